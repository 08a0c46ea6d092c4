"""Video file -> sampled frames uint8 [F, H, W, 3] and their times in seconds, decoded with PyAV.

    file ─ its packets, undecoded ─▶ Timeline ─ fps ─▶ Sampling          media/timeline.py: the rules
                                     └ Index ─ Sampling ─▶ parts         media/reading.py: what has to be decoded
    parts ─ several decoders in threads ─▶ transform ─▶ (seconds, frame)

The Sampling is made before anything is decoded; everything that counts or reads frames follows it.  Only its frames are
converted; `transform` shrinks each one in the thread that decoded it.
Letters: F sampled frames, H height, W width; h, w before `transform`.

Deviations from the original (decord): files that do not keep their declared rate are sampled by the frames' own times;
rotation and mirroring metadata are applied; a stride of 0 is an error with a remedy; a file that is cut short or holds
undecodable frames is refused with the number of readable seconds, since an answer about half a video would look like
one about the whole.  (`media/ending.py` lists the formats whose cut end is detected, docs/long-video.md the damage that
goes unseen in a long video, of which not all is decoded.  In MPEG-TS and MPEG-PS data before the first decodable frame
is skipped, as recordings of a broadcast begin anywhere.)
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8

from llamavid_jax.media.ahead import side_by_side
from llamavid_jax.media.container import (
    BROADCASTS,
    WITHOUT_TIMES,
    DamagedError,
    damaged,
    empty,
    is_hidden,
    open_video,
    packets_of,
)
from llamavid_jax.media.decode import LOST, IrregularError, Pixels, Transform, decode_in_order, decode_parts
from llamavid_jax.media.ending import is_cut, is_joined
from llamavid_jax.media.index import Mark, Units, index_of
from llamavid_jax.media.reading import plan_reading
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.media.timeline import Packet, Sampling, Timeline, sample, timeline_of

Progress = Callable[[Sampling, int], None]  # the sampling, and how many of its frames have been decoded
Partial = Callable[[float], None]  # called with the readable seconds of a damaged file, which is then read up to there
UNTOLD = (*BROADCASTS, "mpjpeg")  # formats whose normal end FFmpeg reports as a cut
DECLARED = ("ivf", "mxf")  # formats whose stated length is that of their frames, so that a shorter file is a cut one
AHEAD = 2**28  # bytes of frames decoded ahead at most: 1,783 frames of 224 x 224 pixels
DECODER = 64  # bytes that one decoder holds for each pixel of a frame, and for each packet of the file
DECODERS = 2**30  # bytes that all decoders of one video hold together


@dataclasses.dataclass(frozen=True)
class Video:
    """Sampled frames, and the sampling that chose them."""

    frames: UInt8[np.ndarray, "F H W 3"]
    sampling: Sampling

    @property
    def timestamps(self) -> Float64[np.ndarray, " F"]:
        """Seconds after the first frame of the file."""
        return self.sampling.times


def read_video(
    path: str | Path,
    fps: float | int = 1.0,
    transform: Transform | None = None,
    progress: Progress | None = None,
    decoders: int = 0,
) -> Video:
    """Samples `fps` frames a second; `transform` maps each uint8 [h, w, 3] to uint8 [H, W, 3].

    `decoders`: as in `iter_frames`.  Raises MediaError for a file that cannot be read to its end.
    """
    sampling = plan_video(path, fps)
    frames = iter_frames(path, sampling, transform, progress, decoders)
    return Video(np.stack([frame for _, frame in frames]), sampling)


def plan_video(path: str | Path, fps: float | int = 1.0, partial: Partial | None = None) -> Sampling:
    """Which frames are sampled, from the file's packets alone.  Raises MediaError; `partial` as in `read_timeline`."""
    return sample(read_timeline(path, partial), fps, path)


def read_timeline(path: str | Path, partial: Partial | None = None) -> Timeline:
    """The times of all frames, without decoding them.

    Raises MediaError: DamagedError for a file that is cut, unless `partial` is given.
    """
    file = local_file(path)
    stat = file.stat()
    try:
        return _read_timeline(path, file, stat.st_size, stat.st_mtime_ns)
    except DamagedError as error:
        if partial is None or error.timeline is None:
            raise
        partial(error.seconds)
        return error.timeline


@functools.lru_cache(
    maxsize=4
)  # frames are counted before a model is loaded; reading an hour of packets takes a second
def _read_timeline(path: str | Path, file: Path, size: int, changed: int) -> Timeline:
    import av

    with open_video(path) as (container, stream):
        kind, tick = container.format.name, float(stream.time_base)
        packets, marks, is_partial = [], [], False
        units = Units(stream.codec_context)
        try:
            for packet in packets_of(container):
                if packet.size:
                    is_partial = packet.is_corrupt  # matters for the last one
                    if packet.stream is stream:
                        if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                            raise MediaError(f"{path} is encrypted, and there is no key to it; give it decrypted")
                        marks.append(Mark(packet.pts, packet.dts, units.is_entry(packet)))
                        if not is_hidden(packet):
                            pts = packet.dts if packet.pts is None else packet.pts
                            packets.append(Packet(pts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
        except av.FFmpegError:
            is_partial = True
        if not is_partial and not any(packet.is_shown for packet in packets):
            raise empty(path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        flags = {"is_broadcast": kind in BROADCASTS, "has_times": kind not in WITHOUT_TIMES}
        timeline = timeline_of(packets, tick, rate, **flags) if packets else None
        seconds = timeline.times[-1] if timeline else 0.0
        is_short = kind in DECLARED and float((stream.duration or 0) * stream.time_base) - seconds > LOST
        if timeline is None or is_cut(file, kind) or is_short or (is_partial and kind not in UNTOLD):
            raise damaged(path, seconds, (container.duration or 0) / 1e6, timeline)
        if kind not in WITHOUT_TIMES and (np.diff(timeline.pts) > 0).all():
            timeline = dataclasses.replace(timeline, index=index_of(marks, units, kind, stream.codec_context))
    if is_joined(file, kind):
        raise MediaError(
            f"{path} is several files joined end to end, of which not all can be read; "
            "give them one by one, or join them with: ffmpeg -f concat"
        )
    return timeline


def iter_frames(
    path: str | Path,
    sampling: Sampling,
    transform: Transform | None = None,
    progress: Progress | None = None,
    decoders: int = 0,
    partial: Partial | None = None,
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (seconds, frame) of `sampling` one by one, for videos too long for memory.  Errors as in `read_video`.

    With 0 `decoders` a frame is decoded when it is requested; else in that many threads, up to AHEAD bytes of frames
    ahead.  A damaged frame is found only when it is reached: use the yielded frames only after the loop ended normally.
    With `partial` the loop ends at the damage instead.
    """
    frames, done = _frames(path, sampling, Pixels(path, transform), decoders), 0
    try:
        for seconds, frame in zip(sampling.times.tolist(), frames, strict=True):
            done += 1
            if progress:
                progress(sampling, done)
            yield seconds, frame
    except DamagedError as error:
        if partial is None or not done:
            raise
        partial(max(error.seconds, float(sampling.times[done - 1])))


def _frames(path: str | Path, sampling: Sampling, pixels: Pixels, decoders: int) -> Iterator[np.ndarray]:
    """Yields the frame of each sample."""
    places, counts = np.unique(sampling.frames, return_counts=True)
    parts, done = plan_reading(sampling.timeline, places), 0
    if parts:
        index, own = sampling.timeline.index, "AUTO" if len(parts) == 1 else "NONE"  # FFmpeg's own threads
        reader = functools.partial(decode_parts, path, index, pixels, own)
        held = DECODER * (index.area + len(index.pts))
        threads = min(decoders, len(parts), max(1, DECODERS // held))
        try:
            with contextlib.closing(side_by_side(parts, reader, threads, AHEAD)) as frames:
                for frame in frames:
                    for _ in range(counts[done]):
                        yield frame
                    done += 1
            return
        except IrregularError:  # the rest is decoded in file order
            pass
    rest = sampling.only(range(counts[:done].sum(), len(sampling)))
    reader = functools.partial(decode_in_order, path, pixels)
    with contextlib.closing(side_by_side([rest], reader, min(decoders, 1), AHEAD)) as frames:
        yield from frames


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
