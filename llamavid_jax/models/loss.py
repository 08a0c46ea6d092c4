"""Next-token cross-entropy in chunks over the vocabulary: hidden `[B, T, D]`, labels `[B, T]` → three sums.

The logits of a row of 65,536 tokens over a vocabulary of 32,000 would take 8 GB in float32.  Here the logits of one
chunk of the vocabulary are computed at a time, and recomputed for the gradient.  Labels are shifted here and nowhere
else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from llamavid_jax.shapes import IGNORE_LABEL

VOCABULARY_CHUNK = 4096  # tokens of the vocabulary at a time


class LossSums(NamedTuple):
    """Sums over the labelled tokens: cross-entropy in nats, labels with the highest score, and number of labels."""

    loss: Float[Array, "..."]
    correct: Float[Array, "..."]
    tokens: Float[Array, "..."]


@jax.named_scope("loss")
def next_token_sums(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B T"],
) -> LossSums:
    """Position t is scored against label t+1; labels of IGNORE_LABEL do not count.

    `kernel` is the head's; matmuls in its dtype, sums in float32.
    """
    words, kept = _targets(labels)
    log_sum, own, best = _scores(hidden, kernel, words)
    return LossSums(
        jnp.sum(jnp.where(kept, log_sum - own, 0)),
        jnp.sum(kept & (own >= best), dtype=jnp.float32),
        jnp.sum(kept, dtype=jnp.float32),
    )


@jax.jit
def next_token_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """The mean cross-entropy over the labelled tokens, from complete logits."""
    words, kept = _targets(labels)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, words[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * kept) / jnp.maximum(kept.sum(), 1)


def _targets(labels: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token that each position is scored against, label t+1 at position t, and whether there is one."""
    targets = jnp.pad(labels[:, 1:], [(0, 0), (0, 1)], constant_values=IGNORE_LABEL)
    kept = targets != IGNORE_LABEL
    return jnp.where(kept, targets, 0), kept


def _scores(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], words: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """log Σ exp of all scores, the score of `words`, and the largest one.

    Chunk i holds the tokens i, i + n, i + 2n, ..., so that a vocabulary sharded over devices needs no resharding.
    """
    size = kernel.shape[1]
    number = -(-size // VOCABULARY_CHUNK)
    columns = -(-size // number)
    padded = jnp.pad(kernel, [(0, 0), (0, number * columns - size)])
    chunks = rearrange(padded, "d (c n) -> n d c", n=number)

    @jax.checkpoint
    def add(carry, chunk):
        peak, total, own = carry
        index, part = chunk
        scores = jnp.einsum("btd,dc->btc", hidden, part, preferred_element_type=jnp.float32)
        real = jnp.arange(columns) * number + index < size
        scores = jnp.where(real, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(axis=-1)))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(scores - new_peak[..., None]).sum(axis=-1)
        picked = jnp.take_along_axis(scores, (words // number)[..., None], axis=-1)[..., 0]
        return (new_peak, total, jnp.where(words % number == index, picked, own)), None

    start = jnp.full(words.shape, -jnp.inf, jnp.float32), *jnp.zeros((2, *words.shape), jnp.float32)
    (peak, total, own), _ = jax.lax.scan(add, start, (jnp.arange(number), chunks))
    return jnp.log(total) + peak, own, peak
