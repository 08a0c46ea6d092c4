"""Times both frameworks alike: a warm-up, then consecutive steps and a single wait at the end."""

import time
from collections.abc import Callable
from typing import Any

WARM_UP = 3  # steps before the clock starts: compilation, and the first use of every buffer


def seconds(run: Callable[[], None], wait: Callable[[], Any], steps: int) -> float:
    """The mean of `steps` runs after the warm-up; `wait` returns when the device has finished them."""
    for _ in range(WARM_UP):
        run()
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - began) / steps
