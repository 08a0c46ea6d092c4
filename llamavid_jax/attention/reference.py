"""Softmax attention written out: the definition that every other backend is compared with.

Scores and softmax are float32 whatever the inputs.  Long queries run in blocks, so that scores take
`[N, block, S]` at a time: three hours of video (21,600 tokens) would otherwise need 60 GB for one 7B layer.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

QUERY_BLOCK = 1024


def reference_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    *,
    mask: Bool[Array, "..."] | None = None,
    causal: bool = False,
    segment_ids: Int[Array, "*B T"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*B T N H"]:
    """softmax(q kᵀ / √H) v, with grouped-query heads where K < N.

    `mask` is True where a query may look at a key and broadcasts to `[*B, N, T, S]`; `causal` lets position t see
    keys 0..t, those of its own segment where `segment_ids` are given.  `dropout_key` drops attention weights.
    """
    length = q.shape[-3]
    if length <= QUERY_BLOCK or dropout_key is not None or mask is not None:
        mask = _causal(0, length, k.shape[-3], segment_ids) if causal else mask
        return _attend(q, k, v, mask, dropout_rate, dropout_key)

    @jax.checkpoint  # the gradient recomputes a block's scores instead of keeping those of all blocks
    def block(start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, start, QUERY_BLOCK, axis=-3)
        mask = _causal(start, QUERY_BLOCK, k.shape[-3], segment_ids) if causal else None
        return _attend(part, k, v, mask, 0.0, None)

    blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(q, [(0, 0)] * (q.ndim - 3) + [(0, blocks * QUERY_BLOCK - length), (0, 0), (0, 0)])
    out = jnp.moveaxis(jax.lax.map(block, jnp.arange(blocks) * QUERY_BLOCK), 0, -4)
    return out.reshape(*padded.shape[:-1], v.shape[-1])[..., :length, :, :]


def _causal(start: jax.Array | int, queries: int, keys: int, segment_ids: jax.Array | None) -> jax.Array:
    """`[T, S]`, or `[*B, 1, T, S]` with segments: which keys the queries start, start + 1, ... see."""
    visible = (start + jnp.arange(queries))[:, None] >= jnp.arange(keys)[None, :]
    if segment_ids is None:
        return visible
    padded = jnp.pad(segment_ids, [(0, 0)] * (segment_ids.ndim - 1) + [(0, -keys % queries)])
    own = jax.lax.dynamic_slice_in_dim(padded, start, queries, axis=-1)
    return visible & (own[..., :, None] == segment_ids[..., None, :])[..., None, :, :]


def _attend(q, k, v, mask, dropout_rate, dropout_key):
    """One matrix product for each key-value head, over its group's concatenated queries: fast on a CPU."""
    *batch, length, heads, size = q.shape
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (q, k, v))
    kv_heads, keys = k.shape[-3:-1]
    q = q.reshape(*batch, kv_heads, heads // kv_heads * length, size)
    scores = jnp.einsum("...kth,...ksh->...kts", q, k, preferred_element_type=jnp.float32) * size**-0.5
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*batch, heads, length, keys))
        scores = jnp.where(mask.reshape(scores.shape), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    out = jnp.einsum("...kts,...ksh->...kth", weights.astype(v.dtype), v)
    return jnp.moveaxis(out.reshape(*batch, heads, length, size), -3, -2)


def cached_attention(
    q: Float[Array, "B 1 N H"],
    parts: Sequence[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K H"]]],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 N H"]:
    """Attention of one position over keys and values in several arrays, S positions in total.

    The arrays are not concatenated: that would copy the cache in every step.
    """
    scores = jnp.concatenate([_scores(q, k) for k, _ in parts], axis=-1)
    scores = jnp.where(visible[:, None, None, None, :], scores, jnp.finfo(jnp.float32).min)
    ends = itertools.accumulate(k.shape[1] for k, _ in parts[:-1])
    weights = jnp.split(jax.nn.softmax(scores, axis=-1), list(ends), axis=-1)
    out = sum(
        jnp.einsum("bkgts,bskh->btkgh", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v) in zip(weights, parts, strict=True)
    )
    return out.reshape(q.shape).astype(q.dtype)


def attention_to_prompt(
    q: Float[Array, "B A N H"],
    prompt: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    own: tuple[Float[Array, "B A K H"], Float[Array, "B A K H"]],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B A N H"], Float[Array, "B A S"]]:
    """Attention of the A positions after a prompt, and their weights on each prompt position, averaged over heads.

    They attend to the prompt's keys and values where `visible` is True, and to their `own` causally.
    """
    batch, length = q.shape[:2]
    causal = jnp.broadcast_to(_causal(0, length, length, None), (batch, length, length))
    mask = jnp.concatenate([jnp.broadcast_to(visible[:, None], (batch, length, visible.shape[1])), causal], axis=-1)
    scores = jnp.concatenate([_scores(q, prompt[0]), _scores(q, own[0])], axis=-1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    parts = zip(jnp.split(weights, [visible.shape[1]], axis=-1), (prompt[1], own[1]), strict=True)
    out = sum(jnp.einsum("bkgts,bskh->btkgh", part.astype(v.dtype), v) for part, v in parts)
    return out.reshape(q.shape).astype(q.dtype), weights[..., : visible.shape[1]].mean((1, 2))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`[*B, K, N/K, T, S]` in float32, before the softmax."""
    *batch, length, heads, size = q.shape
    grouped = q.reshape(*batch, length, k.shape[-2], heads // k.shape[-2], size)
    return jnp.einsum("...tkgh,...skh->...kgts", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
