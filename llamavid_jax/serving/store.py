"""Arrays that are made once and shared: features of videos, and visual tokens of the questions about them."""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator

import numpy as np


@dataclasses.dataclass(eq=False)
class _Entry:
    making: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    arrays: tuple[np.ndarray, ...] | None = None
    users: int = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays or ())


class Store:
    """Holds up to `max_bytes`, and more while it is in use; what was used least recently is dropped first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.made = 0  # how often something was missing
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    @contextlib.contextmanager
    def use(
        self, key: Hashable, make: Callable[[], tuple[np.ndarray, ...]], check: Callable[[], None]
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """The arrays of `key`, which stay as long as the block runs.

        If several threads want missing arrays, one makes them and the others wait; if it fails, the next one tries.
        `check` raises if this thread should stop waiting.
        """
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            while not entry.making.acquire(timeout=0.1):
                check()
            try:
                if entry.arrays is None:
                    entry.arrays = make()
                    self.made += 1
            finally:
                entry.making.release()
            yield entry.arrays
        finally:
            with self._lock:
                entry.users -= 1
                self._make_room()

    def _make_room(self) -> None:
        total = sum(entry.nbytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if not entry.users and (entry.arrays is None or total > self.max_bytes):
                total -= entry.nbytes
                del self._entries[key]
