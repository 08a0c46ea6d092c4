"""`pip install .[serve]` in an empty environment: the docs' commands run in an empty folder on a real video."""

import re
import shutil
import subprocess
import sys
import venv

import pytest
from paths import ROOT
from test_real_videos import locate

pytestmark = pytest.mark.real
QUESTION = "How many digits appear?"  # as in docs/serving.md


def docs(language: str, holds: str) -> str:
    """The block of docs/serving.md that contains `holds`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    (found,) = (block for block in blocks if holds in block)
    return found


def test_a_server_from_an_empty_environment(tmp_path):
    source, environment, folder = (tmp_path / name for name in ("source", "environment", "folder"))
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs"))
    venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "pip", "install", "--quiet", "--no-compile", "--constraint", "requirements.lock"]
    subprocess.run([*pip, ".[serve]"], cwd=source, check=True)
    folder.mkdir()
    shutil.copy(locate("bikes.mp4"), folder / "film.mp4")

    asked = "--model", "demo/model", "--video", "film.mp4", "--fps", "2", "--question", QUESTION, "--dtype", "bfloat16"
    alone = subprocess.run([environment / "bin" / "llamavid", *asked], cwd=folder, capture_output=True, check=True)
    command = [environment / "bin" / "llamavid-serve", "--model", "demo/model", "--name", "demo", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        said = []
        try:
            for line in server.stderr:
                said.append(line)
                if address := re.search(r"http://\S+:\d+$", line):
                    break
            assert address, "".join(said)
            code = docs("python", "from openai import OpenAI")
            assert QUESTION in code and '"fps": 2' in code
            code = code.replace("http://127.0.0.1:8000", address[0]).replace("demo/held_out.mp4", "film.mp4")
            asked = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
        finally:
            server.terminate()
    assert asked.stdout.strip() == alone.stdout.strip() != b""
    assert server.returncode in (0, -15, 143) and sorted(path.name for path in folder.iterdir()) == ["film.mp4"]
