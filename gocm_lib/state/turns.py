"""Turns: which of the waiting tokens go next, so that small jobs do not wait for large ones. Pure.

Jobs are sorted by size into lanes; those that are sent express have one of their own. Up to half of what may go belongs
to those, before all others. Of the rest half belongs to jobs of more than SMALL tokens, in the order of their arrival;
the other half goes to the smallest jobs first, lane by lane, and within a lane in the order of arrival. Each may use
what the others do not need. So a small job waits for other small ones only, large jobs share half of the pace, and
nothing starves: the oldest large job is always next in its half, the oldest small one in the other.

The spool keeps a token's turn in its `rank`: the lane, and the time of arrival. A retry arrives when it is due.
"""

from collections.abc import Sequence
from heapq import merge
from typing import NamedTuple

from gocm_lib.message.job import SMALL

SIZES = (SMALL, 100, 1000)  # the largest job of each lane but the last of those that are sorted by size
EXPRESS = len(SIZES) + 1  # the lane of what is sent express, whatever its size
LANES = EXPRESS + 1
LARGE_SHARE = 0.5  # of the pace, for jobs of more than SMALL tokens
EXPRESS_SHARE = 0.5  # of the pace, for what is sent express
# Between the ranks of two lanes: more than any time in microseconds. The largest jobs have the lowest ranks, among
# which those from before there were lanes are in good company.
WIDTH = 1 << 53
LESS_THAN_ONE = 1 - 1e-9


class Credit(NamedTuple):
    """What large jobs, and those that are sent express, have left of their shares."""

    large: float = 0.0
    express: float = 0.0


def later(which: int) -> int:
    """The lane of a pack that waits for its time, before which nobody looks at it; and of that lane the first one."""
    return -1 - which


def lane(size: int) -> int:
    """The lane of a job with this many tokens that is not sent express: 0 for the smallest."""
    return sum(size > most for most in SIZES)


def _floor(which: int) -> int:
    """The lowest rank of a lane, in WIDTHs. It is its own inverse."""
    return which if which == EXPRESS else EXPRESS - 1 - which


def rank(which: int, came: float) -> int:
    """The rank of a token that arrived in a lane at a time in microseconds. A job's id is such a time."""
    return _floor(which) * WIDTH + int(came)


def lane_of(token_rank: float) -> int:
    """The lane of a rank."""
    return _floor(min(EXPRESS, int(token_rank // WIDTH)))


def bounds(which: int) -> tuple[int, int]:
    """The lowest rank of a lane, and the first rank above it."""
    return rank(which, 0.0), rank(which, 0.0) + WIDTH


def came(token_rank: float) -> float:
    """The time of arrival of a rank."""
    return token_rank % WIDTH


def _saved(credit: float, share: float) -> float:
    """What may be taken of a share, and of what was left of the last one, but for whole tokens: so that a share also
    holds for claims of one token, and nobody saves up.
    """
    return min(credit, LESS_THAN_ONE) + share


def pick(lanes: Sequence[Sequence[tuple[float, int]]], limit: int, credit: Credit) -> tuple[list[int], Credit]:
    """How many of the waiting tokens go, of each lane. `lanes` say what waits, in order: when some tokens came, and how
    many; as much of each as there is up to the limit. `credit` is what was left of shares the last time; what is left
    now is returned, too.
    """
    waiting = [sum([count for _, count in lane]) for lane in lanes]
    if sum(waiting) <= limit:  # mostly: nobody has to wait
        return waiting, Credit()
    taken = [0] * len(lanes)
    express = _saved(credit.express, limit * EXPRESS_SHARE)
    taken[EXPRESS] = min(waiting[EXPRESS], int(express), limit)
    rest = limit - taken[EXPRESS]
    of_large = _saved(credit.large, rest * LARGE_SHARE)
    large = [[(came, which, count) for came, count in lanes[which]] for which in range(1, EXPRESS) if lanes[which]]
    room = min(rest, int(of_large))
    for _, which, count in merge(*large):
        taken[which] += min(count, room)
        room -= min(count, room)
        if not room:
            break
    left = Credit(
        of_large - sum(taken[1:EXPRESS]) if large else 0.0, express - taken[EXPRESS] if waiting[EXPRESS] else 0.0
    )
    for which in range(len(lanes)):
        taken[which] += min(waiting[which] - taken[which], limit - sum(taken))
    return taken, left
