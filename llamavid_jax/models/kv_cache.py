"""The key-value cache of decoding: what prefill made of the prompt, and room for the answer behind it.

    prompt   [L, B, T, K, H]   read only: no step copies it, and the compiler is free in how it lies on the chip
    answer   [L, B, S, K, H]   one slot a step, the same in all rows, written in place

Of the kind "float" both hold keys and values in the type of products; of the kind "int8" whole numbers and one scale
for each head of each position, half the memory; what it costs is measured in docs/quantization.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from llamavid_jax.parallel.sharding import constrain

KINDS = ("float", "int8")
AXES = (None, "batch", None, "kv_heads", None)  # of an array of the cache; scales lack the last


class Rounded(NamedTuple):
    """`values · scale`: the largest of a head is 127."""

    values: Int8[Array, "*L B S K H"]
    scale: Float[Array, "*L B S K"]

    @classmethod
    def of(cls, x: Float[Array, "*B K H"]) -> "Rounded":
        whole = x.astype(jnp.float32)
        scale = (jnp.max(jnp.abs(whole), axis=-1) / 127).astype(x.dtype)
        divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
        return cls(jnp.round(whole / divisor[..., None]).clip(-127, 127).astype(jnp.int8), scale)


class KeysValues(NamedTuple):
    """Of one layer, or of all."""

    k: Float[Array, "*L B S K H"] | Rounded
    v: Float[Array, "*L B S K H"] | Rounded

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], kind: str) -> "KeysValues":
        """One layer's, as a cache of `kind` holds them; the layers of a prompt are stacked."""
        made = cls(Rounded.of(k), Rounded.of(v)) if kind == "int8" else cls(k, v)
        return jax.tree.map(lambda x: constrain(x, *AXES[1 : x.ndim + 1]), made)

    def room(self, slots: int) -> "KeysValues":
        """Empty slots for an answer to this prompt."""

        def empty(x: jax.Array) -> jax.Array:
            return constrain(jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype), *AXES[: x.ndim])

        return jax.tree.map(empty, self)

    def layer(self, index: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values in the type of products."""
        k, v = (
            x.values[index].astype(x.scale.dtype) * x.scale[index][..., None] if isinstance(x, Rounded) else x[index]
            for x in self
        )
        return k, v


class KVCache(NamedTuple):
    """Keys and values of every layer: row b's positions are those of its prompt, then the answer's slots."""

    prompt: KeysValues
    answer: KeysValues
    written: Int[Array, ""]  # slots of the answer

    def visible(self, positions: Int[Array, " B"]) -> Bool[Array, "B _"]:
        """Of T + S: its prompt, without the padding behind it, and the answer up to the new position itself."""
        prompt, answer = (jnp.arange(jax.tree.leaves(part)[0].shape[2]) for part in (self.prompt, self.answer))
        own = prompt < (positions - self.written)[:, None]
        return jnp.concatenate([own, jnp.broadcast_to(answer <= self.written, (len(own), len(answer)))], axis=1)

    def write(self, layer: int, k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]) -> "KVCache":
        """Writes the new position of every row in one layer."""
        new = KeysValues.of(k, v, "int8" if isinstance(self.answer.k, Rounded) else "float")
        slot = layer, slice(None), self.written
        put = jax.tree.map(lambda room, x: room.at[slot].set(x[:, 0].astype(room.dtype)), self.answer, new)
        return self._replace(answer=put)
