"""Where an image or a video comes from: a path, an http(s) URL or a data: URL -> a local file.

`MediaError` is the only error of everything that reads media (`images.py`, `video.py`, `features.py`).  The original
opens URLs with neither a limit nor a timeout; here both are set.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import re
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llamavid_jax.buckets import is_address
from llamavid_jax.errors import InputError, printable
from llamavid_jax.files import find

VIDEO_ENDINGS = (  # of the files in a folder; of one stem the first in this order (the original's, as far as it goes)
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".mpe", ".m2v", ".ts", ".m2ts", ".mts", ".vob"),
    *(".flv", ".f4v", ".wmv", ".asf", ".ogv", ".3gp", ".3g2", ".mxf", ".divx", ".h264", ".264", ".hevc", ".gif"),
)
MAX_BYTES = 2 * 1024**3  # about an hour of 1080p at 4.5 Mbit/s
TIMEOUT = 600.0  # seconds for a whole download
STALL = 20.0  # seconds without a byte
MAX_SIDE = 16384  # pixels
MAX_PIXELS = 2**27  # half a GiB in Pillow, twice that while it is converted
MAX_ASPECT = 100  # a longer strip would be resized to gigabytes


class MediaError(InputError):
    """An image, video or URL cannot be used: names it, what is wrong and the remedy."""


def check_size(width: int, height: int, name: object) -> None:
    """Raises MediaError for an image that would need gigabytes once padded or resized; sizes in pixels."""
    short, long = sorted((width, height))
    if short < 1 or long > MAX_SIDE or long > MAX_ASPECT * short or width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} is {width} x {height} pixels; use sides of 1 to {MAX_SIDE} pixels, "
            f"none more than {MAX_ASPECT} times the other, and {MAX_PIXELS // 10**6} million in all; shrink or crop it"
        )


def local_file(path: str | Path) -> Path:
    """`path` as the absolute path of a file that exists, is no folder and is not empty; else MediaError."""
    if path == "":  # the current folder to pathlib
        raise MediaError("the path is empty; give the name of a file")
    try:
        given = find(path).expanduser()
        file = given.resolve()
        if not given.exists():
            raise MediaError(f"{path} does not exist; check the spelling and the folder it is in")
        if not file.is_file():  # a pipe's name in /dev/fd leads to a name that does not exist
            raise MediaError(f"{path} is {'a folder' if file.is_dir() else 'no regular file'}; give one file")
        if file.stat().st_size == 0:
            raise MediaError(f"{path} is empty (0 bytes); copy or download it again")
        with file.open("rb"):
            return file
    except MediaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the name, a loop of links, no home
        raise MediaError(f"{str(path)!r} cannot be opened ({error}); check its name and permissions") from None


def is_url(source: object) -> bool:
    """Whether it is downloaded each time; files in a bucket are fetched once and kept."""
    return (
        isinstance(source, str)
        and not is_address(source)
        and re.match(r"data:|[a-zA-Z][a-zA-Z0-9+.-]*://", source) is not None
    )


@contextlib.contextmanager
def fetch(
    source: str | Path, max_bytes: int = MAX_BYTES, timeout: float | int = TIMEOUT, public: bool = False
) -> Iterator[Path]:
    """`with fetch(source) as path`: `source` as a local file, which for a URL is temporary.

    A URL is read up to `max_bytes` bytes within `timeout` seconds in all; if `public`, only from public addresses and
    without a proxy.  Raises MediaError; one that the `with` body raises about the file names the source too.
    """
    if not is_url(source):
        with _named(path := local_file(source), source):
            yield path
        return
    name = source if len(source) <= 200 else source[:60] + "..."
    with tempfile.TemporaryDirectory(prefix="llamavid-") as folder:
        path = Path(folder).resolve() / "download"
        with path.open("wb") as file:
            if source.startswith("data:"):
                file.write(_decode_data_url(source, name, max_bytes))
            elif source.lower().startswith(("http://", "https://")):
                _download(source, name, file, max_bytes, time.monotonic() + timeout, public)
            else:
                raise MediaError(f"{name}: only http:// and https:// URLs are read; give a local file by its path")
        if path.stat().st_size == 0:
            raise MediaError(f"{name} answered with an empty file; check the URL in a browser")
        with _named(path, name):
            yield path


@contextlib.contextmanager
def _named(path: Path, name: object) -> Iterator[None]:
    """Renames the file at `path` in MediaErrors to what the user called it."""
    try:
        yield
    except MediaError as error:
        raise MediaError(str(error).replace(printable(path), str(name))) from None


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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to http(s): urllib's own handler would also follow them to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise MediaError(f"{req.full_url} redirects to {newurl[:200]}; only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Clocked(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Connections with one deadline for everything that is read, including headers and chunk sizes.

    A socket's own timeout restarts with every byte.
    """

    def __init__(self, deadline: float, public: bool):
        super().__init__()
        self.deadline, self.public = deadline, public

    def do_open(self, http_class, req, **arguments):
        def connect(*args, **kwargs):
            connection = http_class(*args, **kwargs)
            connection.response_class = respond
            if self.public:
                connection._create_connection = _connect_to_public
            return connection

        def respond(sock, *args, **kwargs):
            response = http.client.HTTPResponse(sock, *args, **kwargs)
            response.fp = io.BufferedReader(_Deadline(sock, response.fp.detach(), self.deadline))
            return response

        req.timeout = _patience(self.deadline)
        return super().do_open(connect, req, **arguments)


class _Deadline(io.RawIOBase):
    """Reads from `sock` through `raw`; TimeoutError after the deadline or a stall."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float):
        self.sock, self.raw, self.deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self.sock.settimeout(_patience(self.deadline))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def is_public(address: str) -> bool:
    """Whether an IP address is public: neither of a machine itself nor of a private network, nor mapped to one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = ip.version == 6 and (ip.ipv4_mapped or ip.sixtofour)
    if inner:
        return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connect_to_public(address: tuple[str, int], timeout: float, source_address: None = None) -> socket.socket:
    """`socket.create_connection` to the very address that was checked: the name may resolve differently next time."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    if not all(is_public(place[0]) for *_, place in found):
        raise MediaError(f"{address[0]} is an address of this machine or of a private network; give a public URL")
    failure = OSError("no address")
    for *_, place in found:
        try:
            return socket.create_connection(place[:2], timeout)
        except OSError as error:
            failure = error
    raise failure


def _patience(deadline: float) -> float:
    """Seconds to wait for the next byte."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(STALL, left)


def _download(url: str, name: str, file: BinaryIO, max_bytes: int, deadline: float, public: bool) -> None:
    too_large = MediaError(
        f"{name} is larger than the limit of {max_bytes / 1e6:.6g} MB; download it and give the file"
    )
    too_slow = MediaError(f"{name} took too long to download; try again, or download it and give the file")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llamavid_jax"})
        # a proxy would connect to private addresses in our place
        proxies = [urllib.request.ProxyHandler({})] if public else []
        opener = urllib.request.build_opener(_Redirects, _Clocked(deadline, public), *proxies)
        with opener.open(request) as response:
            expected = response.headers.get("Content-Length", "")
            if expected.isdigit() and int(expected) > max_bytes:
                raise too_large
            # read1 returns the bytes received so far: `read` would wait past the deadline for a whole block
            while block := response.read1(1 << 20):
                file.write(block)
                if file.tell() > max_bytes:
                    raise too_large
            if expected.isdigit() and file.tell() < int(expected):
                raise MediaError(f"{name} broke off after {file.tell()} of {expected} bytes; try again")
    except MediaError:
        raise
    except TimeoutError:
        raise too_slow from None
    except urllib.error.HTTPError as error:
        raise MediaError(f"{name} answered {error.code} {error.reason[:100]}; check the URL in a browser") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise too_slow from None
        raise MediaError(f"{name} cannot be reached ({error.reason}); check the URL and the network") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise MediaError(f"{name} cannot be downloaded ({reason}); check the URL and the network") from None
