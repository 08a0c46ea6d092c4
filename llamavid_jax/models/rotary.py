"""Rotary positions in the half-split layout of transformers' LLaMA, with linear scaling (T5, P17)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float, factor: float) -> Float[Array, "B T h"]:
    """Float32 angles `[B, T, H/2]`: position / factor × theta^(-2i/H)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return (positions.astype(jnp.float32) / factor)[..., None] * frequencies


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "#B T h"]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of every head by their angle, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
