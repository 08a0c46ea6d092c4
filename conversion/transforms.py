"""What conversion does beyond moving axes (`llamavid_jax/weights/row.py`): fused biases and position tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from conversion.stored_tensor import CheckpointError
from llamavid_jax.weights.row import TorchWeight


def to_jax(value: np.ndarray, weight: TorchWeight) -> np.ndarray:
    """A file's weight in our layout; the value may be a view."""
    if weight.third is not None:
        value = value.reshape(3, -1)
        if np.any(value[1] != 0):
            raise CheckpointError(
                f"{weight.name} has a key bias that is not zero; EVA ViT has none, so this is another model"
            )
        value = value[weight.third]
    return weight.to_jax(value)


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Position table [1+p*p, E] for another image size: [1+side*side, E], the CLS row unchanged.

    torch's bicubic without antialiasing and without aligned corners, in float32, as the original does at load time.
    """
    old = math.isqrt(len(table) - 1)
    if old * old != len(table) - 1:
        raise CheckpointError(f"the position table has {len(table)} rows; one CLS row and a square number are needed")
    grid = jnp.asarray(table[1:], jnp.float32).reshape(old, old, -1)
    grid = jax.image.resize(grid, (side, side, grid.shape[-1]), "bicubic-pytorch", antialias=False)
    return np.concatenate([table[:1], np.asarray(grid).reshape(side * side, -1).astype(table.dtype)])
