"""A message that was a mistake is stopped: what is on its way goes on, and nothing else."""

import json
import threading
import time

import pytest
from kit import ALL, POLICY, accept, claim, eventually, new_job, new_state, succeed, tally

from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.state.contract import BEFORE_ALL, Cancelled, Passing

short = pytest.mark.short
LATER = Outcome(Verdict.DEFERRED, "x", retry_after=30.0)


def cancel(server, job):
    status, _, body = server.http().ask("DELETE", f"/gcm/jobs/{job}")
    return status, json.loads(body)


def states(server, job):
    return server.http().json("GET", f"/gcm/jobs/{job}?limit=1")["states"]


def test_a_campaign_is_stopped_halfway(start_fcm, sandbox):
    sandbox.mode(latency=0.5)
    server = start_fcm("--fcm-rate", "60000")
    tokens = [f"t-{n}" for n in range(20_000)]
    job = server.send(tokens)
    eventually(lambda: states(server, job)["delivered"] >= 50)
    status, told = cancel(server, job)
    assert status == 200 and told["cancelled"] > 15_000 and told["in_air"]
    server.settled()
    found = states(server, job)
    assert found["cancelled"] == told["cancelled"] and found["delivered"] == 20_000 - told["cancelled"]
    assert len(sandbox.received()["delivered"]) == found["delivered"]
    assert server.report()["failures"] == 0
    assert cancel(server, job) == (200, {"job": job, "cancelled": 0, "in_air": 0}), "there is nothing left"
    metrics = server.http().ask("GET", "/metrics")[2].decode()
    assert f'gocm_tokens_cancelled_total{{upstream="fcm"}} {told["cancelled"]}' in metrics
    assert any(f"cancelled {told['cancelled']} tokens of {job}" in line for line in server.lines)


def test_what_comes_back_is_not_tried_again(start, sandbox):
    sandbox.mode(latency=1.0)
    server = start()
    job = server.send(["flaky-9-a", "b"])
    eventually(lambda: states(server, job)["sending"] == 2)
    assert cancel(server, job)[1] == {"job": job, "cancelled": 0, "in_air": 2}
    server.settled()
    assert states(server, job) | {"delivered": 1, "cancelled": 1} == states(server, job)


def test_who_waits_for_it_is_told(start, sandbox):
    server = start("--retry-base", "60")
    job = server.send(["flaky-9-a"])
    eventually(lambda: states(server, job)["deferred"])
    found = []
    client = threading.Thread(target=lambda: found.append(server.http().ask("GET", f"/gcm/jobs/{job}?wait=30")))
    client.start()
    began = time.monotonic()
    assert cancel(server, job)[1]["cancelled"] == 1
    client.join(20)
    assert json.loads(found[0][2])["states"]["cancelled"] == 1 and time.monotonic() - began < 10


def test_what_is_not_there_is_not_cancelled(standing):
    assert cancel(standing, "0" * 15 + "1")[0] == 404
    assert standing.http().ask("DELETE", "/gcm/jobs/x")[0] == 400
    assert standing.http().ask("DELETE", f"/gcm/jobs/{'0' * 15}1?a=b")[0] == 400
    assert standing.http().ask("DELETE", "/gcm/send")[0] == 405


@short
def test_others_of_its_pack_go_on():
    state = new_state()
    accept(state, [new_job(job << 8, "abc") for job in (1, 2, 3)])
    assert state.cancel(2 << 8, 1000.0) == Cancelled(3, 0)
    assert {job for job, _ in claim(state)} == {1 << 8, 3 << 8}
    assert tally(state)["tokens"] == 6


@short
def test_what_was_on_its_way_when_its_senders_died_is_not_sent_again():
    state = new_state()
    accept(state, [new_job(1 << 8, "abc")])
    held = claim(state, room=2)
    assert len(held) == 2 and state.cancel(1 << 8, 1000.0) == Cancelled(1, 2)
    state.begin(2)
    state.release(1)
    assert claim(state, generation=2) == {} and tally(state)["tokens"] == 0
    assert state.status(1 << 8, "", -1, 9).states["cancelled"] == 3
    assert state.snapshot().counters["cancelled"] == 3 and state.snapshot().counters["failures"] == 0


@short
def test_what_fails_for_good_when_it_comes_back_was_cancelled_too():
    """Else it could be replayed."""
    state = new_state()
    accept(state, [new_job(1 << 8, "a")])
    now = 1000.0
    for attempt in range(1, POLICY.max_attempts + 1):
        held = claim(state, now=now)
        assert len(held) == 1
        if attempt == POLICY.max_attempts:
            assert state.cancel(1 << 8, now) == Cancelled(0, 1)
        state.settle(1, [Result("gcm", 1 << 8, 0, attempt, LATER)], now)
        now += 1000
    assert state.failed(ALL, BEFORE_ALL, 9) == [] and state.status(1 << 8, "", -1, 9).states["cancelled"] == 1


@short
def test_it_holds_over_a_restart():
    state = new_state()
    accept(state, [new_job(1 << 8, "ab")])
    assert len(claim(state)) == 2 and state.cancel(1 << 8, 1000.0) == Cancelled(0, 2)
    again = succeed(state)
    assert claim(again, now=1001.0) == {} and again.status(1 << 8, "", -1, 9).states["cancelled"] == 2


@short
def test_while_it_is_not_known_what_is_on_its_way_nothing_is_cancelled():
    state = new_state()
    accept(state, [new_job(1 << 8, "ab")])
    claim(state)
    again = succeed(state, living={1})
    with pytest.raises(Passing, match="a moment ago"):
        again.cancel(1 << 8, 1000.0)
    again.release(1)
    assert again.cancel(1 << 8, 1000.0) == Cancelled(2, 0)


@short
def test_a_deferred_token_and_its_attempts():
    state = new_state()
    accept(state, [new_job(1 << 8, "ab")])
    claim(state)
    state.settle(1, [Result("gcm", 1 << 8, 0, 1, LATER), Result("gcm", 1 << 8, 1, 1, DELIVERED)], 1000.0)
    assert state.cancel(1 << 8, 1001.0) == Cancelled(1, 0)
    fates = state.status(1 << 8, "", -1, 9).fates
    assert [(fate.state, fate.attempts) for fate in fates] == [("cancelled", 1), ("delivered", 1)]
    assert state.snapshot().counters["attempts"] == 2 and state.failed(ALL, BEFORE_ALL, 9) == []
