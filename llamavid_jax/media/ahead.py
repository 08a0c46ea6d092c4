"""Runs several iterators in threads and yields their items in the jobs' order, with bounded buffers.

    jobs ─ one after another to the threads ─▶ a queue for each job ─ in the jobs' order ─▶ items

Threads suffice, as FFmpeg and Pillow release Python's lock: nothing is copied between processes or left behind by one.
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
    """Yields the items of all jobs, made by `threads` threads with a `worker` each; by the caller's thread if 0.

    At most 2 * `threads` jobs are started and not yet fully yielded.  They share a buffer of `room` bytes, but each may
    always hold one item.  An error is raised where its item would have come.  Closing the iterator ends the threads,
    each after its current item, and waits for them.
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
        # The garbage collector may close a forgotten iterator in one of these very threads, in the middle of its work:
        # the thread can wait neither for itself nor for the others, which may need a lock that it holds
        if threading.current_thread() not in running:
            for thread in running:
                if thread.ident is not None:
                    thread.join()


class _Desk:
    """Hands jobs to threads, and their items to the caller."""

    def __init__(self, jobs: Sequence[Any], threads: int, room: int):
        self.jobs, self.begun, self.share = jobs, 2 * threads, room // (2 * threads)
        self.queues = [_Queue() for _ in jobs]
        self.next = self.current = 0  # numbers of the next job to start and of the one being yielded
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
                except BaseException as caught:  # raised again in the caller's thread
                    error = caught
                with self.changed:
                    self.queues[number].is_done, self.queues[number].error = True, error
                    self.changed.notify_all()

    def _take(self) -> int | None:
        """The number of the next job; None if there is none."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.is_closed or self.next == len(self.jobs) or self.next < self.current + self.begun
            )
            if self.is_closed or self.next == len(self.jobs):
                return None
            self.next += 1
            return self.next - 1

    def _put(self, queue: "_Queue", item: np.ndarray) -> bool:
        """Adds an item; returns whether more are wanted."""
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
    """The items of one job that have been made and not yet yielded."""

    def __init__(self):
        self.items: deque[np.ndarray] = deque()
        self.bytes, self.is_done, self.error = 0, False, None
