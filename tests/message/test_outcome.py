"""outcome: the next step is total, and back-off grows, is capped, and honours Retry-After."""

import itertools
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import DELIVERED, TROUBLE, Outcome, Result, Verdict, address, join
from gocm_lib.message.retry import (
    RATE_LIMIT_WAIT,
    SECOND_LOOK,
    Action,
    Policy,
    Ruling,
    next_step,
    parse_retry_after,
    retry_delay,
)

pytestmark = pytest.mark.short

policies = st.builds(Policy, st.floats(0.01, 60), st.floats(60, 3600), st.integers(1, 10))
draws = st.floats(0, 1)
waits = st.none() | st.floats(0, 3600)
outcomes = st.builds(Outcome, st.sampled_from(Verdict), st.text(max_size=5), retry_after=waits)
NOW = 1e9


rulings = st.builds(Ruling, st.integers(0, 50), st.booleans(), st.integers(1, 50), st.floats(NOW, NOW + 3600))


@given(outcomes, rulings, st.floats(NOW - 10, NOW + 1e6), draws, policies)
def test_every_outcome_has_one_next_step(outcome, ruling, expires_at, draw, policy):
    step = next_step(outcome, ruling, expires_at, NOW, draw, policy)
    if ruling.back:
        assert step.action is Action.RETURN
    elif outcome.verdict in TROUBLE | {Verdict.PUT_OFF} and ruling.charged >= policy.max_attempts:
        assert step.action is Action.SET_ASIDE and step.counted == "attempts"
    elif outcome.verdict in TROUBLE | {Verdict.PUT_OFF, Verdict.HELD, Verdict.SHARED, Verdict.RETURNED}:
        assert step.action in (Action.RETRY, Action.SET_ASIDE)
        if step.action is Action.RETRY:
            assert step.due_at >= NOW and (step.due_at < expires_at or outcome.verdict is Verdict.SHARED)
    else:
        assert step.action is Action.FINISH


def test_what_is_everybodys_trouble_counts_no_attempt_and_a_back_off_ends_no_message():
    policy = Policy(10.0, 600.0, 5)
    busy = Outcome(Verdict.DEFERRED, "HTTP 503", cause="unavailable")
    step = next_step(busy, Ruling(4, tries=40), NOW + 100, NOW, 1.0, policy)
    assert (step.action, step.due_at) == (Action.RETRY, NOW + 50)
    assert next_step(busy, Ruling(5), NOW + 100, NOW, 0.1, policy).action is Action.SET_ASIDE
    asked = next_step(busy._replace(retry_after=200.0), Ruling(), NOW + 100, NOW, 1.0, policy)
    assert (asked.action, asked.counted) == (Action.SET_ASIDE, "expired")


def test_what_was_refused_is_tried_again_soon_while_it_is_not_known_to_be_at_fault():
    policy = Policy(10.0, 600.0, 5)
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 404")
    assert next_step(refused, Ruling(0), NOW + 1e5, NOW, 1.0, policy).due_at == NOW + SECOND_LOOK
    assert next_step(refused, Ruling(1), NOW + 1e5, NOW, 1.0, policy).due_at == NOW + 10


def test_a_429_that_does_not_say_is_waited_for_as_google_asks():
    step = next_step(
        Outcome(Verdict.DEFERRED, "HTTP 429", cause="quota"), Ruling(), NOW + 1e5, NOW, 0.5, Policy(10.0, 600.0, 5)
    )
    assert step.due_at >= NOW + RATE_LIMIT_WAIT


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
