"""The source that a request names -> a local file: a data: or http(s) URL, an upload, a path below --media-root."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llamavid_jax.buckets import is_address
from llamavid_jax.errors import printable
from llamavid_jax.media.source import MediaError, fetch, local_file
from llamavid_jax.serving.uploads import Uploads


@dataclasses.dataclass(frozen=True)
class Sources:
    """What may be read: URLs of up to `max_bytes` within `timeout` seconds; with `allow_private`, from any network."""

    uploads: Uploads
    media_root: Path | None = None
    allow_private: bool = False
    max_bytes: int = 1 << 30
    timeout: float = 120.0

    @contextlib.contextmanager
    def open(self, source: str) -> Iterator[Path]:
        """The local file of a source.  Raises MediaError, which names the source but no path of the server."""
        if is_address(source):
            raise MediaError(f"{source[:200]} is in a bucket, which this server does not open to requests; upload it")
        if re.match(r"data:|[a-zA-Z][a-zA-Z0-9+.-]*:", source):
            with fetch(source, self.max_bytes, self.timeout, public=not self.allow_private) as path:
                yield path
            return
        if source.startswith("file-"):
            opened = self.uploads.reading(source)
        else:
            opened = contextlib.nullcontext(self._below_root(source))
        with opened as path:
            try:
                yield local_file(path)
            except MediaError as error:
                raise MediaError(str(error).replace(printable(path), source)) from None
            except FileNotFoundError:
                if path.exists():
                    raise
                raise MediaError(f"{source} was taken away while it was read; upload it to /v1/files") from None

    def keep(self, body: dict[str, Any]) -> dict[str, Any]:
        """Fetches the `url` of a request and stores it as an upload; returns its file object."""
        url, purpose = body.get("url"), body.get("purpose", "user_data")
        if not isinstance(url, str) or not re.match("https?://", url, re.IGNORECASE) or not isinstance(purpose, str):
            raise MediaError(f"url is {str(url)[:200]!r}; give that of a film or a picture, with http:// or https://")
        with self.open(url) as path, path.open("rb") as file:
            name = unquote(urlsplit(url).path).rpartition("/")[2] or "download"
            return self.uploads.add(iter(lambda: file.read(1 << 20), b""), name, purpose)

    def _below_root(self, source: str) -> Path:
        if self.media_root is None:
            raise MediaError(
                f"{source[:200]} is a path, and this server reads none of its own; upload the file to /v1/files"
            )
        root = self.media_root.resolve()
        try:
            path = (root / source).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
            path = root.parent
        if not path.is_relative_to(root):
            raise MediaError(f"{source[:200]} is not below the folder of this server's media; upload it to /v1/files")
        return path
