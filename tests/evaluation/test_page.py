"""docs/evaluation.md: its commands run in an empty folder on made-up data, and its table lists every set."""

import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT
from test_answers import short  # noqa: F401
from test_judge import GOOD, server  # noqa: F401

from llamavid_jax.evaluation import command
from llamavid_jax.evaluation.results import page
from llamavid_jax.evaluation.sets import SETS

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_commands(checkpoint, official, tmp_path, monkeypatch, short, server, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    server.replies = [GOOD]
    for name in ("llamavid-7b-336", "llamavid-7b-video"):
        Path(name).symlink_to(checkpoint)
    Path("eval").mkdir()
    for name, folder in (("gqa", "gqa"), ("msvd", "MSVD-QA")):
        Path("eval", folder).symlink_to(official(name))
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("llamavid-evaluate")]
    assert len(lines) == 9
    for line in lines:
        arguments = shlex.split(line.replace("https://api.openai.com/v1", server.address), comments=True)[1:]
        assert command.main(arguments) == 0, line + capsys.readouterr().err
    assert "MSVD-QA" in capsys.readouterr().out and len(server.asked) == 9
    assert Path("results.md").read_text().count("llamavid-7b") == 0  # the checkpoint is named after its folder
    assert Path("results.md").read_text().count("| checkpoint") == 2


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_in_the_table(name):
    assert re.search(rf"^\|.*`{name}`", PAGE, re.MULTILINE)


def test_the_page_of_results_is_the_command_s():
    """Generated without runs: the released weights have not been measured here."""
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page([])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "x"], "the following arguments are required"),
        (["--model", "x", "--set", "nothing", "--data", ".", "--out", "o"], "invalid choice"),
        (["--model", "x", "--set", "gqa", "--data", "absent", "--out", "o"], "--data absent is no folder"),
        (["--model", "x", "--set", "gqa", "--data", ".", "--out", "o"], "holds no"),
        (["--model", "x", "--set", "gqa", "--data", ".", "--out", "o", "--shard", "2/2"], "give I/N"),
        (["--model", "x", "--set", "gqa", "--data", ".", "--out", "o", "--limit", "0"], "--limit is 0"),
        (["--model", "x", "--set", "msvd", "--data", ".", "--out", "o", "--judge", "localhost:8000"], "give a URL"),
        (["score", "."], "holds no answers.jsonl"),
        (["compare", ".", "."], "cannot be read"),
        (["results", "page.md", "."], "cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("llamavid-evaluate: ")


def test_a_model_that_is_not_there(official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = official("gqa")
    assert command.main(["--model", "absent", "--set", "gqa", "--data", str(data), "--out", "o"]) == 2
    assert "--model absent holds no file" in capsys.readouterr().err
    for picture in (data / "images").iterdir():
        picture.unlink()
    assert command.main(["--model", "absent", "--set", "gqa", "--data", str(data), "--out", "o"]) == 2
    assert "none of the 6 pictures and videos" in capsys.readouterr().err
