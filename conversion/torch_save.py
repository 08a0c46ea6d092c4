"""Tensors of a file written by `torch.save`, found without torch.

Two containers: the zip of torch 1.6 and later (`NAME/data.pkl` beside one uncompressed entry for each storage, each
with its CRC-32), and the older stream of five pickles followed by the storages, which has no checksums.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llamavid_jax.errors import CheckpointError

from .stored_tensor import MAX_INDEX_BYTES, MAX_NAME, Storage, StoredTensor, locate
from .torch_pickle import View, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
WRAPPERS = ("model", "state_dict", "module")  # what checkpoints call the dictionary that holds the weights
ENCRYPTED = 1  # flag of a zip entry
LOCAL_HEADER = b"PK\x03\x04"


def read_saved(file: Path) -> dict[str, StoredTensor]:
    """Name → tensor of a `.bin` or `.pth` file; nested dictionaries are walked and their keys joined by dots."""
    with file.open("rb") as stream:
        start = stream.read(2)
        stream.seek(0)
        found, storages = (_read_zip if start == b"PK" else _read_legacy)(stream, file)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}; a dictionary of weights is needed")
    if not any(isinstance(value, View) for value in found.values()):
        found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), found)
    views = dict(_walk(found, "", file, set()))
    if not views:
        raise CheckpointError(f"{file} holds no tensor; give a file of weights")
    return {name: _located(file, name, view, storages) for name, view in views.items()}


def _walk(values: dict, prefix: str, file: Path, seen: set[int]) -> Iterator[tuple[str, View]]:
    """The tensors of nested dictionaries; each may occur once, since those that share parts can have endless paths."""
    if id(values) in seen or prefix.count(".") > 20 or len(prefix) > MAX_NAME:
        raise CheckpointError(
            f"{file} holds a dictionary in two places or too deep, at {prefix[:60]!r}; save the state_dict alone"
        )
    seen.add(id(values))
    for key, value in values.items():
        if isinstance(value, View):
            yield f"{prefix}{str(key)[: MAX_NAME + 1]}", value
        elif isinstance(value, dict):
            yield from _walk(value, f"{prefix}{str(key)[: MAX_NAME + 1]}.", file, seen)


def _located(file: Path, name: str, view: View, storages: Mapping[str, Storage]) -> StoredTensor:
    if view.storage.key not in storages:
        raise CheckpointError(
            f"{file} lacks the entry of storage {view.storage.key!r} that it names; download it again"
        )
    return locate(name, storages[view.storage.key], view.storage.dtype, *view[1:])


def _read_zip(stream: BinaryIO, file: Path) -> tuple[Any, dict[str, Storage]]:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except Exception as error:  # a damaged directory may raise anything
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download it again") from None
    pickled = next((name for name in entries if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise CheckpointError(f"{file} is a zip file without data.pkl, so not a PyTorch checkpoint")
    root = pickled.removesuffix("data.pkl")
    if root + "byteorder" in entries and _content(stream, entries[root + "byteorder"], file) != b"little":
        raise CheckpointError(f"{file} was written on a big-endian machine; save it again on a little-endian one")
    found, _ = unpickle(io.BytesIO(_content(stream, entries[pickled], file)), file)
    data = root + "data/"
    return found, {
        name.removeprefix(data): _storage(stream, info, file) for name, info in entries.items() if name.startswith(data)
    }


def _storage(stream: BinaryIO, info: zipfile.ZipInfo, file: Path) -> Storage:
    """Where an entry's bytes lie: after its local header, whose two lengths may differ from the directory's."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
        raise CheckpointError(
            f"{file} was compressed or encrypted after saving ({info.filename}); unpack it and save it with torch"
        )
    stream.seek(max(info.header_offset, 0))
    header = stream.read(30) if info.header_offset >= 0 else b""  # damaged directories state less
    lengths = struct.unpack("<HH", header[26:]) if len(header) == 30 and header.startswith(LOCAL_HEADER) else None
    begin = info.header_offset + 30 + sum(lengths or ())
    if lengths is None or info.file_size != info.compress_size or begin + info.file_size > os.path.getsize(file):
        raise CheckpointError(f"{file} is truncated or damaged at its entry {info.filename}; download it again")
    return Storage(file, begin, info.file_size, info.CRC or None)  # torch set not to compute CRCs writes 0


def _content(stream: BinaryIO, info: zipfile.ZipInfo, file: Path) -> bytes:
    """The bytes of a small entry."""
    storage = _storage(stream, info, file)
    if storage.nbytes > MAX_INDEX_BYTES:
        raise CheckpointError(f"{file}: {info.filename} has {storage.nbytes} bytes; save the weights alone")
    stream.seek(storage.offset)
    content = stream.read(storage.nbytes)
    if storage.crc not in (None, zlib.crc32(content)):
        raise CheckpointError(f"{file} is damaged: {info.filename} does not have its CRC-32; download it again")
    return content


def _read_legacy(stream: BinaryIO, file: Path) -> tuple[Any, dict[str, Storage]]:
    size = os.path.getsize(file)
    pickles = io.BytesIO(stream.read(min(size, MAX_INDEX_BYTES)))
    if unpickle(pickles, file)[0] != LEGACY_MAGIC:
        raise CheckpointError(f"{file} is not a PyTorch checkpoint; give a .bin, .pth or .safetensors file")
    unpickle(pickles, file)  # protocol version
    system, _ = unpickle(pickles, file)
    if not (isinstance(system, dict) and system.get("little_endian", True)):
        raise CheckpointError(f"{file} was written on a big-endian machine; save it again on a little-endian one")
    found, dtypes = unpickle(pickles, file)
    keys, _ = unpickle(pickles, file)
    offset, storages = pickles.tell(), {}
    for key in keys if isinstance(keys, list) else ():
        stream.seek(offset)
        header = stream.read(8)
        if len(header) < 8 or not isinstance(key, str) or key not in dtypes:
            raise CheckpointError(f"{file} ends before its tensors do; it is truncated: download it again")
        nbytes = struct.unpack("<q", header)[0] * dtypes[key].itemsize
        storages[key] = Storage(file, offset + 8, nbytes)
        offset += 8 + nbytes
        if nbytes < 0 or offset > size:
            raise CheckpointError(f"{file} ends before its tensors do; it is truncated: download it again")
    return found, storages
