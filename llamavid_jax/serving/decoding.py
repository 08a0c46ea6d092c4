"""Decodes images, videos and their sound in separate processes with a memory limit.

A file that crashes FFmpeg's or Pillow's libraries, or exhausts memory, costs its own request and not the server.

    path ─ a process forked from one that holds no more than the readers ─▶ Sampling, then pixels [f, 3, S, S]
                                                                         ─▶ Cues of the speech
"""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.errors import InputError, printable
from llamavid_jax.inference.film_text import film_speech
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import Sampling, Timeline, rate_that_fits
from llamavid_jax.text.subtitles import Cue

PROCESSES = multiprocessing.get_context("forkserver")  # neither JAX's threads nor its memory are forked
PROCESSES.set_forkserver_preload([__name__])


class Reading(NamedTuple):
    """How a video is read: `fps`, or `num_frames` evenly spaced; up to `most` frames, `chunk` at a time."""

    fps: float | int
    most: int
    chunk: int
    num_frames: int | None = None

    def adapt(self, sampling: Sampling) -> Sampling:
        """Replaces the frames by `num_frames` evenly spaced ones, if given; a video with fewer is read whole."""
        if self.num_frames is None:
            return sampling
        total = len(sampling.timeline.times)
        frames = np.arange(count := min(self.num_frames, total)) * total // count
        return dataclasses.replace(sampling, rule="times", frames=frames, times=sampling.timeline.times[frames])


def check_length(path: Path, timeline: Timeline, frames: int, most: int) -> None:
    """Raises MediaError if there are more frames than fit."""
    if frames > most:
        raise MediaError(
            f"{path} lasts {timeline.seconds:.0f} s, which are {frames} frames, and {most} fit; "
            f"ask with fps {rate_that_fits([timeline], most):.2g}"
        )


def decoded(
    images: LLaMAVIDLlavaImageProcessor,
    path: Path,
    reading: Reading | None,
    max_bytes: int,
    check: Callable[[], None],
) -> Iterator[Any]:
    """Yields a video's Sampling and then its pixels; for an image (`reading` None) only its pixels.

    The process has `max_bytes` of memory.  `check`, called while it works, raises if nobody waits any more.  Raises
    InputErrors, and MediaError if the process died.
    """
    return _made_apart(_decode, path, (images, reading), max_bytes, check)


def heard(path: Path, model: str, max_bytes: int, check: Callable[[], None]) -> list[Cue]:
    """The speech in a video, from its sound; `model` is one of faster-whisper's.  Otherwise like `decoded`."""
    (cues,) = _made_apart(_listen, path, (model,), max_bytes, check)
    return cues


Send = Callable[[Any], None]


def _decode(send: Send, path: Path, images: LLaMAVIDLlavaImageProcessor, reading: Reading | None) -> None:
    def on_read(sampling: Sampling, done: int) -> None:
        if done == 1:
            timeline = sampling.timeline
            check_length(path, timeline, len(sampling), reading.most)
            send(dataclasses.replace(sampling, timeline=dataclasses.replace(timeline, index=None)))

    if reading is None:
        send(images.image_pixels(path))
    else:
        for pixels, _ in images.stream_video(path, reading.fps, reading.chunk, on_read, reading.adapt):
            send(np.ascontiguousarray(pixels))


def _listen(send: Send, path: Path, model: str) -> None:
    send(film_speech(path, model))


def _made_apart(
    make: Callable[..., None], path: Path, arguments: tuple, max_bytes: int, check: Callable[[], None]
) -> Iterator[Any]:
    """Yields what `make(send, path, *arguments)` sends from a process of its own."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(sender, make, path, arguments, max_bytes), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            while not receiver.poll(0.1):
                check()
            got = receiver.recv()
            if isinstance(got, Exception):
                raise got
            if got is None:
                process.join(1)  # it may have to clean up
                return
            yield got
    except (EOFError, OSError):
        process.join()
        raise MediaError(
            f"{printable(path)} ended the process that decodes it (exit code {process.exitcode}); it may be damaged: "
            "convert it, for example to H.264 in MP4"
        ) from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(sender: Connection, make: Callable[..., None], path: Path, arguments: tuple, max_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which completes running answers
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system without such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    try:
        make(sender.send, path, *arguments)
        sender.send(None)
    except BrokenPipeError:  # nobody waits any more
        pass
    except InputError as error:
        sender.send(error)
    except MemoryError:
        sender.send(MediaError(f"{path} takes more than {max_bytes / 1e9:g} GB to decode; make it smaller"))
