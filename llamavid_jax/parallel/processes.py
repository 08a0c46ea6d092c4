"""Communication between the processes of a run."""

from typing import Any

import numpy as np
from jax.experimental import multihost_utils


def on_any(problem: Any) -> bool:
    """Whether `problem` is true on any process; all of them call this.

    Call it before a barrier, so that a process that fails does not leave the others waiting.
    """
    return bool(np.any(multihost_utils.process_allgather(np.int32(bool(problem)))))
