"""The conversion tables: complete, exactly invertible, and right where they do more than move axes."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from flax import nnx
from paths import GOLDEN

from conversion.resize import resize_positions
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import LoraConfig, add_lora
from llamavid_jax.models.structure import params_of
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import Weight, axis_sizes, to_jax, to_torch, torch_shape, weight_table

# All sizes differ, so that no axis can be mistaken for another.
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
        "clip": dataclasses.replace(
            CONFIG,
            vision_tower_config=dataclasses.replace(CONFIG.vision_tower_config, kind="clip"),
            qformer_config=dataclasses.replace(CONFIG.qformer_config, encoder_hidden_size=16),
        ),
        "qformer": dataclasses.replace(CONFIG, bert_type="qformer"),
        "raw_bert": dataclasses.replace(
            CONFIG,
            bert_type="raw_bert",
            qformer_config=dataclasses.replace(CONFIG.qformer_config, cross_attention_frequency=1),
        ),
    }


@pytest.mark.parametrize("layout", ["original", "documented"])
@pytest.mark.parametrize("variant", variants())
def test_every_parameter_is_filled_once_and_back_again_is_exact(variant, layout):
    """Random weights in the file's shapes → parameters → weights: no parameter has gaps, each weight is bit-equal."""
    config = variants()[variant]
    shapes = inventory.shapes(config)
    table = weight_table(config, layout)
    rng = np.random.default_rng(0)
    filled = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for weight in table:
        shape = shapes[weight.path] if weight.index is None else shapes[weight.path][1:]
        value = rng.standard_normal(weight.shape).astype(np.float32)
        if weight.third is not None:
            value.reshape(3, -1)[1] = 0
        ours = to_jax(value, weight)
        assert ours.shape == shape
        filled[weight.path][... if weight.index is None else weight.index] += 1
        expected = value if weight.third is None else value.reshape(3, -1)[weight.third]
        np.testing.assert_array_equal(to_torch(ours, weight.pattern), expected)
    assert all((count == 1).all() for count in filled.values())
    names = [weight.name for weight in table if weight.third is None]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("variant", variants())
def test_the_inventory_is_the_built_model(variant):
    """Also with low-rank updates and with quantised kernels."""
    config, lora = variants()[variant], LoraConfig(rank=3)

    def make(config=config, rank=0):
        model = LlamaVid(config, rngs=nnx.Rngs(0))
        if rank:
            add_lora(model.llama, lora, nnx.Rngs(0))
        return model

    def built(*arguments):
        return {path: leaf.shape for path, leaf in params_of(nnx.eval_shape(lambda: make(*arguments))).items()}

    assert inventory.shapes(config) == built()
    assert inventory.shapes(config.quantized("int8")) == built(config.quantized("int8"))
    assert set(inventory.axes(config, built(config, 3))) == set(built(config, 3))


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
    shapes = inventory.shapes(CONFIG)
    table = {(weight.path, weight.index): weight for weight in weight_table(CONFIG, "original")}
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
        shape = shapes[path] if index is None else shapes[path][1:]
        x = rng.standard_normal((3, weight.shape[1]))
        left = equation.split(",")[0]
        grouped = x.reshape(3, *shape[: len(left) - 1])
        ours = np.einsum(equation, grouped, to_jax(value, weight)).reshape(3, -1)
        expected = torch.nn.functional.linear(torch.tensor(x), torch.tensor(value)).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12, err_msg=path)
    weight = table["vision.patch_embed.kernel", None]
    value, image = rng.standard_normal(weight.shape), rng.standard_normal((3, 7, 7))
    ours = np.einsum("cpq,pqce->e", image, to_jax(value, weight))
    expected = torch.nn.functional.conv2d(torch.tensor(image)[None], torch.tensor(value), stride=7)
    np.testing.assert_allclose(ours, expected.numpy().ravel(), rtol=1e-12)


def test_torch_shape_and_sizes():
    assert torch_shape("(n h) d -> d n h", (6, 2, 3)) == (6, 6)
    assert torch_shape("1 q c -> q c", (4, 5)) == (1, 4, 5)
    assert torch_shape("(t n h) e -> e t n h", (7, 3, 2, 5)) == (30, 7)
    assert axis_sizes("o c p q -> p q c o", (1, 2, 3, 4)) == {"p": 1, "q": 2, "c": 3, "o": 4}


def test_a_key_bias_is_an_error():
    weight = Weight("x.qkv.bias", 2, "vision.blocks.attn.v_bias", 0, "(n h) -> n h", (12,), (2, 2))
    value = np.arange(12.0)
    with pytest.raises(CheckpointError, match=r"x\.qkv\.bias has a key bias that is not zero"):
        to_jax(value, weight)
    value[4:8] = 0
    np.testing.assert_array_equal(to_jax(value, weight), [[8, 9], [10, 11]])


@pytest.mark.parametrize("old,new", [(16, 24), (24, 16), (4, 5), (7, 3), (1, 2), (16, 16)])
def test_positions_are_resized_as_torch_does(old, new):
    table = np.random.default_rng(0).standard_normal((1 + old * old, 5)).astype(np.float32)
    grid = torch.tensor(table[1:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = grid.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    resized = resize_positions(table, new)
    np.testing.assert_array_equal(resized[0], table[0])
    assert np.linalg.norm(resized[1:] - expected) / np.linalg.norm(expected) < 2e-6  # measured: up to 5e-7


def test_positions_of_the_original():
    found = 0
    for file in GOLDEN.rglob("expected.npz"):
        expected = np.load(file)
        tables = {name: expected[name][0] for name in expected.files if name.startswith("pos_embed_")}
        for (_, old), (name, new) in itertools.permutations(tables.items(), 2):
            resized = resize_positions(old, int(name.split("x")[-1]))
            if len(old) < len(new):
                assert np.linalg.norm(resized - new) / np.linalg.norm(new) < 1e-5
                found += 1
    assert found


def test_positions_need_a_square():
    with pytest.raises(CheckpointError, match="12 rows; one CLS row and a square number"):
        resize_positions(np.zeros((12, 4), np.float32), 4)
