"""Waves of unregistered tokens: when an upstream calls so many of them dead that somebody should look first. Pure.

An application deletes what the list of unregistered tokens has, and cannot undo it. A wrong APNs environment, a
mixed-up credential or a fault of Google's makes good tokens look unregistered, all at once (firebase-ios-sdk #2438,
flutterfire #17602). So a share of such answers that leaves its usual is told before it is believed.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

BUCKET = 60.0  # seconds that are counted together
RECENT, BEFORE = 10, 1440  # buckets: ten minutes, and the day before them
LEAST = 100  # answers in the ten minutes: fewer say nothing
MOST = 2  # a wave is more than one in so many of them,
TIMES = 10  # and at least so many times the share of the day before


class Tally(NamedTuple):
    """Answers that were about a token, and how many of them called it unregistered."""

    answers: int
    unregistered: int


def minute(now: float) -> int:
    """The number of a minute since 1970."""
    return int(now // BUCKET)


def is_wave(recent: Tally, before: Tally) -> bool:
    """Whether the answers of the last ten minutes are a wave, after those of the day before."""
    if recent.answers < LEAST or recent.unregistered * MOST <= recent.answers:
        return False
    return recent.unregistered * before.answers >= TIMES * before.unregistered * recent.answers


def is_over(recent: Tally) -> bool:
    """Whether these are none any more: well below what begins one, or it would begin and end with each answer."""
    return recent.answers < LEAST or recent.unregistered * 2 * MOST <= recent.answers


class Bucket(NamedTuple):
    """The answers of a minute: its number since 1970, how many there were, and the number of the first entry that came
    of them in the list (0: none did).
    """

    number: int
    tally: Tally
    first: int


class Watch:
    """The answers of one upstream in the last day, and whether they are a wave. It goes on with what was kept of it."""

    def __init__(self, kept: Iterable[Bucket] = ()) -> None:
        self._buckets = deque(kept)
        self._usual = (-1, Tally(0, 0))  # the day before the ten minutes that end with this bucket
        self.since = 0.0  # when the wave began; 0: there is none
        if self._buckets:
            self.look(self._buckets[-1].number * BUCKET)

    @property
    def newest(self) -> int:
        """The last minute with answers; -1: there were none."""
        return self._buckets[-1].number if self._buckets else -1

    def hear(self, heard: Tally, first: int, now: float) -> None:
        """Count answers, of which the unregistered ones were listed from entry number `first` on (0: none was)."""
        number = minute(now)
        if self._buckets and self._buckets[-1].number >= number:  # a clock that was set back counts on in the last
            last = self._buckets[-1]
            self._buckets[-1] = Bucket(last.number, _sum([last.tally, heard]), last.first or first)
            return
        self._buckets.append(Bucket(number, heard, first))
        while self._buckets[0].number <= number - RECENT - BEFORE:
            self._buckets.popleft()

    def look(self, now: float) -> bool:
        """Whether there is a wave now that was not there, or is none that was there."""
        number = max(minute(now), self.newest)
        if self._usual[0] != number:
            self._usual = number, _sum(each.tally for each in self._buckets if each.number <= number - RECENT)
        recent = self.recent(now)
        there = not is_over(recent) if self.since else is_wave(recent, self._usual[1])
        if there == bool(self.since):
            return False
        self.since = now if there else 0.0
        return True

    def recent(self, now: float) -> Tally:
        """The answers of the last ten minutes."""
        return _sum(each.tally for each in self._recent(now))

    def first(self, now: float) -> int:
        """The number of the first entry of the last ten minutes; 0: there is none."""
        return min((each.first for each in self._recent(now) if each.first), default=0)

    def _recent(self, now: float) -> list[Bucket]:
        number = max(minute(now), self.newest)
        found = []
        for each in reversed(self._buckets):
            if each.number <= number - RECENT:
                break
            found.append(each)
        return found


def _sum(tallies: Iterable[Tally]) -> Tally:
    answers = unregistered = 0
    for tally in tallies:
        answers, unregistered = answers + tally.answers, unregistered + tally.unregistered
    return Tally(answers, unregistered)
