"""Synthetic video clips whose frames encode their own index, so that tests can check sampling exactly."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS, BLOCK = 10, 16  # bits of the index, and pixels of a block, black or white


def index_frame(index: int) -> np.ndarray:
    """An image, uint8 [32, 160, 3], that shows the bits of `index`, lowest first."""
    bits = [(index >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, BLOCK)
    return np.broadcast_to(row[None, :, None], (2 * BLOCK, BITS * BLOCK, 3)).copy()


def read_index(frame: np.ndarray) -> int:
    """The index that a decoded `index_frame` shows."""
    centres = frame[BLOCK, BLOCK // 2 :: BLOCK].mean(-1) > 127
    return sum(1 << bit for bit, on in enumerate(centres) if on)


@contextlib.contextmanager
def own_priority() -> Iterator[None]:
    """Restores this process's priority: SVT-AV1 sets real-time priority, which would starve other tests."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    rotation: tuple[int, bool, bool] | None = None,
    container: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes `frames` at a constant `rate` or at variable `times_ms`; `options` are the encoder's."""
    with own_priority(), av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # tests run in parallel
        stream.options = options or ({"preset": "ultrafast", "g": "10"} if codec == "libx264" else {"g": "10"})
        if rotation is not None:
            stream.set_display_rotation(*rotation)  # degrees counter-clockwise, then mirrored left-right, up-down
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """A file with a sound track only."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, int(16000 * seconds)), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def cut(path: Path, fraction: float) -> Path:
    """The first part of a file, as an interrupted download leaves it."""
    data = path.read_bytes()
    short = path.with_name(f"cut-{fraction:g}-{path.name}")
    short.write_bytes(data[: int(len(data) * fraction)])
    return short
