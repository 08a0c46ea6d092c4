"""The installed package: what the wheel contains, and what runs in a folder without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from paths import ROOT

import llamavid_jax

FOLDERS = {"llamavid_jax": "", "conversion": "conversion", "configs": "configs", "demo": "demo"}  # → folder in package


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """site-packages of a new environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("install")
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    (site,) = folder.glob("environment/lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return site


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs a command of the environment in `folder`, which is also the user's cache folder."""
    ours = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(folder)}
    line = [str(site.parents[2] / "bin" / command[0]), *command[1:]]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


def test_the_wheel_holds_all_below_one_name(site):
    assert {path.name for path in site.iterdir()} == {
        "dependencies.pth",
        "llamavid_jax",
        f"llamavid_jax-{llamavid_jax.__version__}.dist-info",
    }
    for name, inside in FOLDERS.items():
        files = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        files = {file for file in files if "__pycache__" not in file.parts}
        missing = [str(file) for file in files if not (site / "llamavid_jax" / inside / file).exists()]
        assert not missing, f"add them to pyproject.toml: {missing}"


def test_the_demo_from_another_folder(site, tmp_path):
    """It runs twice; the second run compiles nothing."""
    record = json.loads((ROOT / "demo" / "held_out.json").read_text())
    answers = [turn["value"] for turn in record["conversations"][1::2]]
    programs = []
    for _ in range(2):
        done = run(site, tmp_path, "python", "-m", "llamavid_jax.demo.show", "demo.png")
        assert done.returncode == 0 and (tmp_path / "demo.png").stat().st_size > 10_000, done.stderr
        assert [line[9:] for line in done.stdout.splitlines() if line.startswith("  model: ")] == answers
        programs.append({path.name for path in (tmp_path / "llamavid_jax").iterdir()})
    assert len(programs[0]) > 5 and programs[0] == programs[1]


@pytest.mark.parametrize(
    "command, code, says",
    [
        ("llamavid --model demo/model --video demo/held_out.mp4 --question Why? --max-new-tokens 1", 0, ""),
        ("llamavid --model demo/models --question Why?", 2, "demo/models/preprocessor_config.json does not exist"),
        (
            "llamavid-train --config configs/tiny/stage1_align.yaml training.batch_size=8 data.path=no.json",
            2,
            "no.json does not exist",
        ),
        ("llamavid-train --config configs/tiny/stage9.yaml", 2, "configs/tiny/stage9.yaml does not exist"),
        ("llamavid-convert no OUT", 2, "no does not exist"),
        ("llamavid-evaluate results page.md", 0, ""),
        ("llamavid-evaluate score no", 2, "no holds no answers.jsonl"),
        ("llamavid-serve --model no", 2, "no/preprocessor_config.json does not exist"),
    ],
)
def test_scripts(site, tmp_path, command, code, says):
    done = run(site, tmp_path, *command.split())
    assert done.returncode == code and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == (code == 2)
