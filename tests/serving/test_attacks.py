"""Attacks on a server, and its replies."""

import asyncio
import http.server
import json
import socket
import threading

import pytest
from servers import make_server
from starlette.testclient import TestClient

from llamavid_jax.media import source
from llamavid_jax.media.source import is_public
from llamavid_jax.serving.app import Limits

KEY = "a key"


@pytest.fixture(scope="module")
def inside():
    """A server in the private network that records its requests, redirects, and sends an endless body."""
    reached = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, reached
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "root").mkdir()
    (folder / "secret.png").write_bytes(b"secret")
    (folder / "root" / "link.png").symlink_to(folder / "secret.png")
    (folder / "root-secret.png").write_bytes(b"secret")
    return folder / "root"


@pytest.fixture(scope="module")
def client(tiny_model, engine, tmp_path_factory, root):
    uploads = tmp_path_factory.mktemp("uploads")
    limits = Limits(max_body=100_000, max_upload=1000)
    server = make_server(tiny_model, engine, uploads, limits, (KEY, "other"), media_root=root, max_bytes=50_000)
    return TestClient(server.app, headers={"authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)


def show(client, kind: str, url, **fields):
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3} | fields
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "017700000001", "[::1]", "[::ffff:127.0.0.1]",
        "0.0.0.0", "[::]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_this_machine_is_not_reached(client, inside, kind, host):
    port, reached = inside
    before = len(reached)
    made = show(client, kind, f"http://{host}:{port}/metadata")
    assert made.status_code == 400 and len(reached) == before
    assert "private network" in made.json()["error"]["message"] or "cannot be" in made.json()["error"]["message"]


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True),
        ("10.0.0.1", False), ("172.16.9.9", False), ("192.168.1.1", False), ("127.8.8.8", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("240.0.0.1", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::ffff:169.254.169.254", False), ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("2002:a00:1::", False), ("::7f00:1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("198.18.0.1", False), ("192.0.2.1", False),
    ],
)  # fmt: skip
def test_addresses(address, public):
    assert is_public(address) == public


def test_a_name_that_changes_its_address(client, inside, monkeypatch):
    """DNS rebinding: the connection goes to the address that was checked."""
    port, reached = inside
    asked, tried = [], []

    def resolve(host, port, *_, **__):
        asked.append(host)
        address = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address, *_, **__):
        tried.append(address[0])
        raise OSError("no route")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    before = len(reached)
    assert show(client, "image_url", f"http://rebinding.example:{port}/x").status_code == 400
    assert tried == ["93.184.215.14"] and asked == ["rebinding.example"] and len(reached) == before


def test_a_name_with_one_private_address_of_two(client, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "private network" in show(client, "image_url", "http://two.example/").json()["error"]["message"]


def test_a_redirect_into_the_private_network(client, inside, monkeypatch):
    """The first server is public, the target of its redirect is not."""
    port, reached = inside
    monkeypatch.setattr(source, "is_public", lambda address: address == "127.0.0.1")
    before = len(reached)
    made = show(client, "image_url", f"http://127.0.0.1:{port}/to/http://127.0.0.2:{port}/metadata")
    assert made.status_code == 400 and "private network" in made.json()["error"]["message"]
    assert reached[before:] == [f"/to/http://127.0.0.2:{port}/metadata"]
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"):
        made = show(client, "image_url", f"http://127.0.0.1:{port}/to/{target}")
        assert made.status_code == 400 and "root:" not in made.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_link_that_is_kept_is_no_way_inside(client, inside, host):
    port, reached = inside
    before = len(reached)
    made = client.post("/v1/files", json={"url": f"http://{host}:{port}/metadata"})
    assert made.status_code == 400 and len(reached) == before and not client.get("/v1/files").json()["data"]


def test_no_proxy_goes_there_for_us(client, inside, monkeypatch):
    port, reached = inside
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    before = len(reached)
    made = show(client, "image_url", "http://169.254.169.254/latest/meta-data")
    assert made.status_code == 400 and len(reached) == before


def test_an_endless_file(client, inside, monkeypatch):
    monkeypatch.setattr(source, "is_public", lambda _: True)
    made = show(client, "video_url", f"http://127.0.0.1:{inside[0]}/endless")
    assert made.status_code == 400 and "limit" in made.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "file:///etc/passwd", "file:/etc/passwd", "../secret.png", "link.png", "../root-secret.png",
        "./../../../../../../etc/passwd", "~/.ssh/id_rsa", "nul\0l.png", "file-../../secret.png", "file-" + "0" * 64,
        "ftp://example.com/x", "gopher://127.0.0.1:70/", "concat:/etc/passwd|x", "demo/held_out.mp4", "", ".",
        "file://localhost/etc/passwd", "FILE:///etc/passwd", "file:///%2e%2e/etc/passwd", "%2e%2e/secret.png",
        "..%2fsecret.png", "file://ROOT/../secret.png", "file://ROOT/%2e%2e/secret.png", "file://ROOT/%2e%2e%2fsecret.png",
        "file://ROOT/link.png", "file://ROOT-secret.png", "ROOT/../secret.png", "ROOT/link.png",
        "data:text/html,<b>", "data:image/png;base64,%%%", "data:image/png;base64,AAAA", ["a.png"], 3, {"url": "x"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_paths_of_the_server(client, root, kind, path):
    made = show(client, kind, path.replace("ROOT", str(root)) if isinstance(path, str) else path)
    assert made.status_code in (400, 404), made.text
    outside = "is not below the folder of this server's media" in made.text
    assert "root:" not in made.text and (outside if "ROOT" in str(path) else str(root.parent) not in made.text)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer a", "Bearer a key2", "Basic a key", "Bearer other2", "a key", "Bearer \xe9"],
)
@pytest.mark.parametrize("route", ["/v1/models", "/v1/files", "/v1/uploads/upload_0", "/metrics", "/nowhere"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_without_the_key(client, header, route, method):
    made = client.request(method, route, headers={"authorization": header.encode("latin1")})
    assert made.status_code == 401 and made.json()["error"]["code"] == "invalid_api_key"


def test_with_a_key(client):
    for key in (KEY, "other"):
        assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert client.get("/health", headers={"authorization": ""}).status_code == 200


def endless(blocks: int):
    for _ in range(blocks):
        yield bytes(10_000)


@pytest.mark.parametrize(
    "route, content, kind",
    [
        ("/v1/chat/completions", bytes(100_001), "application/json"),
        ("/v1/chat/completions", endless(11), "application/json"),
        ("/v1/files", bytes(1001), "multipart/form-data; boundary=x"),
        ("/v1/files", endless(2), "multipart/form-data; boundary=x"),
        ("/v1/uploads/upload_0", bytes(1001), None),
    ],
    ids=["declared", "not declared", "upload", "upload, not declared", "range"],
)
def test_large_bodies(client, route, content, kind):
    method = "PUT" if kind is None else "POST"
    made = client.request(method, route, content=content, headers={"content-type": kind or ""})
    assert made.status_code == 413 and "bytes" in made.json()["error"]["message"]


def test_large_bodies_at_once(tiny_model, engine, tmp_path):
    """Each body may have the maximal size; all together are bounded, and freed when their clients disconnect."""
    app = make_server(tiny_model, engine, tmp_path, Limits(max_body=1000)).app

    async def post(leave: asyncio.Event) -> int:
        messages = [{"type": "http.request", "body": bytes(1000), "more_body": True}]
        status = []

        async def receive():
            if not messages:
                await leave.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message):
            status.append(message.get("status"))

        headers = [(b"content-type", b"application/json"), (b"host", b"x")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
        await app({**scope, "headers": headers, "http_version": "1.1", "server": ("x", 80)}, receive, send)
        return status[0]

    async def all_of_them() -> None:
        for _ in range(2):
            leave = asyncio.Event()
            waiting = [asyncio.create_task(post(leave)) for _ in range(4)]
            await asyncio.sleep(0)
            assert await post(leave) == 429
            leave.set()
            assert [await one for one in waiting] == [499] * 4

    asyncio.run(all_of_them())


def test_a_page_of_another_site(client):
    """It can send no request, by script or form, and no reply allows it to read."""
    for origin in ("http://evil.example", "null", "http://testserver.evil.example"):
        made = client.get("/v1/models", headers={"origin": origin})
        assert made.status_code == 403 and "access-control-allow-origin" not in made.headers
    assert client.get("/v1/models", headers={"origin": "http://testserver"}).status_code == 200
    form = client.post("/v1/chat/completions", content=b'{"model": "tiny"}', headers={"content-type": "text/plain"})
    assert form.status_code == 415


def test_a_name_that_leads_here(tiny_model, engine, tmp_path):
    """DNS rebinding by a web page: a local server accepts only its own host names."""
    local = TestClient(make_server(tiny_model, engine, tmp_path, hosts=("127.0.0.1", "localhost")).app)
    assert local.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 400
    assert local.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200


def test_headers(client):
    for route in ("/", "/v1/models", "/nowhere"):
        headers = client.get(route).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("key", ["..%2f..%2fetc%2fpasswd", "file-x", "%00", "file-" + "f" * 64])
def test_files_by_other_names(client, key):
    for route in (f"/v1/files/{key}", f"/v1/files/{key}/content"):
        assert client.get(route).status_code == 404
    assert client.delete(f"/v1/files/{key}").status_code == 404


@pytest.mark.parametrize("url", ["\ud800.png", "http://\ud800/a.png", "data:image/png;base64,\ud800", "x" * 90_000])
def test_texts_that_cannot_be_sent_back(client, url):
    """UTF-8 cannot encode lone surrogates; the error message is one sentence whatever was sent."""
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]})
    made = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert made.status_code == 400 and len(made.json()["error"]["message"]) <= 1000
    body = json.dumps({"filename": url[:9000], "purpose": url[:900], "bytes": 3})
    made = client.post("/v1/uploads", content=body, headers={"content-type": "application/json"})
    assert made.status_code == 200 and len(made.json()["filename"]) <= 200
    assert client.post(f"/v1/uploads/{made.json()['id']}/cancel").status_code == 200


def test_a_header_that_is_injected(client):
    made = client.post("/v1/files", files={"file": ('a"\r\nX-Evil: 1\r\n\x1b[2J.mp4', b"x")})
    assert made.status_code in (200, 400) and "x-evil" not in made.headers and "\x1b" not in made.text
