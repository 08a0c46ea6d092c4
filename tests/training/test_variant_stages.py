"""The recipes of the model's variants, run for one step on tiny models: which of their parameters train."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from paths import CONFIGS
from training_cases import draw
from training_data import losses, write_data, write_tokenizers

from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.checkpoints.weights import load_weights
from llamavid_jax.commands import train
from llamavid_jax.config.schema import HEAD
from llamavid_jax.text.tokenizer import load_tokenizer
from llamavid_jax.weights import inventory

TINY = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml")
PARTS = ("vision_tower_config", "qformer_config", "text_config")
VARIANTS = {  # the settings of each variant, apart from its sizes
    "bert": {"bert_type": "raw_bert", "qformer_config": {"cross_attention_frequency": 1}},
    "clip": {
        "vision_tower_config": {"kind": "clip", "feature_layer": -2, "hidden_act": "quick_gelu"},
        "qformer_config": {"encoder_hidden_size": 96},
    },
    "start_end": {"mm_use_im_start_end": True, "text_config": {"vocab_size": TINY.text_config.vocab_size + 2}},
}


def small(variant: str) -> LLaMAVIDLlavaConfig:
    changes = VARIANTS[variant]
    parts = {name: dataclasses.replace(getattr(TINY, name), **new) for name, new in changes.items() if name in PARTS}
    return dataclasses.replace(TINY, **changes | parts)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with images and clips only, so that every caption has a visual."""
    file = write_data(tmp_path_factory.mktemp("data"), count=12)
    records = [record for record in json.loads(file.read_text()) if "image" in record or "video" in record]
    file.write_text(json.dumps(records))
    return file


def run(recipe: str, data, folder, *overrides: str) -> dict[str, np.ndarray]:
    """Runs one step of a recipe on the model at `folder/start`; returns the saved weights."""
    arguments = [
        f"data.path={data}", f"model={folder / 'model.yaml'}", f"start.model={folder / 'start'}",
        "data.buckets=[{frames: 4, pairs: 4, questions: 1, tokens: 128}]", "data.question_tokens=16", "mesh=fsdp=1",
        "training.batch_size=8", "training.micro_batches=1", "training.steps=1", "training.dtype=float32",
        "training.log_every=1", "training.remat=none", "optimizer.warmup=0.0", f"output={folder / recipe}",
    ]  # fmt: skip
    assert train.main(["--config", str(CONFIGS / f"{recipe}.yaml"), *arguments, *overrides]) == 0
    assert np.isfinite(losses(folder / recipe)).all()
    return weights_of(folder / recipe / "model")


def weights_of(folder) -> dict[str, np.ndarray]:
    config = LLaMAVIDLlavaConfig.from_pretrained(folder)
    return {path: np.asarray(value) for path, value in load_weights(folder, config).items()}


@pytest.fixture
def start(request, tmp_path):
    """The name of a variant, whose random model is saved as a folder to start from."""
    config = small(request.param)
    shapes = inventory.shapes(config)
    values = zip(shapes, draw(7, *shapes.values()), strict=True)
    params = {path: jnp.asarray(value + path.endswith("scale")) for path, value in values}
    LLaMAVIDLlavaForConditionalGeneration(config, params).save_pretrained(tmp_path / "start")
    write_tokenizers(tmp_path / "start")
    model = {name: value for name, value in config.to_dict().items() if name not in HEAD}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(model))))
    return request.param


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """The changed parameters, without key biases, which change by rounding only (the softmax ignores them)."""
    changed = {path for path, value in after.items() if not np.array_equal(value, before[path])}
    return {path for path in changed if not path.endswith(("key.bias", "key_projector.bias"))}


@pytest.mark.parametrize("start", ["bert", "clip"], indirect=True)
def test_stage_1(start, data, tmp_path):
    """The trained parts have changed, and all else is as before."""
    begun = weights_of(tmp_path / "start")
    trains = ("visual_tokens.", "qformer.") if start == "bert" else ("visual_tokens.",)
    expected = moved(dict.fromkeys(begun), {path: value for path, value in begun.items() if path.startswith(trains)})
    assert moved(begun, run(f"stage1_align_{start}", data, tmp_path, "start.adapter=")) == expected
    left = LLaMAVIDLlavaConfig.from_pretrained(tmp_path / f"stage1_align_{start}" / "model")
    assert left == dataclasses.replace(small(start), image_aspect_ratio="crop")


@pytest.mark.parametrize("start", ["start_end"], indirect=True)
def test_start_and_end_tokens(start, data, tmp_path):
    """Stage 1 changes only the embeddings of the tokens beside a visual, and stage 2 starts from them.

    As in the original, captions have no start and end tokens: the changed rows are BOS and each caption's first word.
    """
    begun, table = weights_of(tmp_path / "start"), "llama.embed.embedding"
    first = run("stage1_align_start_end", data, tmp_path, "start.adapter=")
    trained = {path for path in begun if path.startswith("visual_tokens.") and not path.endswith("key_projector.bias")}
    assert moved(begun, first) == trained | {table}
    tokenizer = load_tokenizer(tmp_path / "start")
    captions = [tokenizer.encode(record["conversations"][1]["value"]) for record in json.loads(data.read_text())]
    beside = {tokenizer.bos_id, *(next(i for i in ids if i != tokenizer.bos_id) for ids in captions)}
    assert set(np.flatnonzero((first[table] != begun[table]).any(axis=1))) == beside
    adapter = tmp_path / "stage1_align_start_end" / "adapter"
    still = [f"start.adapter={adapter}", "optimizer.learning_rate=1e-30"]
    assert not moved(first, run("stage2_instruct_start_end", data, tmp_path, *still))
