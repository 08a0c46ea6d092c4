"""What a run has seen: speed and loss to the log, samples and steps left out, and the reasons to stop it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from llamavid_jax.data.batching import Batch
from llamavid_jax.data.loader import LoadedBatch, Loader
from llamavid_jax.data.plan import describe
from llamavid_jax.data.records import DataError
from llamavid_jax.errors import InputError
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.flops import PARTS, flops_per_step
from llamavid_jax.training.metrics import Metrics, Throughput
from llamavid_jax.training.start import Start
from llamavid_jax.training.step import StepMetrics


class TrainingError(InputError):
    """A run that cannot go on: says at which step, why, and what to do."""


class Upcoming(NamedTuple):
    """A batch on the devices, what was loaded for it, and the data position behind it."""

    batch: Batch
    loaded: LoadedBatch
    position: dict[str, Any]
    wait: float  # seconds that the loader needed


class Journal:
    """What a run has seen: logs, counts, and the reasons to stop it."""

    def __init__(self, config: TrainConfig, start: Start, loader: Loader, console: Console, first_step: int):
        self.config, self.start, self.console = config, start, console
        self.steps, self.first_step, self.output = loader.steps, first_step, Path(config.output)
        sizes = loader.schedule.sizes
        self.allowed = config.data.max_broken * len(sizes.kind)
        self.metrics = Metrics(self.output, first_step + 1, report=console.print)
        self.throughput = Throughput()
        self.trains = {part: any(path.startswith(part) for path in start.trained) for part in PARTS}
        self.pending: list[tuple[int, StepMetrics, Upcoming]] = []
        self.since_log: list[dict[str, float]] = []  # the steps that the next line of the log is the mean of
        self.bad_steps = self.bad_in_a_row = self.skipped = self.truncated = self.samples = 0
        console.print(describe(loader.schedule.epoch(0), sizes, config.data.shapes, start.config.tokens_per_frame))
        self._note_skipped(sizes.broken if first_step == 0 else [])

    def finished(self, step: int, metrics: StepMetrics, current: Upcoming) -> None:
        """Takes in a step that was just sent to the device and looks at the one before it."""
        self.pending.append((step, metrics, current._replace(batch=None)))
        if len(self.pending) > 1:
            self._look(*self.pending.pop(0))

    def flush(self) -> None:
        """Looks at every step so far."""
        while self.pending:
            self._look(*self.pending.pop(0))

    def _look(self, step: int, metrics: StepMetrics, seen: Upcoming) -> None:
        values = {name: float(value) for name, value in metrics._asdict().items()}
        self.samples, self.truncated = self.samples + seen.loaded.samples, self.truncated + seen.loaded.truncated
        self._note_skipped(seen.loaded.skipped)
        if values.pop("finite"):
            self.bad_in_a_row = 0
            self.since_log.append(values)
        else:
            self._note_bad(step, values, seen.loaded.ids)
        self._count(seen)
        if (step + 1) % self.config.training.log_every == 0 or step + 1 == self.steps:
            means = {name: float(np.mean([one[name] for one in self.since_log or [values]])) for name in values}
            values, self.since_log = means | {"learning_rate": values["learning_rate"]}, []
            counts = {"skipped_steps": self.bad_steps, "skipped_samples": self.skipped, "truncated": self.truncated}
            self.metrics.log(step + 1, values | {k: n for k, n in counts.items() if n} | self.throughput.read())

    def _count(self, seen: Upcoming) -> None:
        """Adds one step's work, over all processes."""
        batch, rows = seen.loaded.batch, self.config.training.batch_size
        share = rows // len(batch.token_ids)
        frames, pairs = (rows * shape[1] for shape in (batch.frames.shape, batch.pair_frame.shape))
        flops = flops_per_step(
            self.start.config,
            self.trains,
            frames=frames if batch.frames.ndim == 5 else 0,
            pairs=pairs,
            question_tokens=batch.question_ids.shape[2],
            rows=rows,
            row_tokens=batch.token_ids.shape[1],
        )
        self.throughput.add(seen.loaded.tokens * share, seen.loaded.frames * share, flops, seen.wait)

    def _note_skipped(self, skipped: Sequence[dict[str, str]]) -> None:
        if not skipped:
            return
        self.skipped += len(skipped)
        self._append("skipped", skipped)
        if self.skipped > self.allowed:
            raise DataError(
                f"{self.skipped} samples cannot be read, more than data.max_broken = {self.config.data.max_broken:g} "
                f"of them all; the last one is {skipped[-1]['id']}: {skipped[-1]['reason']}. All are named in "
                f"{self.output / 'skipped.jsonl'}; mend them, or raise data.max_broken"
            )

    def _note_bad(self, step: int, values: dict[str, float], ids: list[list[str]]) -> None:
        self.bad_steps, self.bad_in_a_row = self.bad_steps + 1, self.bad_in_a_row + 1
        names = [name for row in ids for name in row]
        self._append("not_finite", [{"step": step + 1, **values, "samples": names}])
        self.console.print(
            f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped; samples {names}"
        )
        if self.bad_in_a_row >= self.config.training.max_bad_steps:
            raise TrainingError(
                f"{self.bad_in_a_row} steps in a row, up to step {step + 1}, had no finite loss or gradient; look "
                f"at the samples in {self.output / 'not_finite.jsonl'}, or lower optimizer.learning_rate"
            )

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        suffix = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        with open(self.output / f"{name}{suffix}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def summary(self) -> str:
        """What was left out or cut, in a sentence."""
        return (
            f"{self.samples} samples; {self.skipped} unreadable ones skipped, {self.truncated} cut to fit their row, "
            f"{self.bad_steps} steps without a finite loss"
        )
