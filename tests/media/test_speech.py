"""Speech in a video gets the right times, with any speech recogniser."""

import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import index_frame, write_clip

from llamavid_jax.media import speech
from llamavid_jax.media.source import MediaError

RATE = 8000


class Whisper:
    """Stands in for faster-whisper: hears each loud stretch as two words, and all words as one segment."""

    def __init__(self, model: str, **settings: object):
        if model == "nothing":
            raise ValueError("Invalid model size")

    def transcribe(self, sound: np.ndarray, language: str | None, **settings: object) -> tuple:
        assert sound.dtype == np.float32 and np.abs(sound).max() <= 1
        sound = np.pad(sound, (0, -len(sound) % 160)).reshape(-1, 160)
        loud = np.abs(sound).max(1) > 0.1  # per hundredth of a second
        edges = np.flatnonzero(np.diff(loud, prepend=False, append=False)).reshape(-1, 2) / 100
        words = [
            SimpleNamespace(start=start, end=end, word=f" {end - start:.1f}")
            for first, last in edges
            for start, end in ((first, (first + last) / 2), ((first + last) / 2, last))
        ]
        return iter([SimpleNamespace(words=words)] if words else []), SimpleNamespace(language="en")


@pytest.fixture(autouse=True)
def whisper(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=Whisper))


def film(
    path: Path,
    tones: list[tuple[float, float]],
    late: float = 0.0,
    gap: tuple[float, float] = (0, 0),
    codec: str = "pcm_s16le",
) -> Path:
    """Ten seconds; the sound starts `late` seconds after the video, is loud in `tones`, and has no packets in `gap`."""
    clip = write_clip(path.with_suffix(".mp4"), [index_frame(i) for i in range(10)], rate=1)
    with av.open(str(path), "w") as out, av.open(str(clip)) as source:
        copy = out.add_stream_from_template(source.streams.video[0])
        stream = out.add_stream(codec, rate=RATE, layout="stereo")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
        at = np.arange(10 * RATE)
        loud = np.any([(at >= first * RATE) & (at < last * RATE) for first, last in tones], axis=0)
        samples = (loud * 20_000 * np.sin(at / 3)).astype(np.int16)
        for start in range(round(late * RATE), 10 * RATE, RATE // 10):
            if not gap[0] <= start / RATE < gap[1]:
                piece = np.repeat(samples[start : start + RATE // 10], 2)[None]
                frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="stereo")
                frame.sample_rate, frame.pts = RATE, start
                out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


TONES = [(1.0, 2.0), (3.0, 4.5), (8.0, 9.0)]


@pytest.mark.parametrize("silent", [{}, {"late": 0.5}, {"gap": (5.0, 7.0)}, {"late": 0.7, "gap": (2.2, 2.8)}], ids=str)
@pytest.mark.parametrize("piece", [120.0, 4.0, 2.5])
def test_sentences_end_where_they_end_in_the_video(tmp_path, monkeypatch, silent, piece):
    """With a late start or gaps in the sound, and transcribed in pieces, none of which cuts a sentence."""
    monkeypatch.setattr(speech, "PIECE", round(piece * speech.RATE))
    found = speech.read_speech(film(tmp_path / "film.mkv", TONES, **silent), "a")
    assert [text for _, text in found] == [" 0.5 0.5", " 0.8 0.8", " 0.5 0.5"]
    assert [end for end, _ in found] == pytest.approx([2.0, 4.5, 9.0], abs=0.03)


def test_nothing_is_said(tmp_path):
    assert speech.read_speech(film(tmp_path / "film.mkv", []), "a") == []


def test_what_cannot_be_heard(tmp_path):
    """Each is an error of one sentence."""
    mute = write_clip(tmp_path / "mute.mp4", [index_frame(0)], rate=1)
    (tmp_path / "model").mkdir()
    for path, model, message in (
        (mute, "a", r"mute.mp4 holds no sound that is known; give what is said with --subtitles"),
        (mute, str(tmp_path / "model"), r"model holds no model.bin; give a folder of faster-whisper's, or a name"),
        (mute, str(tmp_path / "none"), r"none holds no model.bin; give a folder of faster-whisper's, or a name"),
        (mute, "nothing", r"the speech model nothing cannot be loaded \(Invalid model size\); give a folder, or"),
    ):
        with pytest.raises(MediaError, match=message):
            speech.read_speech(path, model)


def test_a_damaged_stretch_is_silence(tmp_path):
    """Speech before and after it keeps its times."""
    path = film(tmp_path / "film.mkv", [(1.0, 2.0), (8.0, 9.0)], codec="flac")
    with av.open(str(path)) as source:
        found = [(p.pos + 8, p.pos + p.size) for p in source.demux(audio=0) if p.pts in range(4000, 6000)]
    data = bytearray(path.read_bytes())
    for start, end in found:
        data[start:end] = bytes(end - start)
    path.write_bytes(data)
    assert [end for end, _ in speech.read_speech(path, "a")] == pytest.approx([2.0, 9.0], abs=0.03)


def test_sentences_end_at_a_full_stop_and_at_a_pause():
    words = [(0.0, 0.5, " Who"), (0.5, 1.0, " goes?"), (1.1, 1.5, " I"), (2.6, 3.0, " do"), (3.4, 4.0, " so")]
    found = speech._sentences(SimpleNamespace(start=start, end=end, word=word) for start, end, word in words)
    assert found == [(1.0, " Who goes?"), (1.5, " I"), (4.0, " do so")]
