"""Downloads from a local server that misbehaves on request."""

import base64
import contextlib
import http.server
import os
import socket
import threading
import time

import pytest

from llamavid_jax.media.source import MediaError, fetch, local_file

BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        getattr(self, "answer_" + self.path.strip("/").split(".")[0], self.answer_missing)()

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self):
        self.answer(200, BODY, Content_Length=str(len(BODY)))

    def answer_unsized(self):
        self.answer(200, BODY)

    def answer_moved(self):
        self.answer(302, Location="/good.mp4")

    def answer_ftp(self):
        self.answer(302, Location="ftp://127.0.0.1/clip.mp4")

    def answer_file(self):
        self.answer(302, Location="file:///etc/hostname")

    def answer_loop(self):
        self.answer(302, Location="/loop.mp4")

    def answer_missing(self):
        self.answer(404)

    def answer_forbidden(self):
        self.answer(403)

    def answer_failing(self):
        self.answer(500)

    def answer_empty(self):
        self.answer(200, Content_Length="0")

    def answer_short(self):
        self.answer(200, BODY[:100], Content_Length=str(len(BODY)))

    def answer_silent(self):
        self.server.closing.wait(120)

    def answer_drip(self):
        self.answer(200, Content_Length="1000")
        for _ in range(60):
            if self.server.closing.wait(0.1):
                return
            self.wfile.write(b".")
            self.wfile.flush()

    def drip(self, begin, piece):
        """Sends `begin`, then `piece` repeatedly, each time before a socket timeout would occur."""
        self.wfile.write(begin)
        while not self.server.closing.wait(0.05):
            self.wfile.write(piece)
            self.wfile.flush()

    def answer_headers(self):
        self.drip(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x")

    def answer_more_headers(self):
        self.drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")

    def answer_continue(self):
        self.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")

    def answer_chunk_size(self):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x")

    def answer_chunks(self):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")

    def answer_trailers(self):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n")

    def answer_around(self):
        self.server.closing.wait(0.2)
        self.answer(302, Location=f"/around.mp4?{time.monotonic()}")

    def answer_escape(self):
        self.wfile.write(b"HTTP/1.1 404 \x1b[2J" + b"long" * 1000 + b"\r\n\r\n")

    def answer_huge(self):
        self.answer(200, Content_Length="9" * 5000)

    def answer_nonsense(self):
        self.wfile.write(b"not http at all\r\n\r\n")

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.closing = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.closing.set()
        server.shutdown()


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("name", ["good.mp4", "unsized.mp4", "moved.mp4", "good.mp4?size=1#top"])
def test_a_url_is_a_temporary_file(server, name):
    with fetch(f"{server}/{name}") as path:
        assert path.read_bytes() == BODY
    assert not path.exists() and not path.parent.exists()


def test_a_data_url_is_a_temporary_file():
    with fetch("data:image/png;base64," + base64.b64encode(BODY).decode()) as path:
        assert path.read_bytes() == BODY
    assert not path.exists()


def test_a_local_file_stays_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("clip.mp4", tmp_path / "clip.mp4", "~/clip.mp4"):
        with fetch(name) as path:
            assert path == tmp_path / "clip.mp4" == local_file(name)
    assert path.exists()


BAD_URLS = {
    "not found": ("{server}/nothing.mp4", "404"),
    "forbidden": ("{server}/forbidden.mp4", "403"),
    "server error": ("{server}/failing.mp4", "500"),
    "empty": ("{server}/empty.mp4", "empty file"),
    "announced too large": ("{server}/good.mp4", "larger than the limit"),
    "too large unannounced": ("{server}/unsized.mp4", "larger than the limit"),
    "breaks off": ("{server}/short.mp4", "broke off after 100 of 10240 bytes"),
    "silent": ("{server}/silent.mp4", "took too long"),
    "one byte at a time": ("{server}/drip.mp4", "took too long"),
    **{
        f"drip of {name}": (f"{{server}}/{name}.mp4", "took too long")
        for name in ("headers", "more_headers", "continue", "chunk_size", "chunks", "trailers", "around")
    },
    "escapes": ("{server}/escape.mp4", "404 \\x1b[2Jlong"),
    "a length beyond all numbers": ("{server}/huge.mp4", "cannot be downloaded"),
    "no HTTP": ("{server}/nonsense.mp4", "cannot be downloaded"),
    "redirect to ftp": ("{server}/ftp.mp4", "only http and https are followed"),
    "redirect to a file": ("{server}/file.mp4", "is not allowed"),
    "redirect for ever": ("{server}/loop.mp4", "302"),
    "nobody listens": ("http://127.0.0.1:{closed}/clip.mp4", "cannot be reached"),
    "no host": ("http:///clip.mp4", "cannot be"),
    "bad port": ("http://127.0.0.1:port/clip.mp4", "cannot be"),
    "blank in the name": ("{server}/my clip.mp4", "cannot be"),
    "unfinished IPv6": ("http://[::1/clip.mp4", "cannot be"),
    "file URL": ("file:///etc/hostname", "only http:// and https://"),
    "ftp URL": ("ftp://127.0.0.1/clip.mp4", "only http:// and https://"),
    "stream URL": ("rtsp://127.0.0.1/clip.mp4", "only http:// and https://"),
    "data URL without base64": ("data:text/plain,hello", "is not a base64 data URL"),
    "data URL without data": ("data:image/png;base64,", "empty"),
    "damaged data URL": ("data:image/png;base64,abc$", "is not valid base64"),
    "large data URL": ("data:image/png;base64," + "A" * 20000, "more than the limit"),
}
REMEDIES = ("check", "download", "try", "only", "give", "write", "encode", "send")


@pytest.mark.parametrize("kind", BAD_URLS)
def test_a_bad_url_is_named_with_a_remedy(server, kind):
    url, reason = BAD_URLS[kind]
    url = url.format(server=server, closed=closed_port()) if url.startswith(("http", "{")) else url
    begin = time.monotonic()
    limit = 5000 if "large" in kind else 10**6
    with pytest.raises(MediaError) as caught, fetch(url, max_bytes=limit, timeout=0.5):
        pass
    assert time.monotonic() - begin < 60
    message = str(caught.value)
    assert (url in message or url[:60] in message) and reason in message and len(message) < 400
    assert any(f"; {verb}" in message or f": {verb}" in message for verb in REMEDIES)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "make", [lambda d: "", lambda d: d, lambda d: d / "missing", lambda d: "a\0b", lambda d: "/dev/null"]
)
def test_a_bad_path_is_named_with_a_remedy(tmp_path, make):
    source = make(tmp_path)
    with pytest.raises(MediaError, match=r"; (give|check)") as caught, fetch(source):
        pass
    assert str(source) in str(caught.value) or repr(source) in str(caught.value)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(MediaError, match="the path is empty; give"), fetch(""):
        pass


def test_errors_about_a_downloaded_file_name_the_url(server):
    with pytest.raises(MediaError, match=rf"^{server}/good\.mp4 is no picture$"), fetch(f"{server}/good.mp4") as path:
        raise MediaError(f"{path} is no picture")


def test_errors_about_a_local_file_name_it_as_given(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match=r"^clip\.mp4 is no picture$"), fetch("clip.mp4") as path:
        raise MediaError(f"{path} is no picture")


def test_a_link_to_itself_is_named(tmp_path):
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    with pytest.raises(MediaError, match=r"loop\.mp4.*; check its name"):
        local_file(loop)


def test_a_pipe_that_a_shell_gives_as_a_file_is_named():
    """`<(command)`: its path is a link to a name that does not exist."""
    ends = os.pipe()
    with pytest.raises(MediaError, match="is no regular file; give one file"):
        local_file(f"/dev/fd/{ends[0]}")
    for end in ends:
        os.close(end)
