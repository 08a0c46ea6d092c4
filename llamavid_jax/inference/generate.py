"""Merged rows → new ids: one bucketed prefill, then a compiled decode loop over its cache and room for the answer.

The host looks at the ids after every block of decode steps, to stop rows at stop strings and to stream their text;
within a block nothing leaves the device.  A row's greedy ids depend neither on its batch nor on its bucket.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llamavid_jax.inference.sampling import Sampling, next_tokens
from llamavid_jax.models.kv_cache import KeysValues, KVCache
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.shapes import TEXT, Row, bucket, pad_rows

BLOCK_STEPS = 16  # decode steps between two looks of the host
SMALLEST_LENGTH = 64  # of prompts and of room for answers


class DecodeState(NamedTuple):
    """What the decode loop carries."""

    token: Int[Array, " B"]  # the newest token of every row, not yet in the cache
    position: Int[Array, " B"]  # where that token stands
    done: Bool[Array, " B"]  # rows that have ended; they go on computing, unread
    cache: KVCache
    keys: Key[Array, " B"]  # one a row


@functools.partial(jax.jit, static_argnums=0, static_argnames="greedy")
def prefill(
    graphdef,
    params,
    token_ids: Int[Array, "B T"],
    visual: Float[Array, "1 N D"],
    visual_index: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    seed: UInt32[Array, ""],
    sampling: Sampling,
    *,
    greedy: bool,
) -> tuple[Int[Array, " B"], Key[Array, " B"], KeysValues]:
    """Runs the prompts: the first token of every row, its key, and what the cache holds of the prompts."""
    model: LlamaVid = nnx.merge(graphdef, params)
    hidden, prompt = model.llama.prefill(model.merge(token_ids, visual, visual_index))
    rows = jnp.arange(len(lengths))
    logits = model.llama.logits(hidden[rows, lengths - 1])
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
    return next_tokens(logits, keys, lengths, sampling, greedy=greedy), keys, prompt


answer_room = jax.jit(KeysValues.room, static_argnames="slots")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("greedy",), donate_argnames="state")
def decode_block(
    graphdef,
    params,
    state: DecodeState,
    steps: Int[Array, ""],
    eos: Int[Array, ""],
    sampling: Sampling,
    *,
    greedy: bool,
) -> tuple[DecodeState, Int[Array, "B s"]]:
    """The next `steps` tokens of every row, at most BLOCK_STEPS: the newest one of `state` and those after it.

    They come as `[B, BLOCK_STEPS]`, filled up with `eos`.
    """
    model: LlamaVid = nnx.merge(graphdef, params)
    tokens = jnp.full((len(state.token), BLOCK_STEPS), eos, jnp.int32)

    def more(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry):
        step, state, tokens = carry
        tokens = tokens.at[:, step].set(state.token)
        done = state.done | (state.token == eos)
        embedded = model.llama.embed(state.token[:, None])
        hidden, cache = model.llama.decode(embedded, state.position, state.cache)
        logits = model.llama.logits(hidden[:, 0])
        token = next_tokens(logits, state.keys, state.position + 1, sampling, greedy=greedy)
        return step + 1, DecodeState(token, state.position + 1, done, cache, state.keys), tokens

    _, state, tokens = jax.lax.while_loop(more, body, (0, state, tokens))
    return state, tokens


def generate(
    graphdef: Any,
    params: Any,
    rows: Sequence[Row],
    visual: Float[Array, "N D"],
    *,
    max_new_tokens: int,
    eos: int,
    sampling: Sampling,
    seed: int,
    on_tokens: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """New ids of every row, without the end token `eos` (-1: never end).

    `on_tokens(row, ids)` is given a row's new ids as they come and returns True to stop that row.
    """
    lengths = np.array([len(row.token_ids) for row in rows], np.int32)
    batch, length = bucket(len(rows)), bucket(int(lengths.max()), SMALLEST_LENGTH)
    lengths = np.pad(lengths, (0, batch - len(rows)), constant_values=1)
    greedy = sampling.temperature == 0
    token, keys, prompt = prefill(
        graphdef,
        params,
        pad_rows([row.token_ids for row in rows], batch, length, 0),
        visual[None],
        pad_rows([row.visual_index for row in rows], batch, length, TEXT),
        lengths,
        np.uint32(seed),
        _as_arrays(sampling),
        greedy=greedy,
    )
    cache = KVCache(prompt, answer_room(prompt, slots=bucket(max_new_tokens, SMALLEST_LENGTH)), jnp.int32(0))
    state = DecodeState(token, jnp.asarray(lengths), jnp.arange(batch) >= len(rows), cache, keys)
    new: list[list[int]] = [[] for _ in rows]
    ended = np.zeros(len(rows), bool)
    for done in range(0, max_new_tokens, BLOCK_STEPS):
        steps = min(BLOCK_STEPS, max_new_tokens - done)
        state, tokens = decode_block(
            graphdef, params, state, np.int32(steps), np.int32(eos), _as_arrays(sampling), greedy=greedy
        )
        for index, ids in enumerate(np.asarray(tokens)[: len(rows), :steps].tolist()):
            if ended[index]:
                continue
            ids = ids[: ids.index(eos)] if eos in ids else ids
            new[index] += ids
            stopped = on_tokens is not None and on_tokens(index, ids)
            ended[index] = stopped or len(ids) < steps
        if ended.all():
            break
        state = state._replace(done=jnp.asarray(np.pad(ended, (0, batch - len(rows)), constant_values=True)))
    return new


def _as_arrays(sampling: Sampling) -> Sampling:
    return Sampling(np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p))
