"""Every recorded case below `--golden DIR` (default `tests/golden`): checkpoints, text, preprocessing.

A case is recognised by what its folder holds, so that other recordings of the same form can be run against the model:

    pytest -m golden --golden DIR
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN, ROOT
from PIL import Image
from recorded_training import replay

from conversion.check import TOLERANCES, check_case, read_expected
from conversion.read_torch import read_checkpoint
from conversion.resize import resize_positions
from conversion.torch_to_jax import main as torch_to_jax
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.config.schema import CLIP_MEAN, CLIP_STD
from llamavid_jax.data.labels import training_example
from llamavid_jax.media.images import normalize, pad_to_square, resize_and_crop
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc):
    """One test for each case; a folder without any fails `test_there_are_cases`."""
    root = Path(metafunc.config.getoption("--golden"))
    for name, cases in find_cases(root).items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases, ids=[str(case.relative_to(root)) for case in cases])


def find_cases(root: Path) -> dict[str, list[Path]]:
    weights = {path.parent for pattern in ("*.bin", "*.safetensors") for path in root.rglob(pattern)}
    return {
        "checkpoint": sorted(folder for folder in weights if (folder / "config.json").exists()),
        "text": sorted(path.parent for path in root.rglob("conversations.json")),
        "training": sorted(root.rglob("train_stage*.npz")),
        "preprocessing": sorted(f for f in root.rglob("expected.npz") if not (f.parent / "config.json").exists()),
    }


def test_there_are_cases(golden):
    assert any(find_cases(golden).values()), f"{golden} holds no recorded case"


def test_checkpoint(checkpoint, tmp_path):
    """Features, tokens, logits, losses and greedy ids of the converted checkpoint."""
    expected = expected_of(checkpoint)
    assert torch_to_jax([str(checkpoint), str(tmp_path / "converted")]) == 0
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "converted", dtype="float32")
    rows = check_case(model, expected)
    assert rows, f"{checkpoint} has no recorded outputs"
    assert {row.name for row in rows} == {name for name in expected if any(f".{kind}" in name for kind in TOLERANCES)}
    assert not [row for row in rows if not row.passed]
    qformer_ids(checkpoint, expected)


def expected_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """A checkpoint's recording; one in the documented layout may share it with the original that has its weights."""
    if (checkpoint / "expected.npz").exists():
        return read_expected(checkpoint / "expected.npz")
    key = read_checkpoint(checkpoint)["vlm_att_projector.weight"].read()
    for sibling in sorted(checkpoint.parent.iterdir()):
        if sibling != checkpoint and (sibling / "expected.npz").exists() and (sibling / "config.json").exists():
            weight = read_checkpoint(sibling).get("model.vlm_att_projector.weight")
            if weight is not None and np.array_equal(weight.read(), key):
                return read_expected(sibling / "expected.npz")
    raise AssertionError(f"{checkpoint} has no expected.npz, nor has a folder beside it the same weights and one")


def qformer_ids(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    tokenizer = QFormerTokenizer(checkpoint / "qformer_tokenizer")
    for key in expected:
        kind, name, *number = key.split(".")
        if name == "qformer_input_ids":
            prompts = json.loads(str(expected[f"{kind}.prompts"]))[int(number[0])]
            assert tokenizer(prompts)[0].tolist() == expected[key].tolist(), key


def test_training(training, tmp_path):
    """Losses, gradient norms and learning rates step by step, and the exact set of trained parameters."""
    expected = read_expected(training)
    stage = json.loads(str(expected["hyper"]))["stage"]
    found = replay(training.parent, expected, tmp_path / "converted")
    for name in ("losses", "grad_norms", "learning_rates"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=f"stage {stage}: {name}")


def test_text(text):
    """Ids, labels and Q-Former prompts of every conversation, exactly."""
    tokenizer = load_tokenizer(text)
    for number, case in enumerate(json.loads((text / "conversations.json").read_text(encoding="utf-8"))):
        draws, movie = case["image_side_draws"], case["movie"]
        example = training_example(case["version"], case["conversations"], tokenizer, case["has_image"], draws, movie)
        name = f"case {number} ({case['version']})"
        assert example.input_ids.tolist() == case["input_ids"], f"{name}: input_ids"
        assert example.labels.tolist() == case["labels"], f"{name}: labels"
        assert case["prompts"] is None or example.prompts == case["prompts"], f"{name}: prompts"


def test_preprocessing(preprocessing):
    """Pixels after crop and pad, within Pillow's own rounding, and resized position tables."""
    expected = read_expected(preprocessing)
    checked = 0
    for key, value in expected.items():
        kind, _, number = key.partition(".")
        if kind in ("crop", "pad"):
            image = Image.fromarray(expected[f"image.{number}"])
            image = pad_to_square(image, CLIP_MEAN) if kind == "pad" else image
            difference = np.abs(
                normalize(resize_and_crop(image, value.shape[-1])[None], CLIP_MEAN, CLIP_STD)[0] - value
            )
            assert difference.max() <= 1e-2 and difference.mean() <= 1e-3, key
            checked += 1
    tables = {side(key): value[0] for key, value in expected.items() if key.startswith("pos_embed_")}
    for size in sorted(tables)[1:]:
        resized = resize_positions(tables[min(tables)], size)
        assert np.linalg.norm(resized - tables[size]) <= 1e-5 * np.linalg.norm(tables[size]), f"positions {size}"
        checked += 1
    assert checked, f"{preprocessing} holds nothing that is known"


@pytest.mark.parametrize("kept, passed", [(["text", "preprocess"], 3), ([], 0)])
def test_folders_with_some_kinds_of_cases(kept, passed, tmp_path):
    """What DIR does not hold has no test, so that any folder can be run; one without cases fails."""
    for name in kept:
        shutil.copytree(GOLDEN / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "golden", "--golden", str(tmp_path), __file__]
    done = subprocess.run([*command, "-k", "not folders"], cwd=ROOT, capture_output=True, text=True)
    assert f"{passed} passed" in done.stdout if passed else "1 failed" in done.stdout
    assert (done.returncode == 0) == bool(passed) and "error" not in done.stdout.splitlines()[-1]


def side(key: str) -> int:
    """4 of "pos_embed_4x4"."""
    return int(key.rsplit("_", 1)[1].split("x")[0])
