"""Merged rows → new ids: prefills the prompts, then runs a compiled decode loop over their cache and the answers'.

    prefill   the prompt in one piece where attention is fused (TPU, GPU); on a CPU its first PREFILL_CHUNK positions
    extend    on a CPU the remaining positions, a chunk at a time, so that memory stays flat; on any device the part of
              a prompt after its common beginning with the previous one, whose keys and values were kept
    decode    one position at a time

The host reads the ids after every block of decode steps, to stop rows at stop strings and to stream their text;
within a block nothing leaves the device.  A row's greedy ids depend neither on its batch nor on its bucket.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llamavid_jax.inference.sampling import Sampling, next_tokens
from llamavid_jax.models.kv_cache import KeysValues, KVCache
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Params, Structure
from llamavid_jax.parallel.rows import ways
from llamavid_jax.parallel.sharding import target
from llamavid_jax.shapes import TEXT, Row, bucket, pad_rows

BLOCK_STEPS = 16  # decode steps before the host reads the ids
SMALLEST_LENGTH = 64  # smallest bucket of prompts and of answers
EVIDENCE_TOKENS, SMALLEST_EVIDENCE = 64, 8  # of an answer: 64 take 177 MB in a layer of 32 heads and 21,600 positions
PREFILL_CHUNK = 1024  # positions prefilled at a time on a CPU: the scores of more would fill the memory


class DecodeState(NamedTuple):
    """What the decode loop carries."""

    token: Int[Array, " B"]  # the newest token of every row, not yet in the cache
    position: Int[Array, " B"]  # of that token
    done: Bool[Array, " B"]  # rows that have ended; they are still computed, and ignored
    cache: KVCache
    keys: Key[Array, " B"]  # one a row


@functools.partial(jax.jit, static_argnums=0, static_argnames="greedy")
def prefill(
    structure: Structure,
    params: Params,
    token_ids: Int[Array, "B T"],
    visual: Float[Array, "1 N D"],
    visual_index: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    seed: UInt32[Array, ""],
    sampling: Sampling,
    *,
    greedy: bool,
) -> tuple[Int[Array, " B"], Key[Array, " B"], KeysValues]:
    """Runs the prompts: the first token of every row, its random key, and the prompts' keys and values."""
    model: LlamaVid = structure.model(params)
    hidden, prompt = model.llama.prefill(model.merge(token_ids, visual, visual_index))
    token, keys = _first_tokens(model, hidden, lengths - 1, lengths, seed, sampling, greedy)
    return token, keys, prompt


@functools.partial(jax.jit, static_argnums=0, static_argnames="greedy", donate_argnames="prompt")
def extend(
    structure: Structure,
    params: Params,
    token: Int[Array, " B"],
    prompt: KeysValues,
    token_ids: Int[Array, "B T"],
    visual: Float[Array, "B T D"],
    visual_index: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, " B"],
    seed: UInt32[Array, ""],
    sampling: Sampling,
    *,
    greedy: bool,
) -> tuple[Int[Array, " B"], Key[Array, " B"], KeysValues]:
    """Prefills the positions from `start` on; `token` and `prompt` are the results for the positions before.

    A row that does not end in this chunk keeps its `token`.
    """
    model: LlamaVid = structure.model(params)
    hidden, prompt = model.llama.extend(model.merge(token_ids, visual, visual_index), start, prompt)
    last = lengths - 1 - start
    ends = (last >= 0) & (last < token_ids.shape[1])
    new, keys = _first_tokens(model, hidden, jnp.where(ends, last, 0), lengths, seed, sampling, greedy)
    return jnp.where(ends, new, token), keys, prompt


def _first_tokens(model: LlamaVid, hidden, last, lengths, seed, sampling: Sampling, greedy: bool):
    """The token after position `last` of each row's hidden states, and the row's random key."""
    rows = jnp.arange(len(lengths))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
    return next_tokens(model.llama.logits(hidden[rows, last]), keys, lengths, sampling, greedy=greedy), keys


longer = jax.jit(KeysValues.grown, static_argnames="slots")
answer_room = jax.jit(KeysValues.room, static_argnames="slots")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("greedy",), donate_argnames="state")
def decode_block(
    structure: Structure,
    params: Params,
    state: DecodeState,
    steps: Int[Array, ""],
    eos: Int[Array, ""],
    sampling: Sampling,
    *,
    greedy: bool,
) -> tuple[DecodeState, Int[Array, "B s"]]:
    """The next `steps` tokens of every row, at most BLOCK_STEPS: the newest one of `state` and those after it.

    Returned as `[B, BLOCK_STEPS]`, padded with `eos`.
    """
    model: LlamaVid = structure.model(params)
    tokens, layers = jnp.full((len(state.token), BLOCK_STEPS), eos, jnp.int32), model.llama.each_layer()

    def more(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry):
        step, state, tokens = carry
        tokens = tokens.at[:, step].set(state.token)
        done = state.done | (state.token == eos)
        embedded = model.llama.embed(state.token[:, None])
        hidden, cache = model.llama.decode(embedded, state.position, state.cache, layers)
        logits = model.llama.logits(hidden[:, 0])
        token = next_tokens(logits, state.keys, state.position + 1, sampling, greedy=greedy)
        return step + 1, DecodeState(token, state.position + 1, done, cache, state.keys), tokens

    _, state, tokens = jax.lax.while_loop(more, body, (0, state, tokens))
    return state, tokens


def generate(
    structure: Structure,
    params: Params,
    rows: Sequence[Row],
    visual: Float[Array | np.ndarray, "N D"],
    *,
    max_new_tokens: int,
    eos: int,
    sampling: Sampling,
    seed: int,
    on_tokens: Callable[[int, list[int]], bool] | None = None,
    kept: tuple[int, KeysValues] | None = None,
) -> tuple[list[list[int]], KeysValues]:
    """New ids of every row, without the end token `eos` (-1: never end), and the prompts' keys and values.

    `on_tokens(row, ids)` receives a row's new ids as they come and returns True to stop that row.
    `kept`: a number of first positions with their keys and values from an earlier call, whose arrays are donated.
    """
    lengths = np.array([len(row.token_ids) for row in rows], np.int32)
    lengths = np.pad(lengths, (0, bucket(len(rows)) - len(rows)), constant_values=1)
    greedy, batch = sampling.temperature == 0, len(lengths)
    choice = (lengths, np.uint32(seed), _as_arrays(sampling))
    token, keys, prompt = _prefill(structure, params, rows, visual, choice, greedy, kept)
    cache = KVCache(prompt, answer_room(prompt, slots=bucket(max_new_tokens, SMALLEST_LENGTH)), jnp.int32(0))
    state = DecodeState(token, jnp.asarray(lengths), jnp.arange(batch) >= len(rows), cache, keys)
    new: list[list[int]] = [[] for _ in rows]
    ended = np.zeros(len(rows), bool)
    for done in range(0, max_new_tokens, BLOCK_STEPS):
        steps = min(BLOCK_STEPS, max_new_tokens - done)
        state, tokens = decode_block(
            structure, params, state, np.int32(steps), np.int32(eos), _as_arrays(sampling), greedy=greedy
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
    return new, state.cache.prompt


def evidence(
    structure: Structure,
    params: Params,
    rows: Sequence[Row],
    answers: Sequence[Sequence[int]],
    prompt: KeysValues,
    smallest: int = SMALLEST_EVIDENCE,
) -> list[Float[np.ndarray, " n"]]:
    """The share of an answer's attention on each visual token of its row: mean over layers, heads and positions.

    The positions are those that predicted the answer's ids: the prompt's last one, and those of all ids but the last,
    at most EVIDENCE_TOKENS.  `prompt` is what `generate` returned for the rows.  One program is compiled for each
    bucket of lengths from `smallest` on.
    """
    given = [[int(row.token_ids[-1]), *ids][:EVIDENCE_TOKENS] for row, ids in zip(rows, answers, strict=True)]
    batch, length = jax.tree.leaves(prompt)[0].shape[1], bucket(max(map(len, given)), smallest)
    start, asked = np.ones(batch, np.int32), np.zeros((batch, length), np.float32)
    for number, (row, ids) in enumerate(zip(rows, given, strict=True)):
        places = max(1, len(ids) - 1)
        start[number], asked[number, :places] = len(row.token_ids) - 1, 1 / places
    weights = np.asarray(_look_back(structure, params, pad_rows(given, batch, length, 0), start, asked, prompt))
    places = [np.flatnonzero(row.visual_index != TEXT) for row in rows]
    return [of_row[own] for of_row, own in zip(weights, places, strict=False)]  # padding rows follow


@functools.partial(jax.jit, static_argnums=0)
def _look_back(structure, params, token_ids, start, asked, prompt) -> Float[Array, "B S"]:
    llama = structure.model(params).llama
    return llama.look_back(llama.embed(token_ids), start, asked, prompt)


def prefills_at_once() -> bool:
    """Whether a prompt of any length is run in one piece: on TPUs and GPUs, and if the mesh shards rows."""
    return target().platform != "cpu" or ways() > 1


def _prefill(structure, params, rows, visual, choice, greedy: bool, kept):
    """The first token of every row, its key and the prompts' keys and values, in as many pieces as it takes."""
    lengths = choice[0]
    batch, length = len(lengths), int(lengths.max())
    if kept is None:
        size = bucket(length if prefills_at_once() else min(length, PREFILL_CHUNK), SMALLEST_LENGTH)
        token_ids, visual_index = _columns(rows, batch, 0, size)
        head = np.minimum(lengths, size)
        token, keys, prompt = prefill(
            structure, params, token_ids, visual[None], visual_index, head, *choice[1:], greedy=greedy
        )
        start = size
    else:
        (start, prompt), token, keys = kept, jnp.zeros(batch, jnp.int32), None
    if start >= length:
        return token, keys, prompt
    size = min(bucket(length - start, SMALLEST_LENGTH), PREFILL_CHUNK)
    chunks, table = range(start, length, size), np.asarray(visual)
    if prompt.slots < chunks[-1] + size:
        prompt = longer(prompt, slots=bucket(chunks[-1] + size))
    for at in chunks:
        token_ids, visual_index = _columns(rows, batch, at, size)
        own = table[np.maximum(visual_index, 0)]  # each position's own visual token, so that no program holds them all
        places = np.where(visual_index == TEXT, TEXT, np.arange(size, dtype=np.int32))
        token, keys, prompt = extend(
            structure, params, token, prompt, token_ids, own, places, np.int32(at), *choice, greedy=greedy
        )
    return token, keys, prompt


def _columns(rows: Sequence[Row], batch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and visual index `[batch, size]` of the positions from `start` on."""
    part = slice(start, start + size)
    return (
        pad_rows([row.token_ids[part] for row in rows], batch, size, 0),
        pad_rows([row.visual_index[part] for row in rows], batch, size, TEXT),
    )


def _as_arrays(sampling: Sampling) -> Sampling:
    return Sampling(np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p))
