"""Video file -> sampled frames uint8 [F, H, W, 3] and their times in seconds, decoded with PyAV.

    file ─ its packets, undecoded ─▶ Timeline ─ fps ─▶ Sampling          media/timeline.py has the rules
         └ decoded in order, the frames of the plan alone ─▶ transform ─▶ (seconds, frame)

The plan is made before anything is decoded, and everything that counts or reads frames goes by it.  Only the frames of
the plan are converted; `transform` shrinks each as it comes.
Letters: F sampled frames, H height, W width; h, w before `transform`.

Deviations from the original (decord): files that do not keep their declared rate are sampled by the frames' own times;
rotation and mirroring metadata are applied; a stride of 0 is an error that says what to do; a file that is cut short or
holds frames that cannot be decoded is refused with the number of seconds that can be read, since an answer about half a
video would look like one about the whole.  (`media/ending.py` says of which formats a cut end can be told.  In MPEG-TS
and MPEG-PS data before the first frame that can be decoded is skipped, as recordings of a broadcast begin anywhere.)
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from llamavid_jax.media.ending import is_cut, is_joined
from llamavid_jax.media.images import open_picture
from llamavid_jax.media.source import MediaError, check_size, local_file
from llamavid_jax.media.timeline import Packet, Sampling, Timeline, sample, timeline_of

Transform = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[Sampling, int], None]  # the plan, and how many of its frames have been decoded
PLAYLISTS = ("concat", "hls", "dash")
BROADCASTS = ("mpegts", "mpeg")
DECLARED = ("ivf", "mxf")  # formats whose stated length is that of their frames, and tells a cut
WITHOUT_TIMES = ("avi", "mpeg")  # FFmpeg makes up times of packets, which the frames get in another order
NEAR, FAR = 32, 1024  # frames before and after the place expected where a decoded one is looked for
LOST = 0.5  # seconds of frames that do not come out of the decoder: a gap


@dataclasses.dataclass(frozen=True)
class Video:
    """Sampled frames, and the plan by which they were read."""

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
) -> Video:
    """Samples `fps` frames a second; `transform` maps each uint8 [h, w, 3] to uint8 [H, W, 3].

    Raises MediaError for a file that cannot be read to its end.
    """
    sampling = plan_video(path, fps)
    return Video(np.stack([frame for _, frame in iter_frames(path, sampling, transform, progress)]), sampling)


def plan_video(path: str | Path, fps: float | int = 1.0) -> Sampling:
    """Which frames are sampled, from the packets of the file alone.  Raises MediaError."""
    return sample(read_timeline(path), fps, path)


def read_timeline(path: str | Path) -> Timeline:
    """The times of all frames, without decoding them.  Raises MediaError for a file that is cut short."""
    import av

    with open_video(path) as (container, stream):
        kind, tick = container.format.name, float(stream.time_base)
        packets, is_partial, file = [], False, local_file(path)
        try:
            for packet in _packets(container):
                if packet.size:
                    is_partial = packet.is_corrupt  # matters for the last one
                    if packet.stream is stream and not _is_hidden(packet):
                        pts = packet.dts if packet.pts is None else packet.pts
                        packets.append(Packet(pts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
        except av.FFmpegError:
            is_partial = True
        if not is_partial and not any(packet.is_shown for packet in packets):
            raise _empty(path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        flags = {"is_broadcast": kind in BROADCASTS, "has_times": kind not in WITHOUT_TIMES}
        timeline = timeline_of(packets, tick, rate, **flags) if packets else None
        seconds = timeline.times[-1] if timeline else 0.0
        is_short = kind in DECLARED and float((stream.duration or 0) * stream.time_base) - seconds > LOST
        if timeline is None or is_cut(file, kind) or is_short or (is_partial and kind not in BROADCASTS):
            raise _damaged(path, seconds, (container.duration or 0) / 1e6)
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
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (seconds, frame) of the plan one by one, for videos that do not fit in memory.  Errors as `read_video`.

    A damaged frame is known as such only when it is reached: use what was yielded only when the loop ended normally.
    """
    import av

    size = {}  # of the first frame: a stream may change its size, and the frames of one video are stacked

    def pixels(frame) -> np.ndarray:
        if not size:
            check_size(frame.width, frame.height, path)
            size.update(width=frame.width, height=frame.height)
        try:  # by default each frame starts as many threads as there are cores, and keeps them as long as it lives
            shown = _upright(frame.to_ndarray(format="rgb24", threads=1, **size), frame)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{path} has {frame.format.name} pixels, which cannot be shown ({error}); convert it to H.264 .mp4"
            ) from None
        return transform(shown) if transform else shown

    with open_video(path) as (container, stream):
        previous = shown = None
        frames = _due(_decode(path, container, stream, sampling.timeline), sampling)
        for done, (seconds, frame) in enumerate(zip(sampling.times.tolist(), frames, strict=True), 1):
            if frame is not previous:
                previous, shown = frame, pixels(frame)
            if progress:
                progress(sampling, done)
            yield seconds, shown


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple]:
    """The open container and its best video stream."""
    import av  # here, so that importing the package loads no video library

    file = local_file(path)
    unreadable = MediaError(
        f"{path} is not a video that can be read, or its beginning or index is missing (an interrupted recording or "
        "download); copy it again or convert it to .mp4"
    )
    try:
        container = av.open(
            _animated_webp(path) or str(file), metadata_errors="replace", options={"protocol_whitelist": "file"}
        )
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
        if stream.codec_context.width:  # else known with the first frame
            check_size(stream.codec_context.width, stream.codec_context.height, path)
        # FFmpeg's Theora takes the headers in the middle of a joined file on one thread only
        stream.thread_type = "NONE" if stream.codec_context.name == "theora" else "AUTO"
        yield container, stream


def _animated_webp(path: str | Path) -> io.BytesIO | None:
    """An animated WebP, which FFmpeg does not read, as lossless video in memory; None for any other file."""
    import av

    with local_file(path).open("rb") as file:
        head = file.read(21)
    if len(head) < 21 or head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X" or not head[20] & 2:
        return None
    if is_cut(local_file(path), "webp_pipe"):
        raise _damaged(path, 0, 0)
    video, milliseconds = io.BytesIO(), Fraction(1, 1000)
    with open_picture(path) as image, av.open(video, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=1000, width=image.width, height=image.height, pix_fmt="bgr0")
        time = 0
        for number in range(image.n_frames):
            image.seek(number)
            frame = av.VideoFrame.from_image(image.convert("RGB"))
            frame.pts, frame.time_base = time, milliseconds
            for packet in stream.encode(frame):
                packet.duration = max(1, image.info["duration"])
                output.mux(packet)
                time += packet.duration
        output.mux(stream.encode())
    video.seek(0)
    return video


def _decode(path, container, stream, timeline: Timeline) -> Iterator[tuple[int, Any]]:
    """(place in the timeline, frame) in order of presentation; MediaError when there are none or some are missing."""
    import av

    is_broadcast, by_time = container.format.name in BROADCASTS, container.format.name not in WITHOUT_TIMES
    shown = np.append(timeline.times, timeline.seconds)  # from shown[i] to shown[i + 1]
    last, previous = len(timeline.times) - 1, -1
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if (previous < 0 and is_broadcast) or _is_hidden(packet):
                continue
            raise _damaged(path, shown[max(previous, 0)], timeline.seconds) from None
        for frame in frames:
            place = min(_place(timeline, frame.pts if by_time else None, previous + 1), last)
            is_lost = shown[place] - shown[previous + 1] > LOST and not (previous < 0 and is_broadcast)
            if is_lost or (frame.is_corrupt and not is_broadcast):  # corrupt: patched up with parts of others
                raise _damaged(path, shown[max(previous, 0)], timeline.seconds)
            previous = max(previous, place)
            yield place, frame
    if previous < 0:
        raise _empty(path)
    if shown[-1] - shown[previous + 1] > LOST:
        raise _damaged(path, shown[previous + 1], timeline.seconds)


def _packets(container, *streams) -> Iterator[Any]:
    """All packets, or those of `streams`, but for streams that begin in the middle of the file, which PyAV lacks."""
    while True:
        try:
            yield from container.demux(*streams)
            return
        except IndexError:  # such a packet; the next ones follow
            pass


def _place(timeline: Timeline, pts: int | None, expected: int) -> int:
    """Where in the timeline a decoded frame stands: near `expected`, as a packet may give no frame, or two give one."""
    start = max(0, expected - NEAR)
    places = start + np.flatnonzero(timeline.pts[start : expected + FAR] == pts)
    return expected if pts is None or not len(places) else int(places[np.abs(places - expected).argmin()])


def _due(decoded: Iterator[tuple[int, Any]], sampling: Sampling) -> Iterator[Any]:
    """The frame that is shown at each sample's place: the one that stands there, or else the one before it."""
    due, wanted, before = 0, sampling.frames, None
    for place, frame in decoded:
        while due < len(wanted) and wanted[due] <= place:
            yield frame if wanted[due] == place or before is None else before
            due += 1
        before = frame if due < len(wanted) else None
    for _ in wanted[due:]:
        yield before


def _is_hidden(packet) -> bool:
    """Whether it gives no frame to show: reference frames of VP8; headers of Theora, in the middle of a joined file."""
    mark = {"vp8": (0x10, 0), "theora": (0x80, 0x80)}.get(packet.stream.codec_context.name)
    return mark is not None and bytes(packet)[0] & mark[0] == mark[1]


def _empty(path: object) -> MediaError:
    return MediaError(f"{path} holds no frame that can be decoded; copy it again or convert it to H.264 .mp4")


def _damaged(path: object, seconds: float, total: float) -> MediaError:
    seconds = math.floor(10 * seconds) / 10
    of = f" of {total:.1f}" if total > seconds else ""
    return MediaError(
        f"{path} is cut short or damaged: {seconds:.1f}{of} seconds can be read; copy it again, "
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
