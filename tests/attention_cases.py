"""Inputs for attention tests, and the relative error of results."""

import jax.numpy as jnp
import numpy as np


def random(*shapes, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def relative_error(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def segments(length: int) -> np.ndarray:
    """Segment ids of two rows with samples of several lengths; the second row is padded."""
    first, second = length // 3, length // 2 + 5
    row = np.arange(length)
    return np.stack([1 + (row >= first) + (row >= second), np.where(row < second, 1, 0)]).astype(np.int32)
