"""Arrays on disk by dotted path: an Orbax checkpoint in which no bit can flip unnoticed.

    weights/_METADATA  _CHECKPOINT_METADATA         the tree, for Orbax; not needed here
    weights/llama.embed.embedding/zarr.json  c/0/0  one folder an array (zarr 3), one file a chunk

Every chunk ends with its CRC-32C, which TensorStore, the library under Orbax, checks whenever it reads one.  Orbax
itself has no checksums for values and no option for them, so a handler here replaces its own.  Folders that Orbax wrote
by itself can be read too.
"""

import asyncio
import logging
import math
import re
import shutil
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llamavid_jax import buckets
from llamavid_jax.errors import CheckpointError, OutageError, first_line
from llamavid_jax.parallel.processes import on_any

CHUNK_BYTES = 32 << 20  # a chunk is read and checked as one
AT_ONCE = 8  # arrays written at a time, of which the host holds a copy
AWAY = r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED"  # of buckets
DRIVERS = {"zarr.json": "zarr3", ".zarray": "zarr"}  # an array's metadata → TensorStore's driver


class Arrays(Mapping):
    """The arrays of a folder by dotted path, opened on first access.

    Raises CheckpointError, which names the file, for anything damaged or missing.
    """

    def __init__(self, folder: Path, remedy: str = "convert again"):
        self.folder, self.remedy = folder.resolve(), remedy  # TensorStore takes no `..`
        self._opened: dict[str, tensorstore.TensorStore] = {}
        try:
            if buckets.url(self.folder):
                keys = list(buckets.listing(self.folder))
            else:
                keys = [f"{file.parent.name}/{file.name}" for name in DRIVERS for file in folder.glob(f"*/{name}")]
            # Orbax's own form: many arrays in a file
            self.ocdbt = "manifest.ocdbt" in keys or (folder / "manifest.ocdbt").is_file()
            if self.ocdbt:
                listed = tensorstore.KvStore.open(self._place("")).result().list().result()
                keys = [key.decode() for key in listed]
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        parts = (key.rpartition("/") for key in keys)
        self._drivers = {path: DRIVERS[name] for path, _, name in parts if name in DRIVERS}
        if not self._drivers:
            raise CheckpointError(f"{folder} is not an Orbax checkpoint (it holds no arrays); {remedy}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._drivers)

    def __len__(self) -> int:
        return len(self._drivers)

    def __getitem__(self, path: str) -> tensorstore.TensorStore:
        if path not in self._opened:
            try:
                self._opened[path] = open_store(self._place(path), self._drivers[path]).result()
            except ValueError as error:
                raise self._damaged(error) from error
        return self._opened[path]

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """An array, or one layer of it, as it is stored."""
        return self._result((self[path] if layer is None else self[path][layer]).read())

    def restore(self, path: str, target: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
        """An array with the dtype and sharding of `target`; of a sharded one only this host's shards are read."""
        store, reads = tensorstore.cast(self[path], target.dtype.name), {}
        for index in target.sharding.addressable_devices_indices_map(target.shape).values():
            reads[str(index)] = reads.get(str(index)) or store[index].read()
        return jax.make_array_from_callback(
            target.shape, target.sharding, lambda index: self._result(reads[str(index)])
        )

    def _place(self, path: str) -> dict[str, Any]:
        if self.ocdbt:
            return {"driver": "ocdbt", "base": file_store(self.folder), "path": f"{path}/" if path else ""}
        return file_store(self.folder / path)

    def _result(self, read: tensorstore.Future) -> np.ndarray:
        try:
            return read.result()
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError | OutageError:
        if buckets.url(self.folder) and re.search(AWAY, str(error)):
            return OutageError(f"{self.folder} cannot be read ({first_line(error)}); run the same again")
        return CheckpointError(f"{self.folder} is damaged ({first_line(error)}); {self.remedy}")


def write_arrays(folder: Path, arrays: Mapping[str, Any], chunks: Mapping[str, tuple[int, ...]]) -> None:
    """Writes arrays by dotted path; Orbax writes a temporary folder and renames it, so `folder` is complete or absent.

    A `jax.ShapeDtypeStruct` becomes an array without values.  No two processes may hold parts of one chunk.  Raises
    CheckpointError if writing fails.
    """
    handler = _SummedArrayHandler(chunks)
    kinds = ((kind, handler) for kind in (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    layout = {"use_ocdbt": False, "use_zarr3": True, "type_handler_registry": registry}
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its own steps as warnings
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
            checkpointer.save(
                buckets.url(folder) or folder.absolute(), args=ocp.args.PyTreeSave(nest(arrays)), force=True
            )
    except Exception as error:  # Orbax and TensorStore raise many kinds
        for half_made in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_made, ignore_errors=True)
        raise CheckpointError(
            f"{folder} cannot be written ({first_line(error)}); free space there or give another folder"
        ) from error
    finally:
        logging.getLogger("absl").setLevel(level)


class _SummedArrayHandler(ocp.type_handlers.ArrayHandler):
    def __init__(self, chunks: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.chunks = chunks

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list:
        at_once, problem = asyncio.Semaphore(AT_ONCE), None

        async def write(value: Any, info: Any) -> None:
            async with at_once:
                await info.await_path_creation()
                await self._write(value, info)

        try:
            await _all(map(write, values, infos))
        except Exception as error:  # whatever it is, the other processes must know
            problem = error
        if on_any(problem):
            raise problem or OSError("another process cannot write its part")
        return []  # nothing is left for the background

    async def _write(self, value: Any, info: Any) -> None:
        metadata = {
            "shape": value.shape,
            "data_type": jnp.dtype(value.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunks[info.name]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        place = file_store(info.parent_dir / info.name)
        if jax.process_index() == 0:
            await open_store(place, "zarr3", metadata=metadata, create=True)
        store = await open_store(place, "zarr3", metadata=metadata, assume_metadata=True)
        if isinstance(value, jax.Array):
            shards = (shard for shard in value.addressable_shards if shard.replica_id == 0)
            await _all(store[shard.index].write(np.asarray(shard.data)) for shard in shards)
        elif isinstance(value, np.ndarray) and jax.process_index() == 0:
            await store.write(value)


async def _all(writes: Iterable[Awaitable]) -> None:
    """Waits for all, even if one fails: every write that outlives the event loop prints a traceback."""
    for done in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(done, BaseException):
            raise done


def file_store(folder: Any) -> dict[str, Any]:
    return buckets.kvstore(folder) or {"driver": "file", "path": f"{folder}/"}  # not as a URL: names may hold # and %


def open_store(place: Mapping[str, Any], driver: str, **options: Any) -> tensorstore.Future:
    """Opens one array.  Chunks of zeros are written too, so that a missing chunk is an error."""
    zeros = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
    return tensorstore.open({"driver": driver, "kvstore": place, "open": "create" not in options, **zeros} | options)


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """`shape` cut into equal parts of at most CHUNK_BYTES: what one file holds.  Most axes have factors of two."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        factor, _, axis = min((_smallest_factor(size), -size, axis) for axis, size in enumerate(chunk) if size > 1)
        chunk[axis] //= factor
    return tuple(chunk)


def _smallest_factor(size: int) -> int:
    return next(factor for factor in range(2, size + 1) if size % factor == 0)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` → `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree
