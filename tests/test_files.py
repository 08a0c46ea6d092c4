"""Files that come with the package."""

from pathlib import Path

import pytest
from paths import ROOT

from llamavid_jax import LLaMAVIDLlavaConfig
from llamavid_jax.files import find


@pytest.mark.parametrize("path", ["configs/models/tiny.yaml", "demo/model", "demo/held_out.mp4"])
def test_they_are_found_from_any_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert find(path) == ROOT / path
    Path(path).parent.mkdir(parents=True)
    Path(path).touch()
    assert find(path) == Path(path), "what is there comes first"


@pytest.mark.parametrize("path", ["configs/models/no.yaml", "llamavid_jax/files.py", "README.md", "", "/demo/model"])
def test_other_paths_stay(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert find(path) == Path(path)


def test_they_are_read_and_never_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = LLaMAVIDLlavaConfig.from_pretrained("demo/model")
    config.save_pretrained("demo/model")
    assert Path("demo/model/config.json").exists()
    assert LLaMAVIDLlavaConfig.from_yaml("configs/models/demo.yaml").text_config == config.text_config
