"""The README: its Python runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT
from test_infer import CLIP

import infer
from conversion import check, jax_to_torch, torch_to_jax
from llamavid_jax.evaluation.command import main as evaluate

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(start: str) -> list[list[str]]:
    """The arguments of every command in the README that begins with `start`."""
    lines = re.findall(rf"{re.escape(start)} ([^`\n#]*)", README)
    return [shlex.split(line) for line in lines]


def test_python_example(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("walk.mp4").symlink_to(CLIP)
    Path("llamavid-7b-video").symlink_to(checkpoint)
    (example,) = blocks("python")
    exec(example.replace('dtype="bfloat16"', 'dtype="float32"').replace("=128", "=4"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "start, main, count",
    [
        ("python -m conversion.torch_to_jax", torch_to_jax.main, 7),
        ("python -m conversion.jax_to_torch", jax_to_torch.main, 1),
        ("python -m conversion.check", check.main, 1),
        ("python infer.py", infer.main, 1),
        ("llamavid-evaluate", evaluate, 1),
    ],
)
def test_commands_parse(start, main, count, tmp_path, monkeypatch, capsys):
    """Each command stops at the first missing file, not at its flags."""
    monkeypatch.chdir(tmp_path)
    found = commands(start)
    assert len(found) == count
    for arguments in found:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "unrecognized" not in error and "required" not in error
        assert any(argument.split("/")[0] in error for argument in arguments), error


def test_make_targets_exist():
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(rules)


def test_files_exist():
    for path in re.findall(r"`((?:llamavid_jax|configs|conversion|demo|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
