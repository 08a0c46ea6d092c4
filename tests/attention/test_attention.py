"""The reference attention against torch's, the TPU kernel (interpreted) against it, and the choice of backend."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_cases import random, relative_error, segments

from llamavid_jax.attention import attention as attention_file
from llamavid_jax.attention.attention import attention
from llamavid_jax.attention.reference import QUERY_BLOCK, reference_attention
from llamavid_jax.attention.splash import splash_attention, splash_supports
from llamavid_jax.parallel.mesh import make_mesh

BAR = 1e-5  # relative error in float32


def torch_attention(q, k, v, mask=None, causal=False):
    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else torch.tensor(np.asarray(mask))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).numpy()


@pytest.mark.parity
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [7, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 300])
def test_reference_equals_torch(length, kv_heads, causal):
    """Less than a block of queries, exactly one, and more with a partial last block."""
    if kv_heads < 4 and length > QUERY_BLOCK + 1:
        length = QUERY_BLOCK + 77  # grouped heads: another partial last block
    q, k, v = random((1, length, 4, 8), (1, length, kv_heads, 8), (1, length, kv_heads, 8))
    assert relative_error(reference_attention(q, k, v, causal=causal), torch_attention(q, k, v, causal=causal)) < BAR


@pytest.mark.parity
def test_reference_with_other_keys_than_queries():
    q, k, v = random((2, QUERY_BLOCK + 5, 4, 8), (2, 33, 2, 8), (2, 33, 2, 8))
    assert relative_error(reference_attention(q, k, v), torch_attention(q, k, v)) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 1, 1, 9), (2, 4, 6, 9)])
def test_masks_equal_torch(shape):
    """Masks over keys, over queries and keys, over batch and keys, and over all four axes."""
    q, k, v = random((2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[..., 0] = True  # every query attends to at least one key
    got = reference_attention(q, k, v, mask=jnp.asarray(mask))
    assert relative_error(got, torch_attention(q, k, v, np.broadcast_to(mask, (2, 4, 6, 9)))) < BAR


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = random((1, 64, 2, 8), (1, 500, 2, 8), (1, 500, 2, 8))
    dropped = [
        reference_attention(q, k, v, dropout_rate=0.1, dropout_key=key)
        for key in jax.random.split(jax.random.key(0), 64)
    ]
    assert relative_error(dropped[0], dropped[1]) > 0.1
    assert relative_error(np.mean(dropped, axis=0), reference_attention(q, k, v)) < 0.1  # mean of 64 draws


MESHES = {"one device": None, "tensor=4, data=2": {"tensor": 4, "data": 2}, "tensor=8": {"tensor": 8}}


@pytest.mark.parity
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_splash_equals_the_reference(mesh, kv_heads):
    """Multi-head and grouped, including two key-value heads, which four or eight shards cannot split."""
    q, k, v = random((2, 256, 8, 64), (2, 256, kv_heads, 64), (2, 256, kv_heads, 64))
    wanted = reference_attention(q, k, v, causal=True)
    assert relative_error(on_mesh(mesh, lambda: splash_attention(q, k, v, interpret=True)), wanted) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("mesh", ["one device", "tensor=4, data=2"])
def test_splash_gradients_equal_the_references(mesh):
    q, k, v, weight = random((2, 128, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64), (2, 128, 4, 64))

    def gradients(attend):
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) * weight), argnums=(0, 1, 2))(q, k, v)

    got = on_mesh(mesh, lambda: gradients(lambda *qkv: splash_attention(*qkv, interpret=True)))
    for ours, wanted in zip(got, gradients(lambda *qkv: reference_attention(*qkv, causal=True)), strict=True):
        assert relative_error(ours, wanted) < BAR


def packed_torch_attention(q, k, v, ids):
    causal = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    return torch_attention(q, k, v, causal & (ids[:, None, :, None] == ids[:, None, None, :]))


@pytest.mark.parity
@pytest.mark.parametrize("length", [11, QUERY_BLOCK + 77])
def test_samples_that_share_a_row_see_themselves_alone(length):
    """Packed samples, in one block of queries and in several, with gradients."""
    q, k, v, weight = random((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 4, 8))
    ids = segments(length)
    got = attention(q, k, v, causal=True, segment_ids=jnp.asarray(ids))
    assert relative_error(got, packed_torch_attention(q, k, v, ids)) < BAR
    mask = jnp.asarray(np.tril(np.ones((length, length), bool)) & (ids[:, None, :, None] == ids[:, None, None, :]))

    def gradient(**options):
        return jax.grad(lambda q: jnp.sum(reference_attention(q, k, v, **options) * weight))(q)

    assert relative_error(gradient(causal=True, segment_ids=jnp.asarray(ids)), gradient(mask=mask)) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("mesh", ["one device", "tensor=4, data=2"])
def test_splash_with_segments_equals_the_reference(mesh):
    q, k, v, weight = random((2, 256, 4, 64), (2, 256, 4, 64), (2, 256, 4, 64), (2, 256, 4, 64))
    ids = jnp.asarray(segments(256))

    def value_and_gradient(attend):
        return jax.value_and_grad(lambda q: jnp.sum(attend(q) * weight))(q)

    got = on_mesh(mesh, lambda: value_and_gradient(lambda q: splash_attention(q, k, v, ids, interpret=True)))
    wanted = value_and_gradient(lambda q: reference_attention(q, k, v, causal=True, segment_ids=ids))
    assert abs(got[0] / wanted[0] - 1) < BAR
    assert relative_error(got[1], wanted[1]) < BAR


def test_segments_need_causality():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="segment_ids go with causal=True"):
        attention(q, q, q, segment_ids=jnp.ones((1, 4), jnp.int32))


def on_mesh(name, call):
    if MESHES[name] is None:
        return jax.jit(call)()
    with jax.set_mesh(make_mesh(**MESHES[name])):
        return jax.jit(call)()


def test_splash_refuses_what_the_kernel_does_not_take():
    q, k = random((1, 100, 4, 64), (1, 100, 4, 64))
    assert not splash_supports(q, k)
    with pytest.raises(ValueError, match="multiple of 128"):
        splash_attention(q, k, k, interpret=True)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "mask", "causal", "chosen"),
    [
        ("cpu", "float32", 128, False, True, "reference"),
        ("cpu", "bfloat16", 128, False, True, "reference"),
        ("gpu", "bfloat16", 128, False, True, "cudnn"),
        ("gpu", "bfloat16", 88, False, False, "cudnn"),  # the vision tower
        ("gpu", "float16", 64, False, True, "cudnn"),
        ("gpu", "float32", 128, False, True, "reference"),
        ("gpu", "bfloat16", 256, False, True, "reference"),
        ("gpu", "bfloat16", 12, False, True, "reference"),
        ("gpu", "bfloat16", 128, True, False, "reference"),
        ("tpu", "bfloat16", 128, False, True, "splash"),
        ("tpu", "float32", 64, False, True, "splash"),
        ("tpu", "bfloat16", 88, False, True, "reference"),
        ("tpu", "bfloat16", 128, False, False, "reference"),
        ("tpu", "bfloat16", 128, True, False, "reference"),
    ],
)
def test_choice_of_the_backend(monkeypatch, device, dtype, size, mask, causal, chosen):
    q, mask = jnp.zeros((1, 128, 4, size), dtype), jnp.ones(128, bool) if mask else None
    called = []

    def pretend(name):
        return lambda q, k, v, **_: called.append(name) or q

    monkeypatch.setattr(attention_file, "target", lambda: SimpleNamespace(platform=device, device_kind=device))
    monkeypatch.setattr(jax.nn, "dot_product_attention", pretend("cudnn"))
    monkeypatch.setattr(attention_file, "splash_attention", pretend("splash"))
    monkeypatch.setattr(attention_file, "reference_attention", pretend("reference"))
    attention(q, q, q, mask=mask, causal=causal)
    assert called == [chosen]


def test_a_named_backend_is_taken(monkeypatch):
    monkeypatch.setattr(attention_file, "splash_attention", lambda q, k, v, segment_ids: q + 1)
    q = jnp.zeros((1, 128, 4, 64))
    assert attention(q, q, q, causal=True, backend="splash").max() == 1
    assert attention(q, q, q, causal=True, backend="reference").max() == 0
