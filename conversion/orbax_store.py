"""An Orbax checkpoint written and read one layer at a time.

Parameters are stacked over layers: 2.7 GiB for the gate projections of a 7B model.  The arrays are made empty, and
their layers written in their places with TensorStore, the library under Orbax.  A chunk is one layer, or a part of one
of at most `CHUNK_BYTES`, so that a host which holds a shard of a parameter reads little more than its shard.
Parameters of up to `GATHER_BYTES` (norms, biases) are one chunk and are gathered before they are written.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore

from llamavid_jax.checkpoints.arrays import chunk_shape, first_line, store_spec, write_arrays
from llamavid_jax.errors import CheckpointError

GATHER_BYTES = 4 << 20


def create(directory: Path, arrays: Mapping[str, jax.ShapeDtypeStruct], stacked: Collection[str]) -> None:
    """Makes a checkpoint of empty arrays by dotted path; the `stacked` ones have layers on axis 0."""
    write_arrays(directory, arrays, {path: layer_chunk(x, path in stacked) for path, x in arrays.items()})


def layer_chunk(array: jax.ShapeDtypeStruct, stacked: bool) -> tuple[int, ...]:
    """The part of an array that one file holds: all of a small one, else at most a layer."""
    itemsize = array.dtype.itemsize
    if math.prod(array.shape) * itemsize <= GATHER_BYTES:
        return array.shape
    return chunk_shape((1, *array.shape[1:]) if stacked else array.shape, itemsize)


class Arrays:
    """The arrays of a checkpoint directory, opened when first named.  Damaged files are CheckpointErrors."""

    def __init__(self, directory: Path):
        metadata = directory / "_METADATA"
        if not metadata.is_file():
            raise CheckpointError(f"{directory} is not an Orbax checkpoint (no _METADATA); convert the weights first")
        try:
            values = json.loads(metadata.read_bytes())
            keys = [entry["key_metadata"] for entry in values["tree_metadata"].values()]
            self.paths = [".".join(str(part["key"]) for part in key) for key in keys]
            self.driver = "zarr3" if values.get("use_zarr3") else "zarr"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{metadata} is damaged ({error}); convert again") from None
        self.directory = directory.resolve()
        self.ocdbt = (directory / "manifest.ocdbt").is_file()  # as Orbax writes without `write_arrays`
        self._opened: dict[str, tensorstore.TensorStore] = {}
        self._gathered: dict[str, dict[int, np.ndarray]] = defaultdict(dict)

    def __getitem__(self, path: str) -> tensorstore.TensorStore:
        if path not in self._opened:
            spec = store_spec(f"{self.directory}" if self.ocdbt else f"{self.directory}/{path}", self.driver)
            if self.ocdbt:
                spec["kvstore"] = {"driver": "ocdbt", "base": spec["kvstore"], "path": f"{path}/"}
            try:
                self._opened[path] = tensorstore.open(spec, open=True).result()
            except ValueError as error:
                raise self._damaged(error) from None
        return self._opened[path]

    def write(self, path: str, index: int | None, value: np.ndarray) -> None:
        """Writes one layer, or a whole parameter that has no layers."""
        array = self[path]
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
                f"{self.directory} cannot be written ({first_line(error)}); free space there or give another OUT"
            ) from None

    def read(self, path: str, index: int | None) -> np.ndarray:
        array = self[path]
        try:
            return (array if index is None else array[index]).read().result()
        except ValueError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: ValueError) -> CheckpointError:
        return CheckpointError(f"{self.directory} is damaged ({first_line(error)}); convert again")
