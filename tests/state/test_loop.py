"""The loop on real sockets: what comes together is one commit, nobody waits for one who is slow, and nothing is kept in
part.
"""

import contextlib
import os
import pickle
import socket
import struct
import threading

import pytest
from kit import eventually, new_job, new_state, of_sqlite, tally

from gocm_lib.message.outcome import DELIVERED, Result
from gocm_lib.state.contract import Passing
from gocm_lib.state.loop import Loop
from gocm_lib.state.packs import pack

pytestmark = pytest.mark.short


class Caller:
    """Speaks as Client does, but writes what a test says when it says so."""

    def __init__(self, loop):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        loop.adopt(theirs.fileno())
        theirs.close()

    @staticmethod
    def message(verb, *arguments):
        call = pickle.dumps(("", verb, arguments, {}))
        return struct.pack("!i", len(call)) + call

    def ask(self, verb, *arguments):
        self.sock.sendall(self.message(verb, *arguments))

    def answer(self):
        def read(size):
            found = b""
            while len(found) < size:
                more = self.sock.recv(size - len(found))
                assert more, "it was closed"
                found += more
            return found

        [size] = struct.unpack("!i", read(4))
        return pickle.loads(read(size))


@pytest.fixture
def loop():
    made = Loop(new_state(), lambda verb, error: os._exit(9))
    threading.Thread(target=made.run, daemon=True).start()
    return made


def commits(loop):
    """A list that grows with each commit."""
    found = []
    loop.state.store.db.set_trace_callback(lambda sql: found.append(sql) if sql.startswith("COMMIT") else None)
    return found


@contextlib.contextmanager
def together(loop):
    """What is asked in this block arrives in one turn."""
    first = Caller(loop)
    first.ask("snapshot")
    first.answer()  # nothing that came before is in work
    with loop.turning:
        Caller(loop).ask("snapshot")  # for this one the loop stands at the lock
        eventually(lambda: not loop._new)
        yield


@of_sqlite
def test_a_settle_rides_with_the_next_accept_and_waits_for_nothing_else(loop, monkeypatch):
    settling, accepting, looking = (Caller(loop) for _ in range(3))
    accepting.ask("accept", pack([new_job(1, ["a"])]), None)
    accepting.answer()
    found = commits(loop)
    with monkeypatch.context() as patient:
        patient.setattr("gocm_lib.state.loop.RIDE", 10.0)
        settling.ask("settle", 1, [Result("gcm", 1, 0, 1, DELIVERED)], 1.0)
        eventually(lambda: loop._riders)
    accepting.ask("accept", pack([new_job(2, ["a"])]), None)
    settling.answer()
    accepting.answer()
    assert len(found) == 1, "one commit for both"
    settling.ask("settle", 1, [Result("gcm", 1, 0, 1, DELIVERED)], 1.0)
    assert settling.answer()[0] == "#RETURN", "nobody comes, and it is settled"
    accepting.ask("accept", pack([new_job(3, ["a"])]), None)
    accepting.answer()
    settling.ask("settle", 1, [Result("gcm", 2, 0, 1, DELIVERED)], 1.0)
    looking.ask("release", 1)
    assert looking.answer()[0] == settling.answer()[0] == "#RETURN", "what was settled before is not released"


@of_sqlite
def test_what_comes_together_is_one_commit_and_each_is_answered(loop):
    callers = [Caller(loop) for _ in range(4)]
    callers[0].ask("accept", pack([new_job(1, ["a", "b"]), new_job(2, ["c"])]))
    assert callers[0].answer()[0] == "#RETURN"
    callers[1].ask("claim", 1, 1, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 0.0)
    assert len(callers[1].answer()[1].slices) == 2
    made = commits(loop)
    with together(loop):
        callers[0].ask("accept", pack([new_job(3, ["d"])]))
        callers[1].ask("settle", 1, [Result("gcm", 1, 0, 1, DELIVERED)], 1001.0)
        callers[2].ask("settle", 1, [Result("gcm", 1, 1, 1, DELIVERED), Result("gcm", 2, 0, 1, DELIVERED)], 1001.0)
        callers[3].ask("page", "canonical", 0, 9)
    assert [caller.answer()[0] for caller in callers] == ["#RETURN"] * 4
    assert len(made) == 1, "one fsync for all of them"
    assert tally(loop.state) == {"jobs": 1, "tokens": 1, "failed": 0, "over": 3, "finished": 3}


@of_sqlite
def test_what_cannot_be_kept_together_is_made_alone(loop):
    """One of them would fill the disk: the others are kept, and counted once."""
    callers = [Caller(loop) for _ in range(3)]
    callers[0].ask("accept", pack([new_job(1, ["a"]), new_job(2, ["b"])]))
    callers[0].answer()
    callers[1].ask("claim", 1, 1, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 0.0)
    callers[1].answer()
    db = loop.state.store.db
    [[pages]] = db.execute("PRAGMA page_count").fetchall()
    db.execute(f"PRAGMA max_page_count = {pages + 6}")
    with together(loop):
        callers[0].ask("settle", 1, [Result("gcm", 1, 0, 1, DELIVERED)], 1001.0)
        callers[1].ask("accept", pack([new_job(3, ["x" * 4000] * 40)]))
        callers[2].ask("settle", 1, [Result("gcm", 2, 0, 1, DELIVERED)], 1001.0)
    answers = [caller.answer() for caller in callers]
    assert [kind for kind, _ in answers] == ["#RETURN"] * 3
    assert answers[1][1].not_kept[3].status == 507
    assert tally(loop.state) == {"jobs": 0, "tokens": 0, "failed": 0, "over": 2, "finished": 2}
    assert loop.state.snapshot().counters["delivered"] == 2 and loop.state.backlog.in_hand[1, "gcm"] == 0


def test_a_claim_waits_for_what_comes_and_no_longer(loop):
    claiming, other = Caller(loop), Caller(loop)
    claiming.ask("claim", 1, 1, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 20.0)
    eventually(lambda: loop._waiting)
    other.ask("accept", pack([new_job(1, ["a"])]))
    assert [part.job for part in claiming.answer()[1].slices] == [1]
    claiming.ask("claim", 1, 2, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 0.05)
    assert claiming.answer()[1].slices == []
    claiming.ask("claim", 1, 2, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 20.0)
    other.answer(), other.ask("begin", 2)
    assert claiming.answer()[1].slices == [], "its generation is over"


def test_one_who_waits_goes(loop):
    claiming, other = Caller(loop), Caller(loop)
    claiming.ask("claim", 1, 1, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 20.0)
    eventually(lambda: loop._waiting)
    claiming.sock.close()
    eventually(lambda: not loop._waiting)
    other.ask("accept", pack([new_job(1, ["a"])]))
    other.answer(), other.ask("claim", 1, 1, {"gcm": 10}, {"gcm": 0.0}, 1000.0, 0.0)
    assert [part.job for part in other.answer()[1].slices] == [1], "nothing was given to nobody"


def test_nobody_waits_for_one_who_is_slow(loop):
    slow, deaf, other = Caller(loop), Caller(loop), Caller(loop)
    call = slow.message("accept", pack([new_job(1, ["x" * 4000] * 200)]))
    for part in (call[:2], call[2:700], call[700:100_000]):
        slow.sock.sendall(part)
        other.ask("snapshot")
        assert other.answer()[1].pending == 0
    slow.sock.sendall(call[100_000:])
    assert slow.answer()[1].not_kept == {}
    for _ in range(50):  # each answer is a megabyte, and it reads none
        with contextlib.suppress(TimeoutError):
            deaf.sock.settimeout(0.05)
            deaf.ask("status", 1, "", -1, 1000)
    other.ask("snapshot")
    assert other.answer()[1].pending == 1
    deaf.sock.settimeout(10)
    assert len(deaf.answer()[1].fates) == 200, "and has it when it reads"


@pytest.mark.parametrize("garbage", [b"\0\0\0\x05hello", struct.pack("!i", 3) + b"N.x", b"\xff" * 4 + b"\0" * 8])
def test_one_who_is_not_understood_is_left(loop, garbage):
    strange, other = Caller(loop), Caller(loop)
    strange.sock.sendall(garbage)
    with contextlib.suppress(ConnectionResetError):
        assert strange.sock.recv(10) == b""
    other.ask("no_such_verb")
    assert isinstance(other.answer()[1], AttributeError)
    other.ask("turn")
    assert other.answer()[0] == "#ERROR", "only what the contract has"


def test_a_locked_spool_is_told_to_each(loop, monkeypatch):
    callers = [Caller(loop) for _ in range(2)]

    def locked(*_):
        raise Passing("database is locked")

    monkeypatch.setattr(loop.state.store, "keep", locked)
    with together(loop):
        for job, caller in enumerate(callers, 1):
            caller.ask("accept", pack([new_job(job, ["a"])]))
    assert all(isinstance(caller.answer()[1], Passing) for caller in callers)
    monkeypatch.undo()
    callers[0].ask("accept", pack([new_job(1, ["a"])]))
    assert callers[0].answer()[1].not_kept == {} and tally(loop.state)["jobs"] == 1
