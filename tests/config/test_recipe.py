"""Configuration files made to cost memory or time, and damaged ones: each is one sentence, at once."""

import json
import os

import pytest

from llamavid_jax.config.recipe import read_recipe
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError

BOMB = "a0: &a0 [x, y]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
YAML = {
    "aliases that multiply": (BOMB + "model: *a11", "a0 is an alias; write out what it stands for"),
    "itself": ("&a {b: *a}", "is an alias"),
    "merged": ("a: &a {b: 1}\nc: {<<: *a}", "is an alias"),
    "nested": ("[" * 20_000, "nested too deeply"),
    "a section twice": ("training: {steps: 5}\ndata: {fps: 2}\ntraining: {seed: 1}", "'training' stands there twice"),
    "a field twice": ("data:\n  fps: 1\n  fps: 2", "'fps' stands there twice"),
    "long": ("a: " + "x" * (1 << 18), "too many"),
    "a list": ("[1]", "no mapping of fields"),
    "not UTF-8": (b"a: \xff", "can't decode"),
    "Python": ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", YAML)
def test_hostile_recipes(tmp_path, case):
    content, message = YAML[case]
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "a.yaml")


OWN = {"model_type": "llamavid_jax"}
CONFIGS = {
    "layers": (OWN | {"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10000000"),
    "tower's layers": (OWN | {"vision_tower_config": {"num_hidden_layers": 2 * 10**9}}, "num_hidden_layers is 2000"),
    "pixels": (OWN | {"vision_tower_config": {"image_size": 14 * 10**8}}, "image_size is 1400000000"),
    "projector": (OWN | {"mm_projector_type": "mlp9999x_gelu"}, "mm_projector_type is 'mlp9999x_gelu'"),
    "NaN": (OWN | {"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps is nan"),
    "a long number": (OWN | {"num_query": 10**4000}, "num_query is 1000"),
    "type": ({"model_type": ["x"]}, "model_type is"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(tmp_path, case):
    values, message = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "nested", "list", "folder"])
def test_what_is_no_config(tmp_path, kind):
    file = tmp_path / "config.json"
    make = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "nested": lambda: file.write_text("[" * 20_000),
        "list": lambda: file.write_text("[]"),
        "folder": file.mkdir,
    }
    make[kind]()
    with pytest.raises(ConfigError, match=r"config\.json is not readable JSON"):
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path)


def test_home_in_paths(tmp_path, monkeypatch):
    """We expand `~`, as a shell does so only at the beginning of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    LLaMAVIDLlavaConfig().save_pretrained(tmp_path / "model")
    assert LLaMAVIDLlavaConfig.from_pretrained("~/model") == LLaMAVIDLlavaConfig()
