"""turns: what is small does not wait for what is large, large jobs keep half, in their order, and nothing starves."""

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message.job import SMALL
from gocm_lib.state.turns import LANES, SIZES, bounds, came, lane, lane_of, pick, rank, save

pytestmark = pytest.mark.short

sizes = st.sampled_from([1, 3, 10, 11, 100, 101, 1000, 1001, 5000])


@given(st.integers(0, LANES - 1), st.integers(1, 1 << 52))
def test_a_rank_says_its_lane_and_when_it_came(which, at):
    low, high = bounds(which)
    assert low <= rank(which, at) < high and lane_of(rank(which, at)) == which
    assert came(rank(which, at)) == at


def test_what_was_there_before_there_were_lanes_is_with_the_largest():
    assert lane_of(12345) == LANES - 1 and bounds(LANES - 1)[0] == 0
    assert [lane(size) for size in (1, SMALL, SMALL + 1, SIZES[-1], 10**6)] == [0, 0, 1, LANES - 2, LANES - 1]


def in_parts(rows):
    """Rows as they are told of: neighbours of a job together."""
    return [list(part) for _, part in itertools.groupby(rows, key=lambda row: row[0])]


class Line:
    """Jobs that wait, and claims of them: what went when."""

    def __init__(self):
        self.lanes = [[] for _ in range(LANES)]
        self.credit = 0.0
        self.sizes = {}
        self.went = defaultdict(list)  # by job: at which claim each token went

    def come(self, size):
        job = len(self.sizes) + 1
        self.sizes[job] = size
        self.lanes[lane(size)] += [(job, n, rank(lane(size), job)) for n in range(size)]

    def claim(self, limit, turn):
        waiting = [len(each) for each in self.lanes]
        told = [[(came(rows[0][-1]), len(rows)) for rows in in_parts(each[:limit])] for each in self.lanes]
        counts, self.credit = pick(told, limit, save(self.credit, limit))
        chosen = [row for each, count in zip(self.lanes, counts) for row in each[:count]]
        assert len(chosen) == len(set(chosen)) == min(limit, sum(waiting)), "nothing twice, and no room left empty"
        for row in chosen:
            self.lanes[lane_of(row[-1])].remove(row)
            self.went[row[0]].append(turn)
        return chosen


@given(st.lists(st.tuples(sizes, st.integers(0, 20)), min_size=1, max_size=12), st.integers(1, 400))
def test_everything_goes_in_order_and_nothing_starves(arrivals, limit):
    line = Line()
    for turn in itertools.count():
        for size, at in arrivals:
            if at == turn:
                line.come(size)
        small, large = len(line.lanes[0]), sum(map(len, line.lanes[1:]))
        chosen = line.claim(limit, turn)
        went = sum(line.sizes[job] <= SMALL for job, _, _ in chosen)
        if limit > 1:
            assert went >= min(small, limit // 2), "small ones have half if they need it"
            assert len(chosen) - went >= min(large, limit // 2), "and large ones"
        if turn > 20 and not any(line.lanes):
            break
    assert {job: len(turns) for job, turns in line.went.items()} == line.sizes
    for which in range(LANES):
        ends = [line.went[job][-1] for job, size in line.sizes.items() if lane(size) == which]
        assert ends == sorted(ends), "in the order of arrival"


def test_a_share_holds_for_claims_of_one():
    line = Line()
    for size in (100, *[1] * 40):
        line.come(size)
    went = [line.sizes[line.claim(1, turn)[0][0]] for turn in range(40)]
    assert went.count(1) == went.count(100) == 20
