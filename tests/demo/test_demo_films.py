"""Films to train on: questions that are right, pictures that no test asks about, features of the frames shown."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from demo import digits, films, length
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data import validate
from llamavid_jax.training.config import read_config

MODEL = Path(films.__file__).parent / "model"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("films")
    assert films.main([str(MODEL), str(out), "--films", "1:9", "3:3", "--review", "4"]) == 0
    return out


def test_training_shows_no_picture_and_no_film_of_the_tests():
    kept = np.concatenate(list(digits.split(True).values()))
    drawn = [*films.films("2:60", 0), *films.clips(60, 0)]
    assert not {event.picture for _, scene, _ in drawn for event in scene.events} & set(kept.tolist())

    def looks(scene):
        return [(event.start, event.digit, event.colour, event.direction) for event in scene.events]

    asked = [looks(length.needle(kind, 120, number).scene) for kind in length.KINDS for number in range(60)]
    assert not [name for name, scene, _ in films.films("2:60", 0) if looks(scene) in asked]


def test_questions_of_films_are_those_of_the_needles():
    seen = set()
    for _, scene, ((kind, question, answer),) in films.films("2:90", 0):
        events = scene.events
        seen.add((kind, len(events)))
        if kind == "count":
            assert answer == str(len(events))
        elif kind == "order":
            named = next(e for e in events if re.search(rf"\b({e.colour}|{e.digit})\b", question))
            assert answer == str(next(event for event in events if event is not named).digit)
        else:
            assert answer in (str(events[0].digit), events[0].colour, events[0].direction)
    assert seen == {("locate", 1), ("order", 2), ("count", 1), ("count", 2), ("count", 3)}


def test_records_and_features(written):
    records = json.loads((written / "films.json").read_text())
    assert len(records) == 16 and len({record["id"] for record in records}) == 16
    assert [len(record["conversations"]) for record in records[:12]] == [2] * 12
    feats = [np.load(written / record["features"])["feats"] for record in records]
    assert [one.shape for one in feats] == [(60, 37, 96)] * 9 + [(180, 37, 96)] * 3 + [(8, 37, 96)] * 4
    assert validate.main([str(written / "films.json"), "--model", str(MODEL)]) == 0


def test_features_are_those_of_every_frame(written):
    name, scene, _ = next(films.films("3:1", 0))
    model = length.LLaMAVIDLlavaForConditionalGeneration.from_pretrained(MODEL, dtype="float32")
    images = length.LLaMAVIDLlavaProcessor.from_pretrained(MODEL).image_processor
    (pixels,) = images(videos=np.stack([digits.frame(scene, second) for second in range(180)]))["pixel_values"]
    kept = np.load(written / "features" / f"{name}.npz")["feats"]
    assert kept.dtype == np.float16
    np.testing.assert_allclose(kept, model.vision_features(pixels), rtol=2e-3, atol=2e-3)


def test_what_is_no_number_of_films_is_named(tmp_path, capsys):
    assert films.main([str(MODEL), str(tmp_path), "--films", "ten"]) == 2
    assert "'ten'" in capsys.readouterr().err


def test_the_recipe_has_room_for_an_hour():
    recipe = read_config(ROOT / "configs/demo/stage3_hour.yaml", [f"start.model={MODEL}"])
    text = recipe.model_config().text_config
    shipped = LLaMAVIDLlavaConfig.from_pretrained(MODEL).text_config
    assert (shipped.rope_factor, text.rope_factor) == (1, 4)
    assert text.max_length >= recipe.max_tokens > 3600 * 2
