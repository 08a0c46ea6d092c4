"""The pickle in a file of `torch.save`, read without running its code.

The only names that it may hold are those of tensors, and the only calls build a description of one
(`llamavid_jax/pickles.py` is the pickle machine).
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.errors import CheckpointError
from llamavid_jax.pickles import PickleError
from llamavid_jax.pickles import unpickle as run

from .stored_tensor import DTYPES

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


class StorageType(NamedTuple):
    dtype: np.dtype


class StorageName(NamedTuple):
    """A storage's name in the pickle, and its dtype."""

    key: str
    dtype: np.dtype


class View(NamedTuple):
    """A tensor whose storage has not been located in the file yet."""

    storage: StorageName
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_ignored: Any) -> View:
    if not (isinstance(storage, StorageName) and type(shape) is type(strides) is tuple):
        raise ValueError("a tensor has no storage or no shape")
    return View(storage, offset, shape, strides)


def _parameter(tensor: Any, *_ignored: Any) -> View:
    if not isinstance(tensor, View):
        raise ValueError("a parameter is no tensor")
    return tensor


def _ordered_dict() -> dict:
    return {}


def _size(numbers: Any) -> tuple:
    return tuple(numbers)


CALLS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
}
VALUES = {
    **{("torch", name): StorageType(DTYPES[dtype]) for name, dtype in STORAGE_DTYPES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}


def unpickle(stream: io.BytesIO, file: Path) -> tuple[Any, dict[str, np.dtype]]:
    """The next object of the stream, and the type of each storage that it names.

    The object consists of numbers, texts, tuples, lists, dictionaries and `View`s.  Raises CheckpointError for a
    damaged pickle and for one that asks for anything else.
    """
    dtypes: dict[str, np.dtype] = {}

    def storage(reference: Any) -> StorageName:
        found = _storage(reference)
        dtypes[found.key] = found.dtype
        return found

    try:
        return run(stream, CALLS, VALUES, _build, storage), dtypes
    except PickleError as error:
        raise CheckpointError(
            f"{file} {error}; only tensors are read, nothing else in a pickle is run: "
            "save the weights alone, with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{file} is damaged or not a PyTorch checkpoint ({reason}); download it again") from None


def _build(made: Any, _state: Any) -> None:
    """Ignores the attributes of an OrderedDict, such as a state_dict's module versions; nothing else may have any."""
    if type(made) is not dict:
        raise ValueError("a dict is missing")


def _storage(reference: Any) -> StorageName:
    kind, storage_type, key, _device, _count, *view = reference
    if kind != "storage" or not isinstance(storage_type, StorageType) or any(part is not None for part in view):
        raise PickleError(f"refers to {kind!r}, which is not a plain tensor storage")
    if not isinstance(key, str | int):
        raise ValueError("a storage has no name")
    return StorageName(str(key), storage_type.dtype)
