"""What a session leaves out of a long or damaged film when allowed to, and that it reports it."""

import dataclasses
import re
import threading

import pytest
from clips import index_frame, write_clip

from llamavid_jax import LLaMAVIDLlavaImageProcessor
from llamavid_jax.errors import InputError
from llamavid_jax.inference import encode
from llamavid_jax.inference.feature_cache import FeatureCache
from llamavid_jax.inference.film import Reading
from llamavid_jax.inference.session import Session
from llamavid_jax.media import video
from llamavid_jax.text.subtitles import Cue

IMAGES = LLaMAVIDLlavaImageProcessor(56)
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six seconds, with a key frame every 0.4 s."""
    return write_clip(tmp_path_factory.mktemp("film") / "film.mkv", [index_frame(i) for i in range(150)])


@pytest.fixture
def positions(tiny_model, monkeypatch):
    def change(count: int) -> None:
        text = dataclasses.replace(tiny_model.config.text_config, max_position_embeddings=count)
        monkeypatch.setattr(tiny_model, "config", dataclasses.replace(tiny_model.config, text_config=text))

    return change


def ask(model, videos, reading=None, fps=1, **others):
    said = []
    reading = {} if reading is None else {"reading": reading}
    session = Session(model, IMAGES, videos=list(map(str, videos)), fps=fps, notice=said.append, **reading, **others)
    return session.ask("what is it", **SHORT), said


def test_the_seconds_taken_are_told(tiny_model, film):
    answer, said = ask(tiny_model, [film])
    assert answer.sampling == [{"video": str(film), "rule": "stride", "frames": 6, "times": [0, 1, 2, 3, 4, 5]}]
    assert said == []


def test_key_frames(tiny_model, film):
    answer, said = ask(tiny_model, [film], Reading(fast=True), fps=5)
    (sampling,) = answer.sampling
    assert sampling["rule"] == "key frames" and sampling["frames"] == 30 == answer.frames
    assert set(sampling["times"]) == {round(0.4 * i, 3) for i in range(15)}
    assert said == [
        f"{film}: key frames in place of the 30 asked for, 0.1 s away on average and 0.2 s at most; "
        "15 different ones, each for up to 3 of them"
    ]


def test_key_frames_of_a_file_without_an_index(tiny_model, tmp_path):
    path = write_clip(tmp_path / "a.ts", [index_frame(i) for i in range(50)])
    answer, said = ask(tiny_model, [path], Reading(fast=True))
    assert answer.sampling[0]["rule"] == "stride"
    assert said == [f"{path} does not say where its key frames are: the frames asked for are decoded"]


@pytest.mark.parametrize("videos", [1, 2])
def test_a_rate_at_which_it_fits(tiny_model, film, positions, videos):
    positions(200)
    with pytest.raises(InputError, match=r"300 visual tokens; this model has room for 196: use --fps \d.*--fit"):
        ask(tiny_model, [film] * videos, fps=25)
    answer, said = ask(tiny_model, [film] * videos, Reading(fit=True), fps=25)
    assert 80 < answer.visual_tokens < 180 and answer.prompt_tokens <= 196
    assert len(said) == videos and "frames a second, not 25: " in said[0]
    _, said = ask(tiny_model, [film] * videos, Reading(fit=True))
    assert said == []


@pytest.mark.parametrize("videos", [1, 2])
def test_the_rate_that_a_refusal_names_fits(tiny_model, film, positions, videos):
    """There is room for nine tenths of the frames, and a stride is 1 or 2."""
    positions(videos * 280)
    with pytest.raises(InputError, match="--fps ") as refused:
        ask(tiny_model, [film] * videos, fps=25)
    rate = float(re.search(r"--fps ([\d.]+)", str(refused.value))[1])
    answer, _ = ask(tiny_model, [film] * videos, fps=rate)
    assert answer.frames == 75 * videos


def test_what_is_said_has_its_room_too(tiny_model, film, positions):
    positions(300)
    cues = [Cue(second + 0.5, "what is it who is it " * 2) for second in range(6)]
    without, _ = ask(tiny_model, [film], Reading(fit=True), fps=25)
    answer, said = ask(tiny_model, [film], Reading(fit=True), fps=25, subtitles=cues)
    assert answer.visual_tokens < without.visual_tokens and answer.prompt_tokens <= 296 and len(said) == 1


@pytest.mark.parametrize("times", ["frame", "minute"])
def test_the_times_in_the_text_have_their_room_too(tiny_model, film, positions, times):
    """A time for each sampled frame, or one in all; without `fit` the refusal counts them as well."""
    positions(300)
    answer, said = ask(tiny_model, [film], Reading(fit=True), fps=25, times=times)
    assert 190 < answer.prompt_tokens <= 296 and len(said) == 1
    assert (answer.frames < 40) == (times == "frame")
    with pytest.raises(InputError, match=r"300 visual tokens; this model has room for \d+: use --fps") as refused:
        ask(tiny_model, [film], fps=25, times=times)
    room = int(re.search(r"room for (\d+)", str(refused.value))[1])
    assert room < 150 if times == "frame" else 280 < room < 296


def test_what_is_left_of_a_file(tiny_model, film, tmp_path):
    path = tmp_path / "cut.mkv"
    path.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(InputError, match="is cut short or damaged"):
        ask(tiny_model, [path])
    answer, said = ask(tiny_model, [path], Reading(partial=True))
    assert answer.frames == answer.sampling[0]["frames"] == len(answer.sampling[0]["times"]) in (3, 4)
    assert said and all(f"{path} is cut short or damaged: only its first 2." in text for text in said)
    whole, said = ask(tiny_model, [film], Reading(partial=True))
    assert whole.frames == 6 and said == []


@pytest.mark.parametrize("at", ["end", "middle"])
def test_what_is_said_after_the_damage_is_left_out(tiny_model, film, tmp_path, at):
    """Otherwise the subtitles of the rest of the film would follow the last frame that can be read."""
    data = film.read_bytes()
    half, path = len(data) // 2, tmp_path / "damaged.mkv"
    path.write_bytes(data[:half] + (b"" if at == "end" else bytes(2000) + data[half + 2000 :]))
    cues = [Cue(second + 0.5, f"word {second}") for second in range(6)]
    sessions = [
        Session(tiny_model, IMAGES, videos=[str(path)], fps=1, reading=Reading(partial=True), subtitles=some)
        for some in (cues, cues[:2])
    ]
    lengths = [session.ask("what is it", **SHORT).prompt_tokens for session in sessions]
    movies = [session.visuals.movie for session in sessions]
    assert movies[0] == movies[1] and lengths[0] == lengths[1] and "word 1" in movies[0]


@pytest.mark.parametrize("reading", [Reading(fast=True), Reading(fit=True), Reading(partial=True)])
def test_what_a_cache_holds_is_said_as_before(tiny_model, film, positions, tmp_path, reading):
    """Also, features cached from a damaged file are no answer to a request without `partial`."""
    positions(200)
    if reading.partial:
        whole, film = film.read_bytes(), tmp_path / "cut.mkv"
        film.write_bytes(whole[: len(whole) // 2])
    cache, rate = FeatureCache(tmp_path / "cache"), {"fps": 1 if reading.partial else 25 if reading.fit else 5}
    first, *others = (ask(tiny_model, [film], reading, cache=kept, **rate) for kept in (None, cache, cache))
    told = [(dataclasses.replace(answer, seconds={}), said) for answer, said in others]
    assert told == [(dataclasses.replace(first[0], seconds={}), first[1])] * 2 and first[1]
    if reading.partial:
        with pytest.raises(InputError, match="is cut short or damaged"):
            ask(tiny_model, [film], cache=cache)


@pytest.mark.parametrize("follow_ups", [True, False])
def test_stages_run_side_by_side(tiny_model, film, monkeypatch, follow_ups):
    """While the tower encodes a chunk, more frames are decoded: as many as may wait, and one in the decoder."""
    decoded, begun, changed = [], [], threading.Condition()
    crop, encode_frames = LLaMAVIDLlavaImageProcessor._crop, encode.encode_frames
    monkeypatch.setattr(video, "AHEAD", 2 * 20 * 56 * 56 * 3)  # two parts' shares, where this film has one

    def crop_one(self, frame):
        with changed:
            decoded.append(frame.shape)
            changed.notify_all()
        return crop(self, frame)

    def encode_chunk(structure, params, pixels):
        due = min(150, 32 * (len(begun) + 1) + 20 + 1)
        with changed:
            assert changed.wait_for(lambda: len(decoded) >= due, timeout=600)  # though nobody asks for them
        begun.append(len(decoded))
        return encode_frames(structure, params, pixels)

    monkeypatch.setattr(LLaMAVIDLlavaImageProcessor, "_crop", crop_one)
    monkeypatch.setattr(encode, "encode_frames", encode_chunk)
    answer, _ = ask(tiny_model, [film], fps=25, follow_ups=follow_ups)
    assert answer.frames == 150 and begun == [53, 85, 117, 149, 150]
