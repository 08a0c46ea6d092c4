"""Compiled programs are kept between two calls of a command."""

import os
import subprocess
import sys

import jax
import pytest
from paths import ROOT

from llamavid_jax.commands.program import keep_programs

CALL = """
from llamavid_jax.commands.program import keep_programs, run

def main():
    keep_programs()
    import jax
    print(jax.jit(lambda x: x * 2)(3))
    return 7

run(main)
"""


def call(**variables: str) -> subprocess.CompletedProcess:
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_ENABLE_COMPILATION_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in ours and name != "XDG_CACHE_HOME"}
    done = subprocess.run([sys.executable, "-c", CALL], cwd=ROOT, env=env | variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "6\n", "")
    return done


@pytest.mark.parametrize(
    "variable, folder",
    [
        ("HOME", ".cache/llamavid_jax"),
        ("XDG_CACHE_HOME", "llamavid_jax"),
        ("JAX_COMPILATION_CACHE_DIR", ""),
    ],
)
def test_programs_are_kept(tmp_path, variable, folder):
    call(**{variable: str(tmp_path)})
    assert [path.name.split("-")[0] for path in (tmp_path / folder).iterdir()] == ["jit__lambda"]


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        {"XDG_CACHE_HOME": "/proc/nowhere"},
        {"HOME": "/proc/nowhere"},
        {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "relative"},
    ],
    ids=["turned off", "no such folder", "no home", "no full path"],
)
def test_without_a_cache(tmp_path, variables):
    """The output is the same, without a warning."""
    call(**{"HOME": str(tmp_path)} | variables)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = jax.config.jax_compilation_cache_dir
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
