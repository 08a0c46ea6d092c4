"""Rotary positions in the half-split layout of transformers' LLaMA, with linear scaling."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float, factor: float) -> Float[Array, "2 B T h"]:
    """Float32 cosines and sines `[2, B, T, H/2]` of position / factor × theta^(-2i/H), once for all layers."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = (positions.astype(jnp.float32) / factor)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B T N H"], rotation: Float[Array, "2 #B T h"]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of every head by their angle, in float32."""
    cos, sin = rotation[:, :, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
