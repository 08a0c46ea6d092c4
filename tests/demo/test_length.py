"""The needle test: its questions, its films of repeated tokens, runs that go on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from demo import digits, length
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor

MODEL = Path(length.__file__).parent / "model"


@pytest.fixture(scope="module")
def shipped():
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(MODEL, dtype="float32")
    return model, LLaMAVIDLlavaProcessor.from_pretrained(MODEL).image_processor


@pytest.mark.parametrize("kind, counts", [("locate", {1}), ("order", {2}), ("count", {1, 2, 3})])
def test_needles(kind, counts):
    """Needles do not overlap and lie within the film, and the answer follows from them."""
    seen = set()
    for number in range(60):
        one = length.needle(kind, 60, number)
        assert one == length.needle(kind, 60, number) != length.needle(kind, 60, number, seed=1)
        events = one.scene.events
        seen.add(len(events))
        ends = [event.start + event.seconds for event in events]
        assert all(end <= event.start for end, event in zip(ends, events[1:], strict=False)) and ends[-1] <= 60
        if kind == "count":
            assert one.answer == str(len(events))
        elif kind == "order":
            named = next(e for e in events if re.search(rf"\b({e.colour}|{e.digit})\b", one.question))
            other = next(event for event in events if event is not named)
            assert one.answer == str(other.digit)
            earlier = re.search("before|precedes", one.question) is not None
            assert earlier == (other.start < named.start)
        else:
            assert one.answer in (str(events[0].digit), events[0].colour, events[0].direction)
    assert seen == counts


@pytest.mark.parametrize("every", [1.0, 2.5, 7.0])
def test_repeated_tokens_are_the_whole_film_s(shipped, every):
    model, images = shipped
    one = length.needle("order", 60, 3)
    frames = np.stack([digits.frame(one.scene, second) for second in np.arange(0, 60, every)])
    (pixels,) = images(videos=frames)["pixel_values"]
    whole = model.visual_tokens(pixels, [one.question])[0]
    np.testing.assert_allclose(length.film_tokens(model, images, one, every), whole, atol=1e-5)


def test_beyond_the_positions(shipped):
    model, _ = shipped
    assert length.fitted(model, 600, "stretch") == (model, 1)
    extended, stretched = (length.fitted(model, 3600, how)[0].config.text_config for how in ("extend", "stretch"))
    assert extended.max_length >= 7200 and extended.rope_factor == 1
    assert stretched.rope_factor == 4 and stretched.max_position_embeddings == 2048
    same, stride = length.fitted(model, 3600, "thin")
    assert same is model and 1024 * 0.8 < 3600 / stride < 1024
    hour, _ = length.fitted(model, 3600, "stretch")  # like a model trained for an hour, then extended
    assert length.fitted(hour, 3600, "extend") == (hour, 1)
    further, wider = (length.fitted(hour, 3 * 3600, how)[0].config.text_config for how in ("extend", "stretch"))
    assert further.rope_factor == 4 and 21600 < further.max_length < 22000
    assert wider.rope_factor == 11 and wider.max_position_embeddings == 2048


def test_a_run_goes_on(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    arguments = [
        str(MODEL),
        str(file),
        "--minutes",
        "1",
        "20",
        "--beyond",
        "thin",
        "--picture",
        str(tmp_path / "a.png"),
    ]
    assert length.main([*arguments, "--questions", "1", "--batch", "2"]) == 0
    first = file.read_text()
    rows = [json.loads(line) for line in first.splitlines()[1:]]
    assert [(row["minutes"], row["beyond"], row["kind"]) for row in rows] == [
        *((1, "", kind) for kind in length.KINDS),
        *((20, "thin", kind) for kind in length.KINDS),
    ]
    assert [row["tokens"] for row in rows] == [120] * 3 + [1200] * 3 and all(row["peak_mb"] > 100 for row in rows)
    assert rows[0]["truth"] == rows[0]["answer"]
    assert [row["every"] for row in rows] == [1] * 3 + [2] * 3
    with file.open("a") as cut:
        cut.write('{"minutes": 1, "ev')  # as after kill -9
    assert length.main([*arguments, "--questions", "2"]) == 0
    assert file.read_text().startswith(first) and len(file.read_text().splitlines()) == 13
    table = capsys.readouterr().out
    assert "| 1 min | 1 s | – | 120 | 100 % ± 0 (2) |" in table and "| 20 min | 2 s | thin | 1,200 |" in table
    assert (tmp_path / "a.png").stat().st_size > 5000
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))
    assert length.main(arguments) == 2 and "was begun with another model" in capsys.readouterr().err
