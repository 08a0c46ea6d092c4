"""docs/tpu-pod.md: what can run here is run unchanged; the rest is checked by the shell and our own parsers."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from training_data import environment

import train
from llamavid_jax.parallel.mesh import parse_mesh
from llamavid_jax.precompile import compile_check
from llamavid_jax.training.config import TrainConfig, read_config

BLOCKS = re.findall(r"```bash( runs-here)?\n(.*?)```", (ROOT / "docs" / "tpu-pod.md").read_text("utf-8"), re.DOTALL)
ELSEWHERE = [block for mark, block in BLOCKS if not mark]
STUBS = """
say() { printf '%s\\n' "$@"; }
python() { :; }
kubectl() { say "$@"; if [ "${@: -1}" = - ]; then cat; fi; }
for name in gcloud docker xpk sky sbatch; do eval "$name() { say \\"\\$@\\"; }"; done
export -f say xpk
"""


def bash(script: str, *options: str, **settings) -> subprocess.CompletedProcess:
    command = ["bash", "-euo", "pipefail", *options, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, **settings)


def rows_divide(config: TrainConfig, mesh: str) -> bool:
    axes = parse_mesh(mesh)
    copies = axes.get("data", 1) * axes["fsdp"]
    return math.prod(axes.values()) in (64, 128) and config.training.batch_size % copies == 0


@pytest.mark.sharding
def test_the_rehearsal(tmp_path):
    """Data, two processes, a bucket outage, SIGTERM to one process, the restart, the report of hours."""
    for name in ("train.py", "llamavid_jax", "configs", "demo", "deploy", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = environment(1)
    script = "".join(block for mark, block in BLOCKS if mark)
    done = bash(script, cwd=tmp_path, env=env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("ended with 143") == done.stdout.count("ended with") == 2, done.stdout
    assert "resuming gs://films/run at step" in done.stderr, done.stderr
    assert "gs://films/run/model: the model after 24 steps" in done.stderr, done.stderr
    assert re.search(r"^restore +0:0", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / "build" / "rehearsal.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("gs:*"))


def test_the_shell_understands_all_blocks():
    assert len(BLOCKS) > len(ELSEWHERE) > 5
    for _, block in BLOCKS:
        assert bash(block, "-n").returncode == 0


def test_compile_check_understands_its_lines(monkeypatch):
    seen = []
    monkeypatch.setattr(compile_check, "check", lambda *given: seen.append(given) or 0)
    monkeypatch.chdir(ROOT)
    for line in re.findall(r"^python -m llamavid_jax.precompile.compile_check (.*)$", "".join(ELSEWHERE), re.MULTILINE):
        assert compile_check.main(shlex.split(line)) == 0
    assert [(mesh, options.plan, options.num_slices) for _, options, mesh in seen] == [
        ("fsdp=32,sequence=2", False, 1),
        ("", True, 1),
        ("data=2,fsdp=16,sequence=4", False, 2),
    ]
    assert all(rows_divide(config, mesh) for config, _, mesh in seen if mesh)


def test_what_reaches_the_hosts(monkeypatch):
    """The commands for all hosts are quoted correctly; stand-ins for Google Cloud's tools print their arguments."""
    monkeypatch.chdir(ROOT)
    said = bash(STUBS + "".join(ELSEWHERE))
    assert said.returncode == 0, said.stderr
    commands = re.findall(r"^--command=(.*)$", said.stdout, re.MULTILINE)
    jobs = [command for command in commands if "nohup" in command]
    for job, mesh in zip(
        jobs, ("fsdp=32,sequence=2", "data=2,fsdp=16,sequence=4"), strict=True
    ):  # on one slice, on two
        assert job.startswith("cd llamavid_jax && nohup .venv/bin/python train.py ") and job.endswith("< /dev/null &")
        options = train.parse_arguments(shlex.split(job.partition("train.py ")[2].partition(" >>")[0]))
        config = read_config(options.config, options.overrides)
        assert options.distributed and config.mesh == mesh and config.training.save_every == 200
        assert config.output == "gs://my-llama-vid/runs/stage2" and rows_divide(config, mesh)
    image = "europe-west4-docker.pkg.dev/my-project/llamavid/train"
    for line in (f"image: {image}", "output=gs://my-llama-vid/runs/stage2"):  # jobset.yaml, filled in
        assert f"{line}\n" in said.stdout
    assert f"--docker-image={image}\n" in said.stdout and "--cluster=stage2\n" in said.stdout  # xpk.sh
    assert f"build\n-t\n{image}\n--build-arg\nEXTRA=tpu,train,gcs\n" in said.stdout
