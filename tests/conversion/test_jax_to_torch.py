"""Back to PyTorch: bit-exact in both layouts, read by torch and safetensors, the configuration of the same meaning."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from converted import (
    COMPUTED,
    CONFIG,
    GOLDEN,
    ORIGINAL,
    assert_bit_equal,
    back,
    convert,
    save_folder,
    state_dict,
)

from conversion import jax_to_torch
from conversion.read_torch import read_checkpoint
from conversion.torch_config import documented_config, original_config
from llamavid_jax.checkpoints.weights import load_weights, save_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("limit", [None, 400_000], ids=["one file", "shards"])
@pytest.mark.parametrize("layout", ["original", "documented"])
def test_recorded_checkpoints_come_back(tmp_path, layout, limit):
    folder = {"original": ORIGINAL, "documented": GOLDEN / "documented_format"}[layout]
    expected = state_dict() if layout == "original" else safetensors.torch.load_file(folder / "model.safetensors")
    convert(folder, tmp_path / "jax")
    out = tmp_path / "back"
    assert_bit_equal(back(tmp_path / "jax", out, layout, max_shard_bytes=limit), expected)
    assert LLaMAVIDLlavaConfig.from_pretrained(out) == LLaMAVIDLlavaConfig.from_pretrained(folder)
    assert (out / "qformer_tokenizer/vocab.txt").is_file()
    assert read_checkpoint(out).keys() == {name for name in expected if not name.endswith(COMPUTED)}
    sizes = [file.stat().st_size for file in out.iterdir() if file.suffix in (".bin", ".safetensors")]
    assert len(sizes) == 1 if limit is None else len(sizes) > 3 and max(sizes) < limit + 50_000


def test_from_one_layout_to_the_other(tmp_path):
    """Both checkpoints have the same weights; only the documented vocabulary is padded.  The video rate is kept."""
    convert(ORIGINAL, tmp_path / "jax")
    rate, again = (tmp_path / name / "video_preprocessor_config.json" for name in ("jax", "jax2"))
    rate.write_text(rate.read_text().replace('"fps": 1.0', '"fps": 0.5'))
    written = back(tmp_path / "jax", tmp_path / "documented", "documented")
    for name, value in safetensors.torch.load_file(GOLDEN / "documented_format/model.safetensors").items():
        assert torch.equal(written[name], value[: len(written[name])]), name
    convert(tmp_path / "documented", tmp_path / "jax2")
    assert again.read_text() == rate.read_text() and '"fps": 0.5' in rate.read_text()
    assert_bit_equal(back(tmp_path / "jax2", tmp_path / "original", "original"), state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bits(tmp_path, dtype):
    """Bit patterns including NaN and infinities survive in both layouts."""
    values = {name: value.to(dtype) for name, value in state_dict().items() if not name.endswith(COMPUTED)}
    name = "model.layers.0.mlp.gate_proj.weight"
    bits = torch.arange(values[name].numel(), dtype=torch.int32) * 12 - 2**15  # spread over all 2**16 patterns
    values[name] = bits.to(torch.int16).view(dtype).reshape(values[name].shape)
    convert(save_folder(tmp_path / "source", values, original_config(CONFIG)), tmp_path / "jax")
    assert_bit_equal(back(tmp_path / "jax", tmp_path / "a", "original"), values)
    back(tmp_path / "jax", tmp_path / "b", "documented")
    convert(tmp_path / "b", tmp_path / "jax2")
    assert_bit_equal(back(tmp_path / "jax2", tmp_path / "c", "original"), values)


def test_tied_head_is_named_twice(tmp_path):
    tied = dataclasses.replace(CONFIG, text_config=dataclasses.replace(CONFIG.text_config, tie_word_embeddings=True))
    values = state_dict() | {"lm_head.weight": state_dict()["model.embed_tokens.weight"]}
    convert(save_folder(tmp_path / "source", values, original_config(tied)), tmp_path / "jax")
    assert_bit_equal(back(tmp_path / "jax", tmp_path / "a", "original"), values)
    assert "language_model.lm_head.weight" not in back(tmp_path / "jax", tmp_path / "b", "documented")


def test_a_trained_checkpoint(tmp_path):
    """Weights saved by `save_weights`, whose chunks may differ from the converter's."""
    convert(ORIGINAL, tmp_path / "jax")
    params = load_weights(tmp_path / "jax", CONFIG)
    CONFIG.save_pretrained(tmp_path / "trained")
    save_weights(tmp_path / "trained", jax.tree.map(lambda leaf: leaf + 1, params))
    expected = {name: value + 1 for name, value in state_dict().items()}
    assert_bit_equal(back(tmp_path / "trained", tmp_path / "a", "original"), expected)


@pytest.mark.parametrize("form", [original_config, documented_config])
def test_configurations_mean_the_same(form):
    text = dataclasses.replace(
        CONFIG.text_config, rope_factor=16.0, rope_theta=5e5, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6
    )
    vision = dataclasses.replace(CONFIG.vision_tower_config, layer_norm_eps=1e-5, image_size=84)
    qformer = dataclasses.replace(CONFIG.qformer_config, dropout=0.3, cross_attention_frequency=3)
    changes = {"vision_tower_config": vision, "qformer_config": qformer, "num_query": 5}
    for compress_type in ("none", "mean", "grid:2"):
        config = dataclasses.replace(CONFIG, text_config=text, compress_type=compress_type, **changes)
        assert LLaMAVIDLlavaConfig.from_dict(json.loads(json.dumps(form(config)))) == config


def test_any_name_of_a_folder(tmp_path, monkeypatch):
    """Characters that have a meaning in URLs, and `..`, which TensorStore refuses in a path."""
    odd = tmp_path / "a #1 %41?"
    odd.mkdir()
    monkeypatch.chdir(odd)
    convert(ORIGINAL, odd / "jax")
    assert_bit_equal(back(odd / "jax", odd / "back", "original"), state_dict())
    parent = Path("..") / odd.name
    params = load_weights(parent / "jax", CONFIG)
    save_weights(parent / "again", params)
    jax.tree.map(np.testing.assert_array_equal, load_weights(parent / "again", CONFIG), params)


def test_damaged_weights_are_one_line(tmp_path, capsys):
    convert(ORIGINAL, tmp_path / "jax")
    for file in (tmp_path / "jax/weights/llama.layers.mlp.down.kernel/c").rglob("[0-9]"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    assert jax_to_torch.main([str(tmp_path / "jax"), str(tmp_path / "out"), "--layout", "documented"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "weights is damaged (" in error
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_bad_arguments(tmp_path, capsys):
    convert(ORIGINAL, tmp_path / "jax")
    linear = dataclasses.replace(CONFIG, mm_projector_type="linear")
    linear.save_pretrained(tmp_path / "linear")
    CONFIG.save_pretrained(tmp_path / "no_weights")
    for source, layout, kind, message in (
        (tmp_path / "gone", "original", ConfigError, "gone"),
        (tmp_path / "linear", "documented", CheckpointError, "mm_projector_type is 'linear'"),
        (tmp_path / "no_weights", "documented", CheckpointError, "is not an Orbax checkpoint"),
    ):
        with pytest.raises(kind, match=message):
            jax_to_torch.convert(source, tmp_path / "out", layout=layout)
    (tmp_path / "jax/config.json").write_bytes((tmp_path / "linear/config.json").read_bytes())
    assert jax_to_torch.main([str(tmp_path / "jax"), str(tmp_path / "out"), "--layout", "original"]) == 2
    assert "0 missing (), 2 unknown (visual_tokens.projector.1.bias, " in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
