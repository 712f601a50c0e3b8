"""Turns: which of the waiting tokens go next, so that small jobs do not wait for large ones. Pure.

Jobs are sorted by size into lanes. Half of what may go belongs to jobs of more than SMALL tokens, in the order of their
arrival. The other half goes to the smallest jobs first, lane by lane, and within a lane in the order of arrival. Either
half may use what the other does not need. So a small job waits for other small ones only, large jobs share half of the
pace, and nothing starves: the oldest large job is always next in its half, the oldest small one in the other.

The spool keeps a token's turn in its `rank`: the lane, and the time of arrival. A retry arrives when it is due.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import merge
from itertools import islice
from typing import Any

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


def rank(which: int, came: float) -> float:
    """The rank of a token that arrived in a lane at a time in microseconds. A job's id is such a time."""
    return (LANES - 1 - which) * WIDTH + came


def lane_of(token_rank: float) -> int:
    """The lane of a rank."""
    return LANES - 1 - min(LANES - 1, int(token_rank // WIDTH))


def bounds(which: int) -> tuple[float, float]:
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


def pick(lanes: Sequence[Sequence[tuple[Any, ...]]], limit: int, credit: float) -> tuple[list[tuple[Any, ...]], float]:
    """Up to `limit` of the waiting tokens. The rows end with their rank; there is a list for each lane, in the order of
    ranks, with as many rows as there are up to the limit. `credit` is what large jobs may take (see `save`); what is
    left of it is returned.
    """
    if sum(map(len, lanes)) <= limit:  # mostly: nobody has to wait
        return [row for waiting in lanes for row in waiting], 0.0
    large = [waiting for waiting in lanes[1:] if waiting]
    chosen = list(islice(merge(*large, key=lambda row: came(row[-1])), min(limit, int(credit))))
    credit -= len(chosen)
    taken = Counter(lane_of(row[-1]) for row in chosen)
    for which, waiting in enumerate(lanes):
        chosen += waiting[taken[which] : taken[which] + limit - len(chosen)]
    return chosen, credit if large else 0.0
