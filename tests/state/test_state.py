"""State in its own process: several senders settling at once, calls that are lost, files that must not be opened."""

import contextlib
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import struct
import threading
import time
from queue import Empty

import pytest
from kit import ALL, POLICY, accept, claim, eventually, new_job, new_state, stand_still, tokens_of, told

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.monitoring.collector import Collector
from gocm_lib.senders.credentials import Credentials, Source
from gocm_lib.senders.feeder import Feeder, Terms
from gocm_lib.state import server
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.sqlite import database

KEY = b"k" * 32


def _settle_share(address, results, seed):
    """One of several processes settling the same results, in its own order and batches, some twice."""
    client, chance = Client(address, KEY), random.Random(seed)
    chance.shuffle(results)
    while results:
        count = chance.randint(1, 40)
        part, results = results[:count], results[count:]
        for _ in range(chance.randint(1, 2)):
            client.settle(1, part, time.time())


@pytest.fixture
def context():
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def serving(context, tmp_path):
    """(address, process) of a state process on a spool in tmp_path"""
    ours, theirs = context.Pipe()
    address = str(tmp_path / "socket")
    child = context.Process(
        target=server.main,
        args=(Settings(spool=str(tmp_path / "s.db"), log_level="error"), address, KEY, (), False, [math.inf], theirs),
    )
    child.start()
    theirs.close()
    assert ours.poll(20) and ours.recv() == ("ready", (0, False))
    yield address, child
    ours.close()
    child.join(10)
    if child.is_alive():
        child.kill()
    child.join()


@pytest.fixture
def process(context, tmp_path):
    with serving(context, tmp_path) as found:
        yield found


def test_four_processes_settling_the_same_tokens_count_each_once(process, context):
    address, _ = process
    client = Client(address, KEY)
    now = time.time()
    accept(client, [new_job(n, [f"{n}-{k}" for k in range(10)], now) for n in range(1, 101)])
    ends = [
        DELIVERED,
        Outcome(Verdict.DELIVERED, canonical="new"),
        Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"),
        Outcome(Verdict.REJECTED, "no"),
    ]
    slices, *_ = client.claim(1, 1, {"gcm": 5000}, {"gcm": 0.0}, now, 1.0)
    results = [Result("gcm", job, n, 1, ends[n % 4]) for job, n in tokens_of(slices)]
    assert len(results) == 1000
    settlers = [context.Process(target=_settle_share, args=(address, list(results), seed)) for seed in range(4)]
    for settler in settlers:
        settler.start()
    for settler in settlers:
        settler.join(30)
        assert settler.exitcode == 0
    snapshot = client.snapshot()
    assert told(snapshot) == {
        "attempts": 1000,
        "failures": 400,
        "canonicals": 300,
        "notregistered": 200,
        "dropped": 0,
    }
    assert snapshot.pending == 0
    assert len({entry.token for entry in client.page("notregistered", 0, -1)}) == 200


@pytest.mark.alone
def test_a_call_to_a_process_that_stands_still_ends_within_the_limit(process):
    address, child = process
    greeted, strange = Client(address, KEY, 0.5), Client(address, KEY, 0.5)
    greeted.snapshot()
    stand_still(child.pid)
    try:
        for client in (greeted, strange):
            began = time.monotonic()
            with pytest.raises(StateUnavailable):
                client.snapshot()
            assert time.monotonic() - began < 2.0
    finally:
        os.kill(child.pid, signal.SIGCONT)
    eventually(lambda: greeted.snapshot().pending == 0)


@pytest.mark.parametrize("arguments, again", [(("snapshot",), True), (("discard", ALL), False)])
def test_a_call_whose_answer_is_lost_is_repeated_unless_it_counts(process, context, tmp_path, arguments, again):
    """What a second call would count is what the first has left."""
    address, child = process
    client, ends = Client(address, KEY, 20.0), []
    client.snapshot()

    def ask():
        verb, *words = arguments
        try:
            getattr(client, verb)(*words)
            ends.append(True)
        except StateUnavailable:
            ends.append(False)

    stand_still(child.pid)
    asking = threading.Thread(target=ask)
    asking.start()
    eventually(client._turn.locked)
    child.kill()
    child.join()
    with serving(context, tmp_path):
        asking.join(30)
    assert ends == [again]


def test_a_call_to_nobody_ends_within_the_limit(tmp_path):
    with pytest.raises(StateUnavailable):
        Client(str(tmp_path / "nobody"), KEY, 0.3).snapshot()


def test_a_stranger_without_the_key_is_not_served(process):
    with pytest.raises(StateUnavailable):
        Client(process[0], b"x" * 32, 0.5).snapshot()


def test_a_waiting_claim_ends_when_something_comes(process):
    address, _ = process
    found = []
    waiting = threading.Thread(
        target=lambda: found.extend(
            Client(address, KEY, 30.0).claim(1, 1, {"gcm": 10}, {"gcm": 0.0}, time.time(), 20.0)[0]
        )
    )
    waiting.start()
    accept(Client(address, KEY), [new_job(1, ["a"], time.time())])
    waiting.join(10)
    assert [s.job for s in found] == [1]


def test_a_waiting_claim_ends_with_its_generation(process):
    address, _ = process
    waiting = threading.Thread(
        target=lambda: Client(address, KEY, 30.0).claim(1, 1, {"gcm": 10}, {"gcm": 0.0}, time.time(), 20.0)
    )
    waiting.start()
    Client(address, KEY).begin(2)
    waiting.join(10)
    assert not waiting.is_alive()


def test_once_the_feeder_holds_nothing_is_claimed_for_its_generation(process, context):
    """What slipped in behind a generation's end would stay in its hands for ever."""
    address, _ = process
    feeder, client = (
        Feeder(Client(address, KEY, 5.0), Credentials({"gcm": Source("key=k")}), Terms({"gcm": 100}), Collector()),
        Client(address, KEY),
    )
    feeder.switch(1, context.Queue())
    eventually(lambda: feeder._claiming.locked())  # a claim is waiting in the state process
    feeder.hold()
    accept(client, [new_job(1, ["a"], time.time())])
    assert [s.job for s in client.claim(2, 1, {"gcm": 10}, {"gcm": 0.0}, time.time(), 0.5)[0]] == [1]


def test_a_batch_given_again_waits_for_a_credential_that_has_run_out(process, context):
    address, _ = process
    client, credentials, queue = Client(address, KEY), Credentials({"gcm": Source("key=k")}), context.Queue()
    accept(client, [new_job(1, ["a"], time.time(), upstream="fcm")])
    assert client.claim(1, 1, {"fcm": 10}, {"fcm": 0.0}, time.time(), 1.0)[0], "an answer that reached nobody"
    Feeder(Client(address, KEY, 5.0), credentials, Terms({"fcm": 100}), Collector()).switch(1, queue)
    with pytest.raises(Empty):
        queue.get(timeout=0.6)
    credentials.replace({"fcm": Source("Bearer new")})
    assert [(part.job, part.authorization) for part in queue.get(timeout=10)] == [(1, "Bearer new")]


# ------------------------------------------------------------------------------------------------------- the file


# In processes of their own: one that has opened a spool may not touch its files any more.


def elsewhere(function, path):
    """What the function makes of the path in another process."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(function, (str(path),))


def _open(path):
    """Why a spool cannot be opened, and the exit code for that; ("", 0) when it can."""
    try:
        db, held = database.open_spool(path)
    except Fatal as error:
        return str(error), error.code
    db.close()
    os.close(held)
    return "", 0


def _fill(path):
    state = new_state(path)
    accept(state, [new_job(n, ["x" * 500] * 5) for n in range(1, 200)])
    state.close()


def refused(path):
    """The exit code with which a spool is refused, and left as it was."""
    before = path.read_bytes()
    path.chmod(0o600)
    reason, code = elsewhere(_open, path)
    assert path.read_bytes() == before, "it must be left as it was"
    assert str(path) in reason
    return code


@pytest.mark.parametrize("content", [b"", b"not a database at all", b"SQLite format 3\0", b"\0" * 5000])
def test_a_file_that_is_no_database_is_refused(tmp_path, content):
    (tmp_path / "s.db").write_bytes(content)
    assert refused(tmp_path / "s.db") == Exit.SPOOL_DAMAGED


def test_another_program_s_database_is_refused(tmp_path):
    db = sqlite3.connect(tmp_path / "s.db")
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    assert refused(tmp_path / "s.db") == Exit.SPOOL_DAMAGED


def test_a_newer_spool_is_refused(tmp_path):
    path = tmp_path / "s.db"
    assert elsewhere(_open, path) == ("", 0)
    raw = bytearray(path.read_bytes())
    raw[60:64] = struct.pack(">I", database.SCHEMA_VERSION + 1)
    path.write_bytes(raw)
    assert refused(path) == Exit.SPOOL_DAMAGED


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_spool_is_refused(tmp_path, damage):
    path = tmp_path / "s.db"
    elsewhere(_fill, path)
    raw = path.read_bytes()
    middle = len(raw) // 2 // 4096 * 4096
    path.write_bytes(raw[:middle] if damage == "truncated" else raw[:middle] + b"\xaa" * 8192 + raw[middle + 8192 :])
    assert refused(path) == Exit.SPOOL_DAMAGED


def test_a_spool_that_cannot_be_written_is_refused():
    with pytest.raises(Fatal) as caught:
        database.open_spool("/proc/nowhere/gocm.db")
    assert caught.value.code == Exit.SPOOL_UNWRITABLE


def test_a_spool_in_use_is_refused(tmp_path):
    db, held = database.open_spool(str(tmp_path / "s.db"))
    assert elsewhere(_open, tmp_path / "s.db")[1] == Exit.SPOOL_IN_USE
    db.close()
    os.close(held)


def test_a_creation_that_was_cut_short_is_begun_again(tmp_path):
    (tmp_path / "s.db.new").write_bytes(b"half")
    assert elsewhere(_open, tmp_path / "s.db") == ("", 0)
    assert not (tmp_path / "s.db.new").exists()


def test_commits_reach_the_disk(tmp_path):
    db, _held = database.open_spool(str(tmp_path / "s.db"))
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL"
    assert (tmp_path / "s.db").stat().st_mode & 0o777 == 0o600


def test_a_failed_transaction_changes_nothing():
    one = new_state()
    accept(one, [new_job(1, ["a", "b"])])
    claim(one)
    with pytest.raises(AttributeError):
        one.settle(1, [Result("gcm", 1, 0, 1, DELIVERED), None], 1000.0)
    assert one.snapshot().counters["attempts"] == 0 and one.backlog.in_hand[1, "gcm"] == 2
    assert POLICY.max_attempts == one.policy.max_attempts
