"""turns: what is small does not wait for what is large, large jobs keep half, in their order, and nothing starves."""

import itertools
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message.job import SMALL
from gocm_lib.state.turns import EXPRESS, LANES, SIZES, Credit, bounds, came, lane, lane_of, pick, rank

pytestmark = pytest.mark.short

sizes = st.sampled_from([1, 3, 10, 11, 100, 101, 1000, 1001, 5000])


@given(st.integers(0, LANES - 1), st.integers(1, 1 << 52))
def test_a_rank_says_its_lane_and_when_it_came(which, at):
    low, high = bounds(which)
    assert low <= rank(which, at) < high and lane_of(rank(which, at)) == which
    assert came(rank(which, at)) == at


def test_what_was_there_before_there_were_lanes_is_with_the_largest():
    assert lane_of(12345) == EXPRESS - 1 and bounds(EXPRESS - 1)[0] == 0
    assert [lane(size) for size in (1, SMALL, SMALL + 1, SIZES[-1], 10**6)] == [0, 0, 1, EXPRESS - 2, EXPRESS - 1]


def in_parts(rows):
    """Rows as they are told of: neighbours of a job together."""
    return [list(part) for _, part in itertools.groupby(rows, key=lambda row: row[0])]


class Line:
    """Jobs that wait, and claims of them: what went when."""

    def __init__(self):
        self.lanes = [[] for _ in range(LANES)]
        self.credit = Credit()
        self.sizes = {}
        self.went = defaultdict(list)  # by job: at which claim each token went

    def come(self, size, express=False):
        job, which = len(self.sizes) + 1, EXPRESS if express else lane(size)
        self.sizes[job] = size
        self.lanes[which] += [(job, n, rank(which, job)) for n in range(size)]

    def claim(self, limit, turn):
        waiting = [len(each) for each in self.lanes]
        told = [[(came(rows[0][-1]), len(rows)) for rows in in_parts(each[:limit])] for each in self.lanes]
        counts, self.credit = pick(told, limit, self.credit)
        chosen = [row for each, count in zip(self.lanes, counts) for row in each[:count]]
        assert len(chosen) == len(set(chosen)) == min(limit, sum(waiting)), "nothing twice, and no room left empty"
        for row in chosen:
            self.lanes[lane_of(row[-1])].remove(row)
            self.went[row[0]].append(turn)
        return chosen


arrivals = st.lists(st.tuples(sizes, st.booleans(), st.integers(0, 20)), min_size=1, max_size=12)


@given(arrivals, st.integers(1, 400))
def test_everything_goes_in_order_and_nothing_starves(arrivals, limit):
    line = Line()
    lanes = {}
    for turn in itertools.count():
        for size, express, at in arrivals:
            if at == turn:
                line.come(size, express)
                lanes[len(line.sizes)] = EXPRESS if express else lane(size)
        small, large, express = len(line.lanes[0]), sum(map(len, line.lanes[1:EXPRESS])), len(line.lanes[EXPRESS])
        went = Counter(lanes[job] for job, _, _ in line.claim(limit, turn))
        if limit > 1:
            others = limit - min(express, -(-limit // 2))
            assert went[EXPRESS] >= min(express, limit // 2), "what is express has half if it needs it"
            assert went[0] >= min(small, others // 2), "of the rest small ones have half"
            assert went.total() - went[0] - went[EXPRESS] >= min(large, others // 2), "and large ones"
        if turn > 20 and not any(line.lanes):
            break
    assert {job: len(turns) for job, turns in line.went.items()} == line.sizes
    for which in range(LANES):
        ends = [line.went[job][-1] for job in line.sizes if lanes[job] == which]
        assert ends == sorted(ends), "in the order of arrival"


def test_a_share_holds_for_claims_of_one():
    line = Line()
    for size in (100, *[1] * 40):
        line.come(size)
    went = [line.sizes[line.claim(1, turn)[0][0]] for turn in range(40)]
    assert went.count(1) == went.count(100) == 20


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
def test_what_is_express_takes_half_at_most_and_nobody_waits_for_ever(limit):
    line = Line()
    line.come(2000)
    line.come(2000, express=True)
    for _ in range(2000):
        line.come(1)
    went = Counter(job for turn in range(400 // limit) for job, _, _ in line.claim(limit, turn))
    assert went[2] == pytest.approx(200, abs=limit)
    assert went[1] == pytest.approx(100, abs=2 * limit) and went.total() - went[1] - went[2] == pytest.approx(
        100, abs=2 * limit
    )


def test_what_is_express_goes_first():
    line = Line()
    line.come(100)
    line.come(5)
    line.come(3, express=True)
    line.claim(6, 0)
    assert line.went[3] == [0, 0, 0]
