"""What the processes of a run tell each other."""

from typing import Any

import numpy as np
from jax.experimental import multihost_utils


def on_any(problem: Any) -> bool:
    """Whether `problem` is true on any process; all of them call this.

    It stands before a barrier: a process that fails must not leave the others waiting for it.
    """
    return bool(np.any(multihost_utils.process_allgather(np.int32(bool(problem)))))
