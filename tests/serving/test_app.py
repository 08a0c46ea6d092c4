"""OpenAI's protocol: answers, streams, files, errors, and what becomes of requests that nobody waits for."""

import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from clips import index_frame, write_clip
from PIL import Image
from servers import make_server
from starlette.testclient import TestClient

from llamavid_jax.inference.session import Session
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.serving import prepare as preparing
from llamavid_jax.serving.app import Limits
from llamavid_jax.text.subtitles import parse_subtitles

QUESTION = "what is the man doing?"
SUBTITLES = "1\n00:00:00,500 --> 00:00:01,500\nHello there\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", [index_frame(i) for i in range(100)])


@pytest.fixture(scope="module")
def server(tiny_model, engine, tmp_path_factory, clip):
    return make_server(tiny_model, engine, tmp_path_factory.mktemp("uploads"), media_root=clip.parent)


@pytest.fixture(scope="module")
def client(server):
    return TestClient(server.app, raise_server_exceptions=False)


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def ask(client, *content, **fields):
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0} | fields
    return client.post("/v1/chat/completions", json=body)


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response) -> list[dict]:
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def session(tiny_model, **visuals) -> Session:
    return Session(tiny_model, LLaMAVIDLlavaImageProcessor.of(tiny_model.config), **visuals)


def picture(colour=(200, 30, 30), kind="PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, kind)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_answers_are_those_of_a_session(tiny_model, client, clip):
    """A video by upload, by path and as data, at two rates; an image; text alone; a second turn."""
    uploaded = client.post("/v1/files", files={"file": ("clip.mp4", clip.read_bytes())}, data={"purpose": "user_data"})
    key = uploaded.json()["id"]
    expected = session(tiny_model, videos=[clip]).ask(QUESTION, max_new_tokens=12).text
    data = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    for source in (key, "clip.mp4", data):
        assert text_of(ask(client, video(source))) == expected
    faster = session(tiny_model, videos=[clip], fps=3.0).ask(QUESTION, max_new_tokens=12).text
    assert text_of(ask(client, video(key), fps=3.0)) == faster
    chat = session(tiny_model, videos=[clip])
    first = chat.ask(QUESTION, max_new_tokens=12).text
    second = chat.ask("how many dogs", max_new_tokens=12).text
    messages = [
        {"role": "user", "content": [video(key), {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "how many dogs"},
    ]
    assert text_of(ask(client, messages=messages)) == second
    image = {"type": "image_url", "image_url": {"url": picture()}}
    assert text_of(ask(client, image)) != text_of(ask(client))


def test_subtitles(tiny_model, client, clip):
    cues = parse_subtitles(SUBTITLES)
    expected = session(tiny_model, videos=[clip], subtitles=cues).ask(QUESTION, max_new_tokens=12).text
    assert text_of(ask(client, video("clip.mp4"), subtitles=SUBTITLES)) == expected
    assert expected != text_of(ask(client, video("clip.mp4")))
    for fields in ({"subtitles": "none"}, {"subtitles": 3}):
        assert ask(client, video("clip.mp4"), **fields).status_code == 400
    assert ask(client, subtitles=SUBTITLES).status_code == 400


def test_a_film_is_encoded_once(client, server, clip):
    before = server.preparer.frames
    for source in ("clip.mp4", f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"):
        text_of(ask(client, video(source), fps=2.0))
    assert server.preparer.frames - before == 9


def test_streams_are_the_whole_answer(client):
    whole = ask(client, seed=3, temperature=1.0, n=2, max_tokens=30).json()
    made = ask(client, seed=3, temperature=1.0, n=2, max_tokens=30, stream=True, stream_options={"include_usage": True})
    assert made.headers["content-type"].startswith("text/event-stream")
    chunks = events(made)
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert chunks[-1]["usage"] == whole["usage"] and not chunks[-1]["choices"]
    assert whole["usage"]["completion_tokens"] <= 60 and whole["object"] == "chat.completion"
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"model": "gpt-4"}, 404, "no model 'gpt-4'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "'audio'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            400,
            "end the messages",
        ),
        ({"max_tokens": 49}, 400, "up to 48"),
        ({"max_tokens": 0}, 400, "max_new_tokens is 0"),
        ({"max_tokens": "many"}, 400, "whole number"),
        ({"temperature": -1}, 400, "temperature is -1"),
        ({"temperature": "hot"}, 400, "temperature is 'hot'"),
        ({"top_p": 0}, 400, "top_p is 0"),
        ({"seed": "x"}, 400, "seed is 'x'"),
        ({"stop": [""]}, 400, "stop is"),
        ({"stop": ["x"] * 17}, 400, "16"),
        ({"n": 0}, 400, "n is 0"),
        ({"n": 1000}, 400, "n is 1000"),
        ({"n": True}, 400, "n is True"),
        ({"stream": "yes"}, 400, "stream is 'yes'"),
        ({"stream_options": {"include_usage": 1}}, 400, "stream_options"),
        ({"temprature": 1}, 400, "'temprature'"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"messages": [{"role": "user", "content": "a" * 20_000}]}, 400, "positions"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": 0}, 400, "fps"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": 25}, 400, "clip.mp4 lasts 4 s"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": [1]}, 400, "fps"),
        ({"messages": [{"role": "user", "content": [{**video("clip.mp4"), "fps": {}}]}]}, 400, "fps"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, 400, "surrogate"),
    ],
)
def test_errors_are_sentences(client, fields, status, words):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | fields
    made = client.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert made.status_code == status, made.text
    error = made.json()["error"]
    assert (
        words in error["message"]
        and "\n" not in error["message"]
        and set(error) == {"message", "type", "param", "code"}
    )


def test_without_max_tokens_an_answer_has_the_room_that_is_left(tiny_model, client):
    """A prompt of nearly all positions, as a client that sets no length may have it."""
    room = tiny_model.config.text_config.max_length
    words = "why " * 100
    while ask(client, messages=[{"role": "user", "content": words}], max_tokens=1).status_code == 200:
        words += "why " * (len(words) // 16)
    while ask(client, messages=[{"role": "user", "content": words}], max_tokens=1).status_code == 400:
        words = words[:-4]
    made = ask(client, messages=[{"role": "user", "content": words}], max_tokens=None)
    assert made.status_code == 200
    assert room - 8 < made.json()["usage"]["prompt_tokens"] < made.json()["usage"]["total_tokens"] <= room


def test_fields_at_rest_are_taken(client):
    rest = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": None, "user": "me", "stop": None, "n": None}
    assert ask(client, **rest, seed=-5, response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "tiny"}'])
def test_bodies_that_are_no_request(client, body):
    made = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert made.status_code == 400 and made.json()["error"]["message"]


def test_models_and_the_rest(client):
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny" and client.get("/v1/models/other").status_code == 404
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    text = client.get("/metrics").text
    assert "llamavid_slots 3.0" in text and 'llamavid_requests_total{route="/health",status="200"}' in text
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert client.get("/").headers["content-type"].startswith("text/html")


def test_files(client, clip):
    content = clip.read_bytes()
    about = client.post("/v1/files", files={"file": ("a film.mp4", content)}, data={"purpose": "vision"}).json()
    assert (about["filename"], about["bytes"], about["purpose"]) == ("a film.mp4", len(content), "vision")
    key = about["id"]
    assert client.get(f"/v1/files/{key}").json() == about and about in client.get("/v1/files").json()["data"]
    assert client.get(f"/v1/files/{key}/content").content == content
    part = client.get(f"/v1/files/{key}/content", headers={"range": "bytes=2-5"})
    assert part.status_code == 206 and part.content == content[2:6]
    assert client.delete(f"/v1/files/{key}").json()["deleted"]
    gone = client.get(f"/v1/files/{key}")
    assert gone.status_code == 404 and ask(client, video(key)).status_code == 404
    assert client.post("/v1/files", files={"file": ("x", b"")}).status_code == 400
    assert client.post("/v1/files", data={"purpose": "vision"}).status_code == 400
    assert client.post("/v1/files", files={"file": ("x", bytes(1 << 20) + b"x")}).status_code == 507


def test_a_full_queue_is_said(tiny_model, engine, tmp_path):
    server = make_server(tiny_model, engine, tmp_path, Limits(queue=1))
    made = ask(TestClient(server.app), n=5)
    assert made.status_code == 429 and made.headers["retry-after"] == "2" and server.answers == 0
    assert ask(TestClient(server.app), n=4).status_code == 200


def test_a_deadline(tiny_model, engine, tmp_path, monkeypatch):
    """Before the answer a status, in the middle of it an event; both leave nothing behind."""
    server = make_server(tiny_model, engine, tmp_path, Limits(deadline=0.3))
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: None)
    assert ask(TestClient(server.app)).status_code == 408
    late = events(ask(TestClient(server.app), stream=True))
    assert "longer than 0.3 s" in late[-1]["error"]["message"] and server.answers == 0
    monkeypatch.setattr(engine, "submit", submit)


async def call(server, body: dict, leave_after) -> list[dict]:
    """One request of a client that goes away once `leave_after(messages)` is true."""
    content, sent, messages = json.dumps(body).encode(), False, []

    async def receive():
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": content}
        while not leave_after(messages):
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    await server.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("x", 80)}, receive, send)
    return messages


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_places(server, engine, monkeypatch, stream):
    """While it waits for its first word, or in the middle of a stream."""
    monkeypatch.setattr(engine, "submit", lambda job: jobs.append(job))
    jobs = []
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": stream}
    asyncio.run(call(server, body, lambda messages: len(jobs) == 2 and (messages or not stream)))
    assert all(job.cancelled for job in jobs) and server.answers == 0


def test_a_client_that_goes_ends_the_encoding(server, engine, monkeypatch, clip):
    """Of its film: the device does not work on for nobody."""
    chunks = []

    def vision(pixels):
        chunks.append(len(pixels))
        time.sleep(0.05)
        return np.zeros((len(pixels), 1, 1), np.float32)

    monkeypatch.setattr(server.preparer, "_vision", vision)
    monkeypatch.setattr(preparing, "FRAME_CHUNK", 1)
    content = [video("clip.mp4"), {"type": "text", "text": QUESTION}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "fps": 9.0}
    asyncio.run(call(server, body, lambda _: chunks))
    server.threads.submit(lambda: None).result()
    assert len(chunks) < 30 and server.answers == 0


def test_films_take_turns(tiny_model, engine, tmp_path, monkeypatch, clip):
    """A picture that comes after a film of many chunks waits for the two that are queued, and not for the film."""
    server = make_server(tiny_model, engine, tmp_path, media_root=clip.parent)
    client, order, begun, queued = TestClient(server.app), [], threading.Event(), threading.Event()
    vision, submit = server.preparer._vision, server.preparer._device.submit

    def put(function, chunk):
        made = submit(function, chunk)
        if len(chunk) == 1:
            queued.set()
        return made

    def first_waits(pixels):
        order.append(len(pixels))
        begun.set()
        queued.wait()
        return vision(pixels)

    monkeypatch.setattr(server.preparer, "_vision", first_waits)
    monkeypatch.setattr(server.preparer._device, "submit", put)
    monkeypatch.setattr(preparing, "FRAME_CHUNK", 2)
    film = threading.Thread(target=lambda: text_of(ask(client, video("clip.mp4"), fps=9.0)))
    film.start()
    begun.wait()
    text_of(ask(client, {"type": "image_url", "image_url": {"url": picture((0, 0, 99))}}))
    film.join()
    assert order.index(1) <= 2 and order.count(2) == 17


def test_many_at_once_are_not_mixed_up(client, clip):
    """Twelve clients, four questions of different lengths, of a film and without."""
    questions = [(QUESTION, True), ("how many dogs", True), ("hello", False), ("why " * 60, False)]

    def put(question, shown):
        content = [*([video("clip.mp4")] if shown else []), {"type": "text", "text": question}]
        return text_of(ask(client, messages=[{"role": "user", "content": content}], max_tokens=20))

    alone = [put(*question) for question in questions]
    found: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda i=i: found.append((i % 4, put(*questions[i % 4])))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(alone[which] == text for which, text in found)
