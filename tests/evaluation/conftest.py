"""A small checkpoint, and sets' official folders with made-up questions about real images and clips."""

import json
from pathlib import Path

import pytest
from clips import index_frame, write_clip
from paths import GOLDEN
from recorded_evaluation import lay_out

from llamavid_jax import LLaMAVIDLlavaImageProcessor


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    LLaMAVIDLlavaImageProcessor(56).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def official(tmp_path):
    """`official("gqa")` writes the recorded items of a set as its official folder."""

    def make(name: str) -> Path:
        recording = json.loads((GOLDEN / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
        folder = lay_out(recording, tmp_path / f"official {name}")
        for video in recording["items"].get("videos", ()):
            (file,) = folder.rglob(video["file"])
            codec = "mpeg4" if file.suffix == ".avi" else "libx264"
            write_clip(file, [index_frame(index) for index in range(30)], codec=codec)
        return folder

    return make
