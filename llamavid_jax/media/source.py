"""Where a picture or a video comes from: a path, an http(s) URL or a data: URL -> a local file.

`MediaError` is the one error of everything that reads media (`media.py`, `images.py`, `video.py`).  The original opens
URLs with neither a limit nor a timeout; here both are set.
"""

import base64
import binascii
import contextlib
import http.client
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llamavid_jax.errors import InputError

MAX_BYTES = 2 * 1024**3  # about an hour of 1080p at 4.5 Mbit/s
TIMEOUT = 600.0  # seconds for a whole download
STALL = 20.0  # seconds without a byte
MAX_SIDE = 16384  # pixels; a square canvas of this side is 1 GiB in Pillow
MAX_ASPECT = 100  # a longer strip would be resized to a picture of gigabytes


class MediaError(InputError):
    """A picture, video or URL that cannot be used: names it, says what is wrong with it and what to do."""


def check_size(width: int, height: int, name: object) -> None:
    """Raises MediaError for a picture that would need gigabytes once padded to a square or resized (pixels)."""
    if min(width, height) < 1 or max(width, height) > MAX_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(
            f"{name} is {width} x {height} pixels; use sides of 1 to {MAX_SIDE} pixels, "
            f"none more than {MAX_ASPECT} times the other: crop or shrink it"
        )


def local_file(path: str | Path) -> Path:
    """`path` as the absolute path of a file that is there, is no folder and is not empty; else MediaError."""
    if path == "":  # the current folder to pathlib
        raise MediaError("the path is empty; give the name of a file")
    try:
        file = Path(path).expanduser().resolve()
        if not file.exists():
            raise MediaError(f"{path} does not exist; check the spelling and the folder it is in")
        if not file.is_file():
            raise MediaError(f"{path} is {'a folder' if file.is_dir() else 'no regular file'}; give one file")
        if file.stat().st_size == 0:
            raise MediaError(f"{path} is empty (0 bytes); copy or download it again")
        with file.open("rb"):
            return file
    except MediaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the name, a loop of links, no home
        raise MediaError(f"{str(path)!r} cannot be opened ({error}); check its name and permissions") from None


@contextlib.contextmanager
def fetch(source: str | Path, max_bytes: int = MAX_BYTES, timeout: float | int = TIMEOUT) -> Iterator[Path]:
    """`with fetch(source) as path`: `source` as a local file, which for a URL is temporary.

    A URL is read up to `max_bytes` bytes within `timeout` seconds in all.  Raises MediaError; one that the body raises
    about the file names the source too.
    """
    scheme = re.match(r"(data:|[a-zA-Z][a-zA-Z0-9+.-]*://)", str(source)) if isinstance(source, str) else None
    if scheme is None:
        with _named(path := local_file(source), source):
            yield path
        return
    name = source if len(source) <= 200 else source[:60] + "..."
    with tempfile.TemporaryDirectory(prefix="llamavid-") as folder:
        path = Path(folder).resolve() / "download"
        with path.open("wb") as file:
            if scheme[0] == "data:":
                file.write(_decode_data_url(source, name, max_bytes))
            elif scheme[0].lower() in ("http://", "https://"):
                _download(source, name, file, max_bytes, time.monotonic() + timeout)
            else:
                raise MediaError(f"{name}: only http:// and https:// URLs are read; give a local file by its path")
        if path.stat().st_size == 0:
            raise MediaError(f"{name} answered with an empty file; check the URL in a browser")
        with _named(path, name):
            yield path


@contextlib.contextmanager
def _named(path: Path, name: object) -> Iterator[None]:
    """Errors about the file at `path` call it what the user called it."""
    try:
        yield
    except MediaError as error:
        raise MediaError(str(error).replace(str(path), str(name))) from None


def _decode_data_url(source: str, name: str, max_bytes: int) -> bytes:
    header, comma, body = source.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaError(f"{name} is not a base64 data URL; write it as data:image/png;base64,...")
    if len(body) * 3 // 4 > max_bytes:
        raise MediaError(f"{name} holds more than the limit of {max_bytes} bytes; send a smaller file")
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{name} is not valid base64 ({error}); encode the file again") from None


class _HttpRedirectOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) alone: urllib's own handler would also go to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise MediaError(f"{req.full_url} redirects to {newurl}; only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, name: str, file: BinaryIO, max_bytes: int, deadline: float) -> None:
    too_large = MediaError(
        f"{name} is larger than the limit of {max_bytes / 1e6:.6g} MB; download it and give the file"
    )
    too_slow = MediaError(f"{name} took too long to download; try again, or download it and give the file")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llamavid_jax"})
        opener = urllib.request.build_opener(_HttpRedirectOnly)
        with opener.open(request, timeout=_patience(deadline)) as response:
            expected = response.headers.get("Content-Length", "")
            if expected.isdigit() and int(expected) > max_bytes:
                raise too_large
            # read1 returns what has come: `read` would wait for a whole block of a slow drip past the deadline
            while block := response.read1(1 << 20):
                file.write(block)
                if file.tell() > max_bytes:
                    raise too_large
                if time.monotonic() > deadline:
                    raise too_slow
            if expected.isdigit() and file.tell() < int(expected):
                raise MediaError(f"{name} broke off after {file.tell()} of {expected} bytes; try again")
    except MediaError:
        raise
    except TimeoutError:
        raise too_slow from None
    except urllib.error.HTTPError as error:
        raise MediaError(f"{name} answered {error.code} {error.reason}; check the URL in a browser") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise too_slow from None
        raise MediaError(f"{name} cannot be reached ({error.reason}); check the URL and the network") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise MediaError(f"{name} cannot be downloaded ({reason}); check the URL and the network") from None


def _patience(deadline: float) -> float:
    return max(0.001, min(STALL, deadline - time.monotonic()))
