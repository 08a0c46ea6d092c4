"""Metrics of a run: {name: number} of a step ─▶ a line on the console and in `metrics.jsonl`, and a tracker's entry.

The names are those of COLUMNS.  Only process 0 writes.  A resumed run first removes what was logged from its first step
on, so that no curve has a step twice.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from llamavid_jax.parallel.chips import peak_flops
from llamavid_jax.training.log import JsonLines
from llamavid_jax.training.trackers import open_tracker

FILE = "metrics.jsonl"

COLUMNS: Mapping[str, tuple[str, str]] = {  # name -> label on the console, and format
    "loss": ("loss", "7.4f"),
    "token_accuracy": ("accuracy", "5.3f"),
    "learning_rate": ("lr", "8.2e"),
    "grad_norm": ("norm", "7.3g"),
    "tokens_per_second": ("tokens/s", "9,.0f"),
    "frames_per_second": ("frames/s", "7,.1f"),
    "mfu": ("MFU", "5.1%"),
    "memory_gib": ("GiB", "5.1f"),
    "data_wait": ("data wait", "4.0%"),
    "padding": ("padding", "4.0%"),
    "goodput": ("goodput", "4.0%"),
}


class Metrics:
    """Prints metrics, and appends them to `folder/metrics.jsonl` and the `tracker`; `first_step` is the next step."""

    def __init__(
        self,
        folder: str | Path,
        first_step: int = 0,
        report: Callable[[str], None] = print,
        tracker: str = "tensorboard",
    ):
        self._report, self._writes = report, jax.process_index() == 0
        if not self._writes:
            return
        self._lines = JsonLines(Path(folder) / FILE, report)
        self._lines.replace(row for row in self._lines.rows() if _step(row) < first_step)
        self._tracker = open_tracker(tracker, Path(folder), first_step, report)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Values may have any type that `float` takes; non-finite ones are null in the file, missing in the tracker."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._lines.append([{"step": step} | dict.fromkeys(values) | finite])
        self._tracker.add(step, finite)
        self._report(console_line(step, values))

    def close(self) -> None:
        if self._writes:
            self._tracker.close()


def _step(row: Mapping[str, Any]) -> int | float:
    """The step of a line; infinity, after all others, for a line without one."""
    step = row.get("step")
    return step if type(step) in (int, float) else math.inf


def console_line(step: int, values: Mapping[str, float]) -> str:
    """One line, whose columns align with those of the line before."""
    columns = ((*COLUMNS.get(name, (name, "8.4g")), value) for name, value in values.items())
    return f"step {step:>6}  " + "  ".join(f"{label} {value:{form}}" for label, form, value in columns)


class Throughput:
    """Speed and its causes, summed over the steps since the last `read`."""

    def __init__(self, devices: int, clock: Callable[[], float] = time.perf_counter):
        """`devices` counts those of the mesh; others are idle."""
        self._devices, self._clock = devices, clock
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._start()

    def _start(self) -> None:
        self._since = self._clock()
        self._tokens = self._slots = self._frames = self._flops = self._waited = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not counted; call it while no step is under way."""
        began = self._clock()
        yield
        self._since += self._clock() - began

    def add(self, tokens: float, slots: float, frames: float, flops: int, wait: float) -> None:
        """Adds one step over all devices; `slots` is the room for tokens, `wait` the seconds waited for the batch."""
        self._tokens += tokens
        self._slots += slots
        self._frames += frames
        self._flops += flops
        self._waited += wait

    def read(self) -> dict[str, float]:
        """Tokens and frames per second of all devices, MFU if their peak is known, and more; then starts anew."""
        seconds = max(self._clock() - self._since, 1e-9)
        values = {"tokens_per_second": self._tokens / seconds, "frames_per_second": self._frames / seconds}
        if self._peak:
            values["mfu"] = self._flops / seconds / (self._peak * self._devices)
        values |= {"memory_gib": peak_memory() / 2**30, "data_wait": self._waited / seconds}
        values["padding"] = 1 - self._tokens / max(self._slots, 1)
        self._start()
        return values


def peak_memory() -> int:
    """Peak memory so far in bytes: of the first local device, or of this process if the device has no statistics."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
