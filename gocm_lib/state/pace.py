"""Pace: how fast an upstream may be sent to, and when one that takes nothing is asked again. Pure.

The pace follows the *share* of answers that say "not now", not their presence: on a good day FCM gives a few in a
thousand. When the share is more than chance explains, the upstream has shown what it can take: what it took. The rate
becomes that and a little more (the adaptive throttling of Google's SRE book, chapter 21). While nothing is refused the
rate grows again, gently at first, then doubling each second. When a cut lowered what was taken, but not the share that
was refused, the refusals have nothing to do with the pace, and the rate is restored.

An upstream that nobody gets through to is paused, and probed with one token at a time.
"""

import math
from typing import NamedTuple

from gocm_lib.message.outcome import Outcome, Verdict
from gocm_lib.state.contract import Pause

RAMP = 60.0  # seconds from a start to the full rate: Google's page on scaling FCM asks for 60 at least
FIRST_SHARE = 0.1  # of the limit, allowed at once
BURST = 0.05  # seconds' worth of messages that may go at once: smooth within the second
SLOWEST = 1.0  # messages a second

ENOUGH = 50  # answers that make a share, and how long they are gathered for:
WINDOW, LONGEST_WINDOW = 0.5, 5.0  # seconds at least, and at most
TOLERATED = 0.08  # share of refusals that costs nobody anything; twice its standard deviation is chance
QUIET = 0.06  # share above which the rate does not grow
HEADROOM = 1.1  # over what was taken, to find out whether more would be: so some 9 % are refused meanwhile
GENTLE, STEADY = 1.1, 3.0  # growth a second, for so many seconds after refusals; then it doubles each second
STRIDE = 1.5  # growth from one look at the share of refusals to the next: further would be blind
USELESS_BELOW = 0.95  # share of refusals up to which cuts that did not help are taken back,
USELESS_FOR = 30.0  # and for how many seconds no other is made
EPISODE = 10.0  # seconds: cuts that follow each other within them have one cause
LATE = 30.0  # seconds after a cut: what left before it has been answered, or never will be


class Cut(NamedTuple):
    """The first of a series of cuts: the rate before it, the share that was refused, how many per second were taken."""

    rate: float
    share: float
    taken: float


class Pace(NamedTuple):
    """A token bucket whose rate ramps up, is cut, and recovers. `limit` and `rate` are messages a second, `credit`
    messages that may go now, `began` when the ramp did. `taken` and `refused` are answers since `since`; `stale` how
    many answers are still to come to what left before the last change of the rate, at `cut_at`. Since `rough_at` no
    more than a few were refused; it does not grow until that `is_quiet`. `judged` was the rate when answers were last
    looked at, at `judged_at`. Until `deaf_until` no cut is made.
    """

    limit: float
    rate: float
    credit: float
    began: float
    at: float
    taken: int = 0
    refused: int = 0
    since: float = 0.0
    stale: int = 0
    cut_at: float = -math.inf
    first: Cut = Cut(0.0, 0.0, 0.0)
    rough_at: float = -math.inf
    is_quiet: bool = True
    judged: float = 0.0
    judged_at: float = -math.inf
    deaf_until: float = -math.inf


def start_pace(limit: float, now: float) -> Pace:
    """The pace after a start: a share of the limit, growing to all of it over RAMP seconds."""
    rate = max(SLOWEST, limit * FIRST_SHARE)
    return Pace(limit, rate, max(1.0, rate * BURST), now, now)


def resume(pace: Pace, now: float) -> Pace:
    """The pace after a pause: a share of what it may be, doubling each second, because nothing is known against it."""
    pace = advance(pace, now)
    rate = max(SLOWEST, _ceiling(pace, now) * FIRST_SHARE)
    return Pace(pace.limit, rate, min(max(1.0, rate * BURST), pace.credit + 1.0), pace.began, now)


def advance(pace: Pace, now: float) -> Pace:
    """The pace at `now`, with the growth and the credit of the time that has passed."""
    passed = max(0.0, now - pace.at)
    growing = passed if pace.is_quiet else min(passed, max(0.0, now - pace.rough_at - LONGEST_WINDOW))
    gentle = min(growing, max(0.0, pace.rough_at + STEADY - now + growing))
    rate = pace.rate * GENTLE**gentle * 2.0 ** min(growing - gentle, 64.0)
    if now < pace.judged_at + LONGEST_WINDOW:
        rate = min(rate, max(pace.rate, pace.judged * STRIDE))
    rate = min(rate, _ceiling(pace, now))
    credit = min(max(1.0, rate * BURST), pace.credit + passed * rate)
    return pace._replace(rate=rate, credit=credit, at=now)


def _ceiling(pace: Pace, now: float) -> float:
    share = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * max(0.0, now - pace.began) / RAMP)
    return max(SLOWEST, pace.limit * share)


def spend(pace: Pace, count: int) -> Pace:
    """The pace after `count` messages were sent."""
    return pace._replace(credit=pace.credit - count)


def until_credit(pace: Pace) -> float:
    """Seconds until messages may go; a handful of them rather than one."""
    return max(0.0, max(1.0, min(4.0, pace.rate * BURST)) - pace.credit) / pace.rate


def heard(pace: Pace, taken: int, refused: int, in_hand: int, now: float) -> Pace:
    """The pace after `taken` messages were taken and `refused` were refused through no fault of their own, while this
    many are still in flight.
    """
    if pace.stale and now < pace.cut_at + LATE:
        return pace._replace(stale=max(0, pace.stale - taken - refused))
    if not pace.taken + pace.refused:
        pace = pace._replace(since=now)
    pace = pace._replace(taken=pace.taken + taken, refused=pace.refused + refused, stale=0)
    answers, age = pace.taken + pace.refused, now - pace.since
    if 0 <= age < WINDOW or (0 <= age < LONGEST_WINDOW and answers < ENOUGH):
        return pace
    share = pace.refused / answers
    chance = 2 * math.sqrt(TOLERATED * (1 - TOLERATED) / answers)
    judged = advance(pace, now)._replace(taken=0, refused=0, is_quiet=share <= QUIET)
    if share > TOLERATED + chance:
        judged = _cut(judged, share, pace.taken / max(age, WINDOW), in_hand, now)
    rough_at = judged.rough_at if share <= QUIET else now
    return judged._replace(rough_at=rough_at, judged=judged.rate, judged_at=now)


def _cut(pace: Pace, share: float, taken: float, in_hand: int, now: float) -> Pace:
    """The pace after this share was refused, while `taken` messages per second were taken."""
    first = pace.first if now - pace.cut_at < EPISODE or now < pace.deaf_until else Cut(pace.rate, share, taken)
    if now < pace.deaf_until:
        if taken > first.taken * 1.1 or pace.rate < first.rate:  # more when it was restored: it was right
            return pace._replace(is_quiet=True)
        first = Cut(pace.rate, share, taken)
    elif share <= USELESS_BELOW and share > 0.8 * first.share and taken < 0.85 * first.taken:
        low = Cut(first.rate, share, taken)
        return pace._replace(
            rate=first.rate, first=low, stale=in_hand, cut_at=now, deaf_until=now + USELESS_FOR, is_quiet=True
        )
    if share < 0.8 * first.share:
        first = Cut(pace.rate, share, taken)
    rate = max(SLOWEST, min(pace.rate, HEADROOM * taken))
    credit = min(pace.credit, max(1.0, rate * BURST))
    return pace._replace(
        rate=rate, credit=credit, stale=in_hand, cut_at=now, first=first, deaf_until=-math.inf, is_quiet=False
    )


def slow(pace: Pace, rate: float, now: float) -> Pace:
    """The pace after somebody else who shares the upstream was refused too much, and slowed down to this rate."""
    pace, rate = advance(pace, now), max(SLOWEST, rate)
    if rate >= pace.rate:
        return pace
    return pace._replace(rate=rate, credit=min(pace.credit, max(1.0, rate * BURST)), rough_at=now)


# ------------------------------------------------------------------------------------------------------------- pauses


LONGEST_PAUSE = 30.0  # seconds
# Seconds: the first pause, and the longest while it is not away for long. What answers, or cannot be reached, is asked
# so often that its return is seen within five seconds; but one that has been away for long more seldom. A wrong key
# stays wrong until somebody edits it, and asking too often can get a server blocked; a message to an upstream that is
# silent may be one more push on somebody's phone each time.
PAUSES = {
    "answers": (1.0, 5.0),
    "unreachable": (1.0, 5.0),
    "silent": (2.0, LONGEST_PAUSE),
    "refuses": (2.0, LONGEST_PAUSE),
}
PATIENCE = 0.05  # of the time that an upstream has been away: so long, or as above, until it is asked again


def manner(outcome: Outcome) -> str:
    """How an upstream behaves that nobody gets through to: one of PAUSES."""
    if outcome.verdict is Verdict.UPSTREAM_CONFIG:
        return "refuses"
    if outcome.verdict is Verdict.UNREACHABLE:
        return "unreachable"
    return "silent" if outcome.may_be_taken else "answers"


def pause(previous: Pause | None, outcome: Outcome, now: float) -> Pause:
    """The pause after trouble that everybody has, or the longer one when the probe of the `previous` pause met trouble
    again. An upstream that says when to come again is not asked before, unless it asks for too much. When it behaves in
    another manner than before, something has changed, and it is asked again soon.
    """
    how = manner(outcome)
    first, longest = PAUSES[how]
    since = previous.since if previous and previous.since <= now else now
    longest = min(LONGEST_PAUSE, max(longest, PATIENCE * (now - since)))
    delay = first
    if previous and previous.manner == how:
        delay = min(max(previous.delay * 2, first), longest)
    wait = max(delay, min(outcome.retry_after or 0.0, LONGEST_PAUSE))
    return Pause(outcome.reason, now, delay, now + wait, since, manner=how, cause=outcome.cause)


def prolong(paused: Pause, now: float) -> Pause:
    """The pause after a probe whose job may itself be at fault. It tells little, so the pause is as long as before; but
    an upstream that has been away for long is asked less often all the same.
    """
    delay = max(paused.delay, min(LONGEST_PAUSE, PATIENCE * (now - paused.since)))
    return paused._replace(until=now + delay, probe=0)
