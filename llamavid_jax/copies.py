"""Local copies of what is in a bucket: always its newest version, complete, and within a size limit.

    gs://bucket/data/chat.json ── fetch ──▶ FOLDER/gs/bucket/data/chat.json

A copy is read-only, has the object's version as its modification time, and is fetched again when the bucket has another
version.  Copies take about `LLAMAVID_BUCKETS_SIZE` GB (100); the least recently used are deleted first.
"""

import base64
import contextlib
import fcntl
import mimetypes
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llamavid_jax.buckets import asked, info_of, listing, root, status_of, url
from llamavid_jax.errors import InputError, OutageError

LARGE = 64 << 20  # bytes; larger files are fetched only by their own name
FRESH = 5.0  # seconds during which the bucket is not checked again
LEFT_OVER = 24 * 3600.0  # seconds until a killed process's temporary folder is deleted
LOCKS = 256  # lock files
TRIES = 3  # of a download whose object changes meanwhile
_seen: dict[str, float] = {}
_unswept = float("inf")  # bytes fetched since the last `_sweep`


def fetch(path: Path) -> None:
    """Updates `path` to what the bucket has: a file, or the small files directly in a folder; else `path` is deleted.

    Images, videos and files larger than LARGE are fetched only by their own name.  Does nothing outside buckets, or if
    the path was checked less than FRESH seconds ago.
    """
    address = url(path)
    if address is None or (time.monotonic() - _seen.get(address, -FRESH) < FRESH and path.exists()):
        return
    with asked(address) as (store, key):
        info = info_of(address) or {"type": ""}
        if info["type"] == "directory":
            path.mkdir(parents=True, exist_ok=True)
            files = {one["name"].rpartition("/")[2]: one for one in store.ls(key, detail=True) if one["type"] == "file"}
            for name in {entry.name for entry in os.scandir(path) if entry.is_file()} - files.keys():
                if not name.startswith(".") and not name.endswith(".lock"):
                    (path / name).unlink(missing_ok=True)
            for name, one in files.items():
                if name and one["size"] <= LARGE and not _is_medium(name):
                    _bring(store, one["name"], path / name, one)
        elif info["type"] == "file":
            _bring(store, key, path, info)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    _seen[address] = time.monotonic()


def fetch_all(folder: Path, media: bool = True) -> None:
    """Fetches a file, or every file below a folder; images, videos and files larger than LARGE only with `media`."""
    if url(folder) is None:
        return
    found = listing(folder).items()
    names = [name for name, (size, _) in found if media or not (_is_medium(name) or size > LARGE)]
    for name in names or [""]:
        fetch(folder / name)


def evict(files: Iterable[tuple[float, int, str]], limit: int, spared: Callable[[str], bool] = lambda _: False) -> None:
    """Deletes the least recently used of `files`, (last use, bytes, path), until `limit` bytes are left."""
    files = sorted(files)
    size = sum(size for _, size, _ in files)
    for _, bytes_, path in files:
        if size <= limit:
            return
        if not spared(path):
            with contextlib.suppress(OSError):  # another process has just deleted it
                os.unlink(path)
                size -= bytes_


def limit() -> int:
    """Bytes that the copies may take."""
    text = os.environ.get("LLAMAVID_BUCKETS_SIZE") or "100"
    try:
        if 0 < (size := float(text)) < 1e9:
            return int(size * 1e9)
    except ValueError:
        pass
    raise InputError(f"LLAMAVID_BUCKETS_SIZE is {text!r}; give a number of GB above 0, such as 100")


def _is_medium(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith(("image/", "video/"))


def _bring(store: Any, key: str, path: Path, info: dict[str, Any]) -> None:
    """Fetches an object to `path` unless it is there already."""
    if _is_there(path, info):
        return
    if info["size"] > limit():
        raise InputError(f"{path} has {info['size']} bytes, more than LLAMAVID_BUCKETS_SIZE; raise that")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path):
        if not _is_there(path, info):
            _download(store, key, path, info)


def _is_there(path: Path, info: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) == status_of(info):
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
            return True
    return False


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one of this host's threads and processes that want a file fetch it; the others wait."""
    with (root() / f".lock-{zlib.crc32(os.fsencode(path)) % LOCKS}").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(store: Any, key: str, path: Path, info: dict[str, Any]) -> None:
    """Downloads to a temporary file and renames it."""
    global _unswept
    _unswept += info["size"]
    if _unswept > limit() / 20:
        _sweep(info["size"])
        _unswept = 0
    with tempfile.TemporaryDirectory(dir=root(), prefix=".fetch-") as folder:
        aside = Path(folder, "object")
        for _ in range(TRIES):
            if info["size"]:
                store.get_file(key, str(aside))
            else:
                aside.touch()
            if _is_whole(store, key, aside, info):
                break
            info = store.info(key)
        else:
            raise OutageError(f"{path} is another object each time it is read; wait until it is written")
        aside.chmod(0o444)
        os.utime(aside, ns=(time.time_ns(), status_of(info).time))
        os.replace(aside, path)


def _is_whole(store: Any, key: str, file: Path, info: dict[str, Any]) -> bool:
    if file.stat().st_size != info["size"]:
        return False
    if "crc32c" not in info:
        return status_of(store.info(key)) == status_of(info)
    from google_crc32c import Checksum

    checksum = Checksum()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum.update(block)
    return base64.b64encode(checksum.digest()).decode() == info["crc32c"]


def _sweep(room: int) -> None:
    """Makes room for `room` more bytes.  Files that were written here, not fetched, stay."""
    copies = []
    for left in root().glob(".fetch-*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > LEFT_OVER:
            shutil.rmtree(left, ignore_errors=True)
    for folder, _, names in os.walk(root()):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.stat(path := os.path.join(folder, name))
                if not found.st_mode & 0o222:
                    copies.append((found.st_atime, found.st_size, path))
    evict(copies, limit() - room)
