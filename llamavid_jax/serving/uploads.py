"""Uploaded files on disk: `file-SHA256` beside `file-SHA256.json`, what OpenAI's protocol calls a file object.

The name is the content's hash: a video that is uploaded twice is stored once.  A file is stored completely or not at
all.
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError, printable
from llamavid_jax.files import read_object, write_files

STALE = 3600  # seconds without a new byte
FORM = re.compile(r"file-[0-9a-f]{64}")


class NoFileError(InputError):
    """An unknown file id."""


class FullError(InputError):
    """No room for another upload."""


class ConflictError(InputError):
    """Bytes that do not match those before them, or their MD5."""


class Uploads:
    """The files in `folder`, up to `max_bytes` in total."""

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._lock, self._readers = threading.RLock(), collections.Counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            deleted = [path for path in self.folder.glob("file-*") if not path.with_suffix(".json").exists()]
            for left in (*self.folder.glob("upload-*"), *deleted):  # of a killed server, or of one beside this
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
        except OSError as error:
            raise InputError(f"{folder} cannot be written to ({error.strerror}); give another --uploads") from None

    def room(self) -> int:
        """Bytes that are free beside the files and unfinished uploads."""
        begun = []
        for about in self.folder.glob("upload_*/about.json"):
            with contextlib.suppress(OSError):  # it has just been completed
                begun += [one] if (one := read_object(about))["status"] == "pending" else []
        return self.max_bytes - sum(one["bytes"] for one in [*self.all(), *begun])

    def add(self, blocks: Iterable[bytes], name: str, purpose: str, reserved: int = 0) -> dict[str, Any]:
        """Stores a file, with `reserved` bytes set aside for it; returns its object.  FullError if it does not fit."""
        room = self.room() + reserved
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="upload-", delete=False) as file:
            try:
                digest, size = hashlib.sha256(), 0
                for block in blocks:
                    digest.update(block)
                    size += len(block)
                    if size > room:
                        raise FullError(
                            f"uploads have room for {room} more of {self.max_bytes} bytes; delete some, or start the "
                            "server with a larger --max-uploads"
                        )
                    file.write(block)
                if not size:
                    raise InputError(f"{name} is empty (0 bytes); upload it again")
                file.flush()
                os.fsync(file.fileno())
                key = f"file-{digest.hexdigest()}"
                about = {"id": key, "object": "file", "bytes": size, "created_at": int(time.time())}
                about |= {"filename": printable(name)[:200], "purpose": printable(purpose)[:40], "status": "processed"}
                with self._lock:
                    if size > self.room() + reserved and not (self.folder / key).exists():
                        raise FullError(f"{name} has no room beside what came at the same time; delete some uploads")
                    os.replace(file.name, self.folder / key)
                    write_files(self.folder, {f"{key}.json": json.dumps(about).encode()})
            except OSError as error:
                Path(file.name).unlink(missing_ok=True)
                raise FullError(f"{name} cannot be written ({error.strerror}); make room on the server") from None
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return about

    def all(self) -> list[dict[str, Any]]:
        """All file objects, the newest first."""
        with self._lock:
            found = [read_object(path) for path in self.folder.glob("file-*.json")]
        return sorted(found, key=lambda one: one["created_at"], reverse=True)

    def find(self, key: str) -> dict[str, Any]:
        """A file's object.  Raises NoFileError if there is none."""
        try:
            if FORM.fullmatch(key):
                return read_object(self.folder / f"{key}.json")
        except OSError:
            pass
        raise NoFileError(f"there is no file {key[:100]!r}; upload it to /v1/files, and give the id that it answers")

    def path(self, key: str) -> Path:
        """The path of a file's content."""
        return self.folder / self.find(key)["id"]

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[Path]:
        """The path of a file's content, which stays there until the block ends, even if it is deleted meanwhile."""
        with self._lock:
            path = self.path(key)
            self._readers[key] += 1
        try:
            yield path
        finally:
            with self._lock:
                self._readers[key] -= 1
                self._sweep(key)

    def delete(self, key: str) -> None:
        """Deletes a file; readers that have opened it may finish."""
        self.find(key)
        with self._lock:
            (self.folder / f"{key}.json").unlink(missing_ok=True)
            self._sweep(key)

    def _sweep(self, key: str) -> None:
        """Deletes the content of a deleted file once nobody reads it."""
        if self._readers[key] == 0:
            del self._readers[key]
            if not (self.folder / f"{key}.json").exists():
                (self.folder / key).unlink(missing_ok=True)
