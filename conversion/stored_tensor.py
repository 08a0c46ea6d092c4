"""One tensor in a checkpoint file: where its bytes lie, read only when asked for.

Nothing is memory-mapped and nothing but the asked bytes is read, so a process stays as small as one tensor however
large the file is.
"""

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of `shape` whose elements begin at byte `offset` of `file`; `strides` count elements, as torch's do."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

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
        """The tensor's values, C-contiguous, in the stored dtype."""
        values = np.empty(self.span, self.dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            if stream.readinto(values.view(np.uint8)) != values.nbytes:
                raise CheckpointError(f"{self.file} ends inside a tensor; it is truncated: download it again")
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, self.shape, steps)).reshape(self.shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
