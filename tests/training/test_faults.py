"""The values of `--simulate-fault`, and their effect on a step; tests/cli has the runs."""

import time

import jax
import jax.numpy as jnp
import pytest
from bucket import emulated
from gcsfs import GCSFileSystem

from llamavid_jax.errors import InputError
from llamavid_jax.files import write_files
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


def test_a_bucket_that_is_away_is_waited_for(tmp_path, monkeypatch):
    """All requests fail at first, and are retried."""
    monkeypatch.setattr(faults, "AWAY", 0.5)
    with emulated(tmp_path) as bucket, monkeypatch.context() as patch:
        patch.setattr("gcsfs.GCSFileSystem._set_session", GCSFileSystem._set_session)  # restored at the end
        for name, value in bucket.env.items():
            patch.setenv(name, value)
        Fault.parse("bucket@2").strike(1, {})
        write_files(bucket.url, {"a": b"1"})
        Fault.parse("bucket@2").strike(2, {})
        began = time.monotonic()
        write_files(bucket.url, {"a": b"2"})
        assert time.monotonic() - began > 0.5 and bucket.store.cat_file("films/a") == b"2"
