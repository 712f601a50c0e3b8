"""What became of a message: looked up while it is sent, after its end, and until that is forgotten."""

import json
import time

import pytest
from kit import FORM, KEEPING, accept, claim, eventually, form, new_job, new_state, succeed, tally

from gocm_lib.front import response as pages
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.state.admission import Limits
from gocm_lib.state.contract import STATES, Past, Pause, Which

short = pytest.mark.short
BUSY = Outcome(Verdict.DEFERRED, "Unavailable")


def look_up(server, job, query=""):
    return server.http().json("GET", f"/gcm/jobs/{job}{query}")


def states(**counts):
    return dict.fromkeys(STATES, 0) | counts


def test_each_token_has_its_own_fate(start, sandbox):
    server = start("--max-attempts", "3")
    before = time.time()
    job = server.send(["a", "gone-b", "flaky-1-c", "canonical-d", "flaky-9-e"])
    server.settled()
    found = look_up(server, job)
    fates = found.pop("results")
    assert before - 1 < found.pop("accepted_at") < found.pop("ended_at") < time.time()
    assert found.pop("expires_at") > before + 80_000
    assert found == {
        "job": job,
        "upstream": "gcm",
        "target": "token",
        "tokens": 5,
        "states": states(delivered=3, failed=2),
        "next": 4,
    }
    assert all(before - 1 < fate.pop("ended_at") < time.time() for fate in fates)
    ids = [fate.pop("message_id", None) for fate in fates]
    assert [bool(found) for found in ids] == [True, False, True, True, False]
    assert fates == [
        {"n": 0, "token": "a", "state": "delivered", "attempts": 1},
        {
            "n": 1,
            "token": "gone-b",
            "state": "failed",
            "attempts": 1,
            "reason": "unregistered",
            "detail": "NotRegistered",
        },
        {"n": 2, "token": "flaky-1-c", "state": "delivered", "attempts": 2},
        {
            "n": 3,
            "token": "canonical-d",
            "state": "delivered",
            "attempts": 1,
            "canonical": "new-d",
        },
        {
            "n": 4,
            "token": "flaky-9-e",
            "state": "failed",
            "attempts": 3,
            "reason": "attempts",
            "detail": "Unavailable, attempt 3 of 3",
        },
    ]


def test_the_answer_says_where_and_head_says_as_much(server):
    _, headers, _ = server.http().ask("POST", "/gcm/send", form(["a"]), FORM)
    assert headers["Location"] == "/gcm/jobs/" + headers["X-GoCM-Job"]
    server.settled()
    got, asked = server.http().ask("GET", headers["Location"]), server.http().ask("HEAD", headers["Location"])
    assert (got[0], got[1]["Content-Length"], b"") == (asked[0], asked[1]["Content-Length"], asked[2])


def test_while_it_is_being_sent(start, sandbox):
    """What waits says why and until when; what is in flight is told as that; an upstream that is paused is named."""
    server = start("--retry-base", "600")
    job, other = server.send(["flaky-1-a"]), server.send(["slow-5-b"])
    eventually(lambda: look_up(server, job)["states"] == states(deferred=1))
    eventually(lambda: look_up(server, other)["states"] == states(sending=1))
    found = look_up(server, job)
    assert found["ended_at"] is None and "paused" not in found
    [waiting] = found["results"]
    assert 0 < waiting.pop("next_due") - time.time() < 601
    assert waiting == {"n": 0, "token": "flaky-1-a", "state": "deferred", "attempts": 1, "reason": "token"}
    assert look_up(server, other)["results"] == [{"n": 0, "token": "slow-5-b", "state": "sending", "attempts": 0}]
    sandbox.mode(status=401)
    third = server.send(["c"])
    eventually(lambda: look_up(server, third).get("paused") == "HTTP 401")
    assert look_up(server, third)["states"] == states(ready=1)


def test_in_pages_and_by_state(server):
    job = server.send([f"{'gone-' if n % 3 == 0 else ''}{n}" for n in range(250)])
    server.settled()
    pages = [look_up(server, job)]
    while pages[-1]["next"] is not None:
        pages.append(look_up(server, job, f"?after={pages[-1]['next']}"))
    assert [len(page["results"]) for page in pages] == [100, 100, 50, 0]
    assert [fate["n"] for page in pages for fate in page["results"]] == list(range(250))
    found = look_up(server, job, "?state=failed&limit=1000")
    assert [fate["n"] for fate in found["results"]] == list(range(0, 250, 3))
    assert look_up(server, job, "?state=ready")["results"] == []


def test_through_kill_9_and_replay(start, run, sandbox):
    server = start("--max-attempts", "1")
    job = server.send(["a", "flaky-1-b"])
    server.settled()
    before = look_up(server, job)
    server.kill_group()
    again = start("--max-attempts", "1")
    assert look_up(again, job) == before
    assert again.http().ask("POST", "/gcm/failed/replay", f"job={job}", FORM)[0] == 200
    again.settled()
    after = look_up(again, job)
    assert after["accepted_at"] == before["accepted_at"] < after["replayed_at"] < after["ended_at"]
    assert after["states"] == states(delivered=2) and after["results"][1]["attempts"] == 1


def test_what_is_forgotten_is_gone_and_what_never_was_is_unknown(start):
    server = start("--keep-jobs", "0")
    job = server.send(["a"])
    status = eventually(lambda: (answer := server.http().ask("GET", f"/gcm/jobs/{job}"))[0] == 410 and answer)
    assert json.loads(status[2]) == {
        "error": "what became of messages so old is not kept: --keep-jobs, --max-kept",
        "field": "job",
    }
    assert server.http().ask("GET", f"/gcm/jobs/{(1 << 61):016x}")[0] == 404
    assert server.http().ask("GET", f"/gcm/jobs/of/{job}")[0] == 400
    assert server.report() == {"attempts": 1, "failures": 0, "pending": 0, "canonicals": 0, "notregistered": 0}


# ----------------------------------------------------------------------------------------------------- how much is kept


def finish(state, job, tokens, now, outcome=DELIVERED):
    assert accept(state, [new_job(job, tokens, now)]) == {}
    state.settle(1, [Result("gcm", *place, 1, outcome) for place in claim(state, now=now, room=10**6)], now)


@short
def test_for_its_time_after_its_end():
    state = new_state(keeping=KEEPING._replace(keep_jobs=100.0))
    accept(state, [new_job(1, ["a"]), new_job(2, ["b"])])
    later = Outcome(Verdict.DEFERRED, "x", retry_after=90.0)
    ends = {1: later, 2: DELIVERED}
    state.settle(1, [Result("gcm", *place, 1, ends[place[0]]) for place in claim(state)], 1000.0)
    state.settle(1, [Result("gcm", *place, 2, DELIVERED) for place in claim(state, now=1096.0)], 1096.0)
    claim(state, now=1101.5)
    assert state.status(2, "", -1, 9) == Past() and state.status(1, "", -1, 9).states["delivered"] == 1
    assert state.status(3, "", -1, 9) is None
    claim(state, now=1200.0)
    assert state.status(1, "", -1, 9) == Past() and tally(state)["over"] == 0
    assert state.store.last_job() == 2, "its number is not given again"


@short
def test_in_their_number_those_that_ended_first_go_first():
    state = new_state(keeping=KEEPING._replace(max_kept=5))
    for job in range(1, 7):
        finish(state, job, ["a", "b"], 1000.0 + job)
    claim(state, now=1010.0)
    assert [job for job in range(1, 7) if state.status(job, "", -1, 9) != Past()] == [5, 6]
    assert tally(state)["over"] == 4


@short
def test_what_is_counted_is_what_there_is():
    """Through a message's ends in parts, its forgetting, and what is done to its failed tokens after that."""
    state = new_state()
    state.policy = state.policy._replace(max_attempts=1)
    busy = Outcome(Verdict.PUT_OFF, "x")

    def check(**expected):
        assert tally(state) == tally(succeed(state))
        assert {name: tally(state)[name] for name in expected} == expected

    accept(state, [new_job(1, ["a", "b", "c"]), new_job(2, ["d"])])
    claim(state)
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED)], 1000.0)
    check(jobs=2, tokens=3, over=1, finished=0)
    state.settle(1, [Result("gcm", 1, 1, 1, DELIVERED), Result("gcm", 2, 0, 1, busy)], 1000.0)
    check(jobs=1, tokens=1, over=2, failed=1, finished=1)
    state.settle(1, [Result("gcm", 1, 2, 1, busy)], 1000.0)
    check(jobs=0, tokens=0, over=2, failed=2, finished=4)
    assert state.store.forget_jobs(1000.0, 0)
    check(over=0, failed=2, finished=0)
    assert state.discard(Which(1, "", "", 2000.0)) == 1
    check(over=1, failed=1, finished=3)
    state.store.forget_jobs(1000.0, 0)
    check(over=0, failed=1, finished=0)
    assert state.replay(Which(2, "", "", 2000.0), 1001.0) == 1
    check(jobs=1, tokens=1, failed=0, finished=0)
    state.settle(1, [Result("gcm", *place, 1, busy) for place in claim(state, now=1001.0)], 1001.0)
    check(jobs=0, failed=1, finished=1)
    assert state.replay(Which(2, "", "", 2000.0), 1002.0) == 1
    check(jobs=1, tokens=1, failed=0, finished=0)


@short
def test_a_message_that_goes_on_for_long_does_not_push_others_out():
    state = new_state(keeping=KEEPING._replace(max_kept=5))
    accept(state, [new_job(1, [f"t{n}" for n in range(20)])])
    ends = [Outcome(Verdict.DEFERRED, "x", retry_after=600.0)] + [DELIVERED] * 19
    state.settle(1, [Result("gcm", *place, 1, ends[place[1]]) for place in claim(state)], 1000.0)
    finish(state, 2, ["a"], 1001.0)
    claim(state, now=1010.0)
    assert state.status(2, "", -1, 9).states["delivered"] == 1
    state.settle(1, [Result("gcm", *place, 2, DELIVERED) for place in claim(state, now=1700.0)], 1700.0)
    claim(state, now=1702.0)
    assert state.status(1, "", -1, 9) == state.status(2, "", -1, 9) == Past(), "20 are more than 5"


@short
def test_much_is_forgotten_in_steps_and_soon():
    state = new_state(keeping=KEEPING._replace(keep_jobs=1.0))
    for job in range(1, 41):
        finish(state, job, ["x"] * 500, 1000.0)
    claim(state, now=1002.0)
    assert 10_000 < tally(state)["over"] < 20_000, "one step of it, so that nobody waits long"
    for turn in range(1, 6):
        claim(state, now=1002.0 + turn / 10)
    assert tally(state)["over"] == 0 and state.store.db.execute("SELECT count(*) FROM pack").fetchone() == (0,)


@short
def test_a_message_with_failed_tokens_stays_for_them():
    state = new_state(keeping=KEEPING._replace(keep_jobs=10.0, failed_age=100.0))
    accept(state, [new_job(1, ["a", "b"])])
    gone = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
    ends = [DELIVERED, gone]
    state.settle(1, [Result("gcm", *place, 1, ends[place[1]]) for place in claim(state)], 1000.0)
    claim(state, now=1020.0)
    found = state.status(1, "", -1, 9)
    assert found.size == 2 and found.finished == 1000.0 and [fate.token for fate in found.fates] == ["b"]
    assert json.loads(pages.status(found))["forgotten"] == 1
    assert not state.store.forget_jobs(1e9, 0), "there is no more to forget of it"
    claim(state, now=1101.0), claim(state, now=1102.5)
    assert state.status(1, "", -1, 9) == Past()


@short
@pytest.mark.parametrize("limits", [Limits(10**9, 600_000, 0), Limits(10**9, 1 << 50, (1 << 63) - 10_000_000)])
def test_it_makes_room_before_a_message_is_refused(limits, monkeypatch):
    """The second: a disk that is all but full, of which `:memory:` says that it never is."""
    state = new_state(keeping=KEEPING._replace(limits=limits))
    free = limits.free_disk + 600_000
    monkeypatch.setattr(
        state.store.disk, "free", lambda: free - state.store.db.execute("PRAGMA page_count").fetchone()[0] * 4096
    )
    for job in range(1, 101):
        finish(state, job, ["x" * 1000] * 20, 1000.0)
    assert state.status(1, "", -1, 9) == Past() and state.status(100, "", -1, 99).states["delivered"] == 20
    claim(state, now=1002.0)
    assert state.snapshot().refusing == ""


@short
def test_nothing_is_forgotten_for_what_no_room_would_help():
    state = new_state(keeping=KEEPING._replace(limits=Limits(1, 1 << 50, 0)))
    finish(state, 1, ["a"], 1000.0)
    assert accept(state, [new_job(2, ["a", "b"])])[2].status == 503
    assert state.status(1, "", -1, 9).size == 1


@short
def test_what_was_settled_before_is_not_counted_again():
    """A span of which only the middle is left, as after a repeat: the job ends with its last token, not before."""
    state = new_state()
    accept(state, [new_job(1, ["a", "b", "c", "d"])])
    claim(state)
    state.settle(1, [Result("gcm", 1, 1, 1, DELIVERED, 2)], 1000.0)
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED, 3)] * 2, 1001.0)
    assert state.snapshot().pending == 1 and state.status(1, "", -1, 9).finished == 0
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED, 4)], 1002.0)
    found = state.status(1, "", -1, 9)
    assert state.snapshot().pending == 0 and found.finished == 1002.0
    assert [fate.at for fate in found.fates] == [1001.0, 1000.0, 1000.0, 1002.0]
    state.store.forget_jobs(1e9, 0)
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED, 4)], 1003.0)
    assert state.snapshot().counters["delivered"] == 4, "nothing is known of it, and nothing is counted"


@short
def test_the_oldest_is_found_whatever_the_order_in_which_they_come():
    state = new_state()
    assert state.snapshot().oldest is None
    accept(state, [new_job(5, ["a"], 1005.0)])
    assert state.snapshot().oldest == 1005.0
    accept(state, [new_job(4, ["b"], 1004.0)])
    assert state.snapshot().oldest == 1004.0
    busy = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
    state.settle(1, [Result("gcm", *place, 1, busy) for place in claim(state, now=1006.0)], 1006.0)
    accept(state, [new_job(6, ["c"], 1006.0)])
    assert state.snapshot().oldest == 1006.0
    state.replay(Which(4, "", "", 1e9), 1007.0)
    assert state.snapshot().oldest == 1007.0, "since it was replayed"


@short
def test_a_paused_upstream_is_told():
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    state.pacing.pauses["gcm"] = Pause("HTTP 401", 1000.0, 1.0, 2000.0, 1000.0)
    assert state.status(1, "", -1, 9).paused == "HTTP 401"
