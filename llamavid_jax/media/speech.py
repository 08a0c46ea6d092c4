"""Transcribes the speech in a video (faster-whisper, the extra `speech`).

sound ─ 16 kHz, from the video's first frame on, gaps filled with silence ─▶ samples ─ piece by piece ─▶ sentences
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax import copies
from llamavid_jax.files import local
from llamavid_jax.media.container import open_video, packets_of
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import cores, read_timeline

RATE = 16_000  # samples a second, which Whisper takes
PIECE = 600 * RATE  # samples given to Whisper at once: 20 minutes take 0.9 GB, an hour 2.6
PAUSE = 0.7  # seconds
STOPS = tuple(".?!。？！")


class SilentError(MediaError):
    """A video without sound."""


def read_speech(path: str | Path, model: str) -> list[tuple[float, str]]:
    """(end in seconds after the first frame, text) of each sentence; empty without speech.

    `model`: a folder, or a name that faster-whisper downloads.  Raises MediaError.
    """
    whisper, sound = _load(model), _sound(path)
    said, at, language = [], 0, None
    while at < len(sound):
        piece = sound[at : at + PIECE].astype(np.float32) / 32768
        segments, about = whisper.transcribe(
            piece,
            language=language,
            word_timestamps=True,  # a segment may hold two sentences, a minute of silence apart
            vad_filter=True,  # else it invents words for silence
            condition_on_previous_text=False,  # else it may repeat a sentence for minutes
        )
        found, start = _sentences(word for segment in segments for word in segment.words), at / RATE
        at += len(piece)
        if at < len(sound) and len(found) > 1 and found[-2][0]:  # the last may be cut: the next piece repeats it
            at = round((start + found[-2][0]) * RATE)
            del found[-1]
        language = about.language if found else language
        said += [(start + end, text) for end, text in found]
    return said


def _sentences(words: Iterable[Any]) -> list[tuple[float, str]]:
    """(end, text) of sentences: words up to a full stop or a pause."""
    found: list[tuple[float, str]] = []
    is_open = False
    for word in words:
        if is_open and word.start - found[-1][0] < PAUSE:
            found[-1] = float(word.end), found[-1][1] + word.word
        else:
            found.append((float(word.end), word.word))
        is_open = not word.word.endswith(STOPS)
    return found


def _load(model: str) -> Any:
    import faster_whisper  # if it is not installed, the error names the extra

    folder = local(model)
    copies.fetch_all(folder)
    if (folder.is_dir() or model[:1] in "/.~") and not (folder / "model.bin").is_file():
        raise MediaError(f"{model} holds no model.bin; give a folder of faster-whisper's, or a name such as small")
    try:
        return faster_whisper.WhisperModel(
            str(folder) if folder.is_dir() else model, device="cpu", compute_type="int8", cpu_threads=cores()
        )
    except Exception as error:  # from the hub, its HTTP client, CTranslate2 or the tokenizer
        raise MediaError(
            f"the speech model {model} cannot be loaded ({error}); give a folder, or a name such as small"
        ) from None


def _sound(path: str | Path) -> np.ndarray:
    """int16 samples."""
    import av  # here, so that importing the package loads no video library

    first = int(read_timeline(path, lambda _: None).pts[0])  # FFmpeg's start of a stream may be that of another one
    samples: list[np.ndarray] = []
    with open_video(path) as (container, video):
        track = container.streams.best("audio")
        if track is None or track.codec_context is None:
            raise SilentError(f"{path} holds no sound that is known; give what is said with --subtitles FILE.srt")
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_abuffer(template=track),
            graph.add("aresample", f"{RATE}:async=1:first_pts=0"),  # pads and cuts according to the times
            graph.add("aformat", "sample_fmts=s16:channel_layouts=mono"),
            graph.add("abuffersink"),
        ).configure()
        for frame in _frames(container, track):
            if frame is not None and frame.pts is not None:
                frame.pts -= round(first * video.time_base / frame.time_base)
            graph.push(frame)
            with contextlib.suppress(BlockingIOError, EOFError):  # until it needs more, or has no more
                while True:
                    samples.append(graph.pull().to_ndarray()[0])
    return np.concatenate([np.zeros(0, np.int16), *samples])


def _frames(container: Any, track: Any) -> Iterator[Any]:
    """Yields the frames that can be decoded, then None."""
    import av

    with contextlib.suppress(av.FFmpegError):  # the end of what can be read
        for packet in packets_of(container, track):
            with contextlib.suppress(av.InvalidDataError):
                yield from packet.decode()
    yield None
