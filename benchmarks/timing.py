"""One clock for both frameworks: a warm-up, then steps in a row, waited for once."""

import time
from collections.abc import Callable
from typing import Any

WARM_UP = 3  # steps before the clock starts: compilation, and the first use of every buffer


def seconds(run: Callable[[], None], wait: Callable[[], Any], steps: int) -> float:
    """The mean of `steps` runs after the warm-up; `wait` returns when the device has done them."""
    for _ in range(WARM_UP):
        run()
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - began) / steps
