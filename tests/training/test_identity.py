"""A run's identity: what may change between two of its lives, and errors that name any other change."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from paths import GOLDEN, ROOT
from training_cases import CONFIG

from llamavid_jax.data.records import read_records
from llamavid_jax.errors import TrainingError
from llamavid_jax.training.config import TrainConfig, read_config
from llamavid_jax.training.identity import check_same_media, check_same_run, identity
from llamavid_jax.training.start import Start

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Data with five images, one of them missing, and a text; tokenizers."""
    (tmp_path / "media").mkdir()
    for number in range(4):
        (tmp_path / "media" / f"{number}.png").write_bytes(b"x" * (number + 1))
    pictures = [{"id": str(number), "image": f"{number}.png", "conversations": TALK} for number in range(5)]
    (tmp_path / "data.json").write_text(json.dumps([*pictures, {"id": "text", "conversations": TALK[1:]}]))
    shutil.copytree(GOLDEN / "text", tmp_path / "tokenizers")
    return tmp_path


def recipe(folder: Path, *overrides: str) -> TrainConfig:
    paths = (f"data.path={folder / 'data.json'}", f"data.tokenizer={folder / 'tokenizers'}")
    return read_config(ROOT / "configs" / "tiny" / "stage2_instruct.yaml", (*paths, *overrides))


def made_of(config: TrainConfig, model=CONFIG, **weights: int) -> dict:
    start = Mock(spec=Start)
    start.config, start.read = model, {"vision.cls_token": 7} | weights
    return identity(config, start)


def test_what_may_change(folder):
    before = made_of(recipe(folder))
    assert json.loads(json.dumps(before)) == before
    (folder / "data.json").touch()
    shutil.copytree(folder, folder / "moved")
    moved = f"data.path={folder / 'moved' / 'data.json'}"
    now = made_of(recipe(folder, moved, "training.log_every=3", "data.threads=7", "mesh=fsdp=2", "output=elsewhere"))
    check_same_run(now, before, folder)


def test_accumulation_may_change_unless_it_changes_the_loss(folder):
    fewer = "training.micro_batches=2"
    check_same_run(made_of(recipe(folder, fewer, "training.device_rows=1")), made_of(recipe(folder)), folder)
    weighted = "training.loss_weighting=micro_batch"
    with pytest.raises(TrainingError, match=r"training\.micro_batches is 2"):
        check_same_run(made_of(recipe(folder, fewer, weighted)), made_of(recipe(folder, weighted)), folder)


@pytest.mark.parametrize(
    "named,change",
    [
        ("optimizer.learning_rate is 0.5", lambda folder: recipe(folder, "optimizer.learning_rate=0.5")),
        ("lora.rank is 64", lambda folder: recipe(folder, "lora={}")),
        ("the SHA-256 of data.path is", lambda folder: edit(folder / "data.json", b"This", b"That")),
        (
            "the SHA-256 of the tokenizers is",
            lambda folder: edit(folder / "tokenizers/tokenizer_config.json", b"{", b"{ "),
        ),
    ],
)
def test_what_has_changed_is_named(folder, named, change):
    before = made_of(recipe(folder))
    config = change(folder) or recipe(folder)
    says = rf"{named}.*, but the run in .* began with .*; set it back, or give another"
    with pytest.raises(TrainingError, match=says):
        check_same_run(made_of(config), before, folder)


def edit(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def test_another_model_is_named(folder):
    config = recipe(folder)
    before = made_of(config)
    other = dataclasses.replace(CONFIG, text_config=dataclasses.replace(CONFIG.text_config, rope_theta=5000.0))
    with pytest.raises(TrainingError, match=r"the model's text_config\.rope_theta is 5000"):
        check_same_run(made_of(config, other), before, folder)
    with pytest.raises(TrainingError, match=r"the fingerprint of vision\.position in start\.model is 8"):
        check_same_run(made_of(config, **{"vision.position": 8}), before, folder)


class Lives:
    """The first life of a run, and those after it."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, []
        self.records = read_records(folder / "data.json", folder / "media")
        check_same_media(self.records, folder / "run", False, 2, pytest.fail)

    def again(self) -> list[str]:
        self.said = []
        check_same_media(self.records, self.folder / "run", True, 2, self.said.append)
        return self.said


def test_the_same_media(folder):
    lives = Lives(folder)
    assert lives.again() == []


@pytest.mark.parametrize("change", ["larger", "gone", "came", "newer"])
def test_a_media_file_that_has_changed_is_named(folder, change):
    lives, file = Lives(folder), folder / "media" / ("4.png" if change == "came" else "2.png")
    if change == "gone":
        file.unlink()
    elif change == "newer":
        os.utime(file, (5, 5))
    else:
        file.write_bytes(b"another picture")
    with pytest.raises(TrainingError, match=f"1 records have other media files.*first is {file}: put it back"):
        lives.again()
    (folder / "run" / "media.npy").unlink()  # as the message advises
    assert "is absent or damaged" in lives.again()[0] and lives.again() == []


def test_copied_media(folder):
    """All files have new times and the same sizes."""
    lives = Lives(folder)
    for file in (folder / "media").iterdir():
        os.utime(file, (5, 5))
    assert "as copies have" in lives.again()[0]
    (folder / "media" / "3.png").write_bytes(b"y")
    with pytest.raises(TrainingError, match="other media files"):
        lives.again()


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY\x01\x00"])
def test_a_damaged_note_of_the_media_stops_no_run(folder, content):
    lives = Lives(folder)
    (folder / "run" / "media.npy").write_bytes(content)
    assert "is absent or damaged" in lives.again()[0] and lives.again() == []
