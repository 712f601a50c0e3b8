"""LoopClient: a call is answered however often its connection breaks, and the loop that makes it never waits."""

import multiprocessing.util
import os
import selectors
import socket
import threading
import time

import pytest
from kit import new_job, new_state

from gocm_lib.process.bell import Bell
from gocm_lib.state import server
from gocm_lib.state.client import LoopClient, StateUnavailable
from gocm_lib.state.contract import Full
from gocm_lib.state.loop import Loop
from gocm_lib.state.packs import pack

pytestmark = pytest.mark.short


class Watching:
    """A loop with a LoopClient in it."""

    def __init__(self, address, limit=10.0):
        self.bell, self.selector = Bell(), selectors.DefaultSelector()
        self.selector.register(self.bell.inside, selectors.EVENT_READ, None)
        self.client = LoopClient(address, b"key", self.bell.ring, limit)

    def turn(self, patience=10.0):
        """Turn once; returns what was answered."""
        found = []
        for key, _ in self.selector.select(patience):
            if key.data is None:
                self.bell.hear()
            else:
                self.client.write()
                found += self.client.read()
        self.client.attend(time.monotonic())
        self.client.watch(self.selector, "client")
        return found

    def ask(self, *call):
        self.client.call(*call)
        self.client.watch(self.selector, "client")
        while not (found := self.turn()):
            pass
        return found[0]


@pytest.fixture
def address(temporary):
    yield str(temporary / "state")
    # The Manager's server removes its socket, while there is one. What has a lower priority removes the place where the
    # forkserver of other tests is reached.
    multiprocessing.util._run_finalizers(0)


def serve(address):
    """A state process's threads, in this one; returns its loop."""
    loop = Loop(new_state(), lambda verb, error: os._exit(9))
    server._Server.loop = loop
    threading.Thread(target=loop.run, daemon=True).start()
    server._serve(address, b"key")
    return loop


def test_it_calls_one_after_the_other(address):
    serve(address)
    watching = Watching(address)
    for number in range(1, 6):
        assert watching.ask("accept", pack([new_job(number, ["a"])]), None).not_kept == {}
        assert not watching.client.busy
    assert watching.ask("snapshot").pending == 5


def test_it_waits_for_one_that_is_not_there_yet(address):
    watching = Watching(address)
    watching.client.call("snapshot")
    assert watching.turn(0.1) == [] and watching.client.busy
    serve(address)
    while not (found := watching.turn()):
        pass
    assert found[0].pending == 0 and watching.client.troubled == ""


def test_a_call_whose_connection_breaks_is_made_again(address):
    loop = serve(address)
    watching = Watching(address)
    watching.ask("snapshot")
    with loop.turning:  # so that it is not answered
        watching.client.call("accept", pack([new_job(1, ["a"])]), None)
        watching.client.sock.shutdown(socket.SHUT_RDWR)
        watching.turn()
        assert watching.client.busy and watching.client.troubled
    while not (found := watching.turn()):
        pass
    assert found[0].not_kept == {} and watching.ask("snapshot").pending == 1, "kept once, though asked twice"


def test_one_that_does_not_answer_is_asked_again_by_another_connection(address):
    loop = serve(address)
    watching = Watching(address, limit=0.2)
    watching.ask("snapshot")
    before = watching.client.sock
    with loop.turning:
        watching.client.call("snapshot")
        assert watching.client.next_moment() < time.monotonic() + 1
        while watching.client.sock is before:
            watching.turn(0.05)
    while not (found := watching.turn(0.05)):
        pass
    assert found[0].pending == 0


def test_what_is_not_possible_now_is_an_answer(address):
    loop = serve(address)

    def full(*_):
        raise Full("the disk is full")

    loop.state.snapshot = full
    answer = Watching(address).ask("snapshot")
    assert isinstance(answer, StateUnavailable) and "full" in str(answer)


def test_a_long_call_is_written_and_read_in_parts(address):
    serve(address)
    watching = Watching(address)
    packs = pack([new_job(number, [f"{number}-{n}-{'x' * 4000}" for n in range(300)]) for number in range(1, 4)])
    assert watching.ask("accept", packs, None).not_kept == {}
    found = watching.ask("status", 1, "", -1, 300)
    assert len(found.fates) == 300
