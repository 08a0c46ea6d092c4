"""When a video shows its frames, and which of them are sampled: packets' times -> Timeline -> Sampling.  No decoding.

    timeline_of   packets in file order ─▶ the time of every frame, in presentation order
    sample        Timeline, fps ─▶ which frames, and when; at a lower rate (`sample_at_most`), or of key frames alone

Two rules.  "stride", if the frames keep the declared rate: frames 0, s, 2s, ... with s = round(rate / fps), halves to
even, as in the original.  "times", if they do not (a varying rate, slides, a wrong header): the frame shown at each of
0, 1/fps, 2/fps, ... seconds after the first one.  The original strides over such files too, and sees few frames or only
part of the video.  There is no cap and no padding, and at least one frame.
Letters: N frames of the file, F sampled ones.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from llamavid_jax.media.index import Index
from llamavid_jax.media.source import MediaError

ROUNDING = 1e-3  # seconds; most containers round times to milliseconds
JITTER = 0.15  # seconds; slides shown for roughly equal times have no rate
RATE_ERROR = 0.005  # by which a declared rate may differ from the frames' own: 30 for 29.97
JUMP = 10.0  # seconds; a longer step in a broadcast is a new clock (as in FFmpeg), a longer last frame is an error
MAX_SAMPLES = 10**6  # eleven days at one a second: only damaged times need more


class Packet(NamedTuple):
    """One encoded frame; times in ticks, None where the file has none."""

    pts: int | None
    duration: int
    is_key: bool
    is_shown: bool = True  # an edit list hides frames that only other frames need


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames in presentation order, according to their packets."""

    pts: Int64[np.ndarray, " N"]  # ticks as in the file; a joined file may have each twice
    times: Float64[np.ndarray, " N"]  # seconds after the first frame
    seconds: float  # until the last frame's end
    average_fps: float  # the declared rate if the frames keep it, else 0
    index: Index | None = None  # where decoding may begin; None if all must be decoded in order
    is_timed: bool = True  # else packets have no times or guessed ones, and frames are identified by order


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames are read, and when; a frame that is shown for long may occur several times."""

    timeline: Timeline
    rule: str  # "stride", "times" or "key frames"
    frames: Int64[np.ndarray, " F"]  # indices in the timeline, ascending
    times: Float64[np.ndarray, " F"]  # seconds after the first frame

    def __len__(self) -> int:
        return len(self.frames)

    def only(self, places: Sequence[int]) -> "Sampling":
        """The sampling at some indices, which ascend."""
        return dataclasses.replace(self, frames=self.frames[places], times=self.times[places])


def timeline_of(
    packets: Sequence[Packet], tick: float, declared_fps: float, *, is_broadcast: bool = False, has_times: bool = True
) -> Timeline:
    """`packets` (one at least) in the file's order, their ticks `tick` seconds long.

    `declared_fps` is 0 if unknown.  Without `has_times` the packets' times are a guess, off by a few frames.
    """
    parts = _parts(packets, JUMP / tick if is_broadcast else math.inf)
    steps = np.concatenate([np.diff(part) for part in parts]) * tick
    steps = steps[steps > 0]
    step = float(np.median(steps)) if len(steps) else 1 / (declared_fps or 25)
    times, end = [], 0.0
    for part in parts:  # each begins where the one before it ends
        times.append((part - part[0]) * tick + end)
        own = np.diff(part)[np.diff(part) > 0] * tick
        end = times[-1][-1] + (float(np.median(own)) if len(own) else step)
    times = np.concatenate(times)
    # How long the last frame is shown: its packet's duration, within limits, if the earlier packets' were right.
    durations = np.array([packet.duration for packet in packets if packet.is_shown]) * tick
    if len(parts) == 1 and len(steps) and math.isclose(durations[:-1].sum(), times[-1], rel_tol=0.01):
        end = times[-1] + min(durations[-1] or step, max(steps.max(), JUMP))
    average_fps = declared_fps if _keeps_rate(times, declared_fps, 0.5 if has_times else 3.0) else 0.0
    if average_fps and not has_times:
        times = np.arange(len(times)) / average_fps
    is_timed = has_times and any(packet.pts is not None for packet in packets)
    return Timeline(np.concatenate(parts), times, float(end), average_fps, is_timed=is_timed)


def _parts(packets: Sequence[Packet], jump: float) -> list[Int64[np.ndarray, " n"]]:
    """Sorted ticks of each part of a file; a file of several joined ones has several."""
    known = [packet for packet in packets if packet.pts is not None]
    if not known:  # a stream without a container
        return [np.cumsum([0, *(max(packet.duration, 1) for packet in packets[:-1])])]
    first = next((place for place, packet in enumerate(packets) if packet.is_key), 0)
    begun = [packet for packet in packets[first:] if packet.pts is not None]
    parts: list[list[int]] = [[]]
    start = latest = begun[0].pts if begun else 0
    if packets[first].pts is None:  # as in Matroska before 0: all that follows can be decoded
        start = min(packet.pts for packet in known)
    for packet in begun:  # what comes before the first key frame cannot be decoded
        # All that precedes a key frame in the file is shown before it: otherwise the times begin again here.
        if packet.pts - latest > jump or (packet.is_key and packet.pts < latest):
            parts.append([])
            start = latest = packet.pts
        if packet.pts >= start:  # nor can what depends on frames before the key frame
            latest = max(latest, packet.pts)
            if packet.is_shown:
                parts[-1].append(packet.pts)
    parts = [part for part in parts if part] or [[packet.pts for packet in known]]
    return [np.sort(np.array(part, np.int64)) for part in parts]


def _keeps_rate(times: Float64[np.ndarray, " N"], declared_fps: float, frames: float) -> bool:
    """Whether frame i is shown at i / rate, up to `frames` frames and JITTER, for a rate that is the declared one."""
    if declared_fps <= 0 or len(times) == 1 or times[-1] <= 0:
        return declared_fps > 0
    own = (len(times) - 1) / times[-1]
    slack = min(frames / own, JITTER) + ROUNDING
    difference = abs((len(times) - 1) / declared_fps - times[-1])
    even = np.abs(np.arange(len(times)) / own - times) <= slack
    return bool(even.all() and difference <= max(slack, RATE_ERROR * times[-1]))


def check_fps(fps: Any, name: object) -> None:
    """Raises MediaError for a rate that is not a finite number above 0 (frames a second)."""
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf:
        raise MediaError(f"{name} cannot be sampled at {fps!r} frames a second; use fps 1")


def frame_stride(average_fps: float, fps: float | int, name: object = "the video") -> int:
    """round(average_fps / fps): 23.976 -> 24, 2.5 -> 2.  MediaError if it would be 0."""
    check_fps(fps, name)
    stride = round(average_fps / fps)
    if stride == 0:
        raise MediaError(
            f"{name} has {average_fps:.4g} frames a second, too few to sample {fps:g} a second; use fps "
            f"{average_fps:.3g} or, where it is fixed, write the video with more: ffmpeg -i IN -r {fps:g} OUT"
        )
    return stride


def count_samples(frames: int, average_fps: float, seconds: float, fps: float | int, name: object = "the video") -> int:
    """The number of frames sampled from a Timeline of `frames` frames.  Raises MediaError."""
    check_fps(fps, name)
    if average_fps:
        return math.ceil(frames / frame_stride(average_fps, fps, name))
    if seconds * fps > MAX_SAMPLES:
        raise MediaError(
            f"{name} lasts {seconds:.0f} seconds by its frames' times: more than {MAX_SAMPLES} samples at {fps:g} a "
            "second; use a lower fps, or convert it to .mp4 where the times are damaged"
        )
    return max(1, math.ceil((seconds - ROUNDING) * fps))


def sample(timeline: Timeline, fps: float | int, name: object = "the video") -> Sampling:
    """The frames of a Timeline at `fps`.  Raises MediaError for an impossible `fps`."""
    count = count_samples(len(timeline.times), timeline.average_fps, timeline.seconds, fps, name)
    if timeline.average_fps:
        frames = np.arange(count) * frame_stride(timeline.average_fps, fps, name)
        return Sampling(timeline, "stride", frames, timeline.times[frames])
    return shown_at(timeline, np.arange(count) / fps)


def shown_at(timeline: Timeline, times: Float64[np.ndarray, " F"]) -> Sampling:
    """The frames shown at `times`, seconds after the first frame."""
    return Sampling(timeline, "times", np.searchsorted(timeline.times, times + ROUNDING, side="right") - 1, times)


def sample_at_most(
    timeline: Timeline, fps: float | int, most: int, name: object = "the video"
) -> tuple[Sampling, float]:
    """`sample` at `fps`, or at the highest rate that gives at most `most` frames (at least one), and that rate."""
    sampling, most = sample(timeline, fps, name), max(most, 1)
    if len(sampling) <= most:
        return sampling, float(fps)
    if timeline.average_fps:
        fps = timeline.average_fps / math.ceil(len(timeline.times) / most)
    else:
        fps = most / timeline.seconds
    return sample(timeline, fps, name), fps


def rate_that_fits(timelines: Sequence[Timeline], frames: float | int) -> float:
    """Frames a second at which the videos together have nine tenths of `frames`, or fewer if their strides need it."""
    fps = max(0.9 * frames / sum(timeline.seconds for timeline in timelines), 1e-9)
    rates = [timeline.average_fps for timeline in timelines if timeline.average_fps]
    return min([fps, *(rate / math.ceil(rate / fps) for rate in rates)])


def nearest_keys(sampling: Sampling) -> Sampling | None:
    """Replaces each frame by the key frame nearest in time; None if the file does not mark its key frames."""
    timeline, index = sampling.timeline, sampling.timeline.index
    if index is None or not index.can_seek:
        return None
    places = np.flatnonzero(np.isin(timeline.pts, index.pts[index.entries]))  # an edit list may hide some
    if not len(places):
        return None
    middles = (timeline.times[places[1:]] + timeline.times[places[:-1]]) / 2
    frames = places[np.searchsorted(middles, sampling.times)]
    return Sampling(timeline, "key frames", frames, timeline.times[frames])
