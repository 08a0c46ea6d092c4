"""Lazy readers of PyTorch checkpoints: name → `StoredTensor`, whose `.read()` gives a NumPy array.

    folder/pytorch_model.bin.index.json  + shards      the original's only form
    folder/model.safetensors[.index.json + shards]     the documented layout, and newer LLaMA bases
    folder/pytorch_model.bin, any single .bin, .pth, .pt or .safetensors file

torch is not needed, nothing is memory-mapped, and no pickle runs code (`torch_save.py`, `torch_pickle.py`).
"""

import math
import os
import struct
from pathlib import Path

from llamavid_jax.errors import CheckpointError
from llamavid_jax.files import parse_object, read_object

from .stored_tensor import DTYPES, MAX_AXES, MAX_INDEX_BYTES, Storage, StoredTensor, locate, row_major
from .torch_save import read_saved

INDEX = ".index.json"
FILES = (f"model.safetensors{INDEX}", "model.safetensors", f"pytorch_model.bin{INDEX}", "pytorch_model.bin")
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


def checkpoint_files(source: str | Path) -> list[Path]:
    """The files of weights of a checkpoint folder, the index first where there is one; or the file itself.

    From a folder that has both forms, safetensors are read, as in transformers.  Raises CheckpointError for a missing
    file or shard.
    """
    source = Path(source)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give the folder or the file of a checkpoint")
    if source.is_dir():
        found = [source / name for name in FILES if (source / name).exists()][:1]
        found = found or sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
        if len(found) != 1:
            what = f"{len(found)} weight files and no index" if found else "no weight file"
            raise CheckpointError(f"{source} holds {what}; expected one of {', '.join(FILES)}")
        source = found[0]
    if not source.name.endswith(INDEX):
        return [source]
    shards = dict.fromkeys(_weight_map(source).values())
    for shard in shards:
        if not (source.parent / shard).is_file():
            raise CheckpointError(
                f"{source} names the shard {shard}, which does not exist; download it into {source.parent}"
            )
    return [source, *(source.parent / shard for shard in shards)]


def read_checkpoint(source: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder or file, by name.

    Raises CheckpointError for a missing, truncated or foreign file, for an index that disagrees with its shards, and
    for a pickle that names anything but tensors.
    """
    first, *shards = checkpoint_files(source)
    if not first.name.endswith(INDEX):
        return read_file(first)
    tensors = {shard.name: read_file(shard) for shard in shards}
    listed = {}
    for name, shard in _weight_map(first).items():
        if name not in tensors[shard]:
            raise CheckpointError(f"{first} maps {name} to {shard}, which does not hold it; download both files again")
        listed[name] = tensors[shard][name]
    unlisted = {name: tensor for found in tensors.values() for name, tensor in found.items()}
    return unlisted | listed


def read_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one `.safetensors`, `.bin`, `.pth` or `.pt` file."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist or is no plain file; download the missing file into that folder")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; download it again")
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_saved(file)


def read_json(file: Path) -> dict:
    """A JSON object, or a CheckpointError that names the file."""
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}); download it again") from None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map'; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable():
            raise CheckpointError(f"{index} maps {name} to {shard!r}; a shard is a file name in the same folder")
    return weight_map


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_INDEX_BYTES):
            raise CheckpointError(f"{file} is truncated or not a safetensors file; download it again")
        header = stream.read(length)
    try:
        entries = parse_object(header)
        entries.pop("__metadata__", None)
        return {name: _safetensors_entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}); download it again") from None


def _safetensors_entry(file: Path, name: str, entry: dict, data: int, size: int) -> StoredTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {entry['dtype']}; convert it to float16, bfloat16 or float32 first"
        )
    dtype, shape, (begin, end) = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], entry["shape"], entry["data_offsets"]
    fits = 0 <= begin <= end <= size - data and len(shape) <= MAX_AXES
    if not fits or math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{file}: {name} does not fit the file; it is truncated: download it again")
    return locate(name, Storage(file, data + begin, end - begin), dtype, 0, shape, row_major(shape))
