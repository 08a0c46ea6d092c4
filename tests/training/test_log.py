"""Logs that cannot be written: reported once, and nothing waits for them; damaged ones are read as far as possible."""

import contextlib
import json
import resource
import struct
from pathlib import Path

import pytest

from llamavid_jax.training import log as log_module
from llamavid_jax.training.log import JsonLines, TensorBoard
from llamavid_jax.training.metrics import Metrics

ODD = [b"[1, 2]", b"7", b"null", b'"text"', b'{"step": 2', b"\xff\xfe{}", b"{" * 9000, b"[" * 200_000, b"\0" * 40, b""]


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of all events in a folder, read as by TensorBoard up to the first one cut off."""
    found = []
    for file in sorted(folder.iterdir()):
        content, at = file.read_bytes(), 0
        while at + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            if at + 16 + length > len(content):
                break
            event = log_module.Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path):
    said = []
    with Metrics(tmp_path, report=said.append) as log:
        log.log(1, {"loss": 1.0})
        with full_disk(200):
            for step in range(2, 50):
                log.log(step, {"loss": 1.0})
        log.log(50, {"loss": 1.0})  # there is space again
    assert sum(line.startswith("step") for line in said) == 50
    others = sorted(line for line in said if not line.startswith("step"))
    assert len(others) == 2 and all("cannot be written" in line and "the run goes on" in line for line in others)
    assert str(tmp_path / "metrics.jsonl") in others[0] and str(tmp_path / "tensorboard") in others[1]
    rows = JsonLines(tmp_path / "metrics.jsonl", pytest.fail).rows()
    assert (rows[0], rows[-1]) == ({"step": 1, "loss": 1.0}, {"step": 50, "loss": 1.0})
    assert (1, "loss", 1.0) in events(tmp_path / "tensorboard")


def test_a_deleted_folder_is_said_once(tmp_path):
    said, log = [], JsonLines(tmp_path / "run" / "a.jsonl", lambda text: said.append(text))
    log.append([{"a": 1}])
    log.append([{"a": 2}])
    assert len(said) == 1 and "No such file" in said[0]


def test_a_clock_that_steps_back_stops_nothing(tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(log_module.time, "time", lambda: float(next(now)))
    log = TensorBoard(tmp_path, 1, pytest.fail)
    for step in range(1, 100):
        log.add(step, {"loss": step / 2})
    log.close()
    assert events(tmp_path) == [(step, "loss", step / 2) for step in range(1, 100)]


def test_odd_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1}, {"step": 2, "loss": 0.5}]
    path.write_bytes(b"\n".join([*ODD, *(json.dumps(row).encode() for row in whole), b'{"step": "3"}', b'{"st']))
    log = JsonLines(path, pytest.fail)
    assert log.rows() == [*whole, {"step": "3"}]
    log.append([{"step": 4}])  # after half a line
    assert log.rows()[-1] == {"step": 4}
    with Metrics(tmp_path, first_step=3, report=pytest.fail):
        pass
    assert log.rows() == whole


def test_names_that_utf8_cannot_hold(tmp_path):
    log = JsonLines(tmp_path / "skipped.jsonl", pytest.fail)
    row = {"id": "日本 \ud800", "reason": "latin\udce9.png"}
    log.append([row])
    assert log.rows() == [row] and "日本" in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8")


def test_a_log_that_is_a_folder(tmp_path):
    said = []
    (tmp_path / "metrics.jsonl").mkdir()
    with Metrics(tmp_path, first_step=3, report=said.append) as log:
        log.log(3, {"loss": 1.0})
    assert len(said) == 2 and "metrics.jsonl cannot be written" in said[0]
