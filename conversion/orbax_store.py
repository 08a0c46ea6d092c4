"""An Orbax checkpoint written and read one layer at a time.

Parameters are stacked over layers: 2.7 GiB for the gate projections of a 7B model.  Orbax writes whole arrays, so it is
given arrays of one element, which settles the tree and its metadata; each array is then made anew at its real shape
with TensorStore, the library under Orbax, and its layers are written in their places.  A chunk is one layer, or a part
of one of at most `CHUNK_BYTES`, so that a host which holds a shard of a parameter reads little more than its shard.
Parameters of up to `GATHER_BYTES` (norms, biases) are one chunk and are gathered before they are written.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llamavid_jax.checkpoints.weights import first_line, nest
from llamavid_jax.errors import CheckpointError

CHUNK_BYTES = 32 << 20
GATHER_BYTES = 4 << 20


def create(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype], stacked: Collection[str]
) -> None:
    """Makes a checkpoint of empty arrays (dotted path → shape, dtype); the `stacked` ones have layers on axis 0."""
    seeds = {path: np.zeros((1,) * len(shape), dtypes[path]) for path, shape in shapes.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(nest(seeds)))
    for path, shape in shapes.items():
        metadata = json.loads((directory / path / ".zarray").read_text(encoding="utf-8"))
        metadata |= {"shape": shape, "chunks": chunk_shape(shape, dtypes[path].itemsize, path in stacked)}
        store = {"driver": "file", "path": f"{directory.resolve()}/{path}/"}
        spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result()


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """The part of an array that one file holds: all of a small one, else at most a layer, its longest axis halved."""
    if math.prod(shape) * itemsize <= GATHER_BYTES:
        return shape
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


class Arrays:
    """The arrays of a checkpoint directory, opened when first named."""

    def __init__(self, directory: Path):
        metadata = directory / "_METADATA"
        if not metadata.is_file():
            raise CheckpointError(f"{directory} is not an Orbax checkpoint (no _METADATA); convert the weights first")
        values = json.loads(metadata.read_text(encoding="utf-8"))
        self.directory = directory.resolve()
        self.driver = "zarr3" if values.get("use_zarr3") else "zarr"
        self.ocdbt = (directory / "manifest.ocdbt").is_file()
        keys = (entry["key_metadata"] for entry in values["tree_metadata"].values())
        self.paths = [".".join(str(part["key"]) for part in key) for key in keys]
        self._opened: dict[str, tensorstore.TensorStore] = {}
        self._gathered: dict[str, dict[int, np.ndarray]] = defaultdict(dict)

    def __getitem__(self, path: str) -> tensorstore.TensorStore:
        if path not in self._opened:
            # not as a URL: names may hold # and %
            store = {"driver": "file", "path": f"{self.directory}/" + ("" if self.ocdbt else f"{path}/")}
            store = {"driver": "ocdbt", "base": store, "path": f"{path}/"} if self.ocdbt else store
            self._opened[path] = tensorstore.open({"driver": self.driver, "kvstore": store}, open=True).result()
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
        array.write(value, can_reference_source_data_indefinitely=True).result()

    def read(self, path: str, index: int | None) -> np.ndarray:
        """Raises CheckpointError where the files are damaged."""
        try:
            return (self[path] if index is None else self[path][index]).read().result()
        except ValueError as error:
            raise CheckpointError(f"{self.directory} is damaged ({first_line(error)}); convert again") from None
