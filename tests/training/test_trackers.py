"""Trackers, offline: one tracked run for all lives, no step twice; the run continues if its tracker fails."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from llamavid_jax.errors import ConfigError
from llamavid_jax.training import trackers
from llamavid_jax.training.trackers import check_tracker, open_tracker

LIFE = """
import os, sys
from pathlib import Path
from llamavid_jax.training.trackers import open_tracker
kind, output, first, last, ends = sys.argv[1:]
tracker = open_tracker(kind, Path(output), int(first), sys.exit)
for step in range(int(first), int(last) + 1):
    tracker.add(step, {"loss": 1 / step})
    if step % 2 == 0:
        tracker.add(step, {"evaluation_loss": 2 / step})
if ends == "killed":
    os._exit(0)
tracker.close()
"""
LIVES = (1, 4), (3, 6)  # the second life resumes after a checkpoint
WANTED = {("loss", step): 1 / step for step in range(1, 7)} | {
    ("evaluation_loss", step): 2 / step for step in (2, 4, 6)
}


def live(kind: str, output: Path, *ends: str) -> None:
    output.mkdir()
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for (first, last), end in zip(LIVES, ends, strict=True):
        command = [sys.executable, "-c", LIFE, kind, str(output), str(first), str(last), end]
        subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=600)


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    live("mlflow", tmp_path / "run", "killed", "closed")
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == trackers.PROJECT]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    found = [one for name in ("loss", "evaluation_loss") for one in client.get_metric_history(run.info.run_id, name)]
    assert len(found) == len(WANTED) and {(one.key, one.step): one.value for one in found} == WANTED


def test_wandb(tmp_path):
    live("wandb", tmp_path / "run", "closed", "closed")  # if killed, it would lose what it has not written yet
    found, runs = Counter(), set()
    for file in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"):
        runs.add(file.name)
        for row in history(file):
            found.update((name, row["_step"], row[name]) for name in ("loss", "evaluation_loss") if name in row)
    assert len(runs) == 1  # the lives are parts of one run
    assert found == Counter((*place, value) for place, value in WANTED.items())


def history(file: Path) -> Iterator[dict]:
    """The logged rows of a W&B file: records in blocks of 32 KiB, in parts (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, part = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):
            items = Record.FromString(record).history.item
            record = b""
            yield {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items}


def test_a_tracker_that_fails_is_said_once(tmp_path, monkeypatch):
    told, lines, fails = [], [], itertools.count()

    def log(values, step):
        if next(fails) == 1:
            raise ConnectionError("no route")
        told.append(step)

    monkeypatch.setattr(trackers, "_mlflow", lambda run, output: (run or "7", log, pytest.fail))
    tracker = open_tracker("mlflow", tmp_path, 1, lines.append)
    for step in (1, 2, 3):
        tracker.add(step, {"loss": 1.0})
    tracker.close()
    (line,) = lines
    assert "ConnectionError: no route" in line and "goes on without it" in line and told == [1]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    check_tracker("tensorboard")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"training\.tracker is wandb, which is not installed; pip install"):
        check_tracker("wandb")
