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


# How connections end by HTTP/2's GOAWAY, and what they speak.
GOAWAYS = {0: "NO_ERROR", 1: "PROTOCOL_ERROR", 11: "ENHANCE_YOUR_CALM"}
GOAWAY_CODES = (*GOAWAYS.values(), "other")
PROTOCOLS = ("http/1.1", "h2")


class Answers(NamedTuple):
    """The answers of one upstream: how often each code, how fast, and when it last answered 200 (0: never). Then its
    connections: how many of each protocol, requests in flight on them, GOAWAYs by code, refused streams, and requests
    that were sent again because nobody had looked at them.
    """

    codes: dict[str, float]
    latency: Histogram
    succeeded_at: float
    connections: dict[str, float]
    in_flight: float
    goaways: dict[str, float]
    refused: float
    repeated: float


# One cell after the other: the codes', the buckets', and
_SUM = len(CODES) + len(LATENCY) + 1
_SUCCESS = _SUM + 1
_CONNECTIONS = _SUCCESS + 1
_IN_FLIGHT = _CONNECTIONS + len(PROTOCOLS)
_GOAWAYS = _IN_FLIGHT + 1
_REFUSED = _GOAWAYS + len(GOAWAY_CODES)
_REPEATED = _REFUSED + 1
_WIDTH = _REPEATED + 1
_PASSING = range(_CONNECTIONS, _GOAWAYS)  # what a sender takes with it when it ends


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

    def connected(self, upstream: str, protocol: str, change: int) -> None:
        """There is a connection more, or less."""
        self._cells[self._starts[upstream] + _CONNECTIONS + PROTOCOLS.index(protocol)] += change

    def in_flight(self, upstream: str, requests: int) -> None:
        """So many requests are in flight."""
        self._cells[self._starts[upstream] + _IN_FLIGHT] = requests

    def goaway(self, upstream: str, code: int) -> None:
        """Count a connection that the upstream has ended with this code."""
        self._cells[self._starts[upstream] + _GOAWAYS + GOAWAY_CODES.index(GOAWAYS.get(code, "other"))] += 1

    def refused(self, upstream: str, streams: int) -> None:
        """Count requests that were refused unlooked at."""
        self._cells[self._starts[upstream] + _REFUSED] += streams

    def repeated(self, upstream: str) -> None:
        """Count a request that is sent again because nobody has looked at it."""
        self._cells[self._starts[upstream] + _REPEATED] += 1


Parts = dict[str, list[float]]  # the cells of each upstream


def parts(cells: Sequence[float], upstreams: Sequence[str]) -> Parts:
    """The cells of a sender with these upstreams, by upstream."""
    return {name: list(cells[place * _WIDTH : (place + 1) * _WIDTH]) for place, name in enumerate(upstreams)}


def add_up(counted: Iterable[Parts], upstreams: Iterable[str]) -> Parts:
    """The cells of many senders added up, of these upstreams and of all others that any of them has."""
    total: Parts = {name: [0.0] * _WIDTH for name in upstreams}
    for each in counted:
        for name, part in each.items():
            sums = total.setdefault(name, [0.0] * _WIDTH)
            for place, value in enumerate(part):
                sums[place] = max(sums[place], value) if place == _SUCCESS else sums[place] + value
    return total


def ended(found: Parts) -> Parts:
    """What stays of the cells of a sender that has ended."""
    return {
        name: [0.0 if place in _PASSING else value for place, value in enumerate(part)] for name, part in found.items()
    }


def read(found: Parts) -> dict[str, Answers]:
    """The Answers in the cells, by upstream."""
    answers = {}
    for name, part in found.items():
        buckets = Histogram(LATENCY, part[len(CODES) : _SUM], part[_SUM])
        answers[name] = Answers(
            dict(zip(CODES, part)),
            buckets,
            part[_SUCCESS],
            dict(zip(PROTOCOLS, part[_CONNECTIONS:])),
            part[_IN_FLIGHT],
            dict(zip(GOAWAY_CODES, part[_GOAWAYS:])),
            part[_REFUSED],
            part[_REPEATED],
        )
    return answers
