"""The devices of a mesh in their order: neighbours on a slice's own network, slices along the first axis (`data`).

Slices of a TPU pod talk over the data-centre network, fifty times slower than the links within one: of a train step
only the sum of the gradients should cross it.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from llamavid_jax.errors import InputError


def device_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """An array of `shape` that holds `devices`.  Raises InputError unless several slices divide the first axis."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise InputError(f"the devices are {slices} slices, whose axis is data: use data={slices}, not data={shape[0]}")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
