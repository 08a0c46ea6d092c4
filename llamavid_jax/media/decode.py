"""Packets -> pixels of the wanted frames: in the file's order, or span by span as `reading.py` plans.

decode_in_order  decodes every frame and reports damaged or missing ones
decode_parts     decodes only the spans; raises IrregularError if the file differs from its index: then decode in order
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from llamavid_jax.media.container import BROADCASTS, damaged, empty, is_hidden, open_video, packets_of
from llamavid_jax.media.index import Index
from llamavid_jax.media.reading import Part
from llamavid_jax.media.source import MediaError, check_size
from llamavid_jax.media.timeline import Sampling, Timeline

Transform = Callable[[np.ndarray], np.ndarray]
NEAR, FAR = 32, 1024  # a decoded frame is searched this many frames before and after its expected index
LOST = 0.5  # seconds of frames that the decoder does not return: a gap


class IrregularError(Exception):
    """A decoded span does not match the index."""


class Pixels:
    """`pixels(frame)` is the frame upright, uint8 [h, w, 3], or what `transform` makes of that."""

    def __init__(self, path: str | Path, transform: Transform | None):
        self.path, self.transform = path, transform
        # of the first frame: a stream may change its size, and the frames of one video are stacked
        self.size: tuple[int, int] | None = None

    def __call__(self, frame) -> np.ndarray:
        import av

        if self.size is None:
            check_size(frame.width, frame.height, self.path)
            self.size = frame.width, frame.height
        width, height = self.size
        try:  # by default each frame starts as many threads as there are cores, and keeps them as long as it lives
            shown = _upright(frame.to_ndarray(format="rgb24", threads=1, width=width, height=height), frame)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self.path} has {frame.format.name} pixels, which cannot be shown ({error}); convert it to H.264 .mp4"
            ) from None
        return self.transform(shown) if self.transform else shown


@contextlib.contextmanager
def decode_in_order(path: str | Path, pixels: Pixels) -> Iterator[Callable[[Sampling], Iterator[np.ndarray]]]:
    """`with decode_in_order(...) as read`: `read(sampling)` gives the frame of each sample.  Raises MediaError."""
    with open_video(path) as (container, stream):

        def read(sampling: Sampling) -> Iterator[np.ndarray]:
            previous = shown = None
            for frame in _due(_decode(path, container, stream, sampling.timeline), sampling):
                if frame is not previous:
                    previous, shown = frame, pixels(frame)
                yield shown

        yield read


@contextlib.contextmanager
def decode_parts(
    path: str | Path, index: Index, pixels: Pixels, threads: str
) -> Iterator[Callable[[Part], Iterator[np.ndarray]]]:
    """`with decode_parts(...) as read`: `read(part)` yields its wanted frames, bit for bit those of `decode_in_order`.

    Raises IrregularError if it cannot.
    """
    from av.stream import Discard

    with open_video(path, threads) as (container, stream):
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        size = stream.codec_context.width, stream.codec_context.height  # of the first frame

        def read(part: Part) -> Iterator[np.ndarray]:
            due = iter(index.pts[part.wanted].tolist())
            for frame in _span_frames(container, stream, index, part):
                if frame.pts != next(due, None):
                    raise IrregularError
                if (frame.width, frame.height) != size:
                    raise IrregularError
                pixels.size = size
                yield pixels(frame)
            if next(due, None) is not None:
                raise IrregularError

        yield read


def _span_frames(container, stream, index: Index, part: Part) -> Iterator[Any]:
    """The wanted frames of a part as they come out of the decoder."""
    import av

    codec, wanted, position = stream.codec_context, set(part.wanted.tolist()), -1
    wanted_pts = set(index.pts[part.wanted].tolist())

    def decode(packet) -> list:
        try:
            frames = codec.decode(packet)
        except EOFError:
            return []
        except av.FFmpegError:
            raise IrregularError from None
        if any(frame.is_corrupt or frame.interlaced_frame for frame in frames):  # also those that others refer to
            raise IrregularError
        return [frame for frame in frames if frame.pts in wanted_pts]

    for span in part.spans:
        if position < span.start:
            if position >= 0:
                yield from decode(None)
            packets, position = _packets_from(container, stream, index, span.start), span.start
        while position < span.stop:
            packet = next(packets, None)
            if packet is None or packet.pts != index.pts[position]:
                raise IrregularError
            codec.skip_frame = "DEFAULT" if position in wanted or not index.has_nonref else "NONREF"
            yield from decode(packet)
            position += 1
    yield from decode(None)


def _packets_from(container, stream, index: Index, number: int) -> Iterator[Any]:
    """The packets from entry `number` on; seeking may land on an earlier one."""
    import av

    if not index.can_seek:
        return _with_content(container, stream)
    for target in (index.pts[number], index.dts[number]):  # formats index one or the other
        try:
            container.seek(int(target), stream=stream)  # also flushes the decoder
        except av.FFmpegError:
            continue
        packets = _with_content(container, stream)
        for packet in packets:
            found = int(index.numbers(np.array([packet.pts or 0]))[0])
            if found == number:
                return itertools.chain([packet], packets)
            if not number - FAR <= found < number:
                break
    raise IrregularError


def _with_content(container, stream) -> Iterator[Any]:
    return (packet for packet in packets_of(container, stream) if packet.size)


def _decode(path, container, stream, timeline: Timeline) -> Iterator[tuple[int, Any]]:
    """Yields (index in the timeline, frame) in presentation order; MediaError if there are none or some are missing."""
    import av

    is_broadcast = container.format.name in BROADCASTS
    shown = np.append(timeline.times, timeline.seconds)  # shown[i] to shown[i + 1]: frame i
    last, previous = len(timeline.times) - 1, -1
    for packet in packets_of(container, stream):
        try:
            frames = packet.decode()
        except EOFError:  # the decoder has given its last frames
            continue
        except av.FFmpegError:
            if (previous < 0 and is_broadcast) or is_hidden(packet):
                continue
            raise damaged(path, shown[max(previous, 0)], timeline.seconds) from None
        for frame in frames:
            if timeline.is_timed and previous < 0 and frame.pts is None:
                continue  # before the video's first timed frame, as in Matroska before 0
            place = min(_place(timeline, frame.pts if timeline.is_timed else None, previous + 1), last)
            is_lost = shown[place] - shown[previous + 1] > LOST and not (previous < 0 and is_broadcast)
            if is_lost or (frame.is_corrupt and not is_broadcast):  # corrupt: patched with parts of other frames
                raise damaged(path, shown[max(previous, 0)], timeline.seconds)
            previous = max(previous, place)
            yield place, frame
    if previous < 0:
        raise empty(path)
    if shown[-1] - shown[previous + 1] > LOST:
        raise damaged(path, shown[previous + 1], timeline.seconds)


def _place(timeline: Timeline, pts: int | None, expected: int) -> int:
    """A decoded frame's index in the timeline, near `expected`: a packet may give no frame, or two packets one."""
    start = max(0, expected - NEAR)
    places = start + np.flatnonzero(timeline.pts[start : expected + FAR] == pts)
    return expected if pts is None or not len(places) else int(places[np.abs(places - expected).argmin()])


def _due(decoded: Iterator[tuple[int, Any]], sampling: Sampling) -> Iterator[Any]:
    """Yields each sample's frame: the one at its index or, if that is missing, the one before it."""
    due, wanted, before = 0, sampling.frames, None
    for place, frame in decoded:
        while due < len(wanted) and wanted[due] <= place:
            yield frame if wanted[due] == place or before is None else before
            due += 1
        before = frame if due < len(wanted) else None
    for _ in wanted[due:]:
        yield before


def _upright(pixels: UInt8[np.ndarray, "h w 3"], frame) -> UInt8[np.ndarray, "H W 3"]:
    """Applies the display matrix, x' = a x + c y and y' = b x + d y: quarter turns and mirrors."""
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(side_data), np.int32)
            if abs(b) > abs(a):
                pixels, a, d = pixels.swapaxes(0, 1), c, b
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)
