"""An Orbax checkpoint written one layer at a time.

Parameters are stacked over layers: 2.7 GiB for the gate projections of a 7B model.  The arrays are created empty and
filled layer by layer.  A chunk is one layer, or a part of one of at most `CHUNK_BYTES`, so that a host that holds a
shard of a parameter reads little more than that.  Parameters of up to `GATHER_BYTES` (norms, biases) are one chunk;
their layers are collected in memory before they are written.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np

from llamavid_jax.checkpoints.arrays import Arrays, chunk_shape, write_arrays
from llamavid_jax.errors import CheckpointError, first_line

GATHER_BYTES = 4 << 20


class LayerWriter:
    """Creates a checkpoint of empty arrays by dotted path and fills them; the `stacked` ones have layers on axis 0."""

    def __init__(self, directory: Path, arrays: Mapping[str, jax.ShapeDtypeStruct], stacked: Collection[str]):
        write_arrays(directory, arrays, {path: layer_chunk(x, path in stacked) for path, x in arrays.items()})
        self.arrays = Arrays(directory)
        self._gathered: dict[str, dict[int, np.ndarray]] = defaultdict(dict)

    def write(self, path: str, index: int | None, value: np.ndarray) -> None:
        """Writes one layer, or a whole parameter that has no layers."""
        array = self.arrays[path]
        if index is not None and array.chunk_layout.write_chunk.shape == array.shape:
            layers = self._gathered[path]
            layers[index] = value
            if len(layers) < array.shape[0]:
                return
            value = np.stack([layer for _, layer in sorted(self._gathered.pop(path).items())])
        elif index is not None:
            array = array[index]
        try:
            array.write(value, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise CheckpointError(
                f"{self.arrays.folder} cannot be written ({first_line(error)}); free space there or give another OUT"
            ) from None


def layer_chunk(array: jax.ShapeDtypeStruct, stacked: bool) -> tuple[int, ...]:
    """The part of an array that one file holds: all of a small one, else at most a layer."""
    itemsize = array.dtype.itemsize
    if math.prod(array.shape) * itemsize <= GATHER_BYTES:
        return array.shape
    return chunk_shape((1, *array.shape[1:]) if stacked else array.shape, itemsize)
