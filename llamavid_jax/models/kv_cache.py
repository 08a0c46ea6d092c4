"""The key-value cache of decoding: `[L, B, S, K, H]`, allocated once and written in place."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamavid_jax.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values of every layer; slot s of row b holds position s of that row; those beyond it are masked."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @classmethod
    def from_prefill(cls, k: Float[Array, "L B T K H"], v: Float[Array, "L B T K H"], length: int) -> "KVCache":
        """A cache of `length` slots whose first T hold what prefill computed."""
        padding = [(0, 0), (0, 0), (0, length - k.shape[2]), (0, 0), (0, 0)]
        return cls(*(constrain(jnp.pad(x, padding), None, "batch", None, "kv_heads", None) for x in (k, v)))

    def write(
        self, layer: int, positions: Int[Array, " B"], k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]
    ) -> "KVCache":
        """Writes one position of every row in one layer."""
        rows = jnp.arange(len(positions))
        return KVCache(
            self.k.at[layer, rows, positions].set(k[:, 0].astype(self.k.dtype)),
            self.v.at[layer, rows, positions].set(v[:, 0].astype(self.v.dtype)),
        )
