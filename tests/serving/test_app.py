"""OpenAI's protocol: answers, streams, files, errors, and requests whose clients have disconnected."""

import asyncio
import base64
import contextlib
import gc
import json
import threading
import time

import pytest
from servers import QUESTION, ask, call, events, make_server, picture, session, text_of, video
from starlette.testclient import TestClient

from llamavid_jax.serving.app import Limits
from llamavid_jax.serving.jobs import Job
from llamavid_jax.serving.prepared import Prepared


def test_answers_are_those_of_a_session(tiny_model, client, clip):
    """A video as upload, path and data URL, at two rates; a second turn; an image; text alone."""
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


def test_a_number_of_frames(client, clip):
    """In the forms of lmms-eval's and vLLM's clients, with the path as a URL; the number is never taken as a rate."""

    def asked(**sampling):
        made = ask(client, video(f"file://{clip}"), evidence=True, **sampling)
        return text_of(made), made.json()["choices"][0]["evidence"][0]["seconds"]

    four = asked(media_io_kwargs={"video": {"num_frames": 4, "fps": None}})
    assert four == asked() == asked(media_io_kwargs={"video": {"fps": 1}}, fps=1) and four[1] == [0, 1, 2, 3]
    assert asked(media_io_kwargs={"video": {"num_frames": 5}})[1] == [0, 0.8, 1.6, 2.4, 3.2]
    assert len(asked(fps=5)[1]) == 20


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
        ({"logprobs": 1}, 400, "logprobs is 1"),
        ({"top_logprobs": 2}, 400, "with logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "up to 20"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"messages": [{"role": "user", "content": "a" * 20_000}]}, 400, "positions"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": 0}, 400, "fps"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": 25}, 400, "clip.mp4 lasts 4 s"),
        ({"messages": [{"role": "user", "content": [video("clip.mp4")]}], "fps": [1]}, 400, "fps"),
        ({"messages": [{"role": "user", "content": [{**video("clip.mp4"), "fps": {}}]}]}, 400, "fps"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, 400, "surrogate"),
        ({"media_io_kwargs": {"video": {"fps": 1, "max_duration": 9}}}, 400, "max_duration"),
        ({"media_io_kwargs": {"audio": {}}}, 400, "audio"),
        ({"media_io_kwargs": 3}, 400, "media_io_kwargs is 3"),
        ({"media_io_kwargs": {"video": {"num_frames": -1}}}, 400, "num_frames is -1"),
        ({"media_io_kwargs": {"video": {"num_frames": 4}}, "fps": 1}, 400, "give one"),
        ({"media_io_kwargs": {"video": {"fps": 2}}, "fps": 1}, 400, "give one"),
        (
            {
                "messages": [{"role": "user", "content": [video("clip.mp4")]}],
                "media_io_kwargs": {"video": {"num_frames": 50}},
            },
            400,
            "50 frames, and 40 fit",
        ),
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
    """A prompt that fills nearly all positions, from a client that sets no length."""
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


def test_an_upload_by_ranges(client, clip):
    """As sent by curl -C; answers about the upload equal those about the original film."""
    film = clip.read_bytes()
    size, half = len(film), len(film) // 2
    begun = client.post("/v1/uploads", json={"filename": "a.mp4", "purpose": "user_data", "bytes": size}).json()

    def put(content: bytes, said: str | None = None):
        headers = {"content-range": said} if said else {}
        return client.put(f"/v1/uploads/{begun['id']}", content=content, headers=headers)

    assert put(film[:half], f"bytes 0-{half - 1}/{size}").json()["received"] == half
    for content, said, status, words in (
        (film[half + 1 :], f"bytes {half + 1}-{size - 1}/{size}", 409, f"has {half} bytes"),
        (bytes(size), None, 409, "another file"),
        (bytes(half), None, 400, f"begun for {size} bytes"),
        (iter([film[half:], b"x"]), f"bytes {half}-{size - 1}/{size}", 400, "Content-Range"),
        (film[half:], "bytes", 400, "FIRST-LAST"),
    ):
        made = put(content, said)
        assert made.status_code == status and words in made.json()["error"]["message"], made.text
    assert client.put("/v1/uploads/upload_" + "0" * 24, content=b"a").status_code == 404
    for _ in range(2):  # the client repeats a request whose reply was lost
        done = put(film[half - 9 :], f"bytes {half - 9}-{size - 1}/{size}").json()
        assert done["status"] == "completed" and done["file"]["filename"] == "a.mp4"
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == film
    assert text_of(ask(client, video(done["file"]["id"]))) == text_of(ask(client, video("clip.mp4")))


def test_a_link_is_fetched_once(client, server, clip, monkeypatch):
    """The film becomes an upload, which a browser can play."""

    @contextlib.contextmanager
    def opened(url):
        asked.append(url)
        yield clip

    asked = []
    monkeypatch.setattr(type(server.preparer.sources), "open", lambda _, url: opened(url))
    about = client.post("/v1/files", json={"url": "https://example.com/a/a%20film.mp4?x=1"}).json()
    assert about["filename"] == "a film.mp4" and about["bytes"] == clip.stat().st_size
    assert client.get(f"/v1/files/{about['id']}/content", headers={"range": "bytes=0-9"}).status_code == 206
    for url in ("file:///etc/passwd", "clip.mp4", "data:video/mp4;base64,AAAA", "httpx://a", None, 3):
        assert client.post("/v1/files", json={"url": url}).status_code == 400
    assert len(asked) == 1 and server.answers == 0


def test_a_full_queue_is_said(tiny_model, engine, tmp_path):
    server = make_server(tiny_model, engine, tmp_path, Limits(queue=1))
    made = ask(TestClient(server.app), n=5)
    assert made.status_code == 429 and made.headers["retry-after"] == "2" and server.answers == 0
    assert ask(TestClient(server.app), n=4).status_code == 200


def test_a_deadline(tiny_model, engine, tmp_path, monkeypatch):
    """Before the answer it gives a status, during a stream an event; both leave nothing behind."""
    server = make_server(tiny_model, engine, tmp_path, Limits(deadline=0.3))
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: None)
    assert ask(TestClient(server.app)).status_code == 408
    late = events(ask(TestClient(server.app), stream=True))
    assert "longer than 0.3 s" in late[-1]["error"]["message"] and server.answers == 0
    monkeypatch.setattr(engine, "submit", submit)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_places(server, engine, monkeypatch, stream):
    """While it waits for its first word, or in the middle of a stream."""
    monkeypatch.setattr(engine, "submit", lambda job: jobs.append(job))
    jobs = []
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": stream}
    asyncio.run(call(server, body, lambda messages: len(jobs) == 2 and (messages or not stream)))
    assert all(job.cancelled for job in jobs) and server.answers == 0


@pytest.mark.parametrize("how", [{}, {"stream": True, "n": 2}, {"evidence": True, "logprobs": True}, {"fps": 25}, None])
def test_what_a_request_held_is_free_with_it(client, server, how):
    """Without garbage collection: a long film's tokens take megabytes, and a busy server collects rarely."""

    def left():
        return [one for one in gc.get_objects() if isinstance(one, Prepared | Job)]

    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 40}
    gc.collect()
    gc.disable()
    try:
        if how is None:
            asyncio.run(call(server, body, lambda messages: len(messages) > 2))
        else:
            ask(client, video("clip.mp4"), **how)
        until = time.monotonic() + 60
        while left() and time.monotonic() < until:  # a thread may still be finishing
            time.sleep(0.05)
        assert not left()
    finally:
        gc.enable()


def test_many_at_once_are_not_mixed_up(client, clip):
    """Twelve clients, four questions of different lengths, with and without a film."""
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
