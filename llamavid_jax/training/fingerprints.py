"""Detects whether arrays have changed: a 32-bit number for each, computed where they are on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np


def fingerprints(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """A 32-bit number for each array: its elements' bits, mixed with their indices, summed; the same on every mesh.

    A change of a single element is always detected, any other except with probability 2^-32.
    """
    values = np.asarray(_fingerprints(arrays).addressable_data(0)) if arrays else []
    return {path: int(value) for path, value in zip(sorted(arrays), values, strict=True)}


@jax.jit
def _fingerprints(arrays: dict[str, jax.Array]) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(_mixed(bits.astype(jnp.uint32) ^ _mixed(place)), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays.values()])


def _mixed(x: jax.Array) -> jax.Array:
    """Maps 32-bit numbers one-to-one to others: the last steps of MurmurHash3.

    Without it, bits would cancel in the sum: two flipped signs do, whatever odd weights their indices have.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
