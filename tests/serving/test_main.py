"""The command: arguments refused before anything is loaded, and data found again after a kill."""

import hashlib
import http.client
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import index_frame, write_clip
from paths import ROOT
from servers import make_server
from starlette.testclient import TestClient

from llamavid_jax.inference.feature_cache import FeatureCache
from llamavid_jax.serving.__main__ import main, parse_arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--model"),
        (["--slots", "0"], "--slots is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "-1"], "--queue is -1"),
        (["--deadline", "nan"], "--deadline is nan"),
        (["--max-upload", "0"], "--max-upload is 0"),
        (["--media-root", "nowhere"], "--media-root nowhere"),
        (["--api-key", ""], "--api-key is empty"),
        (["--decoder-memory", "0"], "--decoder-memory is 0"),
        (["--cache-size", "0"], "--cache-size is 0"),
        (["--transcribe"], 'faster_whisper is not installed; pip install "llamavid_jax[speech]"'),
        ([], "nowhere"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    model = [] if words == "--model" else ["--model", "nowhere"]
    assert main([*model, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith("llamavid-serve: ") and words in said


def test_names_and_keys(monkeypatch):
    monkeypatch.setenv("LLAMAVID_API_KEY", "hidden")
    options = parse_arguments(["--model", "some/folder/", "--api-key", "given"])
    assert options.name == "folder" and options.api_key == ["given", "hidden"]


def test_a_size_of_no_cache_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LLAMAVID_CACHE", raising=False)
    for more in ([], ["--cache-size", "5", "--cache", str(tmp_path)], ["--cache-size", "5"]):
        assert capsys.readouterr().err == ""
        parse_arguments(["--model", "some", *more])
    assert capsys.readouterr().err == "--cache-size changes nothing where no features are kept; give --cache too\n"


JSON = {"Content-Type": "application/json"}


def asked(key: str) -> dict:
    content = [{"type": "video_url", "video_url": {"url": key}}, {"type": "text", "text": "what is it"}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 16}


class Serving:
    """The command as a separate process, on a free port."""

    def __init__(self, *arguments: str | Path):
        command = [sys.executable, "-m", "llamavid_jax.serving", "--port", "0", "--name", "tiny", "--dtype", "float32"]
        self.process = subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if address := re.search(r"http://[^/]*:(\d+)$", line):
                self.port = int(address[1])
                return
        raise AssertionError("".join(said))

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        assert response.status == 200, content
        return content

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def test_a_killed_server_loses_no_upload_and_no_features(checkpoint, tiny_model, engine, tmp_path):
    """kill -9 during uploads: the complete upload, the received parts of others and the encoded features remain."""
    clip = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(50)]).read_bytes()
    film = np.random.default_rng(0).bytes(400_000)
    folders = "--model", checkpoint, "--uploads", tmp_path / "uploads", "--cache", tmp_path / "cache"
    folders += "--max-new-tokens", "16", "--slots", "1"

    def form(name: str, content: bytes) -> tuple[bytes, dict[str, str]]:
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="clip.mp4"\r\n\r\n'.encode()
        return head + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}

    first = Serving(*folders)
    try:
        body, headers = form("file", clip)
        key = json.loads(first.send("POST", "/v1/files", body, **headers))["id"]
        made = first.send("POST", "/v1/chat/completions", json.dumps(asked(key)).encode(), **JSON)
        answer = json.loads(made)["choices"][0]["message"]["content"]
        said = json.dumps({"filename": "b.mp4", "purpose": "vision", "bytes": 6}).encode()
        begun = json.loads(first.send("POST", "/v1/uploads", said, **JSON))["id"]
        body, headers = form("data", b"abc")
        part = json.loads(first.send("POST", f"/v1/uploads/{begun}/parts", body, **headers))["id"]
        said = json.dumps({"filename": "c.mp4", "purpose": "vision", "bytes": len(film)}).encode()
        ranged = json.loads(first.send("POST", "/v1/uploads", said, **JSON))["id"]
        with (
            socket.create_connection(("127.0.0.1", first.port)) as cut,
            socket.create_connection(("127.0.0.1", first.port)) as half,
        ):
            cut.sendall(f"PUT /v1/uploads/{ranged} HTTP/1.1\r\nHost: localhost\r\n".encode())
            cut.sendall(f"Content-Length: {len(film)}\r\n\r\n".encode() + film[:150_000])
            while json.loads(first.send("GET", f"/v1/uploads/{ranged}"))["received"] < 150_000:
                pass
            body, headers = form("file", bytes(100_000))
            half.sendall(f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n".encode())
            half.sendall(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body[:70_000])
            first.kill()
    finally:
        first.kill()
    server = make_server(tiny_model, engine, tmp_path / "uploads", cache=FeatureCache(tmp_path / "cache"))
    client = TestClient(server.app)
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [key]
    assert client.get(f"/v1/files/{key}/content").content == clip
    assert client.get(f"/v1/uploads/{begun}").json()["parts"] == [{"id": part, "bytes": 3}]
    assert client.get(f"/v1/uploads/{ranged}").json()["received"] == 150_000
    rest = {"content-range": f"bytes 150000-{len(film) - 1}/{len(film)}"}
    done = client.put(f"/v1/uploads/{ranged}", content=film[150_000:], headers=rest).json()["file"]
    assert done["id"] == f"file-{hashlib.sha256(film).hexdigest()}" and client.delete(f"/v1/files/{done['id']}")
    again = client.post("/v1/chat/completions", json=asked(key)).json()["choices"][0]["message"]["content"]
    assert again == answer != "" and server.preparer.frames == 0
