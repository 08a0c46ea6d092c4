"""What `--simulate-fault` takes, and what a step sees of it; the runs are in tests/cli."""

import jax
import jax.numpy as jnp
import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.training import faults
from llamavid_jax.training.faults import Fault


@pytest.mark.parametrize(
    "text", ["", "kill", "kill@", "kill@0", "kill@-1", "kill@1.5", "flood@3", "KILL@3", "kill@3@4"]
)
def test_what_is_no_fault(text):
    with pytest.raises(InputError, match="KIND@STEP"):
        Fault.parse(text)


def test_nan_is_in_one_step():
    fault = Fault.parse("nan@2")
    frozen = {"table": jnp.arange(3), "kernel": jnp.ones(3, jnp.bfloat16), "bias": jnp.ones(2)}
    assert fault.strike(1, frozen) is frozen and fault.strike(3, frozen) is frozen
    struck = fault.strike(2, frozen)
    assert jnp.isnan(struck["kernel"]).all() and struck["kernel"].dtype == jnp.bfloat16
    assert struck["bias"] is frozen["bias"] and not jnp.isnan(frozen["kernel"]).any()
    with pytest.raises(InputError, match="frozen"):
        fault.strike(2, {})


def test_the_last_process_is_slow_from_then_on(monkeypatch):
    slept, fault = [], Fault.parse("slow@2")
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    for step in (1, 2, 3):
        fault.strike(step, {})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    fault.strike(4, {})
    assert slept == [faults.SLOW] * 2
