"""Uploads that resume where they broke off, even after the server was killed: OpenAI's `/v1/uploads`.

    create ─▶ upload_X/about.json ─ parts ─▶ upload_X/part_Y ─ complete, which names them in order ─▶ file-SHA256
                                  ─ a range ─▶ upload_X/content ─────────────────── its last byte ─▶ file-SHA256

A part is stored completely or not at all; of a range, the received bytes stay.  Uploads without new bytes for a day are
deleted.
"""

import contextlib
import hashlib
import itertools
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError, printable
from llamavid_jax.files import read_object, write_files
from llamavid_jax.serving.uploads import ConflictError, FullError, NoFileError, Uploads

DAY = 24 * 3600
FORM = re.compile(r"(upload|part)_[0-9a-f]{24}")


class Parts:
    """The unfinished uploads beside the files of `uploads`, with which they share the space."""

    def __init__(self, uploads: Uploads):
        self.uploads = uploads
        self._adding, self._ending = threading.Lock(), threading.Lock()

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Begins an upload; `body` has `filename`, `purpose`, `bytes` (the total length) and maybe the file's `md5`."""
        for left in self.uploads.folder.glob("upload_*"):
            with contextlib.suppress(OSError):  # another server has just deleted it
                if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > DAY:
                    shutil.rmtree(left)
        name, purpose, size = (body.get(key) for key in ("filename", "purpose", "bytes"))
        if size == 0:
            raise InputError(f"{printable(name)[:200]} is empty (0 bytes); upload another file")
        if type(size) is not int or size < 1 or not isinstance(name, str) or not isinstance(purpose, str):
            raise InputError(
                "an upload needs 'filename', 'purpose' and 'bytes', the length of the whole, from 1 on; give them"
            )
        if size > (room := self.uploads.room()):
            raise FullError(f"{printable(name)[:200]} has {size} bytes, and uploads have room for {room}; delete some")
        now, key = int(time.time()), f"upload_{secrets.token_hex(12)}"
        about = {"id": key, "object": "upload", "bytes": size, "created_at": now, "expires_at": now + DAY}
        about |= {
            "filename": printable(name)[:200],
            "purpose": printable(purpose)[:40],
            "status": "pending",
            "md5": _md5(body),
        }
        self.uploads.folder.joinpath(key).mkdir()
        write_files(self.uploads.folder / key, {"content": b"", "about.json": json.dumps(about).encode()})
        return about

    def add(self, key: str, blocks: Iterable[bytes]) -> dict[str, Any]:
        """Stores a part; returns its object.  FullError if the parts exceed the announced length."""
        content = b"".join(itertools.islice(blocks, 65))  # of a megabyte each: a part has up to 64
        if not content or len(content) > 64 << 20:
            raise InputError(f"the part has {len(content)} bytes; send 1 to {64 << 20}")
        with self._adding:
            about, folder = self.find(key), self._folder(key)
            if about["received"] and not about["parts"]:
                raise ConflictError(f"{key} was begun by ranges, or has ended; go on so, or begin another upload")
            if (size := about["received"] + len(content)) > about["bytes"]:
                raise FullError(
                    f"with this part there are {size} bytes of {about['bytes']}; complete it, or begin again"
                )
            part = f"part_{secrets.token_hex(12)}"
            write_files(folder, {part: content})
        return {"id": part, "object": "upload.part", "created_at": int(time.time()), "upload_id": key}

    def put(self, key: str, start: int, block: bytes) -> None:
        """Stores the bytes from `start` on.

        Raises ConflictError if there is a gap before them, or they differ from bytes already stored: then it is another
        file.
        """
        with self._adding:
            about = self.find(key)
            if about["parts"]:
                raise ConflictError(f"{key} was begun in parts; go on so, or begin another upload")
            if start > about["received"]:
                raise ConflictError(f"{key} has {about['received']} bytes; go on from there and not from {start}")
            if start + len(block) > about["bytes"]:
                raise InputError(
                    f"{key} was begun for {about['bytes']} bytes, and more came; begin it with the right length"
                )
            known = block[: about["received"] - start]
            try:
                with self._content(about).open("rb" if len(known) == len(block) else "r+b") as file:
                    file.seek(start)
                    if file.read(len(known)) != known:
                        raise ConflictError(
                            f"{key} has other bytes from {start} on: it is another file's; begin one for this"
                        )
                    if rest := block[len(known) :]:
                        file.write(rest)
            except OSError as error:
                raise FullError(f"{key} cannot be written ({error.strerror}); make room on the server") from None

    def find(self, key: str) -> dict[str, Any]:
        """The upload with its stored `parts`, in order of arrival, and the number of bytes `received`."""
        folder = self._folder(key)
        try:
            about = read_object(folder / "about.json")
            found = [(path.stat().st_mtime_ns, path.name, path.stat().st_size) for path in folder.glob("part_*")]
            parts = [{"id": name, "bytes": size} for _, name, size in sorted(found)]
            received = sum(part["bytes"] for part in parts) or self._content(about).stat().st_size
        except FileNotFoundError:  # it has just been completed, or cancelled
            return self.find(key)
        return about | {"parts": parts, "received": received}

    def complete(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Joins the parts named in `part_ids`; returns the upload with its `file`.

        Raises InputError if they are not the whole file, ConflictError if their MD5 is not the given `md5`.
        """
        with self._ending:
            about, folder, order = self.find(key), self._folder(key), body.get("part_ids")
            if about["status"] == "completed":  # a client that lost the reply asks again
                return about
            sizes = {part["id"]: part["bytes"] for part in about["parts"]}
            if not isinstance(order, list) or not all(isinstance(part, str) and part in sizes for part in order):
                raise InputError(f"part_ids is {str(order)[:200]}; name parts of {key} in their order")
            if (size := sum(sizes[part] for part in order)) != about["bytes"]:
                raise InputError(
                    f"the parts have {size} of {about['bytes']} bytes; send what is missing, and all in order"
                )
            blocks = ((folder / part).read_bytes() for part in order)
            return self._end(about, blocks, _md5(body) or about["md5"])

    def finish(self, key: str) -> dict[str, Any]:
        """The upload by ranges, with its `file` once the last byte has arrived."""
        with self._ending:
            about = self.find(key)
            if about["status"] != "pending" or about["received"] < about["bytes"]:
                return about
            try:
                with self._content(about).open("rb") as file:
                    return self._end(about, iter(lambda: file.read(1 << 20), b""), about["md5"])
            except ConflictError:
                self._content(about).write_bytes(b"")  # not the announced file: it starts again from its first byte
                raise

    def cancel(self, key: str) -> dict[str, Any]:
        about = self.find(key)
        shutil.rmtree(self._folder(key), ignore_errors=True)
        return about | {"status": "cancelled"}

    def _end(self, about: dict[str, Any], blocks: Iterable[bytes], md5: str | None) -> dict[str, Any]:
        """Makes a file of the blocks; the upload stays, for clients that ask about it later."""
        file = self.uploads.add(_of_sum(blocks, md5), about["filename"], about["purpose"], about["bytes"])
        about |= {"status": "completed", "file": file, "parts": [], "received": about["bytes"]}
        with self._adding:  # else a client that sends the same bytes again would find them gone
            folder = self._folder(about["id"])
            write_files(folder, {"about.json": json.dumps(about).encode()})
            for left in (*folder.glob("part_*"), folder / "content"):
                left.unlink(missing_ok=True)
        return about

    def _content(self, about: dict[str, Any]) -> Path:
        """The file with the bytes that came by ranges."""
        if about["status"] == "completed":
            return self.uploads.path(about["file"]["id"])
        return self._folder(about["id"]) / "content"

    def _folder(self, key: str) -> Path:
        folder = self.uploads.folder / key
        if not FORM.fullmatch(key) or not (folder / "about.json").is_file():
            raise NoFileError(f"there is no upload {key[:100]!r}; begin one at /v1/uploads")
        return folder


def read_range(said: str | None, length: int | None, size: int) -> tuple[int, int]:
    """Content-Range and Content-Length -> the sent bytes of a file of `size`: the first, and the one after the last.

    Raises InputError if they do not match `size`.
    """
    if said is None:
        total = size if length is None else length
        start, end = 0, total
    elif found := re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", said.strip()):
        start, end, total = int(found[1]), int(found[2]) + 1, int(found[3])
    else:
        raise InputError(f"Content-Range is {said[:100]!r}; give bytes FIRST-LAST/{size}")
    if total != size or not start < end <= size or length not in (None, end - start):
        sent = end - start if length is None else length
        raise InputError(
            f"the upload was begun for {size} bytes, and {sent} come as bytes {start} to {end - 1} of {total}; send "
            "the same file, or begin another upload"
        )
    return start, end


def _md5(body: dict[str, Any]) -> str | None:
    if (md5 := body.get("md5")) is not None and not (isinstance(md5, str) and re.fullmatch("[0-9a-fA-F]{32}", md5)):
        raise InputError(f"md5 is {str(md5)[:100]!r}; give the 32 digits that md5sum prints, or leave it out")
    return md5 and md5.lower()


def _of_sum(blocks: Iterable[bytes], md5: str | None) -> Iterator[bytes]:
    """Passes the blocks on; raises ConflictError after the last one if their MD5 is not `md5`."""
    found = hashlib.md5(usedforsecurity=False)
    for block in blocks:
        found.update(block)
        yield block
    if md5 not in (None, found.hexdigest()):
        raise ConflictError(f"the MD5 of what came is {found.hexdigest()} and not {md5}; send the file again")
