"""Reading ahead: items come in order, no further ahead than the limit, and no thread is left running."""

import contextlib
import subprocess
import sys
import threading

import av
import numpy as np
import pytest
from clips import index_frame, write_clip
from paths import ROOT

from llamavid_jax.media.ahead import side_by_side


def worker(count, made=None):
    """Job `n` yields the items `10 n`, `10 n + 1`, ..."""

    @contextlib.contextmanager
    def open_one():
        def read(job):
            for number in range(count):
                if made is not None:
                    made.append((job, number))
                yield np.full(5, 10 * job + number, np.uint16)  # ten bytes

        yield read

    return open_one


@pytest.mark.parametrize("threads", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("room", [0, 100, 10**6])
def test_items_come_in_the_jobs_order(threads, room):
    items = [int(item[0]) for item in side_by_side(range(20), worker(4), threads, room)]
    assert items == [10 * job + number for job in range(20) for number in range(4)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("room", [60, 600])
def test_no_thread_runs_further_ahead_than_there_is_room(threads, room):
    made, taken = [], 0
    for _ in side_by_side(range(40), worker(8, made), threads, room):
        taken += 1
        # waiting items, one more held by each thread, and one per job that is always allowed to wait
        assert len(made) - taken <= room / 10 + threads + 2 * threads
        assert max(job for job, _ in made) <= (taken - 1) // 8 + 2 * threads
    assert taken == len(made) == 320


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_comes_where_its_item_would_have(threads):
    @contextlib.contextmanager
    def open_one():
        def read(job):
            yield np.full(1, job)
            if job == 4:
                raise KeyError(job)

        yield read

    seen = []
    with pytest.raises(KeyError, match="4"):
        for item in side_by_side(range(9), open_one, threads, 100):
            seen.append(int(item[0]))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_worker_that_cannot_begin(threads):
    def open_one():
        raise OSError("no more files")

    with pytest.raises(OSError, match="no more files"):
        list(side_by_side(range(9), open_one, threads, 100))


def test_closing_ends_the_threads_and_what_they_hold():
    closed = []

    @contextlib.contextmanager
    def open_one():
        try:
            yield lambda job: iter([np.zeros(1)] * 1000)
        finally:
            closed.append(1)

    before = threading.active_count()
    items = side_by_side(range(9), open_one, 3, 100)
    next(items)
    items.close()
    assert threading.active_count() == before and len(closed) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_thread_that_takes_the_iterator_away_itself(threads, monkeypatch):
    """As the garbage collector may in any thread, here while the thread hands over an item."""
    held, taken, said = [], threading.Event(), []

    class Item(np.ndarray):
        @property
        def nbytes(self):  # read while the thread holds the lock
            if held and taken.is_set():
                held.clear()
            return 10

    monkeypatch.setattr(sys, "unraisablehook", lambda error: said.append(error.exc_value))
    before = set(threading.enumerate())

    @contextlib.contextmanager
    def open_one():
        yield lambda job: iter([np.zeros(1).view(Item)] * 99)

    held.append(side_by_side(range(9), open_one, threads, 1000))
    next(held[0])
    taken.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert not held and not said


THREE_HOURS = """
import resource, sys, threading
import numpy as np
from llamavid_jax.media.video import iter_frames, plan_video

made, enough = [], threading.Event()

def picture(frame):
    made.append(1)
    if len(made) == 64 * 13:  # two MiB of frames from each decoder
        enough.set()
    return np.full((224, 224, 3), frame[0, 0, 0])

frames = iter_frames(sys.argv[1], plan_video(sys.argv[1]), picture, decoders=64)
next(frames)
enough.wait()
count = 1 + sum(1 for _ in frames)
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # ru_maxrss would be that of who started this
print(count, int(peak) >> 10)
"""


def test_three_hours_take_little_memory(tmp_path):
    """10,800 frames (1.6 GB), for a consumer that starts only when 64 decoders have no room left."""
    short = write_clip(tmp_path / "short.mp4", [index_frame(i) for i in range(250)], rate=5, options={"g": "250"})
    with av.open(str(short)) as source, av.open(str(tmp_path / "film.mp4"), "w") as film:
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
        copy, step = film.add_stream_from_template(source.streams.video[0]), packets[0].duration * len(packets)
        for number in range(3 * 3600 * 5 // 250):
            for packet in packets:
                if number:
                    packet.pts, packet.dts = packet.pts + step, packet.dts + step
                packet.stream = copy
                film.mux(packet)
    command = [sys.executable, "-c", THREE_HOURS, str(tmp_path / "film.mp4")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    count, megabytes = map(int, done.stdout.split())
    assert count == 10_800 and megabytes < 1000
