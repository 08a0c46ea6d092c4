"""Keeps Orbax's log off the console: for one unreadable file Orbax prints several hundred lines."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

_HEARING: list[Callable[[logging.LogRecord], None]] = []


@contextlib.contextmanager
def quiet(hear: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Suppresses Orbax's log, passing its records to `hear`, and Python's messages about its closed event loops.

    Orbax logs in background threads throughout a run, so this stays open as long as its checkpoint manager.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    _HEARING.append(hear)
    logger.addFilter(_of_others)
    sys.unraisablehook = tell
    try:
        yield
    finally:
        _HEARING.remove(hear)
        if not _HEARING:
            logger.removeFilter(_of_others)
        sys.unraisablehook = hook


def _of_others(record: logging.LogRecord) -> bool:
    own = "/orbax/" in record.pathname
    for hear in _HEARING if own else ():
        hear(record)
    return not own
