"""Several iterators side by side, their items in order: each in a thread, and never further ahead than there is room.

    jobs ─ one after another to the threads ─▶ a queue for each job ─ in the jobs' order ─▶ items

Threads, as FFmpeg and Pillow work without Python's lock: nothing is copied between processes or left behind by one.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

# `with worker() as read`: `read(job)` gives the items of one job
Worker = Callable[[], contextlib.AbstractContextManager[Callable[[Any], Iterator[np.ndarray]]]]


def side_by_side(jobs: Sequence[Any], worker: Worker, threads: int, room: int) -> Iterator[np.ndarray]:
    """The items of all jobs, made by so many `threads`, each with a `worker` of its own; by the caller's where it is 0.

    At most 2 * `threads` jobs are begun and not yet handed out, and their items wait in `room` bytes in all, but that
    one item of each may always wait.  An error comes where its item would have come.  When the iterator is closed the
    threads end, each after the item that it works on, and are waited for.
    """
    if not threads:
        with worker() as read:
            for job in jobs:
                yield from read(job)
        return
    desk = _Desk(jobs, threads, room)
    running = [threading.Thread(target=desk.work, args=(worker,), daemon=True) for _ in range(threads)]
    try:
        for thread in running:
            thread.start()
        for number in range(len(jobs)):
            yield from desk.items_of(number)
    finally:
        desk.close()
        # Of an iterator that nobody holds any more the garbage collector may get here in one of these very threads, in
        # the middle of what it does: it can wait neither for itself nor for the others, which may need its lock
        if threading.current_thread() not in running:
            for thread in running:
                if thread.ident is not None:
                    thread.join()


class _Desk:
    """Where threads take jobs and put items, and the caller takes these."""

    def __init__(self, jobs: Sequence[Any], threads: int, room: int):
        self.jobs, self.begun, self.share = jobs, 2 * threads, room // (2 * threads)
        self.queues = [_Queue() for _ in jobs]
        self.next = self.current = 0  # the job to be begun, and the one whose items are handed out
        self.is_closed = False
        self.changed = threading.Condition()

    def work(self, worker: Worker) -> None:
        with contextlib.ExitStack() as stack:
            read = None
            while (number := self._take()) is not None:
                error = None
                try:
                    read = read or stack.enter_context(worker())
                    for item in read(self.jobs[number]):
                        if not self._put(self.queues[number], item):
                            return
                except BaseException as caught:  # raised where the items are taken
                    error = caught
                with self.changed:
                    self.queues[number].is_done, self.queues[number].error = True, error
                    self.changed.notify_all()

    def _take(self) -> int | None:
        """The next job; None where there is none."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.is_closed or self.next == len(self.jobs) or self.next < self.current + self.begun
            )
            if self.is_closed or self.next == len(self.jobs):
                return None
            self.next += 1
            return self.next - 1

    def _put(self, queue: "_Queue", item: np.ndarray) -> bool:
        """Whether anybody wants more."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or not queue.items or queue.bytes + item.nbytes <= self.share)
            queue.items.append(item)
            queue.bytes += item.nbytes
            self.changed.notify_all()
            return not self.is_closed

    def items_of(self, number: int) -> Iterator[np.ndarray]:
        queue = self.queues[number]
        while True:
            with self.changed:
                self.changed.wait_for(lambda: queue.items or queue.is_done)
                if not queue.items:
                    break
                item = queue.items.popleft()
                queue.bytes -= item.nbytes
                self.changed.notify_all()
            yield item
        if queue.error is not None:
            raise queue.error
        with self.changed:
            self.current = number + 1
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


class _Queue:
    """What one job has given and nobody has taken yet."""

    def __init__(self):
        self.items: deque[np.ndarray] = deque()
        self.bytes, self.is_done, self.error = 0, False, None
