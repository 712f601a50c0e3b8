"""pace: pauses are bounded and single, the rate follows what is taken, and no second holds more than it allows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message.outcome import BLAMES_UPSTREAM, TROUBLE, Outcome, Verdict
from gocm_lib.state.pace import LONGEST_PAUSE, advance, heard, pause, resume, spend, start_pace, until_credit

pytestmark = pytest.mark.short

NOW = 1e9
troubles = st.builds(
    Outcome, st.sampled_from(sorted(TROUBLE)), st.just("x"), retry_after=st.none() | st.floats(0, 3600),
    answered=st.booleans(),
)  # fmt: skip


@given(st.lists(troubles, min_size=2, max_size=20))
def test_failed_probes_make_longer_pauses_up_to_a_limit(probes):
    paused, now = None, NOW
    for outcome in probes:
        longer = pause(paused, outcome, now)
        assert now < longer.until <= now + LONGEST_PAUSE and not longer.probe and longer.since == NOW
        paused, now = longer, longer.until


def test_what_answers_is_asked_every_five_seconds_at_first_and_later_every_thirty():
    now, paused, waits = NOW, None, []
    while now < NOW + 3600:
        paused = pause(paused, Outcome(Verdict.DEFERRED, "HTTP 503", cause="unavailable"), now)
        waits.append((now - NOW, paused.until - now))
        now = paused.until
    assert [wait for _, wait in waits[:4]] == [1.0, 2.0, 4.0, 5.0]
    assert all(wait <= 5.0 for at, wait in waits if at < 100) and waits[-1][1] == 30.0


def test_a_refusal_and_silence_are_asked_less_often():
    for outcome in (
        Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized"),
        Outcome(Verdict.DEFERRED, "x", answered=False),
    ):
        paused, now = None, NOW
        for _ in range(5):
            paused = pause(paused, outcome, now)
            now = paused.until
        assert paused.delay == 30.0


@given(st.floats(1, 1e5), st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0, 1)), min_size=1, max_size=60))
def test_no_second_holds_more_than_the_limit_allows(limit, turns):
    """However claims and complaints come: what goes in any stretch of time is at most its rate and one burst."""
    pace = start_pace(limit, NOW)
    now, went = NOW, []
    for passed, share in turns:
        now += passed
        pace = advance(pace, now)
        assert 0 < pace.rate <= max(limit, 1.0)
        count = int(pace.credit)
        if count:
            pace = spend(pace, count)
            went.append((now, count))
            pace = heard(pace, int(count * (1 - share)), count - int(count * (1 - share)), 0, now)
    for start, _ in went:
        assert sum(count for at, count in went if start <= at < start + 1.0) <= limit * 1.05 + 2


def play(pace, now, seconds, answer):
    """The pace after so many seconds at full use; `answer` says what of a second's messages is (taken, refused)."""
    for _ in range(int(seconds * 50)):
        now += 0.02
        pace = advance(pace, now)
        count = int(pace.credit)
        pace = spend(pace, count)
        if count:
            pace = heard(pace, *answer(count), 0, now)
    return pace, now


def share_of(refused):
    """Refusals that have nothing to do with the pace, spread evenly."""
    spread = itertools.accumulate(itertools.repeat(refused))
    ones = (int(now) - int(before) for before, now in itertools.pairwise(spread))
    return lambda count: (count - (no := sum(itertools.islice(ones, count))), no)


def test_the_rate_ramps_up():
    pace = start_pace(1000.0, NOW)
    assert pace.rate == 100.0
    assert advance(pace, NOW + 30.0).rate == pytest.approx(550.0)
    assert advance(pace, NOW + 61.0).rate == 1000.0


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_a_few_refusals_cost_nothing(share):
    pace, _now = play(start_pace(1000.0, NOW), NOW, 90, share_of(share))
    assert pace.rate == 1000.0


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_refusals_that_do_not_depend_on_the_pace_do_not_hold_it_down(share):
    pace, now = play(start_pace(1000.0, NOW), NOW, 30, share_of(share))
    rates = []
    for _ in range(60):
        pace, now = play(pace, now, 1, share_of(share))
        rates.append(pace.rate)
    assert sum(rates) / len(rates) > 600


@pytest.mark.parametrize("capacity", [20, 200, 5000])
def test_the_rate_is_what_is_taken_and_recovers_in_fifteen_seconds(capacity):
    level = itertools.count()

    def answer(count):
        nonlocal room
        room = min(capacity * 0.1, room + capacity * 0.02) if next(level) >= 0 else room
        taken = min(count, int(room))
        room -= taken
        return taken, count - taken

    room = 0.0
    pace, now = play(start_pace(10_000.0, NOW)._replace(began=NOW - 60, rate=10_000.0), NOW, 15, answer)
    assert capacity * 0.8 < pace.rate < capacity * 2
    pace, now = play(pace, now, 15, lambda count: (count, 0))
    assert pace.rate == 10_000.0


def test_what_left_before_a_cut_is_no_reason_for_another():
    pace = advance(start_pace(1000.0, NOW - 60), NOW)._replace(rate=1000.0, since=NOW - 1, taken=100, refused=300)
    cut = heard(pace, 1, 0, 400, NOW)
    assert cut.rate < 500
    late = heard(cut, 0, 400, 0, NOW + 0.6)
    assert heard(late, 1, 0, 0, NOW + 1.3).rate >= cut.rate


def test_after_a_pause_it_doubles_each_second():
    pace = start_pace(1000.0, NOW - 100)
    assert resume(pace, NOW).rate == 100.0
    assert advance(resume(pace, NOW), NOW + 4.0).rate == 1000.0


@given(st.floats(1, 1e6))
def test_after_the_wait_there_is_credit(limit):
    pace = spend(start_pace(limit, NOW), int(start_pace(limit, NOW).credit))
    wait = until_credit(pace)
    assert wait >= 0 and advance(pace, NOW + wait + 1e-3).credit >= 0.99


def test_only_what_was_surely_not_taken_goes_back():
    assert BLAMES_UPSTREAM < TROUBLE
