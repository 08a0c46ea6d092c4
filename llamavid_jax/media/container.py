"""Opens a video file: its best stream, its packets, and the errors for a file that cannot be read."""

import contextlib
import io
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from llamavid_jax.media.ending import is_cut
from llamavid_jax.media.images import open_picture
from llamavid_jax.media.source import MediaError, check_size, local_file
from llamavid_jax.media.timeline import Timeline

PLAYLISTS = ("concat", "hls", "dash")
BROADCASTS = ("mpegts", "mpeg")
WITHOUT_TIMES = ("avi", "mpeg")  # FFmpeg invents the packets' times and gives them to the frames in another order


class DamagedError(MediaError):
    """A file is cut short or damaged: its first `seconds` can be read; `timeline`: of its packets, if known."""

    seconds: float
    timeline: Timeline | None = None


@contextlib.contextmanager
def open_video(path: str | Path, threads: str = "AUTO") -> Iterator[tuple]:
    """Yields the open container and its best video stream.

    FFmpeg decodes in its own threads; with `threads` "NONE" in the caller's.
    """
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
        if stream.codec_context.width:  # else unknown until the first frame
            check_size(stream.codec_context.width, stream.codec_context.height, path)
        # FFmpeg's Theora decoder accepts headers in the middle of a joined file only in a single thread
        stream.thread_type = "NONE" if stream.codec_context.name == "theora" else threads
        yield container, stream


def _animated_webp(path: str | Path) -> io.BytesIO | None:
    """An animated WebP, which FFmpeg does not read, as lossless video in memory; None for any other file."""
    import av

    with local_file(path).open("rb") as file:
        head = file.read(21)
    if len(head) < 21 or head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X" or not head[20] & 2:
        return None
    if is_cut(local_file(path), "webp_pipe"):
        raise damaged(path, 0, 0)
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


def packets_of(container, *streams) -> Iterator[Any]:
    """Yields all packets, or those of `streams`, except of streams that begin mid-file, which PyAV does not know."""
    import av

    while True:
        try:
            yield from container.demux(*streams)
            return
        except IndexError:  # such a packet; the next ones follow
            pass
        except av.InvalidDataError:
            if container.format.name != "mpjpeg":  # FFmpeg reports the boundary after its last image as an error
                raise
            return


def is_hidden(packet) -> bool:
    """Whether a packet has no visible frame: VP8's hidden reference frames; Theora's headers in a joined file."""
    mark = {"vp8": (0x10, 0), "theora": (0x80, 0x80)}.get(packet.stream.codec_context.name)
    return mark is not None and bytes(packet)[0] & mark[0] == mark[1]


def empty(path: object) -> MediaError:
    return MediaError(f"{path} holds no frame that can be decoded; copy it again or convert it to H.264 .mp4")


def damaged(path: object, seconds: float, total: float, timeline: Timeline | None = None) -> DamagedError:
    seconds = math.floor(10 * seconds) / 10
    of = f" of {total:.1f}" if total > seconds else ""
    error = DamagedError(
        f"{path} is cut short or damaged: {seconds:.1f}{of} seconds can be read; copy it again, "
        "keep what can be read with: ffmpeg -i FILE readable.mp4, or ask about that alone with --partial"
    )
    error.seconds, error.timeline = seconds, timeline
    return error
