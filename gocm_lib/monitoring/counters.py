"""Counters and histograms, also those that a sender keeps in shared memory.

A sender counts in shared memory that only it writes; the front reads it when somebody asks. So counting needs no
message and no lock, and what a killed sender has counted is still there. A reader may see an answer counted before its
time.
"""

from bisect import bisect_left
from collections.abc import Iterable, MutableSequence, Sequence
from typing import NamedTuple

# Seconds. Upstreams answer in 150 to 250 ms; a message waits for its turn, a pause or a quota; clients for an fsync.
LATENCY = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
WAIT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0)
REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

# What an upstream can answer; "none" is a connection that broke, or was silent for too long.
CODES = ("200", "400", "401", "403", "404", "413", "429", "500", "502", "503", "504", "other", "none")
_CODES = {int(code): place for place, code in enumerate(CODES) if code.isdigit()}
_OTHER, _NONE = CODES.index("other"), CODES.index("none")


class Histogram:
    """How many values were at most each bound, and the sum of all. Only one thread may write."""

    def __init__(self, bounds: Sequence[float], counts: Iterable[float] = (), total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = list(counts) or [0.0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def quantile(self, q: float) -> float | None:
        """An estimate of the value that a share `q` of the values does not exceed, like Prometheus's
        histogram_quantile: values are taken as evenly spread within a bucket, and never above the highest bound. None:
        there are no values.
        """
        rank, below, low = q * sum(self.counts), 0.0, 0.0
        if not rank:
            return None
        for count, high in zip(self.counts, self.bounds):
            if below + count >= rank:
                return min(high, low + (high - low) * (rank - below) / count)  # rounding
            below, low = below + count, high
        return low


class Answers(NamedTuple):
    """The answers of one upstream: how often each code, how fast, and when it last answered 200 (0: never)."""

    codes: dict[str, float]
    latency: Histogram
    succeeded_at: float


_SUM = len(CODES) + len(LATENCY) + 1  # a cell after the codes' and the buckets'
_SUCCESS = _SUM + 1
_WIDTH = _SUCCESS + 1


def cells(upstreams: int) -> int:
    """How many cells the counters of a sender with this many upstreams need."""
    return _WIDTH * upstreams


class Counters:
    """Counts the answers that one sender gets, in cells that it is given."""

    def __init__(self, cells: MutableSequence[float], upstreams: Sequence[str]) -> None:
        self._cells = cells
        self._starts = {name: place * _WIDTH for place, name in enumerate(upstreams)}

    def answered(self, upstream: str, status: int, seconds: float, now: float) -> None:
        """Count an answer that took this long and came at `now`."""
        start = self._starts[upstream]
        self._cells[start + _CODES.get(status, _OTHER)] += 1
        self._cells[start + len(CODES) + bisect_left(LATENCY, seconds)] += 1
        self._cells[start + _SUM] += seconds
        if status == 200:
            self._cells[start + _SUCCESS] = now

    def unanswered(self, upstream: str) -> None:
        """Count a request that was not answered."""
        self._cells[self._starts[upstream] + _NONE] += 1


def add_up(counted: Iterable[Sequence[float]], upstreams: Sequence[str]) -> list[float]:
    """The cells of many senders added up."""
    total = [0.0] * cells(len(upstreams))
    for each in counted:
        for place, value in enumerate(each):
            latest = place % _WIDTH == _SUCCESS
            total[place] = max(total[place], value) if latest else total[place] + value
    return total


def read(cells: Sequence[float], upstreams: Sequence[str]) -> dict[str, Answers]:
    """The Answers in the cells, by upstream."""
    found = {}
    for place, name in enumerate(upstreams):
        part = cells[place * _WIDTH : (place + 1) * _WIDTH]
        buckets = Histogram(LATENCY, part[len(CODES) : _SUM], part[_SUM])
        found[name] = Answers(dict(zip(CODES, part)), buckets, part[_SUCCESS])
    return found
