"""The key-value cache of decoding: the prompt's keys and values, from prefill, and then slots for the answer.

    prompt   [L, B, T, K, H]   read only: no step copies it, and the compiler may choose its layout on the chip
    answer   [L, B, S, K, H]   one slot a step, the same in all rows, written in place; a ring where rows join and leave

Kind "float" holds both in the compute dtype.  Kind "int8" holds integers and one scale for each head of each position,
in half the memory; docs/quantization.md measures what that costs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from llamavid_jax.parallel.sharding import constrain

KINDS = ("float", "int8")
AXES = (None, "batch", None, "kv_heads", None)  # of a cache array; scales lack the last one


class Rounded(NamedTuple):
    """`values · scale`; the largest absolute value of a head is 127."""

    values: Int8[Array, "*L B S K H"]
    scale: Float[Array, "*L B S K"]

    @classmethod
    def of(cls, x: Float[Array, "*B K H"]) -> "Rounded":
        full = x.astype(jnp.float32)
        scale = (jnp.max(jnp.abs(full), axis=-1) / 127).astype(x.dtype)
        divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
        return cls(jnp.round(full / divisor[..., None]).clip(-127, 127).astype(jnp.int8), scale)


class KeysValues(NamedTuple):
    """Keys and values of one layer, or of all."""

    k: Float[Array, "*L B S K H"] | Rounded
    v: Float[Array, "*L B S K H"] | Rounded

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], kind: str) -> "KeysValues":
        """One layer's keys and values, as a cache of `kind` holds them; prefill's scan stacks the layers."""
        made = cls(Rounded.of(k), Rounded.of(v)) if kind == "int8" else cls(k, v)
        return jax.tree.map(lambda x: constrain(x, *AXES[1 : x.ndim + 1]), made)

    def room(self, slots: int) -> "KeysValues":
        """Empty slots for an answer to this prompt."""

        def empty(x: jax.Array) -> jax.Array:
            return constrain(jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype), *AXES[: x.ndim])

        return jax.tree.map(empty, self)

    @property
    def slots(self) -> int:
        """Positions of a row, S."""
        return jax.tree.leaves(self)[0].shape[2]

    def grown(self, slots: int) -> "KeysValues":
        """The same, padded with empty slots to `slots`."""

        def longer(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, slots - x.shape[2]) if axis == 2 else (0, 0) for axis in range(x.ndim)])
            return constrain(padded, *AXES[: x.ndim])

        return jax.tree.map(longer, self)

    def layer(self, index: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values in the compute dtype."""
        return _whole(jax.tree.map(lambda x: x[index], self))

    def block(self, layer: jax.Array, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values at `size` positions from `first` on, in the compute dtype."""

        def cut(x: jax.Array) -> jax.Array:
            starts = (layer, 0, first, *[0] * (x.ndim - 3))
            return jax.lax.dynamic_slice(x, starts, (1, len(x[0]), size, *x.shape[3:]))[0]

        return _whole(jax.tree.map(cut, self))

    def write(self, new: "KeysValues", first: jax.Array) -> "KeysValues":
        """Writes `new`, all layers of some positions of every row, from position `first` on."""
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=2), self, new)


def _whole(of_layer: KeysValues) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    k, v = (x.values.astype(x.scale.dtype) * x.scale[..., None] if isinstance(x, Rounded) else x for x in of_layer)
    return k, v


class KVCache(NamedTuple):
    """Keys and values of every layer: row b's positions are those of its prompt, then the answer's slots.

    Rows that start together use the slots from 0 on.  In a batch that rows join and leave, `lengths` holds each row's
    prompt length and the slots are a ring buffer: a row's answer is in the newest slots, one for each of its positions,
    of which there may be at most S.
    """

    prompt: KeysValues
    answer: KeysValues
    written: Int[Array, ""]  # answer slots written so far
    lengths: Int[Array, " B"] | None = None

    def visible(self, positions: Int[Array, " B"]) -> Bool[Array, "B _"]:
        """Which of T + S positions a row attends to: its prompt without padding, its answer up to the new one."""
        lengths = positions - self.written if self.lengths is None else self.lengths
        own = jnp.arange(self.prompt.slots) < lengths[:, None]
        age = (self.written - jnp.arange(self.answer.slots)) % self.answer.slots  # steps since a slot was written
        return jnp.concatenate([own, age <= (positions - lengths)[:, None]], axis=1)

    def write(self, layer: int, k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]) -> "KVCache":
        """Writes the new position of every row in one layer."""
        new = KeysValues.of(k, v, "int8" if isinstance(self.answer.k, Rounded) else "float")
        slot = layer, slice(None), self.written % self.answer.slots
        put = jax.tree.map(lambda room, x: room.at[slot].set(x[:, 0].astype(room.dtype)), self.answer, new)
        return self._replace(answer=put)
