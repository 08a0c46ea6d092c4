"""Where a run's metrics go beside `metrics.jsonl`, by `training.tracker`: TensorBoard's files, W&B or MLflow.

    open_tracker ─▶ add(step, {name: number}), close()

All restarts of a run log to the same run there.  What a restart logs again is left out: `output/tracker.json` has the
run's id and the last step of every metric, {"run": ..., "told": {name: step}}.  TensorBoard discards repeated steps by
itself.

Environment variables of each tracker set where the metrics go, and whether over a network: WANDB_MODE and
WANDB_PROJECT, MLFLOW_TRACKING_URI (by default the output's folder `mlruns`).
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from llamavid_jax.errors import ConfigError
from llamavid_jax.files import write_files
from llamavid_jax.training.log import Log, TensorBoard

PROJECT = "llamavid_jax"
FILE = "tracker.json"


def check_tracker(kind: str) -> None:
    """Raises ConfigError if the tracker is not installed."""
    if kind != "tensorboard" and not find_spec(kind):
        raise ConfigError(
            f"training.tracker is {kind}, which is not installed; "
            f'pip install "llamavid_jax[{kind}]", or use tensorboard'
        )


def open_tracker(kind: str, output: Path, first_step: int, report: Callable[[str], None]) -> "TensorBoard | Tracker":
    if kind == "tensorboard":
        return TensorBoard(output / "tensorboard", first_step, report)
    return Tracker(kind, output, report)


class Tracker(Log):
    """A run of W&B or MLflow.  A failure there is reported once, and ends the tracking but not the run."""

    def __init__(self, kind: str, output: Path, report: Callable[[str], None]):
        super().__init__(output / FILE, report)
        self._log = self._close = None
        with self.writing():
            known = json.loads(self.path.read_bytes()) if self.path.exists() else {"run": "", "told": {}}
            self._told = known["told"]
            opened = (_wandb if kind == "wandb" else _mlflow)(known["run"], output)
            self._run, self._log, self._close = opened

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each tracker raises its own
            self._report(f"the tracker fails ({type(error).__name__}: {error}); the run goes on without it")
            self._log = self._close = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if step > self._told.get(name, -1)} if self._log else {}
        if new:
            self._told |= dict.fromkeys(new, step)
            with self.writing():  # noted before it is logged: a process that is killed in between leaves a gap
                note = json.dumps({"run": self._run, "told": self._told})
                write_files(self.path.parent, {FILE: note.encode()})
                self._log(new, step)

    def close(self) -> None:
        if self._close:
            with self.writing():
                self._close()
            self._log = self._close = None


def _wandb(run: str, output: Path):
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    opened = wandb.init(project=project, id=run or None, resume="allow", name=output.name, dir=output)
    return opened.id, lambda values, step: opened.log(values, step=step), opened.finish


def _mlflow(run: str, output: Path):
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow still has it, but no longer develops it
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (output / "mlruns").absolute().as_uri())
    if run:
        client.update_run(run, status="RUNNING")
    else:
        known = client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else client.create_experiment(PROJECT)
        run = client.create_run(experiment, run_name=output.name).info.run_id

    def log(values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, [Metric(name, value, now, step) for name, value in values.items()])

    return run, log, lambda: client.set_terminated(run)
