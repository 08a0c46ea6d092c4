"""The feature file: features of a video and their description, written frame by frame (docs/features.md).

    safetensors   feats   [F, P, E]   BF16, F16 or F32; or I8, with
                  scales  [F, E]      F32: value = feats * scales
    metadata      llamavid_features   JSON: the fields of `Description`
                  sha256              of that JSON's bytes

The JSON holds a SHA-256 of every `FRAMES_A_SUM` frames, so that any damage is detected before a damaged frame is used.
The file is written under a temporary name and renamed, so it is complete or absent.  What a killed process left is
deleted when the file is written again.
"""

import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import struct
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llamavid_jax import uploads
from llamavid_jax.files import MAX_JSON_BYTES, parse_object
from llamavid_jax.media.source import MediaError

SUFFIX = ".safetensors"
KEY, SUM = "llamavid_features", "sha256"  # in safetensors' metadata
VERSION = 1
FRAMES_A_SUM = 32
AHEAD = 4  # runs of that many frames, read and checked while one is used
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
}

FIELDS = {  # of the JSON, with their types
    "version": int,
    "shape": list,
    "dtype": str,
    "cls": bool,
    "timestamps": list,
    "source": dict,
    "sampling": dict,
    "processing": dict,
    "tower": dict,
    "inputs": str | None,
    "error": dict | None,
    "sums": list,
}


def name_of(dtype: np.dtype) -> str:
    """A type's name in the file: "BF16" for bfloat16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclasses.dataclass(frozen=True)
class Description:
    """What was encoded, and how; `FeatureWriter` adds version, shape, dtype, error and checksums."""

    cls: bool  # whether each frame begins with the CLS token
    timestamps: list[float]  # of the frames, in seconds
    source: Mapping[str, Any]  # name, bytes, sha256
    sampling: Mapping[str, Any]  # fps, rule, seconds of the video
    processing: Mapping[str, Any]  # size, mean, std, aspect
    tower: Mapping[str, Any]  # sha256 of its weights, dtype
    inputs: str | None = None  # a video's text: one <image> per frame, subtitles between them


class FeatureWriter:
    """Writes one file: `add(frame)` for each, then `commit(description)`; or `discard()`.

    Raises OSError if the disk is full or the folder not writable; then there is no file.
    """

    def __init__(self, path: Path, frames: int, dtype: str, text: str = ""):
        """Reserves a header for `frames` frames and a description that holds `text` twice; `dtype`: one of DTYPES."""
        self.path, self.dtype = path, dtype
        self.room = 8192 + 48 * frames + 2 * len(json.dumps(json.dumps(text)))
        self.shape: tuple[int, ...] | None = None
        self.frames, self.sums, self.scales = 0, [], []
        self._sum, self._squares, self._worst = hashlib.sha256(), np.zeros(2), 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.aside = path.with_name(f".{path.name}.{os.getpid()}.{id(self):x}.part")
        _sweep(path)
        while True:
            self._file = self.aside.open("xb")
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # another process took it for a leftover and deleted it
        with self._discarded_on_error():
            self._file.seek(self.room)

    def add(self, frame: np.ndarray) -> None:
        """Adds a floating-point `frame` [P, E].  MediaError if it is not finite or the type cannot hold it."""
        with self._discarded_on_error():
            self.shape = self.shape or frame.shape
            if frame.shape != self.shape:
                raise ValueError(f"a frame has the shape {frame.shape}, those before it {self.shape}")
            if not np.isfinite(frame).all():
                raise MediaError(
                    f"frame {self.frames} has features that are not finite; see that the weights are right"
                )
            if self.dtype == "I8":
                stored, scale = quantized(frame)
                self.scales.append(scale)
                difference = stored * scale - frame.astype(np.float32)
                self._squares += np.square(difference).sum(dtype=float), np.square(frame.astype(float)).sum()
                self._worst = max(self._worst, float(np.abs(difference).max()))
                parts = [stored, scale]
            else:
                with np.errstate(over="ignore"):
                    parts = [frame.astype(DTYPES[self.dtype])]
                if not np.isfinite(parts[0]).all():
                    raise MediaError(f"frame {self.frames} has features that {self.dtype} cannot hold; write bfloat16")
            self._file.write(parts[0].tobytes())
            for part in parts:
                self._sum.update(part.tobytes())
            self.frames += 1
            if self.frames % FRAMES_A_SUM == 0:
                self._end_sum()

    def commit(self, description: Description, **more: Any) -> None:
        """Completes the file; `more`: further fields of the JSON, for the caller's use."""
        with self._discarded_on_error():
            if self.frames % FRAMES_A_SUM:
                self._end_sum()
            if self.frames != len(description.timestamps) or not self.frames:
                raise MediaError(f"{len(description.timestamps)} times stand for {self.frames} frames; try it again")
            tensors, end = {}, self.frames * math.prod(self.shape) * DTYPES[self.dtype].itemsize
            shape = [self.frames, *self.shape]
            tensors["feats"] = {"dtype": self.dtype, "shape": shape, "data_offsets": [0, end]}
            if self.scales:
                scales = np.stack(self.scales)
                self._file.write(scales.tobytes())
                offsets = [end, end + scales.nbytes]
                tensors["scales"] = {"dtype": "F32", "shape": list(scales.shape), "data_offsets": offsets}
            own = {"version": VERSION, "shape": shape, "dtype": self.dtype, "error": self._error()}
            text = json.dumps(own | {"sums": self.sums} | dataclasses.asdict(description) | more)
            metadata = {KEY: text, SUM: hashlib.sha256(text.encode()).hexdigest()}
            header = json.dumps({"__metadata__": metadata, **tensors}).encode()
            if len(header) > self.room - 8:
                raise ValueError(f"the header takes {len(header)} bytes of {self.room}")
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self.room - 8) + header.ljust(self.room - 8))
            self._file.close()
            os.replace(self.aside, self.path)
            uploads.send(self.path)

    def discard(self) -> None:
        """Deletes the unfinished file, if there is one."""
        with contextlib.suppress(OSError):  # closing a file repeats a failed write
            self._file.close()
        with contextlib.suppress(OSError):
            self.aside.unlink(missing_ok=True)

    def _end_sum(self) -> None:
        self.sums.append(self._sum.hexdigest())
        self._sum = hashlib.sha256()

    def _error(self) -> dict[str, float] | None:
        """The error of int8: root mean square relative to that of the values, and the largest."""
        if self.dtype != "I8":
            return None
        return {"relative": float(np.sqrt(self._squares[0] / max(self._squares[1], 1e-30))), "largest": self._worst}

    @contextlib.contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


def _sweep(path: Path) -> None:
    """Deletes what killed processes left of `path`: nobody holds a lock on it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def quantized(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`frame` [P, E] as int8 with a scale [E] per channel; a scale per patch would have 1.6 times the error."""
    values = frame.astype(np.float32)
    scale = np.abs(values).max(0) / np.float32(127)
    stored = np.round(values / np.where(scale > 0, scale, 1)).astype(np.int8)
    return stored, scale


def read_description(file: Path, metadata: Mapping[str, str], tensors: Mapping[str, tuple]) -> dict[str, Any] | None:
    """The JSON of a feature file; None for any other safetensors file.

    `tensors`: (type, shape) of each, in file order.  Raises ValueError if the file is damaged, MediaError for another
    version of the format.
    """
    if KEY not in metadata:
        return None
    text = metadata[KEY].encode()
    if hashlib.sha256(text).hexdigest() != metadata.get(SUM):
        raise ValueError("its description does not have the SHA-256 beside it")
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"its description has {len(text)} bytes")
    found = parse_object(text)
    if found.get("version") != VERSION:
        raise MediaError(f"{file} has version {found.get('version')!r} of the format, not {VERSION}; make it again")
    for name, kind in FIELDS.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{name} is missing in its description")
    shape, int8 = found["shape"], found["dtype"] == "I8"
    if found["dtype"] not in DTYPES or len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError("its description has no type or no shape")
    wanted = {"feats": (found["dtype"], shape)} | ({"scales": ("F32", [shape[0], shape[2]])} if int8 else {})
    if list(tensors.items()) != list(wanted.items()) or len(found["sums"]) != math.ceil(shape[0] / FRAMES_A_SUM):
        raise ValueError("its arrays are not those of its description")
    times = found["timestamps"]
    if len(times) != shape[0] or not all(type(time) in (int, float) and math.isfinite(time) for time in times):
        raise ValueError("it has not one time for each frame")
    said = found["sampling"]
    if type(said.get("rule")) is not str or not all(_is_positive(said.get(name)) for name in ("fps", "seconds")):
        raise ValueError("its sampling has no rule, fps or seconds")
    return found


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def described_frames(stream: Any, description: Mapping[str, Any]) -> Generator[np.ndarray, None, None]:
    """Yields each frame [P, E] of the open file in its stored type, int8 as float32.

    Raises ValueError at the first run of frames that is damaged.
    """
    frames, patches, width = description["shape"]
    dtype, run = DTYPES[description["dtype"]], FRAMES_A_SUM
    start = 8 + struct.unpack("<Q", os.pread(stream.fileno(), 8, 0))[0]
    size = patches * width * dtype.itemsize
    after = start + frames * size  # where the scales begin

    def read(number: int) -> np.ndarray:
        first = number * run
        count = min(run, frames - first)
        data = os.pread(stream.fileno(), count * size, start + first * size)
        scales = b""
        if dtype == np.int8:
            scales = os.pread(stream.fileno(), count * width * 4, after + first * width * 4)
        if _sum_of(data, scales, count) != description["sums"][number]:
            raise ValueError(f"frames {first} to {first + count - 1} do not have the SHA-256 of its description")
        values = np.frombuffer(data, dtype).reshape(count, patches, width)
        return values if not scales else values * np.frombuffer(scales, np.float32).reshape(count, 1, width)

    for values in _ahead(read, len(description["sums"])):
        yield from values


def _sum_of(data: bytes, scales: bytes, count: int) -> str:
    """The checksum as `FeatureWriter.add` computes it: each frame, followed by its scales."""
    if not scales:
        return hashlib.sha256(data).hexdigest()
    found, size, more = hashlib.sha256(), len(data) // count, len(scales) // count
    for number in range(count):
        found.update(data[number * size : (number + 1) * size])
        found.update(scales[number * more : (number + 1) * more])
    return found.hexdigest()


def _ahead(read: Any, count: int) -> Iterator[Any]:
    """Yields `read(0)`, `read(1)`, ...; AHEAD of them run in threads, as reading releases Python's lock."""
    with ThreadPoolExecutor(AHEAD) as threads:
        under_way: collections.deque[Any] = collections.deque()
        try:
            for number in range(count):
                under_way.append(threads.submit(read, number))
                if len(under_way) > AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for left in under_way:
                left.cancel()
