"""The demo's data: answers follow from what is drawn, files from the seed, and tests show digits never trained on."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from demo import digits, make_data, questions
from demo.make_tokenizers import FOLDER
from llamavid_jax.data.labels import training_example
from llamavid_jax.media.video import read_video
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import load_tokenizer


def test_every_digit_picture_is_for_training_or_for_testing():
    train, test = (np.concatenate(list(digits.split(kept).values())) for kept in (False, True))
    assert sorted([*train, *test]) == list(range(1797))
    assert len(test) == pytest.approx(1797 / 5, abs=10)


def colours_seen(pixels: np.ndarray) -> set[str]:
    """Names of the colours shown in a frame: those of at least half of its bright pixels."""
    names, values = list(digits.COLOURS), np.array(list(digits.COLOURS.values()), float)
    bright = pixels.reshape(-1, 3)[pixels.max(-1).ravel() > 150].astype(float)
    nearest = np.linalg.norm(bright[:, None] - values, axis=-1).argmin(-1)
    return {names[i] for i in range(len(names)) if (nearest == i).sum() >= max(10, len(nearest) / 2)}


@pytest.mark.parametrize("seed", range(8))
def test_answers_agree_with_what_the_video_file_shows(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    side = (digits.SIDE, 128)[seed % 2]
    scene = digits.clip(rng, test=True, count=2, side=side)
    make_data.write_video(tmp_path / "clip.mp4", scene, make_data.CLIP_FPS)
    frames = read_video(tmp_path / "clip.mp4").frames
    assert frames.shape == (digits.CLIP_SECONDS, side, side, 3)
    # questions that name a colour can be checked by looking for that colour
    asked = [q for _ in range(20) for q in questions.clip_questions(rng, scene)]
    for kind, question, answer in asked:
        if kind == "count":
            assert answer == "2"
        if not (colour := re.search("|".join(digits.COLOURS), question)):
            continue
        event = next(event for event in scene.events if event.colour == colour[0])
        if kind == "second":
            assert answer == str(event.start)
        others = [other.colour for other in scene.events if other is not event]
        if kind == "digit":
            assert answer == str(event.digit)
        if kind in ("before", "after"):
            assert answer == str(next(other.digit for other in scene.events if other.colour in others))
    for event in scene.events:
        seen = [event.colour in colours_seen(frame) for frame in frames]
        shown = [event.start <= second < event.start + event.seconds for second in range(len(frames))]
        assert seen == shown, event
        first, last = event.centre(event.start), event.centre(event.start + event.seconds - 1)
        x, y = digits.DIRECTIONS[event.direction]
        assert (last[0] - first[0]) * x + (last[1] - first[1]) * y == side - digits.SIZE


def test_references_name_one_of_several_digits():
    seen = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = digits.still(rng, test=True, count=3)
        centres = [event.path[0] for event in scene.events]
        apart = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a in centres for b in centres if a is not b]
        assert all(distance >= digits.SIZE for distance in apart)
        _, question, answer = questions.reference(rng, scene)
        (name,) = re.findall("|".join([*digits.COLOURS, "[0-9]"]), question)
        meant = [event for event in scene.events if name in (event.colour, str(event.digit))]
        assert answer.split()[:2] == [meant[0].colour, str(meant[0].digit)] if meant else answer == "nothing"
        seen.add((len(meant), name.isdigit()))
    assert seen == {(0, True), (0, False), (1, True), (1, False)}


def test_samples_follow_from_the_seed_alone(tmp_path: Path):
    for folder in ("a", "b"):
        for kind in ("images", "clips", "long"):
            (tmp_path / folder / kind).mkdir(parents=True)
    draw = functools.partial(make_data.sample, seed=3)
    for task in [("pretrain", 0), ("instruct_test", 1), ("refer", 2)]:
        a, b = (draw(task, folder=tmp_path / folder) for folder in ("a", "b"))
        assert a == b
        assert draw((task[0], 7), folder=tmp_path / "a") != a
        assert json.loads(json.dumps(a)) == a
        path = a.get("image") or a["video"]
        a, b = (tmp_path / folder / path for folder in ("a", "b"))
        if path.endswith(".png"):
            assert a.read_bytes() == b.read_bytes()
        else:  # the encoder's rounding may differ between runs, invisibly
            difference = read_video(a).frames.astype(int) - read_video(b).frames
            assert np.abs(difference).mean() < 0.5


def test_tokenizers_know_all_words_and_label_exactly_the_answers():
    tokenizer, qformer = load_tokenizer(FOLDER), QFormerTokenizer(FOLDER / QFormerTokenizer.FOLDER)
    rng = np.random.default_rng(0)
    scene = digits.clip(rng, test=False, count=3)
    asked = questions.clip_questions(rng, scene)
    record = make_data.record("clip", "clips/0.mp4", asked, test=False)
    example = training_example("imgsp_v1", record["conversations"], tokenizer, has_image=True, image_sides=[0] * 40)
    labelled = tokenizer.decode(example.labels[example.labels != -100])
    assert labelled.split() == " ".join(answer for _, _, answer in asked).split()
    ids, _ = qformer(example.prompts)
    unknown = qformer(["\u2603"])[0][0, 1]
    assert unknown not in ids
