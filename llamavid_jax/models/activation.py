"""Activations of the vision tower, the text decoder and the projector."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """x · Φ(x), exactly: by erf in float32 and rounded once, as PyTorch computes it whatever the type of `x`.

    `jax.nn.gelu` takes erfc, which is two polynomials, an exponential and a choice where erf is one fraction, and in 16
    bit it rounds after every operation.
    """
    full = x.astype(jnp.float32)
    return (0.5 * full * (1 + jax.lax.erf(full * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """CLIP's."""
    return x * jax.nn.sigmoid(1.702 * x)
