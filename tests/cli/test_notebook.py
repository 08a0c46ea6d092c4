"""The notebooks: their committed form, and all cells run in order on a CPU, in place and in a new folder."""

import base64
import io
import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from paths import ROOT
from PIL import Image
from training_data import environment

from conversion import jax_to_torch

FOLDER = ROOT / "notebooks"
COLAB, KAGGLE = "colab_tpu_inference", "kaggle_tpu_v5e8"
both = pytest.mark.parametrize("name", [COLAB, KAGGLE])


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: nbformat.NotebookNode, folder: Path, scratch: Path, devices: int, **variables: str) -> None:
    env = environment(devices) | {"IPYTHONDIR": str(scratch), **variables}
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute(env=env)


def printed(notebook: nbformat.NotebookNode, cell: str) -> str:
    (found,) = (one for one in notebook.cells if one.id == cell)
    return "".join(output.text for output in found.outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode, cell: str) -> list[np.ndarray]:
    (found,) = (one for one in notebook.cells if one.id == cell)
    data = [output.data["image/png"] for output in found.outputs if output.output_type == "display_data"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))


@both
def test_outputs_are_cleared(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    first = [line.split(" = ")[0] for line in code[0].source.splitlines() if line]
    assert first[:3] == ["MODEL", "VIDEO", "QUESTION" if name == COLAB else "QUESTIONS"]
    repository = next(cell.source for cell in code if cell.id == "install")
    assert 'REPOSITORY = "https://github.com/OWNER/llamavid_jax"' in repository


def test_what_fits_on_kaggle_is_what_the_compiler_said():
    """Its figures are the largest of the programs in docs/tpu.md, sharded over eight chips and replicated."""

    def largest(model: str, mesh: str) -> float:
        rows = re.findall(rf"\| 7b_224_{model}, bfloat16: .*\| v5e:2x4 \(8\) \| {mesh} \| ([\d.]+) of 16 GiB", table)
        assert len(rows) == 4
        return max(map(float, rows))

    table = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    (text,) = (" ".join(cell.source.split()) for cell in read(KAGGLE).cells if cell.id == "load-text")
    assert f"at most {largest('long_video', 'tensor=8')} of the 16 GiB" in text and "prompt of 21,800 tokens" in text
    assert f"does not fit: {largest('video', 'data=8')} GiB with 3,584 tokens" in text


def test_every_cell_in_place(tmp_path):
    """The demo model answers about its held-out clip on one device; the plan is printed before the weights are read."""
    notebook = read(COLAB)
    execute(notebook, FOLDER, tmp_path, devices=1)
    assert "8 frames at 1 a second" in printed(notebook, "video")
    plan = printed(notebook, "plan")
    assert "parameters: llama" in plan and "key-value cache" in plan and "taken: float32" in plan
    ids = [cell.id for cell in notebook.cells]
    assert ids.index("plan") < ids.index("load")
    (seen,), (lit,) = pictures(notebook, "frames"), pictures(notebook, "encode")
    assert seen.shape == lit.shape and seen.shape[1] > 8 * 144 and np.abs(seen.astype(float) - lit).mean() > 1
    question, answer, counts = printed(notebook, "answer").splitlines()
    assert (question, answer) == ("Name the purple digit.", "0") and counts.startswith("[16 visual tokens of 30, ")
    more = printed(notebook, "more").splitlines()
    assert (more[1], more[4]) == ("white", "2")


STUB = """#!/bin/sh
for folder; do :; done
mkdir "$folder"
ln -s {root}/llamavid_jax {root}/conversion {root}/demo {root}/requirements.txt "$folder"
"""


@both
@pytest.mark.sharding
def test_every_cell_in_a_fresh_folder(name, tmp_path):
    """As on Colab and Kaggle: fetched, installed, converted from the original's layout, sharded over two devices.

    The model is the demo's.  A stand-in replaces git; another replaces pip and records its arguments.
    """
    released = tmp_path / "released"
    assert jax_to_torch.main([str(ROOT / "demo" / "model"), str(released), "--layout", "original"]) == 0
    stubs, fresh = tmp_path / "stubs", tmp_path / "content"
    (stubs / "pip").mkdir(parents=True)
    (stubs / "pip" / "__init__.py").touch()  # without this file the installed pip would be imported
    (stubs / "pip" / "__main__.py").write_text("import sys\nopen(__file__ + '.asked', 'w').write(str(sys.argv[1:]))\n")
    (stubs / "git").write_text(STUB.format(root=ROOT))
    (stubs / "git").chmod(0o755)
    fresh.mkdir()
    shutil.copy(ROOT / "demo" / "held_out.mp4", fresh / "mine.mp4")  # the user's video, named without a folder
    notebook = read(name)
    parameters = next(cell for cell in notebook.cells if cell.id == "parameters")
    parameters.source = re.sub(r'^MODEL = ".*?"', f'MODEL = "{released}"', parameters.source).replace("= 128", "= 16")
    parameters.source = parameters.source.replace("demo/held_out.mp4", "mine.mp4")
    path = {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHONPATH": str(stubs), "TMPDIR": str(fresh)}
    execute(notebook, fresh, tmp_path, devices=2, **path)
    asked = (stubs / "pip" / "__main__.py.asked").read_text()
    assert "'install'" in asked and "'--requirement', " in asked and "requirements.txt" in asked
    assert "2 × cpu" in printed(notebook, "device")
    assert (fresh / "llama-vid-jax" / "checkpoints" / "released" / "weights").is_dir()
    assert printed(notebook, "answer").splitlines()[1] == "0"
    if name == COLAB:
        assert "on each of 2 × cpu" in printed(notebook, "plan")
        assert pictures(notebook, "encode")[0].std() > 5
    else:
        assert "jax[tpu]" in asked and printed(notebook, "answer").splitlines()[4] == "white"
