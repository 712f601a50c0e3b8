"""outcome: the next step is total, and back-off grows, is capped, and honours Retry-After."""

import itertools
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.job import Run, Slice
from gocm_lib.outcome import (
    BLAMES_UPSTREAM,
    DELIVERED,
    Action,
    Outcome,
    Policy,
    Result,
    Verdict,
    address,
    advance,
    join,
    next_step,
    parse_retry_after,
    pause,
    retry_delay,
    slow_down,
    spend,
    start_pace,
    until_credit,
)

pytestmark = pytest.mark.short

policies = st.builds(Policy, st.floats(0.01, 60), st.floats(60, 3600), st.integers(1, 10))
draws = st.floats(0, 1)
waits = st.none() | st.floats(0, 3600)
outcomes = st.builds(Outcome, st.sampled_from(Verdict), st.text(max_size=5), retry_after=waits)
NOW = 1e9


@given(outcomes, st.integers(1, 50), st.floats(NOW - 10, NOW + 1e6), draws, policies)
def test_every_outcome_has_one_next_step(outcome, attempt, expires_at, draw, policy):
    step = next_step(outcome, attempt, expires_at, NOW, draw, policy)
    if outcome.verdict in BLAMES_UPSTREAM or outcome.verdict is Verdict.RETURNED:
        assert step.action is Action.RETURN
    elif outcome.verdict is not Verdict.DEFERRED:
        assert step.action is Action.FINISH
    elif attempt >= policy.max_attempts:
        assert step.action is Action.BURY
    else:
        assert step.action in (Action.RETRY, Action.BURY)
        if step.action is Action.RETRY:
            assert NOW + (outcome.retry_after or 0) <= step.due_at < expires_at


@given(st.integers(1, 1000), waits, draws, policies)
def test_a_delay_is_bounded(attempt, retry_after, draw, policy):
    delay = retry_delay(attempt, retry_after, draw, policy)
    ceiling = policy.retry_base * 2.0 ** min(attempt - 1, 64)
    assert (retry_after or 0) <= delay <= (retry_after or 0) + min(ceiling, policy.retry_cap) + 1e-6


@given(st.integers(1, 30), policies)
def test_ceilings_double_up_to_the_cap(attempt, policy):
    now, later = retry_delay(attempt, None, 1.0, policy), retry_delay(attempt + 1, None, 1.0, policy)
    assert later == min(2 * now, policy.retry_cap) or now == policy.retry_cap == later


@given(st.text(max_size=40) | st.none())
def test_any_retry_after_is_a_bounded_wait_or_none(value):
    wait = parse_retry_after(value, NOW)
    assert wait is None or 0 <= wait <= 3600


@pytest.mark.parametrize(
    "value, wait",
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("999999999999", 3600),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        (formatdate(NOW + 90, usegmt=True), 90),
        (formatdate(NOW - 90, usegmt=True), 0),
        ("٣", None),
    ],
)
def test_retry_after_in_both_forms(value, wait):
    assert parse_retry_after(value, NOW) == wait


blames = st.sampled_from(sorted(BLAMES_UPSTREAM)).map(lambda verdict: Outcome(verdict, "x"))


@given(st.lists(blames, min_size=1, max_size=20))
def test_failures_in_flight_together_make_one_pause(together):
    first = pause(None, together[0], NOW)
    now = first
    for outcome in together:
        now = pause(now, outcome, NOW + 0.5 * first.delay)
    assert now == first


@given(st.lists(blames, min_size=2, max_size=20))
def test_failed_probes_double_the_pause_up_to_a_limit(probes):
    paused = pause(None, probes[0], NOW)
    for outcome in probes[1:]:
        longer = pause(paused._replace(probing=True), outcome, paused.until)
        assert longer.until > paused.until and not longer.probing
        assert longer.delay <= 300 and (longer.delay >= paused.delay or outcome.verdict is Verdict.UNREACHABLE)
        paused = longer


@given(st.floats(1, 1e5), st.lists(st.tuples(st.floats(0.0, 0.5), st.booleans()), min_size=1, max_size=60))
def test_no_second_holds_more_than_the_limit_allows(limit, turns):
    """However claims and complaints come: what goes in any stretch of time is at most its rate and one burst."""
    pace = start_pace(limit, NOW)
    now, went = NOW, []
    for passed, complaint in turns:
        now += passed
        pace = advance(pace, now)
        assert 0 < pace.rate <= max(limit, 1.0)
        count = int(pace.credit)
        if count:
            pace = spend(pace, count)
            went.append((now, count))
        if complaint:
            pace = slow_down(pace, now)
    for start, _ in went:
        assert sum(count for at, count in went if start <= at < start + 1.0) <= limit * 1.05 + 2


def test_the_rate_ramps_up_is_halved_and_recovers():
    pace = start_pace(1000.0, NOW)
    assert pace.rate == 100.0
    assert advance(pace, NOW + 30.0).rate == pytest.approx(550.0)
    assert advance(pace, NOW + 61.0).rate == 1000.0
    busy = advance(pace, NOW + 61.0)
    for tenth in range(100):
        busy = spend(advance(busy, NOW + 61.0 + tenth / 10), 40)  # 400 a second
    slow = slow_down(busy, NOW + 71.0)
    assert 150 <= slow.rate <= 250, "half of what really went, not half of what might have gone"
    assert slow_down(slow, NOW + 71.5) == slow, "once for all that complain together"
    assert advance(slow, NOW + 131.5).rate == 1000.0


@given(st.floats(1, 1e6), st.floats(0, 100))
def test_after_the_wait_there_is_credit(limit, passed):
    pace = spend(start_pace(limit, NOW), int(start_pace(limit, NOW).credit))
    wait = until_credit(pace)
    assert wait >= 0 and advance(pace, NOW + wait + 1e-3).credit >= 0.99


# ---------------------------------------------------------------------------------------------- results in the open


def spread(results):
    """What results say of each token, by job and place."""
    return {
        (result.job, result.n + offset): (result.upstream, result.attempt, result.outcome)
        for result in results
        for offset in range(result.span)
    }


FARES = st.sampled_from(
    [DELIVERED, Outcome(Verdict.DELIVERED, canonical="c"), Outcome(Verdict.DEFERRED, "x"), Outcome(Verdict.REJECTED)]
)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.lists(FARES, min_size=1, max_size=6)), max_size=5))
def test_results_say_of_each_token_what_became_of_it(told):
    runs, outcomes, expected, place = [], [], {}, 0
    for job, attempt, fares in told:
        place += 10  # no two runs of a job meet
        runs.append(Run(job, place, attempt, ["t"] * len(fares)))
        outcomes += fares
        expected |= {(job, place + k): ("gcm", attempt, outcome) for k, outcome in enumerate(fares)}
    results = address(Slice("gcm", "token", "{}", runs), outcomes)
    assert spread(results) == expected and sum(result.span for result in results) == len(expected)


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 2), st.integers(0, 12)),
        st.tuples(st.sampled_from([1, 1, 1, 2]), st.one_of(st.just(DELIVERED), FARES)),
        max_size=26,
    ),
    st.randoms(),
)
def test_neighbours_that_fared_alike_are_joined_and_nobody_else(told, chance):
    results = [Result("gcm", *place, attempt, outcome) for place, (attempt, outcome) in told.items()]
    chance.shuffle(results)
    joined = join(results)
    assert spread(joined) == spread(results) and sum(result.span for result in joined) == len(results)
    for one, next_one in itertools.pairwise(joined):
        if (one.job, one.n + one.span) == (next_one.job, next_one.n):
            assert (one.attempt, one.outcome) != (next_one.attempt, next_one.outcome)
