"""From messages to a row: films are encoded once, in turns, while a client waits, and cached on disk."""

import asyncio
import base64
import contextlib
import threading
import time

import numpy as np
import pytest
from servers import QUESTION, ask, call, events, make_server, picture, session, text_of, video
from starlette.testclient import TestClient

from llamavid_jax.inference.feature_cache import FeatureCache
from llamavid_jax.inference.sources import content
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.serving import prepare as preparing
from llamavid_jax.text.subtitles import Cue, parse_subtitles

SUBTITLES = "1\n00:00:00,500 --> 00:00:01,500\nHello there\n"


def test_subtitles(tiny_model, client, clip):
    cues = parse_subtitles(SUBTITLES)
    expected = session(tiny_model, videos=[clip], subtitles=cues).ask(QUESTION, max_new_tokens=12).text
    assert text_of(ask(client, video("clip.mp4"), subtitles=SUBTITLES)) == expected
    assert expected != text_of(ask(client, video("clip.mp4")))
    for fields in ({"subtitles": "none"}, {"subtitles": 3}):
        assert ask(client, video("clip.mp4"), **fields).status_code == 400
    assert ask(client, subtitles=SUBTITLES).status_code == 400


@pytest.mark.parametrize("times", ["frame", "minute"])
@pytest.mark.parametrize("more", [{}, {"subtitles": SUBTITLES}])
def test_times(tiny_model, client, clip, times, more):
    """They also count for a second question, whose room they reduce."""
    chat = session(tiny_model, videos=[clip], times=times, subtitles=parse_subtitles(SUBTITLES) if more else None)
    first, second = (chat.ask(question, max_new_tokens=12).text for question in (QUESTION, "how many dogs"))
    messages = [{"role": "user", "content": [video("clip.mp4"), {"type": "text", "text": QUESTION}]}]
    assert text_of(ask(client, messages=messages, times=times, **more)) == first
    assert first != text_of(ask(client, messages=messages, **more))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "how many dogs"}]
    assert text_of(ask(client, messages=messages, times=times, **more)) == second


def test_what_goes_with_one_film_alone(client):
    """Such fields with other media are refused before anything is decoded."""
    image = {"type": "image_url", "image_url": {"url": picture()}}
    for fields, words in (
        ({"times": "frame"}, "times goes with one video alone"),
        ({"subtitles": SUBTITLES}, "subtitles goes with one video alone"),
        ({"transcribe": True}, "transcribe goes with one video alone"),
    ):
        for shown in ([], [image], [video("nothing.mp4"), image], [video("nothing.mp4"), video("other.mp4")]):
            made = ask(client, *shown, **fields)
            assert made.status_code == 400 and words in made.json()["error"]["message"], made.text
    for fields, words in (
        ({"times": "hour"}, "times is 'hour'; use one of frame, minute"),
        ({"times": True}, "times is 'True'"),
        ({"transcribe": "small"}, "transcribe is 'small'; give true or false"),
        ({"transcribe": True, "subtitles": SUBTITLES}, "without subtitles"),
        ({"transcribe": True}, "start it with --transcribe"),
    ):
        made = ask(client, video("clip.mp4"), **fields)
        assert made.status_code == 400 and words in made.json()["error"]["message"], made.text


def test_transcribe(tiny_model, engine, tmp_path, clip, monkeypatch):
    """Transcribed speech replaces subtitles, also if there is none; each film is transcribed once."""
    server = make_server(tiny_model, engine, tmp_path, media_root=clip.parent)
    server.preparer.speech, asked, said = "tiny", [], [Cue(2.5, "Who goes there?")]
    monkeypatch.setattr(preparing, "heard", lambda path, model, *_: asked.append((path, model)) or said)
    client = TestClient(server.app)
    for _ in "ab":
        expected = session(tiny_model, videos=[clip], subtitles=said).ask(QUESTION, max_new_tokens=12).text
        for _ in "ab":
            assert expected == text_of(ask(client, video("clip.mp4"), transcribe=True))
        assert expected != text_of(ask(client, video("clip.mp4")))
        said.clear()
        server.preparer.features.max_bytes = 0  # evicted by the next request
        text_of(ask(client))
        text_of(ask(client, video("clip.mp4")))
    assert asked[0] == (clip, "tiny") and len(asked) == 3


def test_a_film_without_sound_cannot_be_heard(tiny_model, engine, tmp_path, clip, monkeypatch):
    """In the decoding process, with a stand-in for faster-whisper; the error names no path of the server."""
    (tmp_path / "faster_whisper.py").write_text("WhisperModel = lambda *_, **__: None")
    monkeypatch.syspath_prepend(tmp_path)
    server = make_server(tiny_model, engine, tmp_path / "uploads", media_root=clip.parent)
    server.preparer.speech = "tiny"
    made = ask(TestClient(server.app), video("clip.mp4"), transcribe=True)
    assert made.status_code == 400 and made.json()["error"]["message"].startswith("clip.mp4 holds no sound that is")


def test_a_film_is_encoded_once(client, server, clip):
    before = server.preparer.frames
    for source in ("clip.mp4", f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"):
        text_of(ask(client, video(source), fps=2.0))
    assert server.preparer.frames - before == 9


def test_a_client_that_goes_ends_the_encoding(server, engine, monkeypatch, clip):
    """The device does not encode the rest of its film."""
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
    """An image that comes after a film of many chunks waits for two queued chunks, not for the whole film."""
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


def test_a_picture_waits_for_no_film(client, server):
    """Even while the maximal number of films is being decoded."""
    with contextlib.ExitStack() as films:
        for _ in range(preparing.DECODING):
            films.enter_context(server.preparer._decoding["video"])
        text_of(ask(client, {"type": "image_url", "image_url": {"url": picture((0, 99, 0))}}))


def evidence_of(tiny_model, clip, *questions, **settings) -> list:
    chat = session(tiny_model, videos=[clip], **settings)
    return [chat.ask(question, max_new_tokens=12, evidence=True) for question in questions][-1].evidence


@pytest.mark.parametrize("stream", [False, True])
def test_evidence_is_that_of_a_session(tiny_model, client, clip, stream):
    """For one question, and for a second one, whose earlier turn shows the film too."""
    content = [video("clip.mp4"), {"type": "text", "text": QUESTION}]
    first = [{"role": "user", "content": content}]
    answer = text_of(ask(client, messages=first))
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "how many dogs"}]
    for messages, questions in ((first, [QUESTION]), (second, [QUESTION, "how many dogs"])):
        made = ask(client, messages=messages, evidence=True, stream=stream)
        choice = events(made)[-1]["choices"][0] if stream else made.json()["choices"][0]
        (found,) = choice["evidence"]
        expected = evidence_of(tiny_model, clip, *questions)
        assert found["part"] == 0 and found["seconds"] == [frame["second"] for frame in expected]
        np.testing.assert_allclose(found["weights"], [frame["weight"] for frame in expected], rtol=1e-3, atol=2e-6)
        assert abs(sum(found["weights"]) - 1) < 1e-4 and np.ptp(found["weights"]) > 1e-3
        pixels, seconds = LLaMAVIDLlavaImageProcessor(56).video_pixels(clip)
        assert [looked["second"] for looked in found["looked"]] == seconds.tolist()
        maps = np.array([looked["attention"] for looked in found["looked"]])
        np.testing.assert_allclose(maps, tiny_model.context_attention(pixels, questions[-1]), atol=1e-4)
        assert np.ptp(maps, (1, 2)).min() > 1e-3


def test_evidence_of_several_parts_and_answers(client):
    """An image, a film and two answers: each answer has its own evidence, whose weights sum to 1 over all parts."""
    image = {"type": "image_url", "image_url": {"url": picture()}}
    made = ask(client, image, video("clip.mp4"), evidence=True, n=2, temperature=1.0, seed=1).json()
    one, other = (choice["evidence"] for choice in made["choices"])
    assert [(part["part"], len(part["seconds"])) for part in one] == [(0, 1), (1, 4)] and one != other
    assert abs(sum(sum(part["weights"]) for part in one) - 1) < 1e-4
    assert "evidence" not in ask(client, video("clip.mp4")).json()["choices"][0]
    for fields in ({"evidence": "yes"}, {"evidence": 1}):
        assert "evidence is" in ask(client, video("clip.mp4"), **fields).json()["error"]["message"]
    assert "show nothing" in ask(client, evidence=True).json()["error"]["message"]


def test_a_film_is_kept_on_disk(tiny_model, engine, tmp_path, clip):
    """Another server with the same folder encodes no frame; at another rate, or if the entry is damaged, all."""
    expected = session(tiny_model, videos=[clip]).ask(QUESTION, max_new_tokens=12).text

    def frames(fps: float = 1.0) -> int:
        cache = FeatureCache(tmp_path / "cache")
        server = make_server(tiny_model, engine, tmp_path, media_root=clip.parent, cache=cache)
        made = ask(TestClient(server.app), video("clip.mp4"), fps=fps, evidence=True)
        assert fps != 1.0 or text_of(made) == expected
        assert len(made.json()["choices"][0]["evidence"][0]["seconds"]) == {1.0: 4, 2.0: 9}[fps]
        return server.preparer.frames

    assert [frames(), frames(), frames(2.0)] == [4, 0, 9]
    for entry in (tmp_path / "cache").glob("*.safetensors"):
        content = bytearray(entry.read_bytes())
        content[-5] ^= 255
        entry.write_bytes(content)
    assert [frames(), frames()] == [4, 0]


def test_a_film_that_is_taken_away_while_it_is_read(tiny_model, engine, tmp_path, clip, monkeypatch):
    """A file below --media-root disappears: an error of one sentence, and nothing of it is cached."""
    root = tmp_path / "root"
    root.mkdir()
    server = make_server(
        tiny_model, engine, tmp_path / "uploads", media_root=root, cache=FeatureCache(tmp_path / "cache")
    )
    for when, owner, name, function in (
        ("decoded", server.preparer, "_vision", server.preparer._vision),
        ("found", preparing, "content", content),
    ):
        film = root / f"{when}.mp4"
        film.write_bytes(clip.read_bytes())

        def then(argument, film=film, function=function):
            film.unlink()
            return function(argument)

        monkeypatch.setattr(owner, name, then)
        made = ask(TestClient(server.app), video(film.name))
        assert made.status_code == 400 and f"{film.name} was taken away" in made.json()["error"]["message"]
        assert not list((tmp_path / "cache").glob("*.safetensors"))


@pytest.mark.parametrize("same", [False, True])
def test_a_picture_that_is_overwritten_while_it_is_read(tiny_model, engine, tmp_path, monkeypatch, same):
    """Between its hash and its decoding: an error, and nothing is kept under that hash; the same content is no harm."""
    server = make_server(tiny_model, engine, tmp_path / "uploads", media_root=tmp_path)
    client, file = TestClient(server.app), tmp_path / "a.png"
    first, other = (base64.b64decode(picture(colour).partition(",")[2]) for colour in ((200, 30, 30), (30, 30, 200)))
    file.write_bytes(first)

    def hashed(path):
        found = content(path)
        monkeypatch.setattr(preparing, "content", content)
        file.unlink()
        file.write_bytes(first if same else other)
        return found

    monkeypatch.setattr(preparing, "content", hashed)
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    made = ask(client, part)
    if not same:
        assert made.status_code == 400 and "a.png was written to while" in made.json()["error"]["message"]
        file.write_bytes(first)
        made = ask(client, part)
    assert server.preparer.features.made == 1
    assert text_of(made) == session(tiny_model, images=[str(file)]).ask(QUESTION, max_new_tokens=12).text


def test_a_film_from_disk_is_not_longer_than_fits(tiny_model, engine, tmp_path, clip):
    cache = FeatureCache(tmp_path / "cache")
    first, second = (make_server(tiny_model, engine, tmp_path, media_root=clip.parent, cache=cache) for _ in "ab")
    text_of(ask(TestClient(first.app), video("clip.mp4")))
    second.preparer.max_frames = 2
    assert "and 2 fit" in ask(TestClient(second.app), video("clip.mp4")).json()["error"]["message"]
