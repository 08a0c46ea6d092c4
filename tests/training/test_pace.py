"""A run that hangs is ended; one that compiles, saves, or has not begun is not; the slow host is named."""

import threading
import time

import numpy as np
import pytest

from llamavid_jax.shapes import Batch
from llamavid_jax.training import pace as module
from llamavid_jax.training.goodput import Goodput
from llamavid_jax.training.pace import Pace

FLOOR = 0.2


def batch(tokens: int = 4) -> Batch:
    return Batch(*[np.zeros((2, tokens))] * len(Batch._fields))


class Result:
    """A step's result, which is ready when the test sets `event`."""

    def __init__(self, done: bool = True):
        self.event = threading.Event()
        if done:
            self.event.set()

    def block_until_ready(self) -> None:
        self.event.wait()


class Stopped(threading.Event):
    def __call__(self, *_) -> None:
        self.set()


@pytest.fixture
def pace(tmp_path, monkeypatch):
    """Tests enter it, which starts its watch, once the steps are as they want them."""
    monkeypatch.setattr(module, "stop_hung", Stopped())
    return Pace(FLOOR, Goodput(tmp_path, pytest.fail), pytest.fail)


def one_step(pace: Pace, of: Batch, result: Result | None = None) -> None:
    pace.begin(of, 0.0)
    pace.sent(result or Result())
    while result is None and not pace._before:
        time.sleep(0.001)


def test_a_hang_is_found(pace):
    one_step(pace, batch())
    one_step(pace, batch(), Result(done=False))
    with pace:
        assert module.stop_hung.wait(60)


def test_a_loader_that_hangs_is_found(pace):
    one_step(pace, batch())
    with pace.pause():
        pass
    with pace:
        assert module.stop_hung.wait(60)


@pytest.mark.parametrize("where", ["first compile", "first step", "later compile", "save", "slow steps"])
def test_no_false_alarm(pace, where):
    """All of these last much longer than the minimal limit."""
    if where == "first compile":
        pace.begin(batch(), 0.0)
    elif where == "first step":
        one_step(pace, batch(), Result(done=False))
    elif where == "later compile":
        one_step(pace, batch())
        pace.begin(batch(tokens=8), 0.0)
    elif where == "slow steps":
        one_step(pace, batch())
        pace._lasted.append(1e6)
    else:
        one_step(pace, batch())
        pause = pace.pause()
        pause.__enter__()
    with pace:
        assert not module.stop_hung.wait(8 * FLOOR)


def test_a_machine_that_was_halted_is_no_hang(tmp_path, monkeypatch):
    """An hour between two ticks of the watch counts as one tick."""
    monkeypatch.setattr(module, "stop_hung", lambda *_: pytest.fail("stopped"))
    pace = Pace(FLOOR, Goodput(tmp_path, pytest.fail), pytest.fail)
    pace._any, ticks = True, iter([False, True])
    monkeypatch.setattr(pace._closed, "wait", lambda seconds: next(ticks))
    pace._watch()
    assert pace._silent == pytest.approx(FLOOR / 10)


def test_no_alarm_after_the_end(pace, monkeypatch):
    """A tick of the watch that began before the end is over when the block is."""
    entered, over = threading.Event(), threading.Event()

    def slow(*_) -> None:
        entered.set()
        time.sleep(0.2)
        over.set()

    monkeypatch.setattr(module, "stop_hung", slow)
    one_step(pace, batch())
    with pace:
        assert entered.wait(60)
    assert over.is_set()


def test_what_devices_waited_for(pace):
    """A batch that came during the step before costs nothing; a later one costs at most its loading time."""
    one_step(pace, batch())
    one_step(pace, batch())
    running = Result(done=False)
    one_step(pace, batch(), running)
    seconds = pace._goodput._seconds
    before = seconds["data wait"]
    pace.begin(batch(), 50.0)
    assert seconds["data wait"] == before
    running.event.set()
    pace.sent(Result())
    while not pace._before:
        time.sleep(0.001)
    time.sleep(0.05)
    pace.begin(batch(), 0.03)
    assert seconds["data wait"] - before == pytest.approx(0.03) and pace._late > 0.04


@pytest.mark.parametrize("late,named", [([0.0, 0.0, 0.9, 0.1], 2), ([0.0, 0.06, 0.0, 0.0], None), ([0.4] * 4, None)])
def test_the_slow_host_is_named(tmp_path, monkeypatch, late, named):
    said = []
    pace = Pace(FLOOR, Goodput(tmp_path, said.append), said.append)
    pace._hosts = [f"host-{number}" for number in range(4)]
    monkeypatch.setattr(module.jax, "process_count", lambda: 4)
    every = np.array([[seconds, 2.0] for seconds in late], np.float32)
    monkeypatch.setattr(module.multihost_utils, "process_allgather", lambda own: every)
    spread = pace.spread()["host_spread"]
    assert spread == pytest.approx((max(late) - np.median(np.delete(late, np.argmax(late)))) / 2, abs=1e-6)
    assert [line.split(" is slow")[0] for line in said] == ([f"process {named} (host-{named})"] if named else [])
