"""The shipped model: its size, what it answers about held-out clips, and the picture of `make demo`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import digits, questions, show
from demo.evaluate import answers
from demo.make_data import sample
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor

DEMO = Path(show.__file__).parent


@pytest.fixture(scope="module")
def shipped():
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(DEMO / "model", dtype="float32")
    return model, LLaMAVIDLlavaProcessor.from_pretrained(DEMO / "model")


def test_it_is_small(shipped):
    size = sum(file.stat().st_size for file in (DEMO / "model").rglob("*") if file.is_file())
    assert size <= 15e6
    parameters = sum(leaf.size for leaf in shipped[0].params.flat_state().leaves)
    assert parameters < 10e6 and shipped[0].config.tokens_per_frame == 2


def test_held_out_clips(shipped, tmp_path):
    """Clips drawn anew with pictures of digits that training never shows; the whole set is in docs/demo.md."""
    for folder in ("clips", "long"):
        (tmp_path / folder).mkdir()
    clips = [sample(("instruct_test", 100_000 + number), tmp_path, seed=1) for number in range(24)]
    found = [answer == truth for *_, truth, answer in answers(*shipped, clips, tmp_path, batch=8)]
    assert np.mean(found) >= 0.8, f"{np.mean(found):.0%} of {len(found)}"
    movie = sample(("long_test", 100_000), tmp_path, seed=1)
    asked = {kind: (truth, answer) for _, kind, _, truth, answer in answers(*shipped, [movie], tmp_path, batch=1)}
    assert asked["colour"][0] == asked["colour"][1]


def test_the_demo_answers_and_draws(tmp_path, capsys):
    show.main(str(tmp_path / "out" / "demo.png"))
    out = capsys.readouterr().out
    record = json.loads((DEMO / "held_out.json").read_text())
    for turn in record["conversations"][1::2]:
        assert f"model: {turn['value']}\n  truth: {turn['value']}" in out
    picture = np.asarray(Image.open(tmp_path / "out" / "demo.png"))
    assert picture.shape[1] > 8 * show.TILE and picture.std() > 20


def test_the_context_token_looks_at_the_digit(shipped):
    """Asked for it, the attention lies on the four patches of a digit more than anywhere else."""
    model, processor = shipped
    scenes = [digits.still(np.random.default_rng(seed), test=True) for seed in range(12)]
    scenes = [scene for scene in scenes if scene.events]
    pixels = processor.image_processor(videos=np.stack([digits.frame(scene, 0) for scene in scenes]))["pixel_values"][0]
    weights = model.context_attention(pixels, questions.CLIP_DIGIT[0])
    np.testing.assert_allclose(weights.sum((1, 2)), 1, rtol=1e-5)
    for scene, attention in zip(scenes, weights, strict=True):
        column, row = (round(at / digits.STEP) - 1 for at in scene.events[0].path[0])
        assert attention[row : row + 2, column : column + 2].mean() > 2 * attention.mean()
