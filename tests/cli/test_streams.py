"""Commands whose standard streams are closed, full or not UTF-8: no traceback, and no error in place of an answer."""

import io
import json
import subprocess
import sys

import pytest
from paths import ROOT

from llamavid_jax.data import validate
from llamavid_jax.errors import InputError, complain, say

COMMANDS = [
    ["train.py", "--config", "nowhere.yaml"],
    ["-m", "llamavid_jax.data.validate", "nowhere.json"],
    ["-m", "llamavid_jax.data.build_shards", "nowhere.json", "out"],
    ["-m", "conversion.torch_to_jax", "nowhere", "out"],
]


def run(arguments: list[str], redirections: str) -> subprocess.CompletedProcess:
    shell = ["sh", "-c", f'exec "$0" "$@" {redirections}']
    return subprocess.run([*shell, sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[-2])
def test_with_stderr_closed_the_error_is_not_the_answer(arguments):
    done = run(arguments, "<&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_with_every_stream_closed():
    assert run(COMMANDS[0], "<&- >&- 2>&-").returncode == 2


@pytest.fixture
def data(tmp_path):
    """A usable sample, and an unusable one whose id and file no terminal can display."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    path = tmp_path / "data.json"
    broken = {"id": "日本 \x1b[2J\ud83d", "video": "gone\udce9.mp4", "conversations": talk}
    path.write_text(json.dumps([{"id": "é", "conversations": [talk[1]]}, broken]))
    return str(path)


def test_a_table_of_ids_that_the_terminal_cannot_show(data, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert validate.main([data]) == 1
    stdout.flush()
    text = stdout.buffer.getvalue().decode("ascii")
    assert "1 missing" in text and "gone" in text and "\x1b" not in text
    assert r"\u65e5\u672c" in text and r"\ud83d" in text


def test_a_full_disk_behind_stdout(data):
    done = run(["-m", "llamavid_jax.data.validate", data], "> /dev/full")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == "error: [Errno 28] No space left on device"


def test_what_cannot_be_said_ends_nothing(monkeypatch):
    for stderr in (None, open("/dev/full", "w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stderr)
        say("a line")
        assert complain(InputError("no"), "train.py") == 2
