"""The running decode batch on the device: B slots, which rows join and leave while other rows continue.

    a row's prompt  ─ extend, chunk by chunk ─▶ KeysValues [L, 1, t, K, H] ─ join ─▶ slot b of a DecodeState

The batch keeps prompts at one of a few lengths T, which fits its longest prompt; the answers share a ring buffer
(`models/kv_cache.py`).  So a fixed set of programs serves every request.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from llamavid_jax.inference.generate import DecodeState
from llamavid_jax.models.kv_cache import AXES, KeysValues, KVCache
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Params, Structure
from llamavid_jax.parallel.sharding import constrain

SCORED, MOST_LIKELY = 64, 20  # tokens of an answer that are scored at a time, and the alternatives to each


def prompt_sizes(longest: int, chunk: int) -> list[int]:
    """The lengths T for prompts of up to `longest` positions: `chunk`, 4 × `chunk`, 16 × `chunk`, ..., `longest`.

    All are multiples of `chunk`, the last one rounded up.
    """
    last, sizes = -(-longest // chunk) * chunk, []
    size = chunk
    while size < last:
        sizes.append(size)
        size *= 4
    return [*sizes, last]


# `keep_unused`: made in a program that takes the model's arrays, new arrays are committed to its devices, like all that
# is computed from them.  Otherwise each program that takes an empty array would be compiled twice
@functools.partial(jax.jit, static_argnums=(0, 2), keep_unused=True)
def empty_row(structure: Structure, params: Params, slots: int) -> tuple[Int[Array, " 1"], KeysValues]:
    """What `extend` starts a prompt from: a dummy token, and room for `slots` positions."""
    return jnp.zeros(1, jnp.int32), _empty_prompts(structure.model(params), 1, slots)


def _empty_prompts(model: LlamaVid, rows: int, slots: int) -> KeysValues:
    """Zeros `[L, rows, slots, K, H]`, in the format of the model's cache."""
    config = model.llama.config
    zeros = jnp.zeros((rows, slots, config.num_key_value_heads, config.head_dim), model.llama.embed.dtype)

    def stacked(x: jax.Array) -> jax.Array:
        return constrain(jnp.zeros((config.num_hidden_layers, *x.shape), x.dtype), *AXES[: x.ndim + 1])

    return jax.tree.map(stacked, KeysValues.of(zeros, zeros, model.llama.kv_cache))


def _placed(state: DecodeState) -> DecodeState:
    """The state with its rows sharded as `decode_block` returns them."""
    rows = {name: constrain(getattr(state, name), AXES[1]) for name in ("token", "position", "done")}
    return state._replace(**rows)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4), keep_unused=True)
def empty_batch(structure: Structure, params: Params, rows: int, slots: int, room: int) -> DecodeState:
    """A batch without rows: prompts of `slots` positions, answers of `room`."""
    prompt = _empty_prompts(structure.model(params), rows, slots)
    zeros = jnp.zeros(rows, jnp.int32)
    cache = KVCache(prompt, prompt.room(room), jnp.int32(0), zeros)
    return _placed(DecodeState(zeros, zeros, jnp.ones(rows, bool), cache, jax.random.split(jax.random.key(0), rows)))


@functools.partial(jax.jit, donate_argnames="state")
def join(
    state: DecodeState,
    slot: Int[Array, ""],
    prompt: KeysValues,
    token: Int[Array, " 1"],
    key: Key[Array, " 1"],
    length: Int[Array, ""],
) -> DecodeState:
    """Puts a row into `slot`: its prompt of `length` positions, its first token and its key."""

    def put(whole: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, row, (0, slot, *[0] * (whole.ndim - 2)))

    cache = state.cache
    cache = cache._replace(
        prompt=jax.tree.map(put, cache.prompt, prompt),
        written=cache.written % cache.answer.slots,
        lengths=cache.lengths.at[slot].set(length),
    )
    rows = state.token.at[slot].set(token[0]), state.position.at[slot].set(length), state.done.at[slot].set(False)
    return _placed(DecodeState(*rows, cache, state.keys.at[slot].set(key[0])))


@functools.partial(jax.jit, static_argnames="slots")
def prompt_of(state: DecodeState, slot: Int[Array, ""], *, slots: int) -> KeysValues:
    """The prompt that `join` put into `slot`, its first `slots` positions."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 1)[:, :, :slots], state.cache.prompt)


@functools.partial(jax.jit, static_argnames="slots")
def resized(state: DecodeState, *, slots: int) -> DecodeState:
    """The batch with prompts of `slots` positions, which must hold those of all rows."""
    prompt = state.cache.prompt
    if slots < prompt.slots:
        prompt = jax.tree.map(lambda x: x[:, :, :slots], prompt)
    return _placed(state._replace(cache=state.cache._replace(prompt=prompt.grown(slots))))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="prompt")
def score(
    structure: Structure,
    params: Params,
    prompt: KeysValues,
    before: Int[Array, "1 SCORED"],
    ids: Int[Array, "1 SCORED"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "1 SCORED"], Int[Array, "1 SCORED K"], Float[Array, "1 SCORED K"], KeysValues]:
    """Log-probabilities of `ids`, each as the token that follows the one at the same index in `before`.

    Also returns the MOST_LIKELY ids at each position with theirs.  `before` begins at position `start`; the returned
    prompt is longer by `before`.
    """
    model: LlamaVid = structure.model(params)
    hidden, prompt = model.llama.extend(model.llama.embed(before), start, prompt)
    every = jax.nn.log_softmax(model.llama.logits(hidden))
    values, best = jax.lax.top_k(every, min(MOST_LIKELY, every.shape[-1]))
    return jnp.take_along_axis(every, ids[..., None], -1)[..., 0], best, values, prompt
