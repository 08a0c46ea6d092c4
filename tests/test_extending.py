"""docs/extending.md: applied to a copy of the package, its changes touch few files and do what the page says."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = {  # heading → number of files that the recipe may change
    "A vision tower": 4,
    "A language model, or a parameter of it": 4,
    "A compressor": 3,
    "A data format": 3,
    "A mesh axis": 3,
}
START = """
import dataclasses
from pathlib import Path

import jax
import numpy as np

from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.data import to_llava
from llamavid_jax.data.records import read_records
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import weight_table

TINY = LLaMAVIDLlavaConfig.from_yaml("tiny.yaml")

def check_model(config, *paths):
    '''It builds, answers, and every weight has a row and a name.'''
    model = LLaMAVIDLlavaForConditionalGeneration(config)
    assert set(paths) <= model.params.keys()
    assert {path: value.shape for path, value in model.params.items()} == inventory.shapes(config)
    assert {weight.path for weight in weight_table(config, "original")} == set(model.params)
    assert len(model.generate([[1, 5, 7]], max_new_tokens=3, ignore_eos=True).token_ids[0]) == 3
    pixels = np.ones((1, 3, *[config.vision_tower_config.image_size] * 2), np.float32)
    assert np.isfinite(model.vision_features(pixels)).all()
    return model
"""


def section(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def blocks(kind: str, text: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_recipe_is_checked():
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == list(RECIPES)


@pytest.mark.parametrize("heading", RECIPES)
def test_few_files(heading):
    (change,) = blocks("diff", section(heading))
    assert 1 <= len(re.findall(r"^\+\+\+ ", change, re.MULTILINE)) <= RECIPES[heading]


def test_the_recipes_work(tmp_path):
    """All five are applied to one copy in the page's order, and the page's checks pass."""
    shutil.copytree(ROOT / "llamavid_jax", tmp_path / "llamavid_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "configs" / "models" / "tiny.yaml", tmp_path)
    for heading in RECIPES:
        (change,) = blocks("diff", section(heading))
        done = subprocess.run(["git", "apply"], input=change, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{heading}: {done.stderr}"
    checks = START + "".join(block for heading in RECIPES for block in blocks("python", section(heading)))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run([sys.executable, "-c", checks], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
