"""A run's records: speed and loss to the log, skipped samples and steps, and the reasons to stop."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamavid_jax.data.loader import Loader
from llamavid_jax.data.record import DataError
from llamavid_jax.errors import TrainingError
from llamavid_jax.models.flops import flops_per_step
from llamavid_jax.training.batches import Upcoming
from llamavid_jax.training.config import LoopConfig
from llamavid_jax.training.forecast import work_of
from llamavid_jax.training.goodput import Goodput
from llamavid_jax.training.log import JsonLines
from llamavid_jax.training.metrics import Metrics, Throughput
from llamavid_jax.training.pace import Pace
from llamavid_jax.training.start import Start
from llamavid_jax.training.step import StepMetrics


class Journal:
    """A run's logs and counts, and the reasons to stop it.  A context manager, which closes its files."""

    def __init__(
        self,
        output: Path,
        start: Start,
        loader: Loader,
        loop: LoopConfig,
        max_broken: float,
        first_step: int,
        report: Callable[[str], None],
        goodput: Goodput,
    ):
        self.output, self.loop, self.max_broken, self.report = output, loop, max_broken, report
        self.steps, self.first_step, self.config = loader.steps, first_step, start.config
        self.done, self.goodput, self.pace = first_step, goodput, Pace(loop.hang_after, goodput, report)
        self.allowed = max_broken * len(loader.schedule.sizes.kind)
        self.throughput = Throughput(start.mesh.size)
        self.trains, self.updates = work_of(start.trained)
        self.pending: list[tuple[int, StepMetrics, Upcoming]] = []
        self.since_log: list[dict[str, float]] = []  # the steps that the next log line averages
        self.bad_steps = self.bad_in_a_row = self.truncated = self.samples = 0
        self.rows = len(loader.rows)  # of a batch, in this process
        # unreadable samples that all processes know before the run; they are never planned
        self.broken = {(one["id"], one["reason"]) for one in loader.schedule.sizes.broken}
        own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        self.skipped = JsonLines(output / f"skipped{own}.jsonl", report)
        self.not_finite = JsonLines(output / f"not_finite{own}.jsonl", report)
        if first_step == 0:
            self.skipped.replace([])
        noted = self._noted()
        self.held_out = noted["evaluation"]
        self.unreadable = noted["training"] - self.broken  # unreadable ones found in this process's rows
        self.skipped.append(_rows(self.broken - noted["training"]))
        self._totals()
        self.metrics = Metrics(output, first_step + 1, report, loop.tracker)  # last, so that no error leaves it open

    def __enter__(self) -> "Journal":
        self.pace.__enter__()
        self.goodput.begin(self.first_step)
        return self

    def __exit__(self, *_) -> None:
        self.pace.__exit__()
        self.goodput.write(self.done)
        self.metrics.close()

    def finished(self, step: int, metrics: StepMetrics, current: Upcoming) -> None:
        """Queues a step that was just dispatched, and logs the one before it."""
        self.pending.append((step, metrics, current))
        if len(self.pending) > 1:
            self._look(*self.pending.pop(0))

    def flush(self) -> None:
        """Logs every step so far."""
        while self.pending:
            self._look(*self.pending.pop(0))

    @contextlib.contextmanager
    def pause(self, part: str) -> Iterator[None]:
        """Logs every step so far; the time inside the block is not the steps' but the run's `part`."""
        self.flush()
        self.goodput.write(self.done)
        with self.throughput.pause(), self.pace.pause(), self.goodput.of(part):
            yield

    def _look(self, step: int, metrics: StepMetrics, seen: Upcoming) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        self.samples, self.truncated = self.samples + seen.loaded.samples, self.truncated + seen.loaded.truncated
        self.note_unreadable(seen.loaded.skipped)
        if values.pop("finite"):
            self.bad_in_a_row = 0
            self.since_log.append(values)
        else:
            self._note_bad(step, values, seen.loaded.ids)
        self._count(seen)
        self.done = step + 1
        if (step + 1) % self.loop.log_every == 0 or step + 1 == self.steps:
            means = {name: float(np.mean([one[name] for one in self.since_log or [values]])) for name in values}
            values, self.since_log = means | {"learning_rate": values["learning_rate"]}, []
            _, truncated, unreadable = self._totals()
            counts = {"skipped_steps": self.bad_steps, "skipped_samples": unreadable, "truncated": truncated}
            self.goodput.write(step + 1)
            values |= {k: n for k, n in counts.items() if n} | self.throughput.read()
            self.metrics.log(step + 1, values | {"goodput": self.goodput.share} | self.pace.spread())

    def _count(self, seen: Upcoming) -> None:
        """Adds one step's work, over all processes."""
        batch, rows = seen.loaded.batch, self.loop.batch_size
        share = rows / len(batch.token_ids)
        frames, pairs = (rows * shape[1] for shape in (batch.frames.shape, batch.pair_frame.shape))
        flops = flops_per_step(
            self.config,
            self.trains,
            frames=frames if batch.frames.ndim == 5 else 0,
            pairs=pairs,
            question_tokens=batch.question_ids.shape[2],
            rows=rows,
            row_tokens=batch.token_ids.shape[1],
            updates=self.updates,
        )
        tokens, slots, real_frames = (share * getattr(seen.loaded, name) for name in ("tokens", "slots", "frames"))
        self.throughput.add(tokens, slots, real_frames, flops, seen.wait)

    def note_unreadable(self, skipped: Sequence[dict[str, str]]) -> None:
        """Logs unreadable samples, each once, and stops a run of one process if there are too many."""
        new = {(one["id"], one["reason"]) for one in skipped} - self.unreadable
        self.unreadable |= new
        self.skipped.append(_rows(new))
        if new and jax.process_count() == 1:
            self._totals()

    def note_held_out(self, skipped: Sequence[dict[str, str]]) -> None:
        """Logs unreadable samples of the held-out set, which never stop a run."""
        new = {(one["id"], one["reason"]) for one in skipped} - self.held_out
        self.held_out |= new
        self.skipped.append([row | {"set": "evaluation"} for row in _rows(new)])

    def _totals(self) -> tuple[int, int, int]:
        """Counts of read, truncated and unreadable samples over all processes.  DataError for too many unreadable.

        All processes call it together, so that all stop after the same step.  Several may read the same rows, so the
        sums are scaled down.
        """
        own = np.array([self.samples, self.truncated, len(self.unreadable), self.rows], np.int32)
        *counts, rows = multihost_utils.process_allgather(own).reshape(-1, len(own)).sum(0, dtype=int).tolist()
        samples, truncated, unreadable = (count * self.loop.batch_size // rows for count in counts)
        count = len(self.broken) + unreadable
        if count > self.allowed:
            name, reason = max(self.unreadable or self.broken)
            raise DataError(
                f"{count} samples cannot be read, more than data.max_broken = {self.max_broken:g} of them "
                f"all; one is {name!r}: {reason}. All are named in {self.output / 'skipped.jsonl'}; mend them, or "
                "raise data.max_broken"
            )
        return samples, truncated, count

    def _noted(self) -> dict[str, set[tuple[str, str]]]:
        """The samples of either set that the log of a resumed run already names."""
        noted: dict[str, set[tuple[str, str]]] = {"training": set(), "evaluation": set()}
        for row in self.skipped.rows():
            of, sample = row.get("set", "training"), (row.get("id"), row.get("reason"))
            if of in ("training", "evaluation") and all(isinstance(part, str) for part in sample):
                noted[of].add(sample)
        return noted

    def _note_bad(self, step: int, values: dict[str, float], ids: list[list[str]]) -> None:
        self.bad_steps, self.bad_in_a_row = self.bad_steps + 1, self.bad_in_a_row + 1
        names = [name for row in ids for name in row]
        self.not_finite.append([{"step": step + 1, **values, "samples": names}])
        self.report(
            f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped; samples {names}"
        )
        if self.bad_in_a_row >= self.loop.max_bad_steps:
            raise TrainingError(
                f"{self.bad_in_a_row} steps in a row, up to step {step + 1}, had no finite loss or gradient; look "
                f"at the samples in {self.output / 'not_finite.jsonl'}, or lower optimizer.learning_rate"
            )

    def summary(self) -> str:
        """What was skipped or truncated, and what the hours went into, in two sentences."""
        samples, truncated, unreadable = self._totals()
        return (
            f"{samples} samples; {unreadable} unreadable ones skipped, {truncated} cut to fit their row, "
            f"{self.bad_steps} steps without a finite loss. {self.goodput}"
        )


def _rows(unreadable: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"id": name, "reason": reason} for name, reason in sorted(unreadable)]
