"""Idempotency-Key: the same request is one job, through restarts and kills; another under its key is told."""

import contextlib
import json
import os
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, IN_POSTGRES, KEEPING, LIMIT, accept, claim, eventually, form, new_job, new_state

from gocm_lib.message import idempotency
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.outcome import DELIVERED, Result
from gocm_lib.state.admission import Limits
from gocm_lib.state.contract import Conflict, Count, Known, Refused
from gocm_lib.state.packs import Key
from gocm_lib.state.sqlite import keys
from gocm_lib.state.sqlite.keys import LIFE

short = pytest.mark.short


def keyed(number, key, body=b"b", tokens=("a",), now=1000.0):
    """A job whose request has a key and a body."""
    return new_job(number, list(tokens), now)._replace(key=idempotency.read(key, body))


@short
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=130))
def test_a_key_is_the_same_quoted_and_bare(key):
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if len(key) > 128:
        with pytest.raises(BadRequest, match="longer than 128"):
            idempotency.read(quoted, b"")
        return
    found = idempotency.read(quoted, b"")
    assert found != idempotency.read(quoted, b"x") and found.key != idempotency.read('"other' + quoted[1:], b"").key
    if " " not in key and not key.startswith('"'):
        assert idempotency.read(key, b"") == found


@short
@pytest.mark.parametrize("key", ["", '""', '"', '"a', "a b", "a\tb", "é", '"é"', '"a"b', '"\\a"', "x" * 129])
def test_what_is_no_key_is_told(key):
    with pytest.raises(BadRequest) as caught:
        idempotency.read(key, b"")
    assert caught.value.field == "idempotency-key" and caught.value.status == 400


@short
def test_the_same_request_is_one_job():
    state = new_state()
    assert accept(state, [keyed(1, "k"), keyed(2, "k"), keyed(3, "k", b"other"), keyed(4, "l")]) == {
        2: Known(1),
        3: Conflict(),
    }
    assert accept(state, [keyed(5, "k")]) == {5: Known(1)}
    assert len(claim(state)) == 2 and state.snapshot().counters["accepted_messages"] == 2


@short
def test_a_caller_who_repeats_himself_is_not_told_that_he_did():
    """His answer was lost, with the process that gave it; he must not be sent away, nor his message sent twice."""
    state = new_state()
    assert accept(state, [keyed(1, "k")]) == {} == accept(state, [keyed(1, "k")])
    for place in claim(state):
        state.settle(1, [Result("gcm", *place, 1, DELIVERED)], 1000.0)
    assert accept(state, [keyed(1, "k")]) == {} == claim(state), "it was sent already"
    assert state.snapshot().counters["accepted_messages"] == 1


@short
def test_there_are_so_many_keys_and_the_oldest_go_first():
    state = new_state(keeping=KEEPING._replace(max_keys=1000))
    for start in range(0, 3000, 500):
        assert accept(state, [keyed(n, f"k{n}") for n in range(start + 1, start + 501)]) == {}
    assert state.store.totals.keys == 1000 == state.snapshot().keys
    assert accept(state, [keyed(9001, "k2001")]) == {9001: Known(2001)} and accept(state, [keyed(9002, "k2000")]) == {}
    assert state.store.counts()[0][Count("keys_forgotten")] == 2001
    known = state.store.known([Key(10**6 + n, *keyed(n, f"k{n}").key, 1000.0) for n in range(1, 3001)])
    assert len(known) == 1000


def test_keys_never_keep_a_message_out():
    """27,000 of them took all of --max-spool for a day."""
    state = new_state(keeping=KEEPING._replace(limits=Limits(10**9, 4 << 20, 0), max_kept=1000))
    for start in range(0, 27_000, 500):
        now = 1000.0 + start / 1000
        jobs = [keyed(n, f"a-rather-long-key-of-number-{n}", now=now) for n in range(start + 1, start + 501)]
        assert accept(state, jobs) == {}
        for place in claim(state, now=now, room=1000):
            state.settle(1, [Result("gcm", *place, 1, DELIVERED)], now)
    assert accept(state, [new_job(30_000, "a", now=2000.0)]) == {}
    assert IN_POSTGRES or state.store.totals.keys == keys.most(10**9, 4 << 20) > 9000


@short
def test_a_key_takes_no_more_room_than_is_said(tmp_path):
    state = new_state(tmp_path / "s.db")
    [[before]] = state.store.db.execute("PRAGMA page_count")
    state.store.db.execute("BEGIN")
    state.store.db.executemany(
        "INSERT INTO idempotency VALUES (?, ?, ?, ?)",
        [(1_700_000_000_000_000 + n, os.urandom(16), os.urandom(16), 1_700_000_000.0 + n) for n in range(50_000)],
    )
    state.store.db.execute("COMMIT")
    [[after]], [[size]] = (state.store.db.execute(f"PRAGMA {what}").fetchall() for what in ("page_count", "page_size"))
    assert (after - before) * size / 50_000 < keys.BYTES


@short
def test_a_key_lives_for_a_day():
    state = new_state()
    accept(state, [keyed(1, "k"), keyed(9, "l")])
    assert accept(state, [keyed(2, "k", now=1000.0 + LIFE - 1)]) == {2: Known(1)}
    assert accept(state, [keyed(10, "l", b"another", now=1000.0 + LIFE)]) == {}
    claim(state, now=1000.0 + LIFE)
    assert state.store.totals.keys == 1, "forgotten by itself"
    assert accept(state, [keyed(3, "k", b"another", now=1000.0 + LIFE)]) == {}


@short
def test_what_there_was_no_room_for_leaves_its_key_free():
    state = new_state()
    state.keeping = state.keeping._replace(limits=Limits(2, 1 << 40, 0))
    answers = accept(state, [keyed(1, "k", tokens=("a", "b")), keyed(2, "l"), keyed(3, "l")])
    assert answers.keys() == {2, 3} and all(isinstance(answer, Refused) for answer in answers.values())
    state.keeping = state.keeping._replace(limits=Limits(9, 1 << 40, 0))
    assert accept(state, [keyed(4, "l"), keyed(5, "k")]) == {5: Known(1)}


def post(server, key, tokens=("a",), content_type=FORM["Content-Type"]):
    """(status, job, whether it is an answer given again, the body) of a post with a key."""
    headers = {"Content-Type": content_type, "Idempotency-Key": key}
    status, headers, body = server.http().ask("POST", "/gcm/send", form(list(tokens)), headers)
    return status, headers["X-GoCM-Job"], headers["Idempotency-Replayed"], body


def test_through_restarts_and_kills(start, sandbox):
    server = start()
    status, job, again, _ = post(server, '"k"')
    assert (status, again) == (200, None)
    server.settled()
    assert post(server, "k") == (200, job, "true", b"ok\n")
    status, _, _, body = post(server, "k", ["b"])
    assert status == 422 and json.loads(body)["field"] == "idempotency-key"
    os.kill(server.children("state")[0], signal.SIGKILL)
    eventually(lambda: server.report_or_none())
    assert post(server, "k") == (200, job, "true", b"ok\n")
    server.kill_group()
    server = start()
    assert post(server, "k") == (200, job, "true", b"ok\n")
    assert server.settled()["attempts"] == 1 and sandbox.received()["arrived"] == {"a": 1}
    assert 'gocm_rejected_total{cause="key_reused"} 0' in server.http().ask("GET", "/metrics")[2].decode()


def test_many_at_once_are_one(start, sandbox):
    server = start()
    answers, ready = [], threading.Barrier(20)

    def send():
        ready.wait()
        answers.append(post(server, "k"))

    clients = [threading.Thread(target=send) for _ in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert {answer[0] for answer in answers} == {200} and len({answer[1] for answer in answers}) == 1
    assert sum(answer[2] is None for answer in answers) == 1
    assert server.settled()["attempts"] == 1 and sandbox.received()["arrived"] == {"a": 1}


def insist(server, numbers):
    """Send each message until it is told ok, as a client should."""
    for number in numbers:
        status = 0
        while status != 200:
            with contextlib.suppress(OSError):
                status = post(server, f"key-{number}", [f"t{number}"])[0]


def kill_states(server, ended):
    """Kill the state process again and again."""
    while not ended.wait(0.7):
        for pid in server.children("state"):
            os.kill(pid, signal.SIGKILL)


def test_clients_that_insist_while_the_state_process_dies(start, sandbox):
    server, ended = start(), threading.Event()
    killer = threading.Thread(target=kill_states, args=(server, ended))
    clients = [threading.Thread(target=insist, args=(server, range(k, k + 40))) for k in range(0, 160, 40)]
    for thread in (killer, *clients):
        thread.start()
    for client in clients:
        client.join()
    ended.set()
    killer.join()
    eventually(lambda: server.report_or_none())
    assert server.settled()["attempts"] == 160, "each was kept once"
    assert set(sandbox.received()["delivered"]) == {f"t{number}" for number in range(160)}


def test_lines_take_no_key(server):
    status, _, _, body = post(server, "k", content_type="application/x-ndjson")
    assert status == 400 and json.loads(body)["field"] == "idempotency-key"


def test_what_many_ask_for_at_once_is_delivered_once(start, sandbox):
    """They come in one commit, of which all but one are left out; and it goes straight through."""
    server = start()
    rounds, clients = 6, 12
    barrier, answers = threading.Barrier(clients), []

    def ask(client):
        http = server.http()
        for number in range(rounds):
            barrier.wait(LIMIT)
            body = form([f"r{number}" if client % 3 else f"other-{number}-{client}"])
            answers.append(http.ask("POST", "/gcm/send", body, {**FORM, "Idempotency-Key": f"k{number}"})[0])

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = server.settled()
    delivered = sandbox.received()["delivered"]
    assert report["attempts"] == rounds == sum(delivered.values()), delivered
    assert set(answers) <= {200, 422}
