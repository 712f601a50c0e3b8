"""What the feeder makes of claimed slices: like messages share a request, senders share the load, no token is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message.job import Run, Slice
from gocm_lib.message.suspect import COMPANY, FATAL
from gocm_lib.senders.feeder import LARGEST_PART, PACK, coalesce, pack

pytestmark = pytest.mark.short


def places(slices):
    """Of each token: what it is sent with, its job, place and attempt."""
    return sorted(
        (part.upstream, part.target, part.message, part.deaths, run.job, n, run.attempt, token)
        for part in slices
        for run in part.runs
        for n, token in enumerate(run.tokens, run.first)
    )


@st.composite
def claims(draw):
    """Slices as they are claimed: each of one job, the jobs in their order."""
    slices = []
    for job in range(1, 1 + draw(st.integers(0, 8))):
        upstream = draw(st.sampled_from(["gcm", "gcm", "fcm"]))
        target = draw(st.sampled_from(["token", "token", "topic"]))
        sizes = [1] if target == "topic" else draw(st.lists(st.sampled_from([1, 3, 700, 1200]), min_size=1, max_size=3))
        runs = [
            Run(job, place * 2000, attempt, [f"{job}-{place}-{n}" for n in range(size)])
            for place, size in enumerate(sizes)
            for attempt in [draw(st.integers(1, 2))]
        ]
        slices.append(
            Slice(
                upstream,
                target,
                draw(st.sampled_from(['{"data":{}}', "{}"])),
                runs,
                draw(st.sampled_from([0, 0, 1, 2])),
            )
        )
    return slices


@given(claims())
def test_jobs_with_the_same_message_share_requests_where_those_take_many_tokens(slices):
    before = places(slices)
    found = coalesce(slices, {"gcm": "key=k", "fcm": "Bearer t"}, {"gcm"})
    assert places(found) == before == places(slices), "nothing is lost, nothing of the claim itself is changed"
    first = [
        (part.upstream, part.message)
        for part in found
        if part.target == "token" and not part.deaths and all(run.attempt == 1 for run in part.runs)
    ]
    assert first.count(("gcm", "{}")) <= 1 and first.count(("gcm", '{"data":{}}')) <= 1
    for part in found:
        assert part.authorization == {"gcm": "key=k", "fcm": "Bearer t"}[part.upstream]
        if len({run.job for run in part.runs}) > 1:
            assert part.upstream == "gcm" and part.target == "token" and part.deaths < FATAL - 1
            assert all(run.attempt == 1 for run in part.runs), "what they shared may have been refused for one of them"


def test_suspects_share_requests_in_small_company_only():
    slices = [Slice("gcm", "token", "{}", [Run(job, 0, 1, ["t"])], 1) for job in range(1, 101)]
    found = coalesce(slices, {"gcm": "key=k"}, {"gcm"})
    assert [part.size for part in found] == [COMPANY, COMPANY, COMPANY, 100 - 3 * COMPANY]
    alone = coalesce([part._replace(deaths=FATAL - 1) for part in slices], {"gcm": "key=k"}, {"gcm"})
    assert [part.size for part in alone] == [1] * 100


@given(claims())
def test_portions_are_small_enough_for_senders_to_share(slices):
    items = list(pack(slices))
    assert places(part for item in items for part in item) == places(slices)
    for item in items:
        assert all(1 <= part.size <= LARGEST_PART for part in item)
        assert sum(part.size for part in item[:-1]) < PACK


def test_small_slices_are_queued_before_large_ones():
    def part(job, size):
        return Slice("fcm", "token", "{}", [Run(job, 0, 1, [f"{job}-{n}" for n in range(size)])])

    order = [each.job for item in pack([part(1, 500), part(2, 3), part(3, 50), part(4, 1)]) for each in item]
    assert order == [2, 4, 1, 3]
