"""The model file against a stand-in for VLMEvalKit."""

import os
import subprocess
import sys

from paths import ROOT

MODEL, CLIP = str(ROOT / "demo" / "model"), str(ROOT / "demo" / "held_out.mp4")


def test_vlmevalkit(tmp_path):
    """A stand-in run.py asks the model that the command has added, with the options given after the checkpoint."""
    files = {
        "vlmeval/__init__.py": "",
        "vlmeval/config.py": "supported_VLM = {}",
        "vlmeval/vlm/__init__.py": "",
        "vlmeval/vlm/base.py": "class BaseModel:\n    allowed_types = ['text', 'image', 'video']",
        "run.py": f"""
import sys
from vlmeval.config import supported_VLM
def load_env(): pass
def main():
    assert sys.argv[1:] == ["--model", "llamavid_jax", "--data", "MVBench"]
    model = supported_VLM["llamavid_jax"](dtype="float32")
    video, text = {{"type": "video", "value": {CLIP!r}}}, {{"type": "text", "value": "How many digits appear?"}}
    print(model.generate_inner([video, text], dataset="MVBench"))
""",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "llamavid_jax.harness.vlmevalkit", MODEL, "--data", "MVBench"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.split() == ["2"], done.stderr


def test_elsewhere(tmp_path):
    command = [sys.executable, "-m", "llamavid_jax.harness.vlmevalkit", MODEL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "clone of VLMEvalKit" in done.stderr
