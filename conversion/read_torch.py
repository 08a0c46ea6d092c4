"""Lazy readers of PyTorch checkpoints: name → `StoredTensor`, whose `.read()` gives a NumPy array.

    folder/pytorch_model.bin.index.json  + shards      the original's only form
    folder/model.safetensors[.index.json + shards]     the documented layout, and newer LLaMA bases
    folder/pytorch_model.bin, any single .bin, .pth, .pt or .safetensors file

torch is not needed, nothing is memory-mapped, and no pickle runs code (`torch_pickle.py`).
"""

import json
import math
import os
import struct
from pathlib import Path

from conversion.stored_tensor import DTYPES, StoredTensor, row_major
from conversion.torch_pickle import read_pickled
from llamavid_jax.errors import CheckpointError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_checkpoint(source: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder or file, by name.

    Raises CheckpointError for a missing, truncated or foreign file, for an index that disagrees with its shards, and
    for a pickle that names anything but tensors.
    """
    source = Path(source)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give the folder or the file of a checkpoint")
    if source.is_file():
        return _read_index(source) if source.name.endswith(".index.json") else read_file(source)
    for name in INDEX_FILES:
        if (source / name).is_file():
            return _read_index(source / name)
    for name in SINGLE_FILES:
        if (source / name).is_file():
            return read_file(source / name)
    found = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(found) != 1:
        what = f"{len(found)} weight files and no index" if found else "no weight file"
        raise CheckpointError(f"{source} holds {what}; expected one of {', '.join(INDEX_FILES + SINGLE_FILES)}")
    return read_file(found[0])


def read_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one `.safetensors`, `.bin`, `.pth` or `.pt` file."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; download the missing file into that folder")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; download it again")
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_pickled(file)


def read_json(file: Path) -> dict:
    """A JSON object, or a CheckpointError that names the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a JSON {type(values).__name__}; an object is needed")
    return values


def _read_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map'; download it again")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} maps {name} to {shard!r}; a shard is a file name in the same folder")
        if shard not in shards:
            if not (index.parent / shard).is_file():
                raise CheckpointError(
                    f"{index} names the shard {shard}, which is not there; download it into {index.parent}"
                )
            shards[shard] = read_file(index.parent / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{index} maps {name} to {shard}, which does not hold it; download both files again")
    unlisted = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return unlisted | {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _safetensors_entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} has a damaged header ({error}); download it again") from None


def _safetensors_entry(file: Path, name: str, entry: dict, data: int, size: int) -> StoredTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {entry['dtype']}; convert it to float16, bfloat16 or float32 first"
        )
    dtype, shape = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], tuple(map(int, entry["shape"]))
    begin, end = entry["data_offsets"]
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise CheckpointError(f"{file}: {name} does not fit the file; it is truncated: download it again")
    return StoredTensor(file, data + begin, dtype, shape, row_major(shape))
