"""Small files, read up to a size limit and written completely or not at all; and files that come with the package."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamavid_jax import buckets, copies, uploads
from llamavid_jax.errors import CheckpointError, InputError

PACKAGE = Path(__file__).parent
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
BROUGHT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent  # as installed; in a clone
# Held while a Python literal is read, as in a .npy file's header: some releases (3.11.7, say) raise SystemError in one
# of two threads that do so at once.
LITERAL = threading.Lock()
MAX_BYTES = 64 << 20  # of a file that is read whole; the largest tokenizer.json has 33 MB
MAX_JSON_BYTES = 16 << 20  # 40,000 names of weights take 4 MB; JSON takes some 20 times its size in memory


def local(text: str | Path) -> Path:
    """The local path of a path as typed, whether or not it exists.

    `~` is expanded, which a shell does only at the beginning of a word; gs://bucket/key becomes its local path.
    """
    return buckets.place(os.path.expanduser(text))


def find(path: str | Path) -> Path:
    """`local(path)`, ready to be read: fetched from its bucket (`copies.fetch`), or the package's own (`brought`)."""
    path = local(path)
    copies.fetch(path)
    return brought(path)


def brought(path: Path) -> Path:
    """The package's own file where `path` begins with `configs/` or `demo/` and does not exist; else `path`."""
    if path.parts[:1] in (("configs",), ("demo",)) and not os.path.exists(path) and (BROUGHT / path).exists():
        return BROUGHT / path
    return path


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """A file's content.  OSError if it is absent, larger than `limit`, or no plain file: pipes may never end."""
    path = Path(path)
    if (size := path.stat().st_size) > limit:
        raise OSError(errno.EFBIG, f"{size} bytes are too many for such a file")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file")
    return path.read_bytes()


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises OSError like `read_bytes`, ValueError like `parse_object`."""
    return parse_object(read_bytes(path, MAX_JSON_BYTES))


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object.  Raises ValueError for anything else, and for one that is nested too deeply."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, and an object is needed")
    return value


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes each file under a temporary name and renames it, so that nobody reads half of one.  Raises InputError."""
    folder = local(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
            for name, content in files.items():
                Path(aside, name).write_bytes(content)
                os.replace(Path(aside, name), folder / name)
                uploads.put(folder / name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); give a folder that can") from None


def with_sums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same files, and one more with their SHA-256 checksums."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return {**files, SUMS: "".join(lines).encode()}


def check_sums(folder: Path) -> None:
    """Raises CheckpointError if a file in `folder` differs from its checksum in SHA256SUMS; unlisted files pass."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition(" ")
        file = folder / name.lstrip(" *")
        if file.parent != folder or not file.is_file():
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not that in {SUMS}; copy the folder again, or remove {SUMS} if "
                    "you changed the file"
                )


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Locks `file`; the system releases it however the process ends, and the file is deleted when the block ends.

    Raises CheckpointError at once, saying that `what` is in use, if another process holds the lock.  On a file system
    without locks nothing is locked.
    """
    with contextlib.ExitStack() as exits:
        while True:
            try:
                stream = exits.enter_context(file.open("a+"))
            except OSError as error:
                raise CheckpointError(f"{what} cannot be made ({error.strerror}); give a folder that can") from None
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise CheckpointError(
                    f"{what} is in use by another process ({stream.read(200).strip()}); wait for its end, or give "
                    "another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            if file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                break  # else its holder has just deleted it
        stream.truncate(0)
        print(f"{os.getpid()} on {socket.gethostname()}", file=stream, flush=True)
        exits.callback(file.unlink, missing_ok=True)
        yield
