"""The original's features: a pickle of `{"feats": float16 [F, P, E], "inputs": text}`, read without running any of it.

Python's own reader would call whatever a pickle names.  `pickles.py` calls only the functions below, which describe
the array; its bytes stay in the file until they are needed.
"""

import io
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.pickles import PickleError, unpickle

LARGE = 16 << 20  # bytes; anything longer is an array's data, and skipped
LONGEST_LINE = 1 << 10
DTYPES = {"f2": np.dtype(np.float16), "f4": np.dtype(np.float32)}


class Span(NamedTuple):
    """Bytes that stay in the file."""

    start: int
    length: int

    def __len__(self) -> int:
        return self.length


class Stream(io.RawIOBase):
    """A file of which long reads are skipped and returned as a Span."""

    def __init__(self, stream: Any):
        self.stream, self.size = stream, os.fstat(stream.fileno()).st_size

    def tell(self) -> int:
        return self.stream.tell()

    def readline(self, size: int = -1) -> bytes:
        return self.stream.readline(LONGEST_LINE)

    def read(self, size: int = -1) -> Any:
        start = self.stream.tell()
        if size <= LARGE or start + size > self.size:  # beyond the end: a short read, which raises later
            return self.stream.read(min(size, LARGE))
        self.stream.seek(size, os.SEEK_CUR)
        return Span(start, size)


class Array:
    """An array before its values are read."""

    def __init__(self, shape: Any = None, dtype: Any = None, data: Any = None):
        self.shape, self.dtype, self.data = shape, dtype, data


class DType:
    def __init__(self, name: Any):
        self.name, self.order = name, "="


def _empty(kind: Any, *_ignored: Any) -> Array:
    if kind is not NDARRAY:
        raise ValueError("it makes what is no array")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if order != "C":
        raise PickleError("holds an array that is stored by columns")
    return Array(shape, dtype, data)


def _dtype(name: Any, *_ignored: Any) -> DType:
    return DType(name)


def _build(made: Any, state: Any) -> None:
    if isinstance(made, DType):
        made.order = state[1]
    elif isinstance(made, Array):
        _version, made.shape, made.dtype, by_column, made.data = state
        if by_column is not False:
            raise PickleError("holds an array that is stored by columns")
    else:
        raise ValueError("it changes what is no array")


NDARRAY = object()
HOMES = ("numpy.core", "numpy._core")  # NumPy 1 and 2
CALLS: dict[tuple[str, str], Any] = {("numpy", "dtype"): _dtype}
CALLS |= {(f"{home}.multiarray", "_reconstruct"): _empty for home in HOMES}
CALLS |= {(f"{home}.numeric", "_frombuffer"): _from_buffer for home in HOMES}
VALUES = {("numpy", "ndarray"): NDARRAY}


class Pickled(NamedTuple):
    array: Array
    shape: tuple[int, ...]
    dtype: Any  # one of DTYPES' values, or the file's own name
    inputs: Any


def read_pickle(stream: Any, names: tuple[str, ...]) -> Pickled:
    """The pickle's content without the array's values; `names` are the possible keys of the array.

    Raises PickleError for anything but arrays, texts and numbers; a damaged file may raise any exception.
    """
    found = unpickle(Stream(stream), CALLS, VALUES, _build)
    if type(found) is not dict:
        raise ValueError("it is no dictionary")
    array = next((found[name] for name in names if name in found), None)
    if not isinstance(array, Array):
        raise ValueError(f"it has no array `{names[0]}`")
    kind = array.dtype
    dtype = DTYPES.get(kind.name, kind.name) if isinstance(kind, DType) and kind.order in ("<", "=") else "no numbers"
    shape = array.shape
    if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError("its array has no shape")
    return Pickled(array, shape, dtype, found.get("inputs"))


def pickled_frames(stream: Any, found: Pickled) -> Iterator[np.ndarray]:
    """Yields the frames one by one.  ValueError if the array's bytes do not match its shape."""
    data, (frames, *shape) = found.array.data, found.shape
    size = int(np.prod(shape)) * found.dtype.itemsize
    if not isinstance(data, Span | bytes | bytearray) or len(data) != frames * size:
        raise ValueError("its array does not have the bytes of its shape")
    for number in range(frames):
        if isinstance(data, Span):
            stream.seek(data.start + number * size)
            part = stream.read(size)
        else:
            part = data[number * size : (number + 1) * size]
        yield np.frombuffer(part, found.dtype).reshape(shape)
