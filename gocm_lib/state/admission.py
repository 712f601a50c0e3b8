"""What is too much for the spool, and when to come again. Pure: `now` is an argument.

GoCM grows to its limits and no further: over them it refuses at once, with the seconds after which there will be room
at the rate at which messages go out, and goes on sending what it holds.
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
    """How many tokens may be pending, how many bytes the spool may hold, how many must stay free on its disk; over how
    many upstreams the first is divided, so that the dead one of two does not fill the room of the other.
    """

    pending: int
    spool: int
    free_disk: int
    upstreams: int = 1

    @property
    def share(self) -> int:
        """How many tokens of one upstream may be pending."""
        return self.pending // self.upstreams


class Usage(NamedTuple):
    """What there is of each: pending tokens, bytes in the spool, bytes free on its disk; and how many of the pending
    tokens are of the upstream that is asked for.
    """

    pending: int
    spool: int
    free_disk: int
    of_upstream: int


class Drain(NamedTuple):
    """How fast tokens come to their end: a moving sum, and of when it is."""

    recent: float
    at: float


def drained(drain: Drain, count: int, now: float) -> Drain:
    """The drain after `count` more tokens came to their end."""
    passed = max(0.0, now - drain.at)
    return Drain(drain.recent * 0.5 ** (passed / HALF_LIFE) + count, now)


def drain_rate(drain: Drain, now: float) -> float:
    """Tokens a second that come to their end."""
    # A steady r a second sums up to r * HALF_LIFE / ln 2.
    return drained(drain, 0, now).recent * math.log(2) / HALF_LIFE


def page(rows: Iterable[Row]) -> list[Row]:
    """As many rows as an answer may have: texts of PAGE bytes together, but one row at least."""
    found: list[Row] = []
    size = 0
    for row in rows:
        size += sum(len(column) for column in row if isinstance(column, str))
        if found and size > PAGE:
            break
        found.append(row)
    return found


def wait_for_room(excess: int, rate: float) -> int:
    """Seconds until `excess` tokens have gone at `rate` tokens a second, as a Retry-After."""
    return LATEST if excess > rate * LATEST else max(SOONEST, math.ceil(excess / rate)) if excess > 0 else SOONEST


def refuse(tokens: int, usage: Usage, limits: Limits, rate: float) -> Refused | None:
    """Whether a message for so many tokens is too much, with what the spool holds already. None: it may come in."""
    if usage.free_disk < limits.free_disk:
        return Refused(507, "the disk under the spool is nearly full: nothing is taken until there is room", DISK_WAIT)
    if usage.spool > limits.spool and not usage.pending:
        return Refused(507, "no room below --max-spool; failed tokens take some until replayed or discarded", DISK_WAIT)
    if usage.spool > limits.spool:
        # It shrinks as messages go out; how much room each leaves is not known, so wait for a tenth of them.
        return Refused(507, "the spool is at --max-spool", wait_for_room(usage.pending // 10, rate))
    excess = usage.of_upstream + tokens - limits.share
    if excess <= 0:
        return None
    shared = f" shared by {limits.upstreams} upstreams" if limits.upstreams > 1 else ""
    reason = f"{usage.of_upstream} tokens are pending, at most --max-pending{shared}"
    return Refused(503, reason, wait_for_room(excess, rate))
