"""Decoding in a process that may die: the error its request gets; other requests continue."""

import multiprocessing
import os
import signal
import threading

import av
import numpy as np
import pytest
from clips import write_clip
from servers import ask, text_of, video

from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.serving.decoding import Reading, decoded, heard

IMAGES = LLaMAVIDLlavaImageProcessor(56)


def nothing() -> None:
    pass


def test_frames_are_those_of_the_image_processor(clip):
    plan, *chunks = decoded(IMAGES, clip, Reading(2.0, 40, 3), 4 << 30, nothing)
    pixels, times = IMAGES.video_pixels(clip, 2.0)
    assert [len(chunk) for chunk in chunks] == [3, 3, 3]
    assert np.array_equal(np.concatenate(chunks), pixels) and np.array_equal(plan.times, times)


WHISPER = """
class WhisperModel:
    def __init__(self, name, **_):
        self.name = name

    def transcribe(self, sound, **_):
        from types import SimpleNamespace as S
        word = S(start=0.0, end=len(sound) / 16000, word=f" {self.name} heard it.")
        return iter([S(words=[word])]), S(language="en")
"""


def test_what_is_said(tmp_path, monkeypatch, clip):
    """With a stand-in for faster-whisper, which the decoding process imports from the same place."""
    (tmp_path / "faster_whisper.py").write_text(WHISPER)
    monkeypatch.syspath_prepend(tmp_path)
    with av.open(str(tmp_path / "film.mkv"), "w") as out, av.open(str(clip)) as source:
        copy = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.ones((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        out.mux(sound.encode(frame))
    ((end, text),) = heard(tmp_path / "film.mkv", "tiny", 4 << 30, nothing)
    assert text == "tiny heard it." and abs(end - 2) < 0.1
    with pytest.raises(MediaError, match="no sound"):
        heard(clip, "tiny", 4 << 30, nothing)


def test_errors_come_over(clip, tmp_path):
    with pytest.raises(MediaError, match=r"which are 9 frames, and 7 fit; ask with fps 1\.6$"):
        list(decoded(IMAGES, clip, Reading(2.0, 7, 3), 4 << 30, nothing))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"a\.png"):
        list(decoded(IMAGES, tmp_path / "a.png", None, 4 << 30, nothing))


def test_a_memory_limit(tmp_path):
    """Frames of 100 MB, in a process limited to 300 MB."""
    large = write_clip(
        tmp_path / "large.mp4", [np.zeros((4096, 4096, 3), np.uint8)] * 3, options={"preset": "ultrafast"}
    )
    assert len(list(decoded(IMAGES, large, Reading(25.0, 9, 1), 8 << 30, nothing))) == 4
    with pytest.raises(MediaError, match=r"large\.mp4"):
        list(decoded(IMAGES, large, Reading(25.0, 9, 1), 300 << 20, nothing))


def test_a_process_that_is_killed_costs_its_own_request(client, server, clip, monkeypatch):
    """While a film is decoded: its client gets an error, other requests their answers; a retry of the film works."""
    begun, killed = threading.Event(), threading.Event()
    vision = server.preparer._vision

    def waits(pixels):
        begun.set()
        assert killed.wait(60)
        return vision(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(server.preparer, "_vision", waits)
        patch.setattr("llamavid_jax.serving.prepare.FRAME_CHUNK", 1)
        found = []
        asking = threading.Thread(target=lambda: found.append(ask(client, video("clip.mp4"), fps=9.0)))
        asking.start()
        assert begun.wait(60)
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        killed.set()
        asking.join()
    error = found[0].json()["error"]["message"]
    assert found[0].status_code == 400 and "clip.mp4 ended the process that decodes it (exit code -9)" in error
    text_of(ask(client))
    text_of(ask(client, video("clip.mp4"), fps=9.0))
