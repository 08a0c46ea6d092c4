"""Tensors of a file written by `torch.save`, found without torch and without running anything the file asks for.

A pickle is a program that may call any Python function.  The unpickler here knows the dozen names with which
torch describes tensors; they only build `StoredTensor`s.  Every other name is refused, and the error says which one it
was.  Two containers: the zip of torch 1.6 and later (`NAME/data.pkl` beside one stored entry a storage), and the older
stream of five pickles followed by the storages.
"""

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from conversion.stored_tensor import DTYPES, StoredTensor
from llamavid_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 256 << 20  # the tensors lie outside the pickle; 40,000 names take 10 MB
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
WRAPPERS = ("model", "state_dict", "module")  # what checkpoints call the dictionary that holds the weights


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _View(NamedTuple):
    """A tensor before the place of its storage is known."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_ignored) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_ignored) -> _View:
    return data


_KNOWN_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(DTYPES[dtype]) for name, dtype in STORAGE_DTYPES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, file: Path):
        super().__init__(stream, encoding="utf-8")
        self.file = file
        self.dtypes: dict[str, np.dtype] = {}  # of every storage named so far

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # its name in pickles that Python 2 can read
        try:
            return _KNOWN_GLOBALS[module, name]
        except KeyError:
            raise CheckpointError(
                f"{self.file} names {module}.{name}; only tensors are read, nothing else in a pickle is run: "
                "save the weights alone, with torch.save(model.state_dict(), ...) or as .safetensors"
            ) from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _device, _count, *view = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(part is not None for part in view):
            raise CheckpointError(f"{self.file} refers to {kind!r}, which is not a plain tensor storage; save it again")
        self.dtypes[str(key)] = storage_type.dtype
        return _Storage(str(key), storage_type.dtype)


def _unpickle(stream: BinaryIO, file: Path) -> tuple[Any, dict[str, np.dtype]]:
    """The next object of the stream, and the dtypes of the storages it names."""
    unpickler = _TensorUnpickler(stream, file)
    try:
        return unpickler.load(), unpickler.dtypes
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{file} is damaged or not a PyTorch checkpoint ({error}); download it again") from None


def read_pickled(file: Path) -> dict[str, StoredTensor]:
    """Name → tensor of a `.bin` or `.pth` file; nested dictionaries are walked and their keys joined by dots."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:2] == b"PK":
        found, place = _read_zip(file)
    else:
        found, place = _read_legacy(file)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds a {type(found).__name__}; a dictionary of weights is needed")
    if not any(isinstance(value, _View) for value in found.values()):
        found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), found)
    views: dict[str, _View] = {}
    _walk(found, "", views, file)
    if not views:
        raise CheckpointError(f"{file} holds no tensor; give a file of weights")
    return {name: _located(file, name, view, place) for name, view in views.items()}


def _walk(values: Mapping, prefix: str, views: dict[str, _View], file: Path) -> None:
    if prefix.count(".") > 20:
        raise CheckpointError(f"{file} nests its dictionaries too deeply at {prefix[:60]!r}; save the state_dict alone")
    for key, value in values.items():
        if isinstance(value, _View):
            views[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            _walk(value, f"{prefix}{key}.", views, file)


def _located(file: Path, name: str, view: Any, place: Callable[[_Storage], tuple[int, int]]) -> StoredTensor:
    """The tensor with its place in the file, after checking that it lies within its storage."""
    storage, offset, shape, strides = view
    sizes = [offset, *shape, *strides] if len(shape) == len(strides) else [-1]
    if not isinstance(storage, _Storage) or any(type(size) is not int or size < 0 for size in sizes):
        raise CheckpointError(f"{file}: {name} has no valid shape; the file is damaged: download it again")
    begin, length = place(storage)
    tensor = StoredTensor(file, begin + offset * storage.dtype.itemsize, storage.dtype, shape, strides)
    if (offset + tensor.span) * storage.dtype.itemsize > length:
        raise CheckpointError(f"{file}: {name} of shape {shape} is longer than its storage; the file is truncated")
    return tensor


def _read_zip(file: Path) -> tuple[Any, Callable[[_Storage], tuple[int, int]]]:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
            entries = {info.filename: info for info in archive.infolist()}
            pickled = next((name for name in entries if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise CheckpointError(f"{file} is a zip file without data.pkl, so not a PyTorch checkpoint")
            if entries[pickled].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{file} has a pickle of {entries[pickled].file_size} bytes; save the weights alone"
                )
            root = pickled.removesuffix("data.pkl")
            if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
                raise CheckpointError(
                    f"{file} was written on a big-endian machine; save it again on a little-endian one"
                )
            with archive.open(pickled) as stream:
                found, _ = _unpickle(stream, file)
            places = {
                name.removeprefix(root + "data/"): (_data_start(raw, info, file), info.file_size)
                for name, info in entries.items()
                if name.startswith(root + "data/")
            }
    except (zipfile.BadZipFile, struct.error, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download it again") from None

    def place(storage: _Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"{file} lacks the entry data/{storage.key} that its index names; download it again")
        return places[storage.key]

    return found, place


def _data_start(raw: BinaryIO, info: zipfile.ZipInfo, file: Path) -> int:
    """Where an entry's bytes begin: behind its local header, whose two lengths may differ from the directory's."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{file} was compressed after saving ({info.filename}); unpack it and save it with torch")
    raw.seek(info.header_offset)
    header = raw.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_legacy(file: Path) -> tuple[Any, Callable[[_Storage], tuple[int, int]]]:
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        if _unpickle(stream, file)[0] != LEGACY_MAGIC:
            raise CheckpointError(f"{file} is not a PyTorch checkpoint; give a .bin, .pth or .safetensors file")
        _unpickle(stream, file)  # protocol version
        system, _ = _unpickle(stream, file)
        if not (isinstance(system, Mapping) and system.get("little_endian", True)):
            raise CheckpointError(f"{file} was written on a big-endian machine; save it again on a little-endian one")
        found, dtypes = _unpickle(stream, file)
        keys, _ = _unpickle(stream, file)
        places = {}
        for key in keys:
            header = stream.read(8)
            if len(header) < 8 or key not in dtypes:
                raise CheckpointError(f"{file} ends before its tensors do; it is truncated: download it again")
            length = struct.unpack("<q", header)[0] * dtypes[key].itemsize
            places[key] = (stream.tell(), length)
            if length < 0 or stream.tell() + length > size:
                raise CheckpointError(f"{file} ends before its tensors do; it is truncated: download it again")
            stream.seek(length, os.SEEK_CUR)

    def place(storage: _Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"{file} lacks the storage {storage.key} that it names; download it again")
        return places[storage.key]

    return found, place
