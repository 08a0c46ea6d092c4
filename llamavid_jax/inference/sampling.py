"""Picking the next token: greedy, temperature, top-k, top-p.  Small pure functions of one row's logits `[V]`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How to pick; temperature 0 is greedy, top_k 0 and top_p 1 are off.  As arrays, new values need no compilation.

    Arrays `[B]` hold a value for each row.
    """

    temperature: float | Float[Array, "*B"] = 0.0
    top_k: int | Int[Array, "*B"] = 0
    top_p: float | Float[Array, "*B"] = 1.0


def keep_top_k(logits: Float[Array, " V"], k: Int[Array, ""] | int) -> Float[Array, " V"]:
    """Keeps only the k greatest logits; all if k is 0."""
    threshold = jnp.sort(logits)[::-1][jnp.clip(k, 1, len(logits)) - 1]
    return jnp.where((k <= 0) | (logits >= threshold), logits, -jnp.inf)


def keep_top_p(logits: Float[Array, " V"], p: Float[Array, ""] | float) -> Float[Array, " V"]:
    """Keeps only the fewest tokens whose probabilities reach p; always the likeliest."""
    order = jnp.argsort(-logits)
    probabilities = jax.nn.softmax(logits[order])
    kept_before = jnp.cumsum(probabilities) - probabilities < p
    kept = jnp.zeros(len(logits), bool).at[order].set(kept_before.at[0].set(True))
    return jnp.where((p >= 1) | kept, logits, -jnp.inf)


def sample(logits: Float[Array, " V"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, ""]:
    """One token: temperature, then top-k, then top-p, in the order of transformers' logits warpers."""
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    drawn = jax.random.categorical(key, keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p))
    return jnp.where(sampling.temperature == 0, jnp.argmax(logits), drawn)


def next_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    positions: Int[Array, " B"],
    sampling: Sampling,
    *,
    greedy: bool,
) -> Int[Array, " B"]:
    """One token a row; a row's draw depends on its own key and position, not on the rest of the batch.

    `greedy`: no row has a temperature, which saves the sorting.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = jax.vmap(jax.random.fold_in)(keys, positions)
    of_rows = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), len(logits)), sampling)
    return jax.vmap(sample)(logits, draws, of_rows).astype(jnp.int32)
