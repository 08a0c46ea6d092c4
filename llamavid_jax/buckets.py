"""Buckets: every gs:// and s3:// address has a local path, where all other code reads and writes plain files.

    gs://bucket/data/chat.json ── place ──▶ FOLDER/gs/bucket/data/chat.json

FOLDER is `LLAMAVID_BUCKETS`, else `~/.cache/llamavid_jax/buckets`.  If a bucket and the local disk differ, the bucket
is right.  `copies.py` downloads, `uploads.py` uploads.

Files go through fsspec: with gcsfs (extra `gcs`), which Orbax uses too, or with s3fs.  Arrays go through TensorStore,
which supports both kinds of bucket.  If a bucket is unreachable, fsspec retries for half a minute and TensorStore for a
quarter of an hour; then OutageError is raised.
"""

import contextlib
import functools
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.errors import SHOWN, InputError, OutageError, first_line

ADDRESS = re.compile(r"(gs|s3):/{1,2}(?=[^/])")  # pathlib makes gs:/bucket of gs://bucket
EXTRAS = {"gs": '"llamavid_jax[gcs]"', "s3": "s3fs"}
STALL = 60.0  # seconds without a byte before a request fails


class Status(NamedTuple):
    """A file's size in bytes and modification time in nanoseconds; no two versions of an object have the same time."""

    size: int
    time: int


def is_address(path: str | Path) -> bool:
    return ADDRESS.match(os.fspath(path)) is not None


def place(address: str | os.PathLike) -> Path:
    """The local path of gs://bucket/key; a path that is no bucket address stays as it is."""
    text = os.fspath(address)
    if not (found := ADDRESS.match(text)):
        return Path(address)
    parts = text[found.end() :].rstrip("/").split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        raise InputError(f"{text} has an empty part, or one of points alone; write gs://BUCKET/FOLDER/NAME")
    SHOWN[f"{root() / found[1]}/"] = f"{found[1]}://"
    return root().joinpath(found[1], *parts)


def url(path: str | Path) -> str | None:
    """The bucket address of a local path; None if it belongs to no bucket."""
    text, home = os.path.abspath(path), f"{root()}/"
    scheme, _, key = text.removeprefix(home).partition("/")
    return f"{scheme}://{key}" if text.startswith(home) and scheme in EXTRAS and key else None


def address(path: str | Path) -> str:
    """The path as other processes and machines know it: bucket address or absolute path."""
    return url(path) or str(Path(path).absolute())


def kvstore(path: str | os.PathLike) -> dict[str, Any] | None:
    """TensorStore's specification of an array's folder in a bucket; None outside buckets."""
    address = url(place(path))
    if address is None:
        return None
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{key}/"}


def kind(path: str | Path) -> str:
    """ "file", "directory", or "" where nothing exists; also for paths outside buckets."""
    if url(path) is None:
        return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else ""
    return (info_of(url(path)) or {"type": ""})["type"]


def status(path: str | Path) -> Status:
    """The Status of one file, local or in a bucket.  Raises FileNotFoundError if it does not exist."""
    address = url(path)
    if address is None:
        found = os.stat(path)
        return Status(found.st_size, found.st_mtime_ns)
    if (info := info_of(address)) is None or info["type"] != "file":
        raise FileNotFoundError(address)
    return status_of(info)


def glob(pattern: Path) -> list[Path]:
    """Local paths of a bucket's files whose address matches `pattern`."""
    address = url(pattern)
    with asked(address) as (store, key):
        return [place(f"{address.partition(':')[0]}://{name}") for name in sorted(store.glob(key))]


def listing(folder: Path) -> dict[str, Status]:
    """Path → Status of all files below a bucket's folder, not fetched; of a local folder, those directly in it."""
    address = url(folder)
    if address is None:
        found = (entry for entry in os.scandir(folder) if entry.is_file())
        return {entry.name: Status(entry.stat().st_size, entry.stat().st_mtime_ns) for entry in found}
    with asked(address) as (store, key):
        objects = store.find(key, detail=True).items()
        return {
            name[len(key) + 1 :]: status_of(info)
            for name, info in objects
            if name.startswith(f"{key}/") and not name.endswith("/")
        }


def files_below(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it; files in a bucket are not fetched."""
    if url(folder):
        return list(listing(folder))
    return [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]


def root() -> Path:
    given = os.environ.get("LLAMAVID_BUCKETS") or "~/.cache/llamavid_jax/buckets"
    return Path(os.path.realpath(os.path.expanduser(given)))


def info_of(address: str) -> dict[str, Any] | None:
    with asked(address) as (store, key):
        try:
            return store.info(key)
        except FileNotFoundError:
            return None


def status_of(info: dict[str, Any]) -> Status:
    if generation := int(info.get("generation", 0)):  # in microseconds
        return Status(info["size"], generation * 1000)
    made = int(info["LastModified"].timestamp()) * 10**9
    return Status(info["size"], made + zlib.crc32(str(info.get("ETag")).encode()) % 10**9)


@contextlib.contextmanager
def asked(address: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and the key in it; errors inside become one-line InputErrors or OutageErrors."""
    scheme, _, key = address.partition("://")
    try:
        yield file_system(scheme), key
    except (InputError, OutageError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{address}: {first_line(error)} does not exist; check the name of the bucket") from None
    except Exception as error:  # gcsfs, aiohttp and google.auth raise many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        refused = isinstance(error, PermissionError) or getattr(error, "code", 0) == 401 or "Forbidden" in reason
        if refused or type(error).__name__ == "DefaultCredentialsError":
            raise InputError(
                f"{address} may not be used ({reason}); give this account the role, or log in: "
                "gcloud auth application-default login"
            ) from None
        if isinstance(error, OSError) and error.errno:  # of the local disk
            raise InputError(f"{address} has no room at {root()} ({error.strerror}); see LLAMAVID_BUCKETS") from None
        raise OutageError(f"{address} cannot be reached ({reason}); run the same again") from None


def file_system(scheme: str) -> Any:
    """One file system for all threads of a process; fsspec itself makes one for each thread."""
    return _file_system(scheme, os.getpid())


@functools.cache
def _file_system(scheme: str, process: int) -> Any:
    try:
        import fsspec

        options = {"use_listings_cache": False}  # other hosts write too
        if scheme == "gs":
            import aiohttp

            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it checks permissions for a minute
            import gcsfs  # noqa: F401 (else fsspec's error has many lines)

            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of every exception
            options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
            fsspec.config.conf["gcs"] = fsspec.config.conf.get("gcs", {}) | options  # also for Orbax's
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise InputError(f"{scheme}:// needs a library; pip install {EXTRAS[scheme]}") from None
