"""Resizes tables: positions for another image size, and vocabularies with new rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llamavid_jax.errors import CheckpointError


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


def grow_rows(table: np.ndarray, rows: int, drawn: np.ndarray | None = None) -> np.ndarray:
    """Table [V, D] extended to `rows`: every new row is the mean of all before it, as the original starts new tokens.

    `drawn` [1, D] is the first new row (for `<im_patch>`, which nothing uses) and counts in the mean.
    """
    table = table if drawn is None else np.concatenate([table, drawn.astype(table.dtype)])
    mean = table.astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - len(table), axis=0)])
