"""Activations of the vision tower, the text decoder and the projector."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Exact GELU, x · Φ(x): computed by erf in float32 and rounded once, as PyTorch does for every type of `x`.

    `jax.nn.gelu` uses erfc: two polynomials, an exponential and a select, where erf is one rational function.  In 16
    bits it also rounds after every operation.
    """
    full = x.astype(jnp.float32)
    return (0.5 * full * (1 + jax.lax.erf(full * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)
