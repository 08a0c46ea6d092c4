"""Video file -> sampled frames uint8 [F, H, W, 3] and their times in seconds, decoded with PyAV.

Frames 0, s, 2s, ... in order of presentation, with stride s = round(average_fps / fps), where Python rounds halves to
even: no cap, no padding, never fewer than one frame.  Decoding is sequential, so that an index means the same
frame in every container.  Only sampled frames are kept; `transform` shrinks each as it comes.
Letters: F sampled frames, H height, W width; h, w before `transform`.

Deviations from the original (decord): rotation and mirroring metadata are applied; a stride of 0 is an error that says
what to do; a file that ends before its declared end, or holds frames that cannot be decoded, is refused with the number
of seconds that can be read, since an answer about half a video would look like one about the whole.  (MPEG-TS and
MPEG-PS declare no end: there a cut file is simply shorter, and undecodable data before the first frame is skipped,
as recordings of a broadcast begin anywhere.)
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from llamavid_jax.media.source import MediaError, check_size, local_file

Transform = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[float, float | None], None]  # seconds read, seconds in all where the file says so
PLAYLISTS = ("concat", "hls", "dash")
BROADCASTS = ("mpegts", "mpeg")


@dataclasses.dataclass(frozen=True)
class Video:
    """Sampled frames; `timestamps` are seconds from the start of the file, as a player shows them."""

    frames: UInt8[np.ndarray, "F H W 3"]
    timestamps: Float64[np.ndarray, " F"]
    average_fps: float  # frames a second of the file
    stride: int  # frames of the file from one sampled frame to the next


def read_video(
    path: str | Path,
    fps: float | int = 1.0,
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> Video:
    """Samples `fps` frames a second; `transform` maps each uint8 [h, w, 3] to uint8 [H, W, 3].

    Raises MediaError for a file that cannot be read whole.
    """
    with open_video(path) as (container, stream, average_fps):
        stride = frame_stride(average_fps, fps, path)
        sampled = _sample(path, container, stream, average_fps, stride, transform, progress)
        times, frames = zip(*sampled, strict=True)
    return Video(np.stack(frames), np.array(times, np.float64), average_fps, stride)


def iter_frames(
    path: str | Path, fps: float | int = 1.0, transform: Transform | None = None, progress: Progress | None = None
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (seconds, frame) one by one, for videos that do not fit in memory.  Errors as `read_video`.

    A file that is cut short is known as such only at its end: use what was yielded only when the loop ended normally.
    """
    with open_video(path) as (container, stream, average_fps):
        stride = frame_stride(average_fps, fps, path)
        yield from _sample(path, container, stream, average_fps, stride, transform, progress)


def check_fps(fps: Any, name: object) -> None:
    """Raises MediaError for a rate that is not a finite number above 0 (frames a second)."""
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf:
        raise MediaError(f"{name} cannot be sampled at {fps!r} frames a second; use --fps 1")


def frame_stride(average_fps: float, fps: float | int, name: object = "the video") -> int:
    """round(average_fps / fps): 23.976 -> 24, 2.5 -> 2.  MediaError where it would be 0."""
    check_fps(fps, name)
    stride = round(average_fps / fps)
    if stride == 0:
        raise MediaError(
            f"{name} has {average_fps:.4g} frames a second, too few to sample {fps:g} a second; "
            f"use --fps {average_fps:.3g}"
        )
    return stride


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple]:
    """The open container, its best video stream and the average frames a second."""
    import av  # here, so that importing the package loads no video library

    file = local_file(path)
    unreadable = MediaError(
        f"{path} is not a video that can be read, or its beginning or index is missing (an interrupted recording or "
        "download); copy it again or convert it to .mp4"
    )
    try:
        container = av.open(str(file), metadata_errors="replace", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError):
        raise unreadable from None
    with container:
        kind = container.format.name
        if kind.endswith("_pipe") or kind == "image2":
            raise MediaError(f"{path} is a still picture, not a video; give it with --image")
        if kind in PLAYLISTS:
            raise MediaError(f"{path} is a playlist ({kind}), not a video; give the video file that it names")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise MediaError(
                f"{path} holds no known video stream, but sound, text or cover art; give a file with moving pictures"
            )
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise MediaError(f"{path} has a video codec that is not known here; convert it to H.264 .mp4")
        stream.thread_type = "AUTO"
        average_fps = float(stream.average_rate or stream.guessed_rate or 0) or _measured_fps(path, file, stream)
        yield container, stream, average_fps


def _measured_fps(path: str | Path, file: Path, stream) -> float:
    """Frames a second counted over the packets, for a container that does not say (a browser's recording)."""
    import av

    with contextlib.suppress(av.FFmpegError), av.open(str(file), metadata_errors="replace") as container:
        same = container.streams[stream.index]
        times = [float(p.pts * p.time_base) for p in container.demux(same) if p.pts is not None]
        if len(times) > 1 and max(times) > min(times):
            return (len(times) - 1) / (max(times) - min(times))
    raise MediaError(f"{path} does not say how many frames a second it has; convert it to .mp4")


def _sample(path, container, stream, average_fps, stride, transform, progress) -> Iterator[tuple[float, np.ndarray]]:
    import av

    size = {}  # of the first frame: a stream may change its size, and the frames of one video are stacked
    start = (container.start_time or 0) / 1e6
    total = container.duration / 1e6 if container.duration else None
    for index, frame in enumerate(_decode(path, container, stream)):
        if index % stride:
            continue
        if not size:
            check_size(frame.width, frame.height, path)
            size = {"width": frame.width, "height": frame.height}
        seconds = index / average_fps if frame.time is None else frame.time - start
        try:  # by default each frame starts as many threads as there are cores, and keeps them as long as it lives
            pixels = _upright(frame.to_ndarray(format="rgb24", threads=1, **size), frame)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{path} has {frame.format.name} pixels, which cannot be shown ({error}); convert it to H.264 .mp4"
            ) from None
        yield seconds, transform(pixels) if transform else pixels
        if progress:
            progress(seconds, total)


def _decode(path, container, stream) -> Iterator:
    """Every frame in order of presentation; MediaError when there are none or some are missing."""
    import av

    # A stream that does not tell its own length (Matroska) is compared with the whole file, to which sound belongs too.
    own_length = stream.duration is not None
    if own_length:
        length, start = stream.duration * stream.time_base, (stream.start_time or 0) * stream.time_base
    else:
        length, start = (container.duration or 0) / 1e6, (container.start_time or 0) / 1e6
    reached = shown = start  # where the packets read so far end; time of the last frame
    longest_gap = 0.0  # between two frames: the last one may be shown as long without the file saying so
    count, cut_short, concealed = 0, False, False
    packets = container.demux()
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is not None and (packet.stream is stream or not own_length):
                reached = max(reached, (pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is not stream:
                continue
            if packet.size:
                cut_short = packet.is_corrupt  # matters for the last one: half a packet
            frames = packet.decode()
        except av.FFmpegError:
            if count == 0 and container.format.name in BROADCASTS:
                continue
            cut_short = True
            break
        for frame in frames:
            if frame.is_corrupt and container.format.name not in BROADCASTS:  # patched up with parts of others
                cut_short = concealed = True
                break
            if frame.time is not None:
                longest_gap, shown = max(longest_gap, frame.time - shown), frame.time
            count += 1
            yield frame
        if concealed:
            break
    if count == 0:
        raise MediaError(f"{path} holds no frame that can be decoded; copy it again or convert it to H.264 .mp4")
    if cut_short or start + length - reached > 0.5 + 2 * longest_gap:
        seconds = f"{float(shown - start):.1f}" + (f" of {float(length):.1f}" if length else "")
        raise MediaError(
            f"{path} is cut short or damaged: {seconds} seconds can be read; copy it again, "
            "or keep what can be read with: ffmpeg -i FILE readable.mp4"
        )


def _upright(pixels: UInt8[np.ndarray, "h w 3"], frame) -> UInt8[np.ndarray, "H W 3"]:
    """Applies the display matrix, x' = a x + c y and y' = b x + d y: quarter turns and mirrors."""
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(side_data), np.int32)
            if abs(b) > abs(a):
                pixels, a, d = pixels.swapaxes(0, 1), c, b
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)
