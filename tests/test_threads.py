"""`data/threads.py`: order, errors and a bounded number of things at a time."""

import threading
import time

import pytest

from sis_jax.data.threads import cores, in_threads


def test_results_come_in_the_order_of_the_items():
    def slow_first(i):
        time.sleep(0.02 * (i == 0))
        return i * i

    assert list(in_threads(slow_first, range(9))) == [i * i for i in range(9)]


def test_few_items_are_held_however_many_there_are():
    held, most, lock = 0, 0, threading.Lock()

    def items():
        nonlocal held, most
        for i in range(50):
            with lock:
                held += 1
                most = max(most, held)
            yield i

    for _ in in_threads(lambda i: i, items()):
        with lock:
            held -= 1
    assert most <= 2 * cores() + 1


def test_an_error_ends_the_work():
    done = []

    def work(i):
        if i == 3:
            raise OSError("the disk is full")
        done.append(i)

    with pytest.raises(OSError, match="full"):
        list(in_threads(work, range(1000)))
    assert len(done) < 3 + 3 * cores()
