"""SIGTERM and Ctrl-C ask a run to stop, on all processes after the same step; the second signal acts at once."""

import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT
from training_data import two_processes

from llamavid_jax.training.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_flag_and_the_handlers(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested() and preemption.requested()
        assert {n: signal.getsignal(n) for n in before} == before  # a second signal has its usual effect
    assert {n: signal.getsignal(n) for n in before} == before
    with Preemption() as again:
        assert not again.requested()
    assert {n: signal.getsignal(n) for n in before} == before


LOOP = """
import signal, time
from llamavid_jax.training.preemption import Preemption
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
with Preemption() as preemption:
    print("ready", flush=True)
    while not preemption.requested():
        time.sleep(0.001)
    print("requested", flush=True)
    while True:  # Python acts on a signal between two statements: one long sleep could miss it
        time.sleep(0.001)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in ("ready\n", "requested\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    process.communicate(timeout=1200)
    assert process.returncode == -number


TWO_PROCESSES = """
import os, signal, time
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.preemption import Preemption
with jax.set_mesh(make_mesh(data=2, fsdp=4)), Preemption() as preemption:
    for step in range(200):
        time.sleep(0.005 * process)  # the two are not in step by themselves
        if step == 20 and process == 1:
            os.kill(os.getpid(), int(arguments[0]))
        if preemption.requested():
            break
    print("stopped after", step, preemption.requested())
"""


@pytest.mark.sharding
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_step(number):
    """One is signalled; JAX's own handler, set by `initialize`, does not interfere."""
    outputs = two_processes(TWO_PROCESSES, str(int(number)))
    assert all("stopped after 21 True" in output for output in outputs), "\n".join(outputs)
