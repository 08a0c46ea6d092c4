"""Goodput: what every second of a run's wall clock went into, over all its restarts.

    Goodput, a stopwatch that is always on one of PARTS ─▶ output/goodput.jsonl ─ tally ─▶ {part: seconds}

A line of the file covers the time since the line before: {time, step, part: seconds}; the first line of a process also
has `began`.  Lines are written at every log and save and at the end, so a killed process leaves at most
`training.log_every` steps unwritten, which count as idle.

`ml-goodput-measurement` is not used, because it works only through Google Cloud Logging.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llamavid_jax.training.log import JsonLines

FILE = "goodput.jsonl"
SHORTEST = 0.01  # the fewest seconds worth a line
PARTS: Mapping[str, str] = {
    "steps": "steps that count",
    "compile": "tracing and compiling the steps",
    "data wait": "devices idle until a batch came",
    "save": "steps standing still for a checkpoint, and the model at the end",
    "restore": "reading a checkpoint",
    "evaluation": "the held-out set",
    "start": "reading weights and data's sizes",
    "lost": "steps after a save, which a restart did again",
    "idle": "no process ran, or it was killed before it wrote",
}


class Goodput:
    """The stopwatch of this process, which begins in part `start`; process 0 writes the file."""

    def __init__(self, output: Path, report: Callable[[str], None], clock: Callable[[], float] = time.perf_counter):
        self._file = JsonLines(output / FILE, report) if jax.process_index() == 0 else None
        self._clock, self._part, self._since, self._began = clock, "start", clock(), time.time()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._totals = dict(self._seconds)

    def turn(self, part: str) -> None:
        """Switches the stopwatch to `part`."""
        now = self._clock()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the time inside the block as `part`."""
        before = self._part
        self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves `seconds` already counted as `source` to `target`."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def begin(self, step: int) -> None:
        """This process continues after `step`: what earlier ones did beyond it is lost.  Switches to `steps`."""
        before = self._file.rows() if self._file else []
        self._totals = tally([*before, self._write(step, began=self._began)])
        self.turn("steps")

    def write(self, step: int) -> None:
        """Writes what the time since the last line went into, up to `step`; less than SHORTEST is carried over."""
        self.turn(self._part)
        if sum(self._seconds.values()) > SHORTEST:
            row = self._write(step)
            for part in PARTS:
                self._totals[part] += row.get(part, 0.0)

    def _write(self, step: int, **fields: float) -> dict[str, float]:
        self.turn(self._part)
        seconds = {part: round(value, 4) for part, value in self._seconds.items() if value}
        row = {"time": round(time.time(), 3), "step": step, **fields, **seconds}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        if self._file:
            self._file.append([row])
        return row

    @property
    def share(self) -> float:
        """Goodput: the fraction of the wall clock so far that went into steps that count."""
        return self._totals["steps"] / max(sum(self._totals.values()), 1e-9)

    def __str__(self) -> str:
        return in_words(self._totals)


def in_words(totals: Mapping[str, float]) -> str:
    """Such as `1.31 hours: steps 91.2 %, compile 5.0 %, save 3.8 %`, the largest part first."""
    whole = sum(totals.values())
    parts = sorted((part for part in totals if totals[part]), key=lambda part: -totals[part])
    return f"{whole / 3600:.2f} hours: " + ", ".join(f"{part} {totals[part] / whole:.1%}" for part in parts)


def tally(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part.  Malformed lines are skipped."""
    totals = dict.fromkeys(PARTS, 0.0)
    for _, _, seconds in spans(rows):
        for part, value in seconds.items():
            totals[part] += value
    return totals


def spans(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, dict[str, float]]]:
    """The wall clock in order, as (from, to, seconds of each part in it), in seconds since 1970.

    It is read backwards: the first line of each process gives the step after which the steps of earlier ones are lost.
    """
    rows = [row for row in rows if all(type(row.get(name)) in (int, float) for name in ("time", "step"))]
    found, again = [], math.inf
    for place in reversed(range(len(rows))):
        row, end = rows[place], rows[place - 1]["time"] if place else None
        seconds = {part: float(row[part]) for part in PARTS if type(row.get(part)) in (int, float)}
        if row["step"] > again:
            seconds["lost"] = seconds.get("lost", 0.0) + seconds.pop("steps", 0.0)
        began = row.get("began", row["time"] if end is None else end)
        found.append((began, row["time"], seconds))
        if "began" in row:
            again = min(again, row["step"])
            if end is not None and began > end:
                found.append((end, began, {"idle": began - end}))
    return found[::-1]
