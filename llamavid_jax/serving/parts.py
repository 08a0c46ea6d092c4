"""Uploads that go on where they broke off, also behind a server that was killed: OpenAI's `/v1/uploads`.

    create ─▶ upload_X/about.json ─ parts ─▶ upload_X/part_Y ─ complete, which names them in order ─▶ file-SHA256

A part is whole or not there.  What nobody has added to for a day is taken away.
"""

import contextlib
import itertools
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError, printable
from llamavid_jax.files import read_object, write_files
from llamavid_jax.serving.uploads import FullError, NoFileError, Uploads

DAY = 24 * 3600
FORM = re.compile(r"(upload|part)_[0-9a-f]{24}")


class Parts:
    """The unfinished uploads beside the files of `uploads`, with which they share the room."""

    def __init__(self, uploads: Uploads):
        self.uploads = uploads

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` has `filename`, `purpose` and `bytes`, the length of all parts."""
        for left in self.uploads.folder.glob("upload_*"):
            with contextlib.suppress(OSError):  # another server has just taken it away
                if time.time() - left.stat().st_mtime > DAY:
                    shutil.rmtree(left)
        name, purpose, size = (body.get(key) for key in ("filename", "purpose", "bytes"))
        if type(size) is not int or size < 1 or not isinstance(name, str) or not isinstance(purpose, str):
            raise InputError(
                "an upload needs 'filename', 'purpose' and 'bytes', the length of all its parts; give them"
            )
        if size > (room := self.uploads.room()):
            raise FullError(f"{printable(name)[:200]} has {size} bytes, and uploads have room for {room}; delete some")
        now, key = int(time.time()), f"upload_{secrets.token_hex(12)}"
        about = {"id": key, "object": "upload", "bytes": size, "created_at": now, "expires_at": now + DAY}
        about |= {"filename": name, "purpose": purpose, "status": "pending"}
        self.uploads.folder.joinpath(key).mkdir()
        write_files(self.uploads.folder / key, {"about.json": json.dumps(about).encode()})
        return about

    def add(self, key: str, blocks: Iterable[bytes]) -> dict[str, Any]:
        """Keeps a part; returns its object.  FullError where the parts are longer than was said."""
        about, folder = self.find(key), self._folder(key)
        content = b"".join(itertools.islice(blocks, 65))  # of a megabyte: 64 may be sent
        size = sum(part["bytes"] for part in about["parts"]) + len(content)
        if not content or len(content) > 64 << 20:
            raise InputError(f"the part has {len(content)} bytes; send 1 to {64 << 20}")
        if size > about["bytes"]:
            raise FullError(f"with this part there are {size} bytes of {about['bytes']}; complete it, or begin again")
        part = f"part_{secrets.token_hex(12)}"
        write_files(folder, {part: content})
        return {"id": part, "object": "upload.part", "created_at": int(time.time()), "upload_id": key}

    def find(self, key: str) -> dict[str, Any]:
        """The upload with the `parts` that are there, in the order of their coming."""
        folder = self._folder(key)
        parts = [(path.stat().st_mtime_ns, path.name, path.stat().st_size) for path in folder.glob("part_*")]
        return read_object(folder / "about.json") | {"parts": [{"id": i, "bytes": n} for _, i, n in sorted(parts)]}

    def complete(self, key: str, order: Any) -> dict[str, Any]:
        """The upload with its `file`.  InputError where the parts that `order` names are not all of it."""
        about, folder = self.find(key), self._folder(key)
        sizes = {part["id"]: part["bytes"] for part in about.pop("parts")}
        if not isinstance(order, list) or not all(isinstance(part, str) and part in sizes for part in order):
            raise InputError(f"part_ids is {str(order)[:200]}; name parts of {key} in their order")
        if (size := sum(sizes[part] for part in order)) != about["bytes"]:
            raise InputError(f"the parts have {size} of {about['bytes']} bytes; send what is missing, and all in order")
        file = self.uploads.add(self._blocks(folder, order), about["filename"], about["purpose"], size)
        shutil.rmtree(folder, ignore_errors=True)
        return about | {"status": "completed", "file": file}

    def cancel(self, key: str) -> dict[str, Any]:
        about = self.find(key)
        shutil.rmtree(self._folder(key), ignore_errors=True)
        del about["parts"]
        return about | {"status": "cancelled"}

    def _blocks(self, folder: Path, order: list[str]) -> Iterator[bytes]:
        for part in order:
            yield (folder / part).read_bytes()

    def _folder(self, key: str) -> Path:
        folder = self.uploads.folder / key
        if not FORM.fullmatch(key) or not (folder / "about.json").is_file():
            raise NoFileError(f"there is no upload {key[:100]!r}; begin one at /v1/uploads")
        return folder
