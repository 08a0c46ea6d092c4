"""Rows split over the `sequence` axis and frames over all axes: eight devices equal one, and none holds a whole row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import random, relative_error, segments
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from llamavid_jax.attention import tile as tile_file
from llamavid_jax.attention.attention import attention
from llamavid_jax.attention.reference import reference_attention
from llamavid_jax.attention.ring import ring_attention
from llamavid_jax.attention.tile import LAX_TILE, splash_tile
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Structure
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.parallel.rows import take_slots
from llamavid_jax.parallel.sharding import partition_spec
from llamavid_jax.shapes import TEXT, Batch
from llamavid_jax.training.layout import batch_sharding
from llamavid_jax.training.step import loss_sums, visual_table
from llamavid_jax.weights import inventory

pytestmark = pytest.mark.sharding
BAR = 1e-5  # relative error in float32


def with_gradients(attend, q, k, v):
    """Output and gradients of q, k and v for fixed random output gradients, in one program."""
    (weight,) = random(q.shape)
    out, gradients = jax.vjp(attend, q, k, v)
    return out, *gradients(weight)


def check_ring(sizes, q, k, v, ids, attend):
    wanted = jax.jit(
        lambda *qkv: with_gradients(lambda *x: reference_attention(*x, causal=True, segment_ids=ids), *qkv)
    )(q, k, v)
    with jax.set_mesh(make_mesh(**sizes)):
        got = jax.jit(lambda *qkv: with_gradients(attend, *qkv))(q, k, v)
    for ours, one in zip(got, wanted, strict=True):
        assert relative_error(ours, one) < BAR


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "packed"),
    [
        ({"sequence": 8}, 4, True),
        ({"sequence": 4, "tensor": 2}, 2, False),
        ({"sequence": 2, "tensor": 4}, 2, True),  # two key-value heads for four chips
        ({"fsdp": 2, "sequence": 4}, 1, True),
    ],
    ids=str,
)
def test_ring_equals_one_device(sizes, kv_heads, packed):
    """Forward and gradients, of rows with several samples and padding; `attention` itself chooses the ring."""
    q, k, v = random((2, 64, 4, 8), (2, 64, kv_heads, 8), (2, 64, kv_heads, 8))
    ids = jnp.asarray(segments(64)) if packed else None
    check_ring(sizes, q, k, v, ids, lambda *qkv: attention(*qkv, causal=True, segment_ids=ids))


def test_ring_in_several_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(tile_file, "QUERY_BLOCK", 8)
    q, k, v = random((1, 96, 2, 8), (1, 96, 1, 8), (1, 96, 1, 8))
    check_ring({"sequence": 3}, q, k, v, None, ring_attention)


def test_ring_of_kernels_equals_one_device():
    """Tiles by the Pallas kernel, in interpret mode."""
    q, k, v = random((1, 512, 2, 64), (1, 512, 1, 64), (1, 512, 1, 64))
    ids = jnp.asarray(segments(512))[:1]
    check_ring({"sequence": 2}, q, k, v, ids, lambda *qkv: ring_attention(*qkv, ids, splash=True, interpret=True))


@pytest.mark.parity
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_in_tpu_interpret_mode(causal):
    """As on a TPU, memory holds NaN until it is written.  Without causality queries see part of the tile."""
    q, k, v, out, d_out = random(*[(1, n, 128, 64) for n in (2, 1, 1, 2, 2)])
    ids = jnp.asarray(1 + (np.arange(128) >= 50), jnp.int32)[None, None]
    queries, keys = (q * 0.125, ids), (k, v, ids)
    row = out, jnp.full((1, 2, 128), 4.0), d_out

    def both(tile):
        return *tile.forward(queries, keys, causal), *tile.backward(queries, keys, row, causal)

    got = jax.jit(lambda: both(splash_tile(pltpu.InterpretParams())))()
    for ours, wanted in zip(got, jax.jit(lambda: both(LAX_TILE))(), strict=True):
        assert relative_error(ours, wanted) < BAR


def test_rows_that_do_not_divide_are_not_cut():
    q, k, v = random((1, 20, 2, 8), (1, 20, 2, 8), (1, 20, 2, 8))
    check_ring({"sequence": 8}, q, k, v, None, lambda *qkv: attention(*qkv, causal=True))


@pytest.mark.parametrize("tables", [1, 2])
def test_slots_are_filled_from_a_cut_table(tables):
    """The table's length does not divide evenly; with its gradient.  One table for all rows, or one for each."""
    table, weight = random((tables, 13, 6), (2, 16, 6))
    index = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 16)), jnp.int32).at[0, 3].set(TEXT)
    there = (index >= 0)[..., None]

    def both(take):
        return jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.where(there, take(t), 0) * weight)))(table)

    value, gradient = both(lambda t: jnp.take_along_axis(t, jnp.maximum(index, 0)[..., None], axis=1))
    with jax.set_mesh(make_mesh(fsdp=2, sequence=4)):
        got, got_gradient = both(lambda t: take_slots(t, index))
    assert abs(got / value - 1) < BAR
    assert relative_error(got_gradient, gradient) < BAR


# ---- the whole model

CONFIG = LLaMAVIDLlavaConfig(
    LLaMAVIDLlavaVisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=2
    ),
    LLaMAVIDLlavaQFormerConfig(
        vocab_size=126, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    ),
    LlamaConfig(
        vocab_size=104,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
    ),
    num_query=4,
)
FRAMES, PAIRS, TOKENS = 8, 24, 176
TABLE = PAIRS * CONFIG.tokens_per_frame  # 48, which no other size equals


@pytest.fixture(scope="module")
def structure():
    return Structure(nnx.eval_shape(lambda: LlamaVid(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def params(structure):
    generator = np.random.default_rng(0)
    return {
        path: (generator.normal(size=leaf.shape, scale=0.1) + path.endswith("scale")).astype(np.float32)
        for path, leaf in structure.shapes.items()
    }


@pytest.fixture(scope="module")
def batch():
    """Two rows; pairs refer to the frames of their own quarter, in random order."""
    generator = np.random.default_rng(1)

    def integers(high, *shape):
        return generator.integers(0, high, shape).astype(np.int32)

    ids = segments(TOKENS)
    index = np.where(generator.random(ids.shape) < 0.3, integers(TABLE, *ids.shape), TEXT).astype(np.int32)
    return Batch(
        frames=generator.integers(0, 256, (2, FRAMES, 8, 8, 3)).astype(np.uint8),
        pair_frame=integers(FRAMES // 4, 2, PAIRS) + np.repeat(np.arange(4) * (FRAMES // 4), PAIRS // 4),
        pair_question=integers(2, 2, PAIRS),
        question_ids=integers(126, 2, 2, 6),
        question_mask=np.arange(6) < np.array([[[6], [4]], [[3], [5]]]),
        token_ids=integers(104, *ids.shape),
        visual_index=index,
        labels=np.where(index == TEXT, integers(104, *ids.shape), -100),
        segment_ids=ids,
        positions=np.tile(np.arange(TOKENS, dtype=np.int32), (2, 1)),
    )


def on_mesh(sizes, structure, params, batch, function):
    """The program compiled for the mesh, and its result."""
    mesh = make_mesh(**sizes)
    axes = inventory.axes(CONFIG, {path: leaf.shape for path, leaf in structure.shapes.items()})
    placed = {
        path: jax.device_put(value, NamedSharding(mesh, partition_spec(value.shape, axes[path], mesh)))
        for path, value in params.items()
    }
    with jax.set_mesh(mesh):
        batch = Batch(*(jax.device_put(x, batch_sharding(mesh, name)) for name, x in batch._asdict().items()))
        compiled = jax.jit(function).lower(placed, batch).compile()
        return compiled, compiled(placed, batch)


def test_no_device_holds_a_row_or_its_table_whole(structure, params, batch):
    """A training step's loss and gradients equal one device's, and no array of it has a dimension T or is N × D."""
    trains = {path: value for path, value in params.items() if path.startswith(("llama.", "visual_tokens.value"))}

    def step(trained, batch):
        def loss(trained):
            return loss_sums(structure.model(params | trained), batch).loss

        return jax.value_and_grad(loss)(trained)

    value, gradients = jax.jit(step)(trains, batch)
    compiled, (got, got_gradients) = on_mesh({"fsdp": 2, "sequence": 4}, structure, trains, batch, step)
    assert abs(got / value - 1) < BAR
    for path, gradient in gradients.items():
        assert relative_error(got_gradients[path], gradient) < BAR, path
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())}
    width = CONFIG.text_config.hidden_size
    assert any(TOKENS // 4 in shape and width in shape for shape in shapes)  # a device's share
    assert not [shape for shape in shapes if TOKENS in shape or {TABLE, width} <= set(shape)]


def test_the_vision_part_uses_all_devices(structure, params, batch):
    """Equal tokens, and a device does little more than an eighth of the matmuls, also over `tensor` and `sequence`."""

    def tokens(params, batch):
        return visual_table(structure.model(params), batch, "none", None)

    single = jax.jit(tokens).lower(params, batch).compile()
    compiled, got = on_mesh({"fsdp": 2, "tensor": 2, "sequence": 2}, structure, params, batch, tokens)
    assert relative_error(got, single(params, batch)) < BAR
    assert compiled.cost_analysis()["flops"] < 1.15 * single.cost_analysis()["flops"] / 8
