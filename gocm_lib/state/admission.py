"""What is too much for the spool, and when to come again. Pure: `now` is an argument.

GoCM grows to its limits and no further. Over them it refuses a message at once, with the seconds until there will be
room at the current rate of sending, and goes on sending what it holds.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from gocm_lib.state.contract import Refused

Row = TypeVar("Row", bound=tuple[Any, ...])

HALF_LIFE = 10.0  # seconds after which what went out counts half in the rate
SOONEST, LATEST = 1, 600  # seconds that we ask a client to wait, however empty or stuck the spool is
PAGE = 8 * 1024 * 1024  # bytes of text in a page: 50,000 tokens of today's length
DISK_WAIT = 30  # seconds to wait for a disk that others filled: nobody knows when that ends


class Limits(NamedTuple):
    """How many tokens may be pending, how many bytes the spool may hold, how many bytes must stay free on its disk. The
    room for pending tokens is shared by `upstreams`, so that those that are down cannot fill that of the others.
    """

    pending: int
    spool: int
    free_disk: int
    upstreams: int = 1

    @property
    def share(self) -> int:
        """How many tokens of one upstream may be pending: all, or half, if there are others."""
        return self.pending // min(self.upstreams, 2)

    @property
    def reserve(self) -> int:
        """How many of them each upstream may have whatever the others do: where there are several, as much as is left
        when one of them has its share.
        """
        return self.pending // max(1, 2 * self.upstreams - 2)


class Keeping(NamedTuple):
    """How much is kept, and for how long: the limits of what is pending; seconds and number of failed tokens; entries
    in each list of the report; seconds and number of tokens of what is over; number of Idempotency-Keys.
    """

    limits: Limits
    failed_age: float
    max_failed: int
    max_report: int
    keep_jobs: float
    max_kept: int
    max_keys: int
    hold_waves: bool = False


class Usage(NamedTuple):
    """The pending tokens, the bytes in the spool, the free bytes on its disk; how many of the pending tokens are for
    the upstream in question; and how many more are `reserved` for others.
    """

    pending: int
    spool: int
    free_disk: int
    of_upstream: int
    reserved: int = 0


class Drain(NamedTuple):
    """A decaying count of the tokens that ended, and the time at which it held."""

    recent: float
    at: float


def drained(drain: Drain, count: int, now: float) -> Drain:
    """The Drain after `count` more tokens ended."""
    passed = max(0.0, now - drain.at)
    return Drain(drain.recent * 0.5 ** (passed / HALF_LIFE) + count, now)


def drain_rate(drain: Drain, now: float) -> float:
    """How many tokens end per second."""
    # A steady r a second sums up to r * HALF_LIFE / ln 2.
    return drained(drain, 0, now).recent * math.log(2) / HALF_LIFE


def page(rows: Iterable[Row]) -> list[Row]:
    """The rows that fit into one answer: PAGE bytes of text, but at least one row."""
    found: list[Row] = []
    size = 0
    for row in rows:
        size += sum(len(column) for column in row if isinstance(column, str))
        if found and size > PAGE:
            break
        found.append(row)
    return found


def wait_for_room(excess: int, rate: float) -> int:
    """Seconds until `excess` tokens have ended at `rate` tokens a second, as a Retry-After."""
    return LATEST if excess > rate * LATEST else max(SOONEST, math.ceil(excess / rate)) if excess > 0 else SOONEST


def refuse(tokens: int, usage: Usage, limits: Limits, rate: float) -> Refused | None:
    """Why a message for this many tokens is too much, given what the spool holds. None: it may come in."""
    if usage.free_disk < limits.free_disk:
        return Refused(507, "the disk under the spool is nearly full: nothing is taken until there is room", DISK_WAIT)
    if usage.spool > limits.spool and not usage.pending:
        return Refused(507, "no room below --max-spool; failed tokens take some until replayed or discarded", DISK_WAIT)
    if usage.spool > limits.spool:
        # It shrinks as messages go out; how much room each leaves is not known, so wait for a tenth of them.
        return Refused(507, "the spool is at --max-spool", wait_for_room(usage.pending // 10, rate))
    excess = max(usage.of_upstream + tokens - limits.share, usage.pending + usage.reserved + tokens - limits.pending)
    if excess <= 0:
        return None
    shared = f" shared by {limits.upstreams} upstreams" if limits.upstreams > 1 else ""
    reason = f"{usage.of_upstream} tokens are pending, at most --max-pending{shared}"
    return Refused(503, reason, wait_for_room(excess, rate))
