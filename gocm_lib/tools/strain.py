"""Strain: what the pretend upstream refuses for a while, as Google does on bad days. No sockets; time and chance are
arguments.

There are three kinds, which a sender must tell apart: errors that strike at random, whoever asks; a capacity of the
whole upstream; a quota of one device or topic.
"""

from collections import OrderedDict
from collections.abc import Mapping

BURST = 0.1  # seconds' worth of messages that a capacity takes at once
REMEMBERED = 100_000  # targets whose quotas are kept; of more, those that were not asked for longest are forgotten


class Bucket:
    """A token bucket that begins full: `rate` per second, `depth` at once."""

    def __init__(self, depth: float, now: float) -> None:
        self.level = depth
        self.at = now

    def take(self, count: int, rate: float, depth: float, now: float) -> bool:
        """Take `count`, if the bucket has as many, or is full. Returns whether it did."""
        self.level = min(depth, self.level + max(0.0, now - self.at) * rate)
        self.at = now
        if self.level < min(count, depth):
            return False
        self.level -= count
        return True


class Strain:
    """The buckets of a pretend upstream. Each call tells their size, because the mode may change in between."""

    def __init__(self) -> None:
        self._capacity: Bucket | None = None
        self._quotas: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    @staticmethod
    def strike(errors: Mapping[str, float], draw: float) -> str:
        """The kind of error that strikes a request, or "". `errors` has the share of each kind, `draw` is chance, 0 to
        1.
        """
        for kind, share in errors.items():
            if draw < share:
                return kind
            draw -= share
        return ""

    def overloads(self, count: int, capacity: float, now: float) -> bool:
        """Whether `count` messages are too much for an upstream that takes `capacity` per second."""
        depth = max(1.0, capacity * BURST)
        if self._capacity is None:
            self._capacity = Bucket(depth, now)
        return not self._capacity.take(count, capacity, depth, now)

    def exhausts(self, kind: str, target: str, a_minute: float, now: float) -> bool:
        """Whether a message is one too many for its target, a `kind` that takes `a_minute`."""
        bucket = self._quotas.pop((kind, target), None) or Bucket(a_minute, now)
        self._quotas[kind, target] = bucket  # the latest last
        if len(self._quotas) > REMEMBERED:
            self._quotas.popitem(last=False)
        return not bucket.take(1, a_minute / 60, a_minute, now)
