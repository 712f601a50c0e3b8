"""What is noted beside packs: names and tags, jobs for another time, held upstreams. And what is express."""

import pytest
from kit import accept, batches, claim, new_job, new_state, succeed

from gocm_lib.message.job import next_id
from gocm_lib.message.outcome import Outcome, Result, Verdict
from gocm_lib.state.contract import BEFORE_ALL, Meaning, Status, Which

pytestmark = pytest.mark.short
NOW = 1_800_000_000.0
UNREGISTERED = Outcome(Verdict.UNREGISTERED, "gone", cause="unregistered")
DELIVERED = Outcome(Verdict.DELIVERED)
BAD = Outcome(Verdict.DEFERRED, "Unavailable", answered=True, cause="unavailable")


def job(state, tokens, later=0.0, **more):
    """A job that comes now, or is to be sent so many seconds later."""
    job.last = next_id(job.last, NOW)
    made = new_job(job.last, tokens, NOW + later)._replace(send_at=NOW + later if later else 0.0, **more)
    assert accept(state, [made]) == {}
    return made.id


job.last = 0


def settle(state, claimed, outcome=DELIVERED, now=NOW, upstream="gcm"):
    state.settle(1, [Result(upstream, *place, token.attempt, outcome) for place, token in claimed.items()], now)


def test_a_job_is_known_by_its_name_and_its_tag():
    state = new_state()
    tagged = job(state, ["a", "b"], by="shop", tag="spring")
    plain = job(state, ["c"])
    assert (state.status(tagged, "", -1, 9).by, state.status(tagged, "", -1, 9).tag) == ("shop", "spring")
    assert (state.status(plain, "", -1, 9).by, state.status(plain, "", -1, 9).tag) == ("", "")
    [found] = state.jobs("spring", 0, 9)
    assert (found.job, found.by, found.size, found.pending) == (tagged, "shop", 2, 2)
    assert state.jobs("spring", tagged, 9) == state.jobs("summer", 0, 9) == []


def test_a_list_of_jobs_says_how_many_tokens_are_where():
    state = new_state()
    jobs = [job(state, [f"{n}-{k}" for k in range(5)], tag="t") for n in range(3)]
    went = claim(state, now=NOW, room=8)
    assert len(went) == 8
    gone, rest = dict(list(went.items())[:1]), dict(list(went.items())[1:7])
    settle(state, gone, UNREGISTERED)
    settle(state, rest)
    state.cancel(jobs[2], NOW)
    told = [(each.pending, each.delivered, each.failed, each.cancelled) for each in state.jobs("t", 0, 9)]
    assert told == [(0, 4, 1, 0), (3, 2, 0, 0), (0, 0, 0, 5)]
    assert [each.job for each in state.jobs("t", 0, 2)] == jobs[:2] and state.jobs("t", jobs[1], 9)[0].job == jobs[2]
    assert all(sum(each[7:]) == each.size for each in state.jobs("t", 0, 9))


def test_lists_of_jobs_are_of_some_upstreams_and_all_of_them_are_cancelled():
    state = new_state(upstreams=("gcm", "fcm"))
    ids = [job(state, ["a", "b"], tag="t", upstream=("gcm", "fcm")[n % 2]) for n in range(6)]
    later = [job(state, ["c"], later=50.0, upstream=("gcm", "fcm")[n % 2]) for n in range(4)]
    assert [each.job for each in state.jobs("t", 0, 2, ("fcm",))] == [ids[1], ids[3]]
    assert [each.job for each in state.jobs("", 0, 9, ("fcm",))] == [later[1], later[3]]
    assert [each.tokens for each in state.cancel_all([*ids[::2], later[0], ids[0]], NOW)] == [2, 2, 2, 1, 0]
    assert [each.cancelled for each in state.jobs("t", 0, 9)] == [2, 0, 2, 0, 2, 0]
    assert state.store.totals.tokens == 9 and set(claim(state, now=NOW)) == {(n, k) for n in ids[1::2] for k in (0, 1)}


def test_failed_tokens_are_found_by_whose_they_are():
    state = new_state()
    for name in ("shop", "", "news"):
        job(state, [f"of-{name}"], by=name)
    claim(state, now=NOW + 20_000)  # too late
    assert [each.token for each in state.failed(Which(0, "", "", 1e12, "shop"), BEFORE_ALL, 9)] == ["of-shop"]
    assert len(state.failed(Which(0, "", "", 1e12), BEFORE_ALL, 9)) == 3
    assert state.discard(Which(0, "", "", 1e12, "news")) == 1
    assert state.replay(Which(0, "", "", 1e12, "shop"), NOW) == 1
    assert [each.token for each in state.failed(Which(0, "", "", 1e12), BEFORE_ALL, 9)] == ["of-"]


def test_what_is_for_another_time_waits_and_lives_from_then_on():
    state = new_state()
    now_ = job(state, ["a"])
    then = job(state, ["b", "c"], later=3600.0, tag="t")
    assert {place[0] for place in claim(state, now=NOW)} == {now_}
    assert state.snapshot().oldest == NOW, "what waits for its time is not late"
    [waiting] = state.jobs("", 0, 9)
    assert (waiting.job, waiting.send_at, waiting.pending) == (then, NOW + 3600, 2)
    status = state.status(then, "", -1, 9)
    assert (status.send_at, status.expires_at) == (NOW + 3600, NOW + 13_600)
    assert status.accepted_at == pytest.approx(NOW, abs=1)
    assert claim(state, now=NOW + 3599) == {}
    assert {place[0] for place in claim(state, now=NOW + 3602)} == {then}
    assert state.jobs("", 0, 9) == [] and state.status(then, "", -1, 9).send_at == NOW + 3600
    assert [each.pending for each in state.jobs("t", 0, 9)] == [2]


def test_how_long_it_waited_counts_from_its_time():
    state = new_state()
    then, _ = job(state, ["a"], later=60.0), job(state, ["b"])
    found = state.claim(1, next(batches), {"gcm": 9}, {"gcm": 0.0}, NOW + 62, 0.0)
    assert len(found.slices) == 2 and found.since == {then: NOW + 60}


def test_a_clock_that_is_taken_for_set_back_is_not_one():
    """A job for tomorrow was not accepted tomorrow."""
    state = new_state()
    then = job(state, ["a"], later=86_400.0)
    assert state.store.last_accepted() == 0
    state = succeed(state)
    state.start(NOW + 5)
    assert claim(state, now=NOW + 6) == {}
    assert [place[0] for place in claim(state, now=NOW + 86_402)] == [then]


def test_scheduled_ones_are_listed_in_pages_and_can_be_cancelled():
    state = new_state()
    ids = [job(state, [f"t{n}"], later=100.0) for n in range(5)]
    assert [each.job for each in state.jobs("", 0, 2)] == ids[:2]
    assert [each.job for each in state.jobs("", ids[1], 9)] == ids[2:]
    assert state.cancel(ids[0], NOW).tokens == 1
    assert state.status(ids[0], "", -1, 9).states["cancelled"] == 1
    went = claim(state, now=NOW + 102)
    assert {place[0] for place in went} == set(ids[1:])
    settle(state, went, now=NOW + 102)
    assert state.store.totals.tokens == 0 and claim(state, now=NOW + 200) == {}


def test_jobs_of_one_commit_for_one_time_are_listed_in_pages():
    state = new_state()
    made = []
    for n in range(4):
        job.last = next_id(job.last, NOW)
        made.append(new_job(job.last, [f"t{n}"], NOW + 100)._replace(send_at=NOW + 100))
    assert accept(state, made) == {}
    ids = [each.id for each in made]
    assert [each.job for each in state.jobs("", 0, 3)] == ids[:3]
    assert [each.job for each in state.jobs("", ids[2], 3)] == ids[3:]


def test_after_a_restart_it_still_waits_for_its_time():
    state = new_state()
    then = job(state, ["a", "b"], later=100.0)
    state.hold("gcm", "ops", NOW)
    state = succeed(state)
    assert claim(state, now=NOW + 102) == {}, "the upstream is held"
    assert state.let_go("gcm")
    assert {place[0] for place in claim(state, now=NOW + 103)} == {then}


def test_nothing_is_sent_to_an_upstream_that_somebody_holds():
    state = new_state(upstreams=("gcm", "fcm"))
    state.hold("gcm", "ops", NOW)
    held, other = job(state, ["a"]), job(state, ["b"], upstream="fcm")
    assert {place[0] for place in claim(state, now=NOW)} == {other}
    assert "somebody holds it, ops" in state.status(held, "", -1, 9).paused
    state.hold("gcm", "again", NOW + 1)
    assert state.snapshot().held_upstreams == {"gcm": (NOW, "ops")}, "who did first is told"
    assert state.snapshot().waiting == {"gcm": 1, "fcm": 1}
    assert state.let_go("gcm") and not state.let_go("gcm")
    assert {place[0] for place in claim(state, now=NOW + 1)} == {held}


def test_what_is_express_goes_before_what_came_earlier():
    state = new_state()
    job(state, [f"slow{n}" for n in range(50)])
    quick = job(state, ["code"], express=True)
    went = claim(state, now=NOW, room=4)
    assert (quick, 0) in went and len(went) == 4
    settle(state, {(quick, 0): went[quick, 0]}, BAD)
    state.settle(1, [], NOW + 60)
    assert (quick, 0) in claim(state, now=NOW + 60, room=8), "also when it is tried again"


def test_a_list_of_one_upstream_is_read_and_cleared_without_the_others():
    state = new_state(upstreams=("gcm", "fcm"))
    for upstream in ("gcm", "fcm"):
        job(state, [f"of-{upstream}"], upstream=upstream)
    for place, token in claim(state, now=NOW).items():
        upstream = state.status(place[0], "", -1, 1).upstream
        state.settle(1, [Result(upstream, *place, token.attempt, UNREGISTERED)], NOW)
    assert [each.token for each in state.page("notregistered", 0, 9, "fcm")] == ["of-fcm"]
    assert [each.token for each in state.hand_out("notregistered", 9, "fcm")] == ["of-fcm"]
    state.handed_out("notregistered", state.store.newest_entry("notregistered"), "fcm")
    assert [each.token for each in state.page("notregistered", 0, 9)] == ["of-gcm"]
    assert state.snapshot().listed["notregistered"] == 1


def test_upstreams_come_and_go_while_it_runs():
    state = new_state(upstreams=("gcm",))
    state.follow({"gcm": 0.0, "shop": 100.0}, {"shop": Meaning("fcm", "shop-project")}, NOW)
    shop = job(state, ["a"], upstream="shop")
    assert {place[0] for place in claim(state, now=NOW)} == {shop}
    state.release(1)
    state.follow({"gcm": 0.0}, {}, NOW)
    assert state.snapshot().waiting == {"shop": 1} and state.snapshot().meant == {"shop": ("fcm", "shop-project")}
    assert "no such upstream any more" in state.status(shop, "", -1, 1).paused
    assert state.keeping.limits.upstreams == 1 and isinstance(state.status(shop, "", -1, 1), Status)


def test_upstreams_that_are_down_leave_room_for_the_others():
    state = new_state(upstreams=tuple("abcde"))
    limits = state.keeping.limits._replace(pending=80, upstreams=5)
    state.keeping = state.keeping._replace(limits=limits)

    def taken(upstream, tokens):
        job.last = next_id(job.last, NOW)
        made = new_job(job.last, [f"{job.last}-{n}" for n in range(tokens)], upstream=upstream)
        return accept(state, [made]) == {}

    assert limits.share == 40 and limits.reserve == 10
    assert taken("a", 40) and not taken("a", 1), "one may have half"
    assert taken("b", 10) and not taken("b", 1), "and the others what is theirs"
    assert all(taken(name, 10) for name in "cde")
