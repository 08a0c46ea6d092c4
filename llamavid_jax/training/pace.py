"""The pace of a run's steps: how long devices sat idle, which host is slow, and whether the run hangs.

A thread for each step notes when the devices finish it.  If the next step is dispatched later than that, the devices
were idle: the host had no batch yet, or was slow itself.  All hosts see a step finish at the same moment, so a host
that dispatches the next one much later than the others is the straggler.  A slow chip does not show here, as all hosts
wait for it alike.

A run hangs if no step finishes within max(TIMES × the usual step, `training.hang_after` seconds) while one is due.
None is due before the first step is done, while a new shape compiles, and during saves and evaluations.
"""

import contextlib
import faulthandler
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamavid_jax.errors import say
from llamavid_jax.shapes import Batch
from llamavid_jax.training.goodput import Goodput

HUNG = 75  # the exit code of a run that hung (sysexits.h's "temporary failure"); restarted, it resumes
TIMES = 20
STRAGGLES = 0.2, 0.1  # of a step, and seconds: a host later than the others by more than both is reported


class Pace:
    """A context manager; each step calls `begin`, runs, and calls `sent`."""

    def __init__(self, hang_after: float, goodput: Goodput, report: Callable[[str], None]):
        self._hang_after, self._goodput, self._report = hang_after, goodput, report
        self._shapes: set[tuple] = set()
        self._paused, self._any, self._silent, self._closed = False, False, 0.0, threading.Event()
        self._before = [time.perf_counter()]  # when the previous step finished; empty until it does
        self._lasted: deque[float] = deque(maxlen=32)  # durations of the last steps, in seconds
        self._late = self._steps = 0.0
        self._hosts = _host_names()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Pace":
        self._watchdog.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._watchdog.join()  # a tick that is under way may not end the process after this

    @property
    def usual(self) -> float:
        """Median duration of the last steps in seconds; 0 before two are done."""
        return statistics.median(self._lasted or [0.0])

    def begin(self, batch: Batch, wait: float) -> None:
        """Called before a step is dispatched; its host waited `wait` seconds for the batch."""
        shapes = tuple(getattr(array, "shape", None) for array in batch)
        late = time.perf_counter() - self._before[0] if self._before else 0.0
        self._goodput.turn("steps")
        self._goodput.move(min(wait, late), "steps", "data wait")
        if shapes in self._shapes:
            self._late, self._steps = self._late + late, self._steps + 1
        else:
            self._shapes.add(shapes)
            self._paused, self._before = True, []
            self._goodput.turn("compile")

    def sent(self, result: Any) -> None:
        """Called once the step is dispatched; `result` is one of its output arrays."""
        self._goodput.turn("steps")
        self._silent, self._paused = 0.0, False
        before, self._before = self._before, []
        threading.Thread(target=self._done, args=(result, before, self._before), daemon=True).start()

    def _done(self, result: Any, before: list[float], own: list[float]) -> None:
        with contextlib.suppress(Exception):  # the main thread raises the same error
            result.block_until_ready()
            own.append(time.perf_counter())
            if before:
                self._lasted.append(own[0] - before[0])
            self._silent, self._any = 0.0, True

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """No step is due inside."""
        self._paused = True
        yield
        self._silent, self._before, self._paused = 0.0, [time.perf_counter()], False

    def _watch(self) -> None:
        """Counts its own ticks instead of reading the clock.

        So time in which the machine was suspended or starved does not count as a hang.
        """
        tick = min(1.0, self._hang_after / 10)
        while not self._closed.wait(tick):
            self._silent += tick
            if self._any and not self._paused and self._silent > max(self._hang_after, TIMES * self.usual):
                stop_hung(self._silent, self.usual)

    def spread(self) -> dict[str, float]:
        """How much later than the others the slowest host dispatched steps since the last call, as a part of a step.

        All processes call it together; a straggler is reported.  The dict is empty if there is only one process.
        """
        own = np.array([self._late / max(self._steps, 1), self.usual], np.float32)
        self._late = self._steps = 0.0
        if jax.process_count() == 1:
            return {}
        late, usual = multihost_utils.process_allgather(own).reshape(-1, 2).T
        slowest, step = int(late.argmax()), max(float(usual.max()), 1e-9)
        gap = float(late[slowest] - np.median(np.delete(late, slowest)))
        if gap > max(STRAGGLES[0] * step, STRAGGLES[1]):
            self._report(
                f"process {slowest} ({self._hosts[slowest]}) is slow: all wait {gap:.2f} s for it at each step, which "
                f"takes {step:.2f} s; see what else runs there, and its disk"
            )
        return {"host_spread": gap / step}


def stop_hung(silent: float, usual: float) -> None:
    """Prints the stack of every thread and ends this process; the run's other processes hang and end likewise."""
    say(
        f"process {jax.process_index()} ({socket.gethostname()}): no step in {silent:.0f} s, where one takes "
        f"{usual:.2f} s; the run ends with code {HUNG} and goes on from its last save when it is started again. "
        "Where its threads stand:"
    )
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback(file=2)
    os._exit(HUNG)


def _host_names() -> list[str]:
    name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64, b"\0"), np.uint8)
    every = multihost_utils.process_allgather(name).reshape(-1, 64)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in every]
