"""Both ends of a generation's queue: whole items, however they are cut; nobody waits; the lock is free while idle."""

import multiprocessing
import os
import select
import threading

import pytest
from kit import eventually

from gocm_lib.message.job import Run, Slice
from gocm_lib.senders.pipe import Inlet, Outlet

pytestmark = pytest.mark.short


def item(number, size=1, text="x"):
    return [Slice("fcm", "token", text, [Run(number, 0, 1, tuple(f"t{n}" for n in range(size)))], 0, "a")]


@pytest.fixture
def ends():
    queue = multiprocessing.get_context("spawn").Queue()
    yield Outlet(queue), Inlet(queue)


def size(part):
    return part.size


def test_what_is_put_in_comes_out_in_order(ends):
    outlet, inlet = ends
    for number in range(50):
        outlet.put(item(number))
    assert [part.runs[0].job for part in inlet.take(1000, size)] == list(range(50))
    assert inlet.take(1000, size) == []


def test_no_more_is_taken_than_wanted_but_for_the_rest_of_an_item(ends):
    outlet, inlet = ends
    for number in range(4):
        outlet.put(item(number, size=10))
    assert len(inlet.take(15, size)) == 2
    assert inlet.take(0, size) == []
    assert len(inlet.take(100, size)) == 2


def test_more_than_the_pipe_holds_is_written_later_and_put_never_waits(ends):
    outlet, inlet = ends
    large = "x" * 100_000
    for number in range(30):
        outlet.put(item(number, text=large))  # three megabytes, and nobody reads yet
    found = []
    while len(found) < 30:
        assert select.select([inlet], [], [], 10)[0]
        found += inlet.take(1, size)
    assert [part.runs[0].job for part in found] == list(range(30))
    assert all(part.message == large for part in found)
    eventually(lambda: not any(thread.name == "outlet" for thread in threading.enumerate()))


def test_who_waits_holds_no_lock_and_who_is_taking_keeps_nobody_waiting(ends):
    outlet, inlet = ends
    assert inlet.take(1, size) == []
    assert inlet._lock.acquire(block=False), "as if another sender were taking"
    outlet.put(item(1))
    assert inlet.take(1, size) == []
    inlet._lock.release()
    assert len(inlet.take(1, size)) == 1


def test_threads_that_put_at_once_do_not_mix(ends):
    outlet, inlet = ends
    threads = [
        threading.Thread(target=lambda: [outlet.put(item(1, text="y" * 5000)) for _ in range(100)]) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    found = []
    while len(found) < 300:
        assert select.select([inlet], [], [], 10)[0]
        found += inlet.take(1000, size)
    assert all(part.message == "y" * 5000 for part in found)


def test_when_nobody_reads_any_more_what_is_put_in_is_dropped(ends):
    outlet, inlet = ends
    for number in range(30):
        outlet.put(item(number, text="x" * 100_000))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), inlet.fileno())  # in its place: the queue closes it
    outlet.put(item(99))
    eventually(lambda: not any(thread.name == "outlet" for thread in threading.enumerate()))
