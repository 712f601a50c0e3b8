"""Turns: which of the waiting tokens go next, so that what is small does not wait for what is large. Pure.

Jobs are sorted by size into lanes. Half of what may go belongs to the jobs of more than SMALL tokens, in the order of
their arrival; the other half goes to the smallest first, lane by lane, in each in the order of arrival. What one half
does not need is the other's. So a small job waits for other small ones only, large ones keep half of the pace between
them, and nothing starves: the oldest large job is always the next in its half, the oldest small one in the other.

A token's turn stands in its `rank`, which the spool keeps: its lane, and when it came. A retry comes when it is due.
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
    """The lane of a job with so many tokens: 0 for the smallest."""
    return sum(size > most for most in SIZES)


def rank(which: int, came: float) -> float:
    """The rank of a token in a lane that came at a time in microseconds: a job's id is one."""
    return (LANES - 1 - which) * WIDTH + came


def lane_of(token_rank: float) -> int:
    """The lane that a rank is in."""
    return LANES - 1 - min(LANES - 1, int(token_rank // WIDTH))


def bounds(which: int) -> tuple[float, float]:
    """The lowest rank of a lane, and the first above it."""
    return rank(which, 0.0), rank(which - 1, 0.0)


def came(token_rank: float) -> float:
    """When a token of this rank came."""
    return token_rank % WIDTH


def save(credit: float, limit: int) -> float:
    """What the large jobs may take of the next `limit` tokens: their share, and what is left of an earlier one, up to
    a token, so that the share holds for claims of one token, too.
    """
    share = limit * LARGE_SHARE
    return min(credit + share, max(1.0, share))


def pick(lanes: Sequence[Sequence[tuple[Any, ...]]], limit: int, credit: float) -> tuple[list[tuple[Any, ...]], float]:
    """Up to `limit` of the tokens that wait: rows that end with their ranks, by lane, in each in the order of the ranks
    and as many as there are up to the limit. `credit` is what the large jobs may take (see `save`); what is left of it
    comes back.
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
