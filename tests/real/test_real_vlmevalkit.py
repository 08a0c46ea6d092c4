"""VLMEvalKit from its wheel (see install.sh), offline: its run.py asks the demo model about a data set of our own."""

import base64
import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.inference.session import Session
from llamavid_jax.media.video import read_video

pytestmark = pytest.mark.real
MODEL = ROOT / "demo" / "model"

# VLMEvalKit imports the code of all its data sets and judges at once, and with it many packages that this run does not
# call.  What is missing of them is an empty module for VLMEvalKit, and still missing for everybody else.
STAND_INS = """
import importlib.abc, importlib.machinery, sys, types
import transformers.models.auto.image_processing_auto  # looks for torchvision, before there is a stand-in for it

class Nothing:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self
    def __mro_entries__(self, bases): return (object,)
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

class Module(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        package = name.split(".")[0]
        wanted = "/vlmeval/" in frame.f_code.co_filename and package not in ("vlmeval", "run")
        if wanted or isinstance(sys.modules.get(package), Module):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module): pass

sys.meta_path.append(Finder())
"""

PROMPT = "Question: {question}\nOptions:\nA. {A}\nB. {B}\nPlease select the correct answer from the options above. \n"


def test_a_data_set_of_our_own(tmp_path):
    """The answers equal a Session's to VLMEvalKit's prompt, and its table counts the right one of two."""
    frames = read_video(ROOT / "demo" / "held_out.mp4").frames
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(MODEL, dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(MODEL).image_processor
    rows, expected = [], []
    for index, (frame, answer) in enumerate(((1, "A"), (6, "B"))):
        file = io.BytesIO()
        Image.fromarray(frames[frame]).save(file, "PNG")
        (tmp_path / "picture.png").write_bytes(file.getvalue())
        row = {"question": "How many digits appear?", "A": "1", "B": "2"}
        session = Session(model, processor, images=[str(tmp_path / "picture.png")])
        expected.append(session.ask(PROMPT.format(**row), max_new_tokens=128).text)
        picture = base64.b64encode(file.getvalue()).decode()
        rows.append({"index": index, "image": picture, **row, "answer": answer, "category": "count"})
    assert expected == ["1", "1"]
    with open(tmp_path / "Digits.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "sitecustomize.py").write_text(STAND_INS)
    (tmp_path / "run.py").write_text("raise SystemExit('not that of VLMEvalKit')")

    path = [str(tmp_path), str(Path(sys.prefix) / "vlmevalkit"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "LMUData": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llamavid_jax.harness.vlmevalkit", str(MODEL), "--data", "Digits"]
    command += ["--work-dir", "out", "--judge", "exact_matching"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "out" / "llamavid_jax"
    read = "import pandas, sys; print(*pandas.read_excel(sys.argv[1]).prediction, sep='\\n')"
    answers = [sys.executable, "-c", read, str(written / "llamavid_jax_Digits.xlsx")]
    done = subprocess.run(answers, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
    (overall,) = csv.DictReader((written / "llamavid_jax_Digits_acc.csv").open())
    assert float(overall["Overall"]) == 0.5 and float(overall["count"]) == 0.5
