"""Fingerprints: the same on every mesh, different after every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.fingerprints import fingerprints

SHAPE = (8, 16, 16)  # layers of one matrix each


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 in float32"])
def array(request) -> np.ndarray:
    dtype, _, wider = request.param.partition(" in ")
    drawn = np.random.default_rng(0).standard_normal(SHAPE).astype(jnp.dtype(dtype))
    return drawn.astype(wider) if wider else drawn


def fingerprint(array: np.ndarray) -> int:
    return fingerprints({"w": jnp.asarray(array)})["w"]


@pytest.mark.sharding
def test_the_mesh_does_not_matter(array):
    for mesh, *axes in ((make_mesh(fsdp=2, tensor=4), "fsdp", None, "tensor"), (make_mesh(fsdp=8), None, "fsdp")):
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
        assert fingerprints({"w": placed})["w"] == fingerprint(array)


def test_flipped_signs(array):
    """Any number of signs, adjacent and anywhere: in a plain sum an even number could cancel."""
    draw, before = np.random.default_rng(1), fingerprint(array)
    assert fingerprint(-array) != before
    for count in [*range(1, 9), 64, 256, 1024] * 20:
        for places in (draw.choice(array.size, count, replace=False), draw.integers(array.size) + np.arange(count)):
            flipped = array.ravel().copy()
            flipped[places % array.size] *= -1
            assert fingerprint(flipped.reshape(SHAPE)) != before, places


def test_exchanged_layers_rows_and_elements(array):
    before = fingerprint(array)
    for axis in range(3):
        for first in range(SHAPE[axis]):
            for second in range(first):
                order = np.arange(SHAPE[axis])
                order[[first, second]] = second, first
                assert fingerprint(np.take(array, order, axis)) != before
        assert fingerprint(np.flip(array, axis)) != before
        assert fingerprint(np.roll(array, 1, axis)) != before


def test_small_changes():
    """2,000 times: one to four flipped bits anywhere, and elements replaced by their neighbours or zero."""
    draw = np.random.default_rng(2)
    array = draw.standard_normal(SHAPE).astype(np.float32)
    before = fingerprint(array)
    for trial in range(2000):
        changed = array.copy()
        bits = changed.view(np.uint32).ravel()
        places = draw.choice(array.size, 1 + trial % 4, replace=False)
        bits[places] ^= np.uint32(1) << draw.integers(32, size=len(places), dtype=np.uint32)
        assert fingerprint(changed) != before, places
        changed = array.copy().ravel()
        changed[places] = 0 if trial % 2 else changed[places - 1]
        assert fingerprint(changed.reshape(SHAPE)) != before, places


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint32", ml_dtypes.bfloat16])
def test_every_type(dtype):
    array = (np.random.default_rng(3).integers(0, 2, (5, 7))).astype(dtype)
    assert fingerprint(array) != fingerprint(array[::-1])
    assert fingerprint(np.zeros((5, 7), dtype)) != fingerprint(np.zeros((7, 6), dtype))
