"""Turns: which of the waiting tokens go next, so that small jobs do not wait for large ones. Pure.

Jobs are sorted by size into lanes. Half of what may go belongs to jobs of more than SMALL tokens, in the order of their
arrival. The other half goes to the smallest jobs first, lane by lane, and within a lane in the order of arrival. Either
half may use what the other does not need. So a small job waits for other small ones only, large jobs share half of the
pace, and nothing starves: the oldest large job is always next in its half, the oldest small one in the other.

The spool keeps a token's turn in its `rank`: the lane, and the time of arrival. A retry arrives when it is due.
"""

from collections.abc import Sequence
from heapq import merge

from gocm_lib.message.job import SMALL

SIZES = (SMALL, 100, 1000)  # the largest job of each lane but the last
LANES = len(SIZES) + 1
LARGE_SHARE = 0.5  # of the pace, for jobs of more than SMALL tokens
# Between the ranks of two lanes: more than any time in microseconds. The largest jobs have the lowest ranks, among
# which those from before there were lanes are in good company.
WIDTH = 1 << 53


def lane(size: int) -> int:
    """The lane of a job with this many tokens: 0 for the smallest."""
    return sum(size > most for most in SIZES)


def rank(which: int, came: float) -> int:
    """The rank of a token that arrived in a lane at a time in microseconds. A job's id is such a time."""
    return (LANES - 1 - which) * WIDTH + int(came)


def lane_of(token_rank: float) -> int:
    """The lane of a rank."""
    return LANES - 1 - min(LANES - 1, int(token_rank // WIDTH))


def bounds(which: int) -> tuple[int, int]:
    """The lowest rank of a lane, and the first rank above it."""
    return rank(which, 0.0), rank(which - 1, 0.0)


def came(token_rank: float) -> float:
    """The time of arrival of a rank."""
    return token_rank % WIDTH


def save(credit: float, limit: int) -> float:
    """What large jobs may take of the next `limit` tokens: their share, and what was left of the last one, up to a
    token. So the share also holds for claims of one token.
    """
    share = limit * LARGE_SHARE
    return min(credit + share, max(1.0, share))


def pick(lanes: Sequence[Sequence[tuple[float, int]]], limit: int, credit: float) -> tuple[list[int], float]:
    """How many of the waiting tokens go, of each lane. `lanes` say what waits, in order: when some tokens came, and how
    many; as much of each as there is up to the limit. `credit` is what large jobs may take (see `save`); what is left
    of it is returned, too.
    """
    waiting = [sum([count for _, count in lane]) for lane in lanes]
    if sum(waiting) <= limit:  # mostly: nobody has to wait
        return waiting, 0.0
    taken = [0] * len(lanes)
    large = [[(came, which, count) for came, count in lanes[which]] for which in range(1, len(lanes)) if lanes[which]]
    room = min(limit, int(credit))
    for _, which, count in merge(*large):
        taken[which] += min(count, room)
        room -= min(count, room)
        if not room:
            break
    credit -= sum(taken)
    for which in range(len(lanes)):
        taken[which] += min(waiting[which] - taken[which], limit - sum(taken))
    return taken, credit if large else 0.0
