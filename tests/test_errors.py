"""The messages that commands print instead of a traceback."""

import re
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT

from llamavid_jax.errors import EXTRAS, Parser, command

MODULES = {
    "scikit_learn": "sklearn",
    "python_multipart": "multipart",
    "jax": "libtpu",
}  # package → module, if the names differ


@pytest.mark.parametrize("extra", ["tpu", "train", "serve", "convert", "eval", "speech", "demo", "gcs"])
def test_the_extra_that_is_named_holds_the_package(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = [re.match(r"[\w-]+", line)[0].replace("-", "_") for line in extras[extra]]
    assert {EXTRAS.get(MODULES.get(name, name), "train") for name in packages} == {extra}


def test_a_package_that_is_not_installed(capsys):
    @command("train.py")
    def main(arguments):
        import grains  # noqa: F401

    assert main([]) == 2
    assert capsys.readouterr().err == 'train.py: grains is not installed; pip install "llamavid_jax[train]"\n'


def test_help_is_the_first_paragraph_of_a_docstring_which_may_be_left_out():
    assert Parser(description="What it\ndoes.\n\n    how\n").description == "What it\ndoes."
    command = [sys.executable, "-OO", "-m", "conversion.check", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m conversion.check"), shown.stderr
