"""The key-value cache of decoding: `[L, B, S, K, H]`, allocated once and written in place.

Of the kind "float" it holds keys and values in the type of products; of the kind "int8" whole numbers and one scale for
each head of each position, half the memory; what it costs is measured in docs/quantization.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from llamavid_jax.sharding import constrain

KINDS = ("float", "int8")


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


class KVCache(NamedTuple):
    """Keys and values of every layer; slot s of row b holds position s of that row; those beyond it are masked."""

    k: Float[Array, "L B S K H"] | Rounded
    v: Float[Array, "L B S K H"] | Rounded

    @classmethod
    def from_prefill(cls, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], length: int, kind: str) -> "KVCache":
        """One layer's cache of `length` slots, whose first T hold what prefill computed; the layers are stacked."""

        def hold(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return constrain(padded, *("batch", None, "kv_heads", None)[: x.ndim])

        return jax.tree.map(hold, cls(Rounded.of(k), Rounded.of(v)) if kind == "int8" else cls(k, v))

    def write(
        self, layer: int, positions: Int[Array, " B"], k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]
    ) -> "KVCache":
        """Writes one position of every row in one layer."""
        new = KVCache(k[:, 0], v[:, 0])
        if isinstance(self.k, Rounded):
            new = KVCache(*map(Rounded.of, new))
        slots = layer, jnp.arange(len(positions)), positions
        return jax.tree.map(lambda cache, x: cache.at[slots].set(x.astype(cache.dtype)), self, new)

    def read(self, layer: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer."""
        k, v = (
            x.values[layer].astype(x.scale.dtype) * x.scale[layer][..., None] if isinstance(x, Rounded) else x[layer]
            for x in self
        )
        return k, v
