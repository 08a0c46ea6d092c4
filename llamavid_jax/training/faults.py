"""Simulated faults, to test how a run copes with them: `--simulate-fault KIND@STEP`.

A fault happens before that step, each time the step is reached, on the last process; `nan`, `disk` and `bucket` happen
on all processes, as all share parameters and folders.
"""

import os
import resource
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamavid_jax.errors import InputError
from llamavid_jax.models.structure import Params

KINDS = {
    "kill": "the process is gone, as by kill -9",
    "hang": "it stands still",
    "slow": "from then on each step begins SLOW seconds late",
    "nan": "a frozen parameter is NaN in this step",
    "disk": "from then on nothing can be written to files",
    "bucket": "for AWAY seconds no request to gs:// is answered, but those for arrays on their way",
}
SLOW = 0.5
AWAY = 5.0


class Fault(NamedTuple):
    kind: str
    step: int  # from 1, as in the log

    @classmethod
    def parse(cls, text: str) -> "Fault":
        kind, _, step = text.partition("@")
        if kind not in KINDS or not step.isdecimal() or int(step) < 1:
            raise InputError(
                f"--simulate-fault is {text!r}; give KIND@STEP, such as kill@3: KIND is one of {', '.join(KINDS)}"
            )
        return cls(kind, int(step))

    def strike(self, step: int, frozen: Params) -> Params:
        """Causes the fault if it is due before `step`; returns the frozen parameters that the step computes with."""
        if self.kind == "nan":
            return _poisoned(frozen) if step == self.step else frozen
        due = step == self.step or (self.kind == "slow" and step > self.step)
        if due and (self.kind in ("disk", "bucket") or jax.process_index() == jax.process_count() - 1):
            match self.kind:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    threading.Event().wait()
                case "slow":
                    time.sleep(SLOW)
                case "disk":  # every write to a file fails, as on a full disk, but with another error
                    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                case "bucket":
                    _take_bucket_away()
        return frozen


def _take_bucket_away() -> None:
    """Makes gcsfs's requests fail as without a network, and gcsfs retries; TensorStore's do not go through it."""
    from aiohttp import ClientConnectionError
    from gcsfs import GCSFileSystem

    connect, back = GCSFileSystem._set_session, time.monotonic() + AWAY

    async def unless_away(self) -> Any:
        if time.monotonic() < back:
            raise ClientConnectionError("--simulate-fault bucket")
        return await connect(self)

    GCSFileSystem._set_session = unless_away


def _poisoned(frozen: Params) -> Params:
    for path, value in frozen.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            return frozen | {path: value * jnp.nan}
    raise InputError("--simulate-fault nan needs a frozen parameter; use a recipe that freezes one")
