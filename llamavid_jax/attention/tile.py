"""One tile of ring attention: some queries against some keys, alone or as a part of a row's softmax.

    forward   q, keys → out = softmax(q kᵀ) v [B, N, T, H] and lse = log Σ exp(q kᵀ) [B, N, T], to merge with others
    backward  also the whole row's out, lse and gradient of out → the tile's share of the gradients of q, k and v

With the whole row's lse, exp(q kᵀ - lse) are the tile's final weights: nothing of size T × S is kept.  Two
implementations: JAX's splash kernel on TPU, and lax in blocks of queries elsewhere.  Positions are axis 2 of all
arrays.  `queries` are `(q, ids)`, scaled; `keys` are `(k, v, ids)`, of fewer heads or as many; `ids [B, 1, T]` are
segments, None where each row is one sample.  `causal` counts the positions of both sides from 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

from llamavid_jax.attention.splash import make_kernel

QUERY_BLOCK = 1024  # of the lax tile, whose scores take [N, block, S] at a time
HIDDEN = kernel.DEFAULT_MASK_VALUE  # the score of masked keys; finite, so that a query may see no key of a tile

Queries = tuple[jax.Array, jax.Array | None]
Keys = tuple[jax.Array, jax.Array, jax.Array | None]
Row = tuple[jax.Array, jax.Array, jax.Array]


class Tile(NamedTuple):
    """`forward(queries, keys, causal)` and `backward(queries, keys, (out, lse, gradient of out), causal)`."""

    forward: Callable[[Queries, Keys, bool], tuple[jax.Array, jax.Array]]
    backward: Callable[[Queries, Keys, Row, bool], tuple[jax.Array, jax.Array, jax.Array]]


def splash_tile(interpret: Any = False) -> Tile:
    """The Pallas kernel, for lengths in multiples of 128 and heads of 64.

    JAX has no public gradient that takes the lse of a longer row, so this calls the private one behind the public
    kernel.
    """

    def run(queries: Queries, keys: Keys, causal: bool) -> tuple[kernel.SplashAttentionKernel, Any]:
        (q, q_ids), (k, _, k_ids) = queries, keys
        attend = make_kernel(*q.shape[1:3], k.shape[2], causal=causal, save_residuals=True, interpret=interpret)
        return attend, None if q_ids is None else kernel.SegmentIds(q_ids[:, 0], k_ids[:, 0])

    def forward(queries: Queries, keys: Keys, causal: bool) -> tuple[jax.Array, jax.Array]:
        attend, ids = run(queries, keys, causal)
        out, (lse,) = jax.vmap(attend)(queries[0], *keys[:2], ids)
        return out, lse

    def backward(queries: Queries, keys: Keys, row: Row, causal: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        attend, ids = run(queries, keys, causal)

        def gradients(q, k, v, ids, out, lse, d_out):
            kept = (q, k, v, ids, None, out, lse, attend.dq_mask_info, attend.dkv_mask_info)
            return kernel._splash_attention_bwd(**attend.kwargs, res=kept, do=d_out)[3:6]

        return jax.vmap(gradients)(queries[0], *keys[:2], ids, *row)

    return Tile(forward, backward)


def _lax_forward(queries: Queries, keys: Keys, causal: bool) -> tuple[jax.Array, jax.Array]:
    v = keys[1]

    def block(_, q, seen):
        scores = _scores(q, keys, seen)
        lse = jax.nn.logsumexp(scores, axis=-1)
        out = jnp.einsum("bkgts,bksh->bkgth", jnp.exp(scores - lse[..., None]).astype(v.dtype), v)
        return None, (out, lse)

    return _in_blocks(block, None, queries, keys, (), causal)[1]


def _lax_backward(queries: Queries, keys: Keys, row: Row, causal: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    k, v, _ = keys

    def block(total, q, seen, out, lse, d_out):
        weights = jnp.exp(_scores(q, keys, seen) - lse[..., None])
        own = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = weights * (jnp.einsum("bkgth,bksh->bkgts", d_out, v, preferred_element_type=jnp.float32) - own)
        d_scores, weights = d_scores.astype(k.dtype), weights.astype(v.dtype)
        d_k = jnp.einsum("bkgts,bkgth->bksh", d_scores, q, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("bkgts,bkgth->bksh", weights, d_out, preferred_element_type=jnp.float32)
        return (total[0] + d_k, total[1] + d_v), (jnp.einsum("bkgts,bksh->bkgth", d_scores, k),)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), (d_q,) = _in_blocks(block, nothing, queries, keys, row, causal)
    return d_q, d_k, d_v


LAX_TILE = Tile(_lax_forward, _lax_backward)


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Out and lse over two sets of keys, from those over each set."""
    (one_out, one_lse), (other_out, other_lse) = one, other
    lse = jnp.logaddexp(one_lse, other_lse)
    return one_out * jnp.exp(one_lse - lse)[..., None] + other_out * jnp.exp(other_lse - lse)[..., None], lse


def _scores(q: jax.Array, keys: Keys, seen: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkgth,bksh->bkgts", q, keys[0], preferred_element_type=jnp.float32)
    return jnp.where(seen, scores, HIDDEN)


def _in_blocks(function: Callable, total: Any, queries: Queries, keys: Keys, row: tuple, causal: bool) -> Any:
    """`total, outputs = function(total, q, seen, *row)` over blocks of queries, heads split as `[K, N / K]`."""
    (q, q_ids), (k, _, k_ids) = queries, keys
    length, keys_length = q.shape[2], k.shape[2]
    size = math.gcd(length, QUERY_BLOCK) if length > QUERY_BLOCK else length

    def block(total, part):
        start, own_ids, *arrays = part
        seen = (start + jnp.arange(size))[:, None] >= jnp.arange(keys_length) if causal else jnp.bool_(True)
        if own_ids is not None:
            seen = seen & (own_ids[:, :, :, None] == k_ids[:, :, None, :])[:, :, None]
        return function(total, arrays[0], seen, *arrays[1:])

    def cut(x: jax.Array) -> jax.Array:
        return rearrange(x, "b n (m t) ... -> m b n t ...", t=size)

    grouped = (rearrange(cut(x), "m b (k g) ... -> m b k g ...", k=k.shape[1]) for x in (q, *row))
    ids = None if q_ids is None else cut(q_ids)
    total, outputs = jax.lax.scan(block, total, (jnp.arange(length // size) * size, ids, *grouped))
    return total, tuple(rearrange(x, "m b k g t ... -> b (k g) (m t) ...") for x in outputs)
