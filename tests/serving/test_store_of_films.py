"""Data shared by requests: made once, bounded, kept while it is in use."""

import threading

import numpy as np
import pytest

from llamavid_jax.serving.store import Store


def arrays(size: int):
    return lambda: (np.zeros(size, np.uint8),)


def wait_no_more():
    raise TimeoutError


def test_what_was_used_longest_ago_goes_first():
    store = Store(100)
    for key in "abc":
        with store.use(key, arrays(40), wait_no_more):
            pass
    assert store.nbytes == 80 and store.made == 3
    with store.use("b", arrays(1), wait_no_more) as (kept,):
        assert len(kept) == 40
    with store.use("d", arrays(40), wait_no_more), store.use("b", arrays(1), wait_no_more) as (kept,):
        assert len(kept) == 40 and store.made == 4  # c was evicted, which was used before b


def test_what_is_in_use_stays():
    store = Store(100)
    with store.use("a", arrays(90), wait_no_more), store.use("b", arrays(90), wait_no_more):
        with store.use("c", arrays(10), wait_no_more):
            assert store.nbytes == 190
        with store.use("a", arrays(1), wait_no_more) as (kept,):
            assert len(kept) == 90
    assert store.nbytes <= 100


def test_many_that_want_it_make_it_once_and_the_next_one_tries_where_one_fails():
    store, tries, begun = Store(100), [], threading.Barrier(4)

    def make():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("a client that left")
        return (np.ones(3),)

    found = []

    def want():
        begun.wait()
        try:
            with store.use("film", make, lambda: None) as (array,):
                found.append(array)
        except ValueError:
            found.append(None)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [array for array in found if array is not None]
    assert len(tries) == 2 and len(made) == 3 and all(array is made[0] for array in made)


def test_one_that_waits_may_leave():
    store = Store(100)

    def make():
        def wait():
            with pytest.raises(TimeoutError), store.use("film", arrays(1), wait_no_more):
                pass

        other = threading.Thread(target=wait)
        other.start()
        other.join()  # while this thread makes the entry
        return (np.ones(3),)

    with store.use("film", make, wait_no_more):
        assert store.made == 1
