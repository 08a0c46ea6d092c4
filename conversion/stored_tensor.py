"""One tensor in a checkpoint file: where its bytes lie, read only when asked for.

Nothing is memory-mapped and only the requested bytes are read, so memory holds one tensor however large the file is.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llamavid_jax.errors import CheckpointError

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
MAX_INDEX_BYTES = 16 << 20  # of an index of tensors; 40,000 of them take 10 MB
MAX_NAME = 500  # characters in the name of a tensor
MAX_AXES = 8


@dataclasses.dataclass(frozen=True)
class Storage:
    """A byte range of a file that tensors lie in, and its CRC-32 if the file states one."""

    file: Path
    offset: int
    nbytes: int
    crc: int | None = None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of `shape` whose elements begin at byte `offset` of a file; `strides` count elements, as torch's do."""

    storage: Storage
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.storage.file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last one used, gaps included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self) -> np.ndarray:
        """The tensor's values, C-contiguous, in the stored dtype.

        Raises CheckpointError if the file has become shorter, and if its bytes do not match their CRC-32.
        """
        check_sum(self.storage)
        values = np.empty(self.span, self.dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            if stream.readinto(values.view(np.uint8)) != values.nbytes:
                raise CheckpointError(f"{self.file} ends inside a tensor; it is truncated: download it again")
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, self.shape, steps)).reshape(self.shape)


@functools.lru_cache(maxsize=1)  # tensors that share a storage are read one after the other
def check_sum(storage: Storage) -> None:
    """Raises CheckpointError unless the bytes of the storage have the CRC-32 that the file states."""
    if storage.crc is None:
        return
    found, left = 0, storage.nbytes
    with storage.file.open("rb") as stream:
        stream.seek(storage.offset)
        while left and (part := stream.read(min(left, 1 << 20))):
            found, left = zlib.crc32(part, found), left - len(part)
    if found != storage.crc or left:
        raise CheckpointError(
            f"{storage.file} is damaged: bytes {storage.offset} to {storage.offset + storage.nbytes} do not have the "
            f"CRC-32 {storage.crc:08x} that it states; download it again"
        )


def locate(
    name: str, storage: Storage, dtype: np.dtype, offset: int, shape: Sequence[int], strides: Sequence[int]
) -> StoredTensor:
    """A tensor `offset` elements into its storage, after checking that it lies inside.

    Raises CheckpointError for invalid numbers, and for a tensor larger than its file, as one with zero strides may be.
    """
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{storage.file} holds the name {name[:60]!r}, which no weight has; save it again")
    shape, strides = tuple(shape), tuple(strides)
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError(f"{storage.file}: {name} has no valid shape; the file is damaged: download it again")
    tensor = StoredTensor(storage, storage.offset + offset * dtype.itemsize, dtype, shape, strides)
    if (offset + tensor.span) * dtype.itemsize > storage.nbytes:
        raise CheckpointError(
            f"{storage.file}: {name} of shape {shape} is longer than its storage; the file is truncated"
        )
    if tensor.nbytes > max(storage.nbytes, storage.file.stat().st_size):
        raise CheckpointError(f"{storage.file}: {name} of shape {shape} is larger than its file; save it again")
    return tensor


def count_not_finite(value: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    with np.errstate(invalid="ignore"):
        return value.size - np.count_nonzero(np.isfinite(value))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
