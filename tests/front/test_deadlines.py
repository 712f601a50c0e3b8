"""deadlines: nothing is due before its time or forgotten, and what is gone leaves nothing behind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.front.deadlines import GRAIN, Deadlines

pytestmark = pytest.mark.short

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.floats(0, 20)),
        st.tuples(st.just("drop"), st.integers(0, 5), st.just(0.0)),
        st.tuples(st.just("pass"), st.just(0), st.floats(0, 5)),
    ),
    max_size=40,
)


@given(STEPS)
def test_each_is_due_once_and_within_a_grain_of_its_time(steps):
    deadlines, times, now = Deadlines(), {}, 0.0
    for what, item, number in steps:
        if what == "set":
            times[item] = now + number
            deadlines.set(item, now + number)
        elif what == "drop":
            times.pop(item, None)
            deadlines.drop(item)
        else:
            now += number
            due = deadlines.due(now)
            assert len(due) == len(set(due))
            for each in due:
                assert times.pop(each) <= now
            assert all(when > now - GRAIN - 1e-9 for when in times.values())
        assert len(deadlines) == len(times)
        moment = deadlines.next_moment()
        assert (moment == float("inf")) == (not times)
        if times:
            assert min(times.values()) <= moment + 1e-9 and moment < min(times.values()) + GRAIN + 1e-9


def test_those_that_are_gone_leave_nothing_behind():
    deadlines = Deadlines()
    for item in range(1000):
        deadlines.set(item, item / 7)
        deadlines.drop(item)
    deadlines.next_moment()
    assert not deadlines._grains and not deadlines._order and not deadlines._known
