"""What is too much is refused at once, with the seconds after which to come again; what is held goes on."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, KEEPING, accept, claim, eventually, form, new_job, new_state, open_tokens, succeed, tally

from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.state.admission import (
    HALF_LIFE,
    LATEST,
    SOONEST,
    Drain,
    Limits,
    Usage,
    drain_rate,
    drained,
    refuse,
    wait_for_room,
)
from gocm_lib.state.contract import Status, Which

short = pytest.mark.short
ENOUGH = 1 << 50
OLD = {"GOCM_DEAD_AGE": "1"}

# --------------------------------------------------------------------------------------------------------- the rules


@short
@given(*[st.integers(0, 100)] * 4, st.floats(0, 1000))
def test_pending_tokens_never_pass_the_limit(tokens, pending, limit, free, rate):
    refused = refuse(tokens, Usage(pending, 0, free, pending), Limits(limit, ENOUGH, 50), rate)
    assert (refused is None) == (pending + tokens <= limit and free >= 50)
    if refused:
        assert refused.status == (507 if free < 50 else 503) and SOONEST <= refused.retry_after <= LATEST


@short
@given(st.integers(0, 10**9), st.floats(0, 1e6))
def test_the_wait_is_as_long_as_the_excess_needs(excess, rate):
    wait = wait_for_room(excess, rate)
    assert isinstance(wait, int) and SOONEST <= wait <= LATEST
    if SOONEST < wait < LATEST:
        assert (wait - 1) * rate < excess * 1.001 and wait * rate >= excess * 0.999


@short
@given(st.floats(1, 10_000))
def test_the_drain_rate_is_that_of_a_steady_stream(rate):
    drain = Drain(0.0, 0.0)
    for tick in range(int(HALF_LIFE * 100)):
        drain = drained(drain, rate / 10, tick / 10)
    assert math.isclose(drain_rate(drain, HALF_LIFE * 10), rate, rel_tol=0.02)
    assert drain_rate(drain, HALF_LIFE * 12) < rate / 3, "and it fades when nothing goes out any more"


# --------------------------------------------------------------------------------------------------------- the state


def limited(**limits):
    return new_state(keeping=KEEPING._replace(limits=KEEPING.limits._replace(**limits)))


@short
def test_at_the_limit_messages_are_refused_one_by_one():
    state = limited(pending=5)
    jobs = [new_job(1, "abc"), new_job(2, "abc"), new_job(3, "de")]
    refused = accept(state, jobs)
    assert list(refused) == [2] and refused[2].status == 503
    assert accept(state, jobs[:1]) == {}, "one that is in already is not refused when it is asked for again"
    assert accept(state, [new_job(4, "f")])[4].retry_after == LATEST, "nothing goes out"
    for job, n in claim(state):
        state.settle(1, [Result("gcm", job, n, 1, DELIVERED)], 1000.0)
    assert accept(state, [new_job(5, "abcde", now=1001.0)]) == {}
    assert accept(state, [new_job(6, "f", now=1001.0)])[6].retry_after < 10, "half a token a second goes out"


@short
def test_a_spool_at_its_size_takes_nothing_and_drains():
    state = limited(spool=200_000)
    ids = iter(range(1, 1000))
    while not (refused := accept(state, [new_job(next(ids), ["x" * 4000] * 10)])):
        pass
    assert [(no.status, no.retry_after) for no in refused.values()] == [(507, LATEST)]
    for job, n in claim(state, room=1000):
        state.settle(1, [Result("gcm", job, n, 1, DELIVERED)], 1000.0)
    assert state.snapshot().pending == 0
    assert accept(state, [new_job(next(ids), ["x" * 4000] * 10)]) == {}, "the pages that became free are used again"


def dead_tokens(state):
    return [each.token for each in state.failed(Which(0, "", "", math.inf), (0, -1), 9)]


@short
def test_the_dead_are_kept_for_their_time_and_in_their_number():
    state = new_state(keeping=KEEPING._replace(failed_age=100.0, max_failed=3, keep_jobs=30.0))
    gone = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
    accept(state, [new_job(1, "ab"), new_job(2, "c", now=1010.0)])
    for place in claim(state, now=1010.0):
        state.settle(1, [Result("gcm", *place, 1, gone)], 1000.0 + 10 * place[0])
    claim(state, now=1050.0)
    assert tally(state)["failed"] == 3
    accept(state, [new_job(3, "d", now=1060.0)])
    for place in claim(state, now=1060.0):
        state.settle(1, [Result("gcm", *place, 1, gone)], 1060.0)
    claim(state, now=1070.0)
    assert dead_tokens(state) == ["b", "c", "d"]
    claim(state, now=1115.0), claim(state, now=1116.5)
    assert dead_tokens(state) == ["c", "d"]
    kept = [job for job in (1, 2, 3) if isinstance(state.status(job, "", -1, 9), Status)]
    assert kept == [2, 3], "the message goes with its last token"
    claim(state, now=1200.0), claim(state, now=1202.0)
    assert state.store.packs([1, 2, 3]) == [] and tally(state)["failed"] == 0


@short
def test_a_flood_of_the_dead_is_given_up_in_steps_and_soon():
    state = new_state(keeping=KEEPING._replace(max_failed=10))
    accept(state, [new_job(1, ["x"] * 12_000)])
    gone = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
    claim(state, room=12_000)
    state.settle(1, [Result("gcm", 1, 0, 1, gone, 12_000)], 1000.0)
    assert tally(state)["failed"] == 12_000
    claim(state, now=1002.0)
    assert 5000 < tally(state)["failed"] < 10_000, "one step of it, so that nobody waits long"
    claim(state, now=1002.1), claim(state, now=1002.2)
    assert tally(state)["failed"] == 10


@short
def test_a_token_is_in_a_list_once_and_a_full_list_takes_no_more():
    state = new_state(keeping=KEEPING._replace(max_report=2))
    accept(state, [new_job(1, "aabbccaa")])
    for job, n in claim(state):
        state.settle(
            1, [Result("gcm", job, n, 1, Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"))], 1000.0
        )
    assert [entry[1] for entry in state.page("notregistered", 0, 99)] == ["a", "b"]
    assert state.snapshot().counters["notregistered"] == 8 and state.snapshot().counters["dropped"] == 2
    state.forget("notregistered", state.store.newest_entry("notregistered"))
    accept(state, [new_job(2, "c")])
    for job, n in claim(state):
        state.settle(
            1, [Result("gcm", job, n, 1, Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"))], 1000.0
        )
    assert [entry[1] for entry in state.page("notregistered", 0, 99)] == ["c"], "who reads it makes room"


@short
def test_the_newest_replacement_of_a_token_stands():
    state = new_state()
    for turn, new in enumerate(["x", "y", "y"], 1):
        accept(state, [new_job(turn, "a")])
        for job, n in claim(state):
            state.settle(1, [Result("gcm", job, n, 1, Outcome(Verdict.DELIVERED, canonical=new))], 1000.0)
    [(number, *entry)] = state.page("canonical", 0, 99)
    assert entry == ["a", "y"] and number == 2, "with a number of its own, for readers that have seen the first"
    assert state.snapshot().counters["dropped"] == 0 and state.store.totals.listed["canonical"] == 1


@short
def test_a_dead_upstream_does_not_fill_the_room_of_the_other():
    keeping = KEEPING._replace(limits=KEEPING.limits._replace(pending=10, upstreams=2))
    state = new_state(upstreams=("fcm", "gcm"), keeping=keeping)
    dead = [new_job(n, "abc") for n in (1, 2, 3)]
    assert list(accept(state, dead)) == [2, 3] and not state.snapshot().refusing
    assert accept(state, [new_job(4, "de"), new_job(5, "f")])[5].status == 503, "five are its share"
    assert accept(state, [new_job(6, "abcde", upstream="fcm")]) == {}
    mixed = accept(state, [new_job(7, "a"), new_job(8, "b", upstream="fcm")])
    assert set(mixed) == {7, 8} and "shared by 2 upstreams" in mixed[7].reason
    assert "pending" in state.snapshot().refusing
    state = succeed(state, keeping, ("fcm", "gcm"))
    assert open_tokens(state) == {"fcm": 5, "gcm": 5}
    for job, n in claim(state):
        state.settle(1, [Result(("gcm", "fcm")[job == 6], job, n, 1, DELIVERED)], 1000.0)
    assert not any(open_tokens(state).values()) and accept(state, [new_job(9, "a")]) == {}


@short
def test_what_is_replayed_fits_into_its_upstream_s_share():
    keeping = KEEPING._replace(limits=KEEPING.limits._replace(pending=8, upstreams=2))
    state = new_state(upstreams=("fcm", "gcm"), keeping=keeping)
    gone = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
    for number, (upstream, tokens) in enumerate((("gcm", "abcd"), ("gcm", "ef"), ("fcm", "gh")), 1):
        accept(state, [new_job(number, tokens, upstream=upstream)])
        for job, n in claim(state):
            state.settle(1, [Result(upstream, job, n, 1, gone)], 1000.0)
    assert state.snapshot().failed == 8
    assert state.replay(Which(0, "", "", math.inf), 1000.0) == 6 and open_tokens(state) == {"fcm": 2, "gcm": 4}
    assert state.replay(Which(0, "", "", math.inf), 1000.0) == 0


# ------------------------------------------------------------------------------------------------------ by HTTP


def test_a_full_server_refuses_sends_on_and_takes_again(start, sandbox):
    sandbox.mode(silent=True)
    server = start("--max-pending", "10", "--upstream-timeout", "3")
    client = server.http()
    server.send([f"t{n}" for n in range(10)], client=client)
    status, headers, body = client.ask("POST", "/gcm/send", form(["u"]), FORM)
    assert status == 503 and int(headers["Retry-After"]) == LATEST and "--max-pending" in json.loads(body)["error"]
    status, _, body = client.ask("POST", "/gcm/send", form(["u"] * 11), FORM)
    assert status == 413 and json.loads(body)["field"] == "tokens", "what could never be taken is not put off"
    assert client.ask("GET", "/gcm/report")[0] == 200
    sandbox.mode(silent=False)
    server.settled()
    server.send(["u"], client=client)
    assert server.settled()["attempts"] == 11
    assert len(server.find("messages are refused: 10 tokens are pending")) == 1


def test_tokens_in_a_call_are_limited(start):
    server = start("--max-tokens", "3")
    server.send(["a", "b", "c"])
    status, _, body = server.http().ask("POST", "/gcm/send", form("abcd"), FORM)
    assert status == 413 and "more than 3" in json.loads(body)["error"]


def test_a_full_disk_refuses_before_it_is_full(start):
    server = start("--min-free-disk", str(1 << 49))
    status, headers, body = server.http().ask("POST", "/gcm/send", form(["a"]), FORM)
    assert status == 507 and int(headers["Retry-After"]) >= 1 and "disk" in json.loads(body)["error"]


@pytest.mark.parametrize("words, environ", [(["--failed-age", "1"], {}), (["--dead-age", "1"], {}), ([], OLD)])
def test_failed_tokens_are_forgotten_after_their_time(start, sandbox, words, environ):
    """Told by the option's name of today, by its old one, or by the old one's variable."""
    server = start(*words, "--max-attempts", "1", environ=environ)
    server.send(["flaky-1-a"])
    assert server.settled()["failures"] == 1
    began = time.monotonic()

    eventually(lambda: server.http().json("GET", "/gcm/failed")["failed"] == [])
    assert time.monotonic() - began < 10
