"""Arrays on disk as an Orbax checkpoint in which no bit can flip unnoticed.

    weights/_METADATA  _CHECKPOINT_METADATA         the tree, as Orbax writes it
    weights/llama.embed.embedding/zarr.json  c/0/0  one folder an array (zarr 3), one file a chunk

Every chunk ends with its CRC-32C, which TensorStore checks whenever it reads one.  Orbax alone has no sums for values
and no option for them, so that this handler writes in place of its own.  It is read as any other checkpoint.
"""

import asyncio
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llamavid_jax.errors import CheckpointError

CHUNK_BYTES = 32 << 20  # a chunk is read and checked as one
AT_ONCE = 8  # arrays of which the host holds a copy


def write_arrays(folder: Path, arrays: Mapping[str, Any], chunks: Mapping[str, tuple[int, ...]]) -> None:
    """Writes arrays by dotted path; Orbax writes aside and renames, so that `folder` is complete or absent.

    Of a `jax.ShapeDtypeStruct` only the place is made.  No two processes may hold parts of one chunk.
    Raises CheckpointError where they cannot be written.
    """
    handler = _SummedArrayHandler(chunks)
    kinds = ((kind, handler) for kind in (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    layout = {"use_ocdbt": False, "use_zarr3": True, "type_handler_registry": registry}
    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(nest(arrays)), force=True)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(
            f"{folder} cannot be written ({first_line(error)}); free space there or give another folder"
        ) from error


class _SummedArrayHandler(ocp.type_handlers.ArrayHandler):
    def __init__(self, chunks: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.chunks = chunks

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def write(value: Any, info: Any) -> None:
            async with at_once:
                await info.await_path_creation()
                await self._write(value, info)

        await asyncio.gather(*map(write, values, infos))
        return []  # nothing is left for the background

    async def _write(self, value: Any, info: Any) -> None:
        metadata = {
            "shape": value.shape,
            "data_type": jnp.dtype(value.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunks[info.name]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        spec = store_spec(f"{info.parent_dir / info.name}", "zarr3") | {
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,  # else a lost file would pass for zeros
        }
        if jax.process_index() == 0:
            await tensorstore.open(spec, create=True)
        store = await tensorstore.open(spec, open=True, assume_metadata=True)
        if isinstance(value, jax.Array):
            shards = (shard for shard in value.addressable_shards if shard.replica_id == 0)
            await asyncio.gather(*(store[shard.index].write(np.asarray(shard.data)) for shard in shards))
        elif isinstance(value, np.ndarray) and jax.process_index() == 0:
            await store.write(value)


def store_spec(folder: str, driver: str) -> dict[str, Any]:
    """TensorStore's spec of one array.  A chunk that is missing is an error."""
    return {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{folder}/"},  # not as a URL: names may hold # and %
        "fill_missing_data_reads": False,
    }


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


def first_line(error: BaseException) -> str:
    """Of the error that the others were raised from: it names the file and what is wrong with it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax prints several hundred lines for one unreadable file: log records, and what its coroutines leave behind."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
