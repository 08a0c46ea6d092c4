"""Attention of a chunk over a cache equals attention over the whole row."""

import jax.numpy as jnp
import numpy as np
import pytest

from llamavid_jax.attention import chunk
from llamavid_jax.attention.chunk import chunk_attention
from llamavid_jax.attention.reference import reference_attention


@pytest.mark.parametrize(("start", "size", "slots"), [(0, 8, 16), (3, 8, 16), (13, 8, 48), (24, 8, 40), (31, 1, 32)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_whole_row(monkeypatch, start, size, slots, kv_heads):
    """The cache is read in blocks of 16, the last of which overlaps the one before; from `start` on it holds noise."""
    monkeypatch.setattr(chunk, "KEY_BLOCK", 16)
    rng = np.random.default_rng(start)
    length = start + size
    q = jnp.asarray(rng.normal(size=(2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, kv_heads, 8)), jnp.float32) for _ in range(2))
    cache = rng.normal(size=(2, 2, slots, kv_heads, 8)).astype(np.float32) * 100
    cache[:, :, :start] = np.stack([k, v])[:, :, :start]
    stored = jnp.asarray(cache)

    def earlier(first, size):
        assert size <= 16
        return tuple(jnp.asarray(part)[:, jnp.arange(size) + first] for part in stored)

    got = chunk_attention(q[:, start:], k[:, start:], v[:, start:], earlier, slots, jnp.int32(start))
    wanted = reference_attention(q, k, v, causal=True)[:, start:]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
