"""The inventory: what the built models hold, complete, exactly invertible, and what torch computes."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from flax import nnx

from conversion.transforms import to_jax
from llamavid_jax.config.schema import (
    LlamaConfig,
    LLaMAVIDLlavaConfig,
    LLaMAVIDLlavaQFormerConfig,
    LLaMAVIDLlavaVisionConfig,
)
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import LoraConfig, add_lora
from llamavid_jax.models.quantize import quantize_base
from llamavid_jax.parallel.sharding import flat_paths
from llamavid_jax.weights.llama import TARGETS
from llamavid_jax.weights.table import parameters, rows, weight_table

# Sizes all different, so that no two axes can be taken for each other.
CONFIG = LLaMAVIDLlavaConfig(
    vision_tower_config=LLaMAVIDLlavaVisionConfig(24, 34, 5, 6, image_size=28, patch_size=7),
    qformer_config=LLaMAVIDLlavaQFormerConfig(
        vocab_size=31, hidden_size=20, num_hidden_layers=7, num_attention_heads=2, intermediate_size=18,
        max_position_embeddings=13, cross_attention_frequency=3,
    ),
    text_config=LlamaConfig(
        vocab_size=37, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=14,
    ),
    num_query=11,
)  # fmt: skip


def variants():
    tied = dataclasses.replace(CONFIG.text_config, tie_word_embeddings=True)
    return {
        "mlp2x_gelu": CONFIG,
        "linear": dataclasses.replace(CONFIG, mm_projector_type="linear"),
        "mlp4x_gelu": dataclasses.replace(CONFIG, mm_projector_type="mlp4x_gelu"),
        "identity": dataclasses.replace(
            CONFIG, mm_projector_type="identity", text_config=dataclasses.replace(CONFIG.text_config, hidden_size=24)
        ),
        "tied": dataclasses.replace(CONFIG, text_config=tied),
    }


@pytest.mark.parametrize("layout", ["original", "documented"])
@pytest.mark.parametrize("variant", variants())
def test_every_parameter_is_filled_once_and_back_again_is_exact(variant, layout):
    """Random weights of the file's shapes → parameters → weights: each parameter whole, each weight bit-equal."""
    config = variants()[variant]
    table = weight_table(config, layout)
    rng = np.random.default_rng(0)
    filled = {path: np.zeros(parameter.shape, int) for path, parameter in parameters(config).items()}
    for weight in table:
        value = rng.standard_normal(weight.shape).astype(np.float32)
        if weight.third is not None:
            value.reshape(3, -1)[1] = 0
        ours = to_jax(value, weight)
        filled[weight.path][... if weight.layer is None else weight.layer] += np.ones(ours.shape, int)
        expected = value if weight.third is None else value.reshape(3, -1)[weight.third]
        np.testing.assert_array_equal(weight.to_torch(ours), expected)
    assert all((count == 1).all() for count in filled.values())
    names = [weight.name for weight in table if weight.third is None]
    assert len(names) == len(set(names))


def test_names_of_special_rows():
    names = {weight.name for weight in weight_table(CONFIG, "original")}
    crossed = {name.split(".")[5] for name in names if "crossattention" in name}
    assert crossed == {"0", "3", "6"}
    linear = {w.name for w in weight_table(variants()["linear"], "original")}
    assert "model.mm_projector.weight" in linear and "model.mm_projector.0.weight" not in linear
    four = {w.name for w in weight_table(variants()["mlp4x_gelu"], "original")}
    assert {f"model.mm_projector.{i}.bias" for i in (0, 2, 4, 6)} <= four
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in {w.name for w in weight_table(variants()["tied"], "original")}
    assert not [w for w in weight_table(variants()["identity"], "original") if "mm_projector" in w.name]


def test_patterns_compute_what_torch_computes():
    """A projection in our layout, contracted by einsum, equals torch's linear layer or convolution in the file's."""
    table = {(weight.path, weight.layer): weight for weight in weight_table(CONFIG, "original")}
    equations = {
        ("llama.layers.attn.q.kernel", 1): "td,dnh->tnh",
        ("llama.layers.attn.out.kernel", 0): "tnh,nhd->td",
        ("llama.layers.mlp.down.kernel", 0): "tm,md->td",
        ("llama.lm_head.kernel", None): "td,dv->tv",
        ("vision.blocks.attn.qkv.kernel", 4): "te,eanh->tanh",
        ("vision.blocks.attn.out.kernel", 0): "tnh,nhe->te",
        ("qformer.cross_attention.key.kernel", 2): "te,enh->tnh",
        ("visual_tokens.projector.1.kernel", None): "ti,io->to",
    }
    rng = np.random.default_rng(0)
    for (path, index), equation in equations.items():
        weight = table[path, index]
        value = rng.standard_normal(weight.shape)
        x = rng.standard_normal((3, weight.shape[1]))
        left = equation.split(",")[0]
        grouped = x.reshape(3, *weight.layer_shape[: len(left) - 1])
        ours = np.einsum(equation, grouped, to_jax(value, weight)).reshape(3, -1)
        expected = torch.nn.functional.linear(torch.tensor(x), torch.tensor(value)).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12, err_msg=path)
    weight = table["vision.patch_embed.kernel", None]
    value, image = rng.standard_normal(weight.shape), rng.standard_normal((3, 7, 7))
    ours = np.einsum("cpq,pqce->e", image, to_jax(value, weight))
    expected = torch.nn.functional.conv2d(torch.tensor(image)[None], torch.tensor(value), stride=7)
    np.testing.assert_allclose(ours, expected.numpy().ravel(), rtol=1e-12)


def built(config: LLaMAVIDLlavaConfig, lora: LoraConfig | None = None) -> dict:
    """Path → shape and type, of the model as it is built."""

    def make() -> LlamaVid:
        model = LlamaVid(config, rngs=nnx.Rngs(0))
        if lora:
            add_lora(model.llama, lora, nnx.Rngs(0))
        if lora and lora.base != "float":
            quantize_base(model.llama, lora.base)
        return model

    leaves = flat_paths(nnx.state(nnx.eval_shape(make), nnx.Param))
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}


def inventory(config: LLaMAVIDLlavaConfig, *lora) -> dict:
    return {path: (row.shape, row.dtype or "float32") for path, row in parameters(config, *lora).items()}


@pytest.mark.parametrize("variant", variants())
def test_the_inventory_is_what_is_built(variant):
    assert inventory(variants()[variant]) == built(variants()[variant])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_kernels_are_what_is_built(kind):
    assert inventory(CONFIG.quantized(kind)) == built(CONFIG.quantized(kind))


@pytest.mark.parametrize("targets", [list(TARGETS), ["q", "down"]])
@pytest.mark.parametrize(("base", "stored"), [("float", ""), ("int8", "int8"), ("nf4", "uint4")])
def test_updates_are_what_is_built(targets, base, stored):
    lora = LoraConfig(rank=3, targets=targets, base=base)
    assert inventory(CONFIG, 3, targets, stored) == built(CONFIG, lora)


def test_a_row_names_each_of_its_axes_once_in_both_layouts():
    for row in rows(CONFIG):
        ours, theirs = row.axes.split()[row.stacked :], re.findall("[a-z_]+", row.torch)
        assert sorted(ours) == sorted(theirs), row.path
        assert row.documented.count("{l}") == row.stacked
