"""A conversation: laid out as by the processor, it reuses earlier computations and may continue without end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN, ROOT

from llamavid_jax import LLaMAVIDLlavaImageProcessor, LLaMAVIDLlavaProcessor
from llamavid_jax.errors import InputError
from llamavid_jax.inference.session import Session
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.subtitles import Cue

CLIP = str(ROOT / "demo" / "space.mp4")
IMAGES = LLaMAVIDLlavaImageProcessor(56)
QUESTIONS = ("what is in the video?", "which\ncar is it", "who?")
SHORT = {"max_new_tokens": 8}


def picture(value: int) -> np.ndarray:
    return np.full((40, 30, 3), value, np.uint8)


def clip(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, 30, 40, 3), np.uint8)


@pytest.fixture
def prompts(tiny_model, monkeypatch) -> list[list[int]]:
    """The ids of every row that the model generates from."""
    asked, generate = [], tiny_model.generate
    monkeypatch.setattr(tiny_model, "generate", lambda ids, **kw: asked.append(list(ids[0])) or generate(ids, **kw))
    return asked


@pytest.mark.parametrize(
    "media",
    [
        {},
        {"videos": [CLIP]},
        {"images": [picture(9), picture(200)], "videos": [clip(3)]},
        {"videos": [CLIP], "times": "frame"},
        {"videos": [clip(5)], "times": "minute", "fps": 0.05},
        {"images": [picture(9)], "times": "frame"},
    ],
)
def test_the_processor_lays_the_conversation_out_alike(tiny_model, prompts, media):
    """The same ids, each turn's visual tokens made for its own question, and so the same answers."""
    session = Session(tiny_model, IMAGES, **media)
    processor = LLaMAVIDLlavaProcessor(IMAGES, tiny_model.tokenizer, tiny_model.qformer_tokenizer)
    shown = [{"type": "image", "image": image} for image in media.get("images", ())]
    shown += [{"type": "video", "video": video} for video in media.get("videos", ())]
    messages, before = [], 0
    for number, question in enumerate(QUESTIONS):
        answer = session.ask(question, **SHORT)
        words = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [words] if number else [*shown, words]})
        inputs = processor.chat(messages, timestamps=media.get("times"), fps=media.get("fps"))
        assert inputs["prompts"] == [[asked for asked in QUESTIONS[: number + 1] for _ in shown]]
        assert inputs["input_ids"][0].tolist() == prompts[-1]
        alone = type(tiny_model).generate(tiny_model, **inputs, max_new_tokens=8)
        assert (alone.texts[0].strip(), alone.visual_tokens) == (answer.text, [answer.visual_tokens])
        assert answer.prompt_tokens == alone.prompt_tokens[0]
        assert answer.cached_tokens >= before - 2  # the new question may change the last tokens
        before = answer.prompt_tokens
        messages.append({"role": "assistant", "content": answer.text})


def test_frames_are_decoded_and_encoded_once(tiny_model, monkeypatch):
    decoded, done = [], []
    read = LLaMAVIDLlavaImageProcessor.stream_video
    monkeypatch.setattr(
        LLaMAVIDLlavaImageProcessor, "stream_video", lambda *a, **kw: decoded.append(a[1]) or read(*a, **kw)
    )
    session = Session(tiny_model, IMAGES, videos=[CLIP], progress=lambda *seen: done.append(seen))
    assert session.encode() == 12 and done[-1] == (CLIP, 12, 12)
    assert [session.ask(question, **SHORT).frames for question in QUESTIONS] == [12] * 3
    assert decoded == [CLIP]
    once = Session(tiny_model, IMAGES, videos=[CLIP], follow_ups=False)
    assert once.ask(QUESTIONS[0], **SHORT).text == session.turns[0].answer
    assert once.features is None and once.ask(QUESTIONS[1], **SHORT).visual_tokens == 24  # stands alone


def test_one_path_alone(tiny_model):
    expected = Session(tiny_model, IMAGES, videos=[CLIP]).ask(QUESTIONS[0], **SHORT).text
    for video in (CLIP, Path(CLIP)):
        assert Session(tiny_model, IMAGES, videos=video).ask(QUESTIONS[0], **SHORT).text == expected


def test_a_question_that_fails_changes_nothing(tiny_model):
    session = Session(tiny_model, IMAGES, videos=[clip(3)])
    first = session.ask(QUESTIONS[0], **SHORT)
    for question, settings, message in (
        ("is <image> here?", SHORT, "the question holds <image>"),
        ("caf\udce9", SHORT, "the question holds half a surrogate pair"),
        ("word " * 2100, SHORT, "more than the 2048 positions"),
        ("who?", {"max_new_tokens": 2040}, "more than the 2048 positions"),
    ):
        with pytest.raises(InputError, match=message):
            session.ask(question, **settings)
    assert [turn.answer for turn in session.turns] == [first.text]
    assert session.ask(QUESTIONS[1], **SHORT).cached_tokens == first.prompt_tokens


@pytest.fixture
def positions(tiny_model, monkeypatch):
    """Changes the model's number of positions from 2,048."""

    def change(trained: int, factor: float = 1.0) -> None:
        text = dataclasses.replace(tiny_model.config.text_config, max_position_embeddings=trained, rope_factor=factor)
        monkeypatch.setattr(tiny_model, "config", dataclasses.replace(tiny_model.config, text_config=text))

    return change


def test_the_oldest_turns_give_way(tiny_model, positions):
    """Thirty questions in 320 positions: first frames are left out, then turns; each is reported once."""
    positions(320)
    said = []
    session = Session(tiny_model, IMAGES, videos=[clip(10)], notice=said.append)
    answers = [session.ask(f"{number} what who", **SHORT) for number in range(30)]
    assert max(answer.prompt_tokens for answer in answers) <= 312
    assert len(said) == 2 and "no frames" in said[0] and "the oldest turns are left out" in said[1]
    assert {answer.visual_tokens for answer in answers} > {20, 40, 60}
    assert np.mean([answer.cached_tokens > answer.prompt_tokens / 2 for answer in answers]) > 0.6
    assert session.turns[-1].question == "29 what who" and 3 <= len(session.turns) < 20


def test_beyond_the_trained_positions_earlier_turns_lose_their_frames(tiny_model, positions):
    """A long-video model could keep them, at 80 tokens a turn here and 7,200 for an hour."""
    positions(300, factor=8.0)
    said = []
    session = Session(tiny_model, IMAGES, videos=[clip(40)], notice=said.append)
    answers = [session.ask(question, **SHORT) for question in QUESTIONS]
    assert [answer.visual_tokens for answer in answers] == [80, 160, 80]
    assert said == ["with more than 300 tokens in all, earlier questions keep their words but no frames"]
    assert [turn.question for turn in session.turns] == list(QUESTIONS)


def test_the_newest_question_alone_shows_frames(tiny_model, prompts):
    session = Session(tiny_model, IMAGES, videos=[clip(3)], like_original=True, template="llava_v1")
    assert [session.ask(question, **SHORT).visual_tokens for question in QUESTIONS] == [6, 6, 6]
    assert [ids.count(IMAGE_TOKEN) for ids in prompts] == [1, 1, 1]
    text = tiny_model.tokenizer.decode([token for token in prompts[1] if token >= 0])
    assert "curious human" in text


CASES = json.loads((GOLDEN / "movie" / "cases.json").read_text(encoding="utf-8"))
FILMS = {
    case["name"]: case
    for case in CASES
    if case["inputs"] is not None
    and (case["source"], case["video_token"], case["im_start_end"]) == ("whisper", 2, False)
}


@pytest.mark.parametrize("name", FILMS)
def test_a_film_with_subtitles(tiny_model, name):
    """The recorded ids, from frames and cues."""
    case = FILMS[name]
    cues = [Cue(cue["end"], cue["text"]) for cue in case["subtitles"]]
    fps = case["video_fps"] / round(case["video_fps"])
    media = {"videos": [clip(case["frames"])], "subtitles": cues, "fps": fps}
    session = Session(tiny_model, IMAGES, **media, like_original=True)
    ids, tokens = session.inputs(case["question"])
    assert ids == case["inference"]["input_ids"]
    assert [array.shape for array in tokens] == [(2 * case["frames"], 64)]


def test_a_conversation_about_a_film(tiny_model, prompts):
    cues = [Cue(1.5, "Hello."), Cue(3.0, "Bye.")]
    for follow_ups in (False, True):
        session = Session(tiny_model, IMAGES, videos=[clip(4)], subtitles=cues, follow_ups=follow_ups)
        answers = [session.ask(question, **SHORT) for question in QUESTIONS]
        assert [ids.count(IMAGE_TOKEN) for ids in prompts] == ([8, 16, 24] if follow_ups else [8, 8, 8])
        assert answers[2].cached_tokens > 0 or not follow_ups
        prompts.clear()
    with pytest.raises(InputError, match="subtitles go with one video alone, not with 2 and 0 images"):
        Session(tiny_model, IMAGES, videos=[clip(4)] * 2, subtitles=cues)


@pytest.mark.parametrize(
    ("times", "film"),
    [
        ("frame", "[0:00]<image>[0:20]<image>Hello.[0:40]<image>[1:00]<image>Bye.[1:20]<image>"),
        ("minute", "[0:00]<image><image>Hello.<image>[1:00]<image>Bye.<image>"),
    ],
)
def test_times_stand_in_the_text(tiny_model, times, film):
    """Before the frames; subtitles stand after them."""
    cues = [Cue(21.0, "Hello."), Cue(63.0, "Bye.")]
    session = Session(tiny_model, IMAGES, videos=[clip(5)], subtitles=cues, times=times, fps=0.05)
    assert session.ask("Who?", **SHORT).visual_tokens == 10 and session.visuals.movie == film


def test_times_that_cannot_be_said(tiny_model):
    for media, message in (
        ({"videos": [clip(4)] * 2, "times": "frame"}, "times go with one video alone, not with 2 and 0 images"),
        ({"videos": [clip(4)], "times": "hour"}, "times is 'hour'; use one of frame, minute"),
    ):
        with pytest.raises(InputError, match=message):
            Session(tiny_model, IMAGES, **media)


def test_evidence_is_a_part_for_every_frame(tiny_model):
    """In the order of the frames, in every turn of a chat; a row's attention does not depend on its batch."""
    session = Session(tiny_model, IMAGES, images=[picture(200)], videos=[clip(5)], fps=0.5)
    for number, question in enumerate(QUESTIONS):
        frames = session.ask(question, evidence=True, **SHORT).evidence
        assert [frame["second"] for frame in frames] == [0.0, 0.0, 2.0, 4.0, 6.0, 8.0]
        assert ["image" in frame for frame in frames] == [True] + 5 * [False]
        assert np.isclose(sum(frame["weight"] for frame in frames), 1) and min(frame["weight"] for frame in frames) > 0
        ids, tokens = session._lay_out(session.turns)
        out = tiny_model.generate([ids[:-1], ids], visual_tokens=[tokens, tokens], evidence=True, **SHORT)
        assert len(out.evidence[1]) == sum(map(len, tokens)) == 12 * (number + 1)
    assert session.ask("why?", **SHORT).evidence is None
    with pytest.raises(InputError, match="there are none; give an image or a video"):
        Session(tiny_model, IMAGES).ask("why?", evidence=True, **SHORT)


def test_evidence_of_a_row_is_what_it_is_alone(tiny_model):
    session = Session(tiny_model, IMAGES, videos=[clip(5)])
    rows = [session.inputs(question) for question in QUESTIONS]
    ids, tokens = zip(*rows, strict=True)
    together = tiny_model.generate(ids, visual_tokens=tokens, evidence=True, **SHORT)
    for number, (own_ids, own_tokens) in enumerate(rows):
        alone = tiny_model.generate([own_ids], visual_tokens=[own_tokens], evidence=True, **SHORT)
        np.testing.assert_allclose(together.evidence[number], alone.evidence[0], rtol=1e-4)
        assert 0 < alone.evidence[0].sum() < 1
