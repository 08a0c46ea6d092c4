"""Causal attention of a chunk of a row over itself and the positions before it, whose keys and values are in a cache.

    cache   0 ............ start ....... S      read in blocks of KEY_BLOCK, up to `start`
    chunk                  start ... start + T  causally, among themselves

The blocks' results are merged by their log-sum-exp, as in `ring.py`: scores take `[N, T, KEY_BLOCK]` however long the
row is, and another `start` needs no recompilation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamavid_jax.attention.tile import LAX_TILE, merge

KEY_BLOCK = 512  # positions of the cache

Earlier = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]  # (first position, how many) → keys and values


def chunk_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    earlier: Earlier,
    slots: int,
    start: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v of the positions `start`, `start + 1`, ... of every row; `slots` is the cache's length S."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    batch, size = len(q), min(KEY_BLOCK, slots)
    everywhere = jnp.ones((batch, 1, q.shape[2]), jnp.int32)

    def look(number: jax.Array, merged: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(number * size, slots - size)  # the last block overlaps the one before it
        positions = first + jnp.arange(size)
        seen = (positions >= number * size) & (positions < start)
        keys, values = (jnp.swapaxes(x, 1, 2) for x in earlier(first, size))
        ids = jnp.broadcast_to(seen.astype(jnp.int32), (batch, 1, size))
        return merge(merged, LAX_TILE.forward((q, everywhere), (keys, values, ids), False))

    out, lse = LAX_TILE.forward((q, None), (k, v, None), True)
    out, _ = jax.lax.fori_loop(0, -(-start // size), look, (out.astype(jnp.float32), lse))
    return jnp.swapaxes(out.astype(v.dtype), 1, 2)
