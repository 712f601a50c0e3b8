"""The last ten minutes: samples of a few figures, which a thread of its own takes every few seconds."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from gocm_lib.monitoring.collector import Collector, Expiry, Figures
from gocm_lib.monitoring.counters import LATENCY, Histogram
from gocm_lib.process import log
from gocm_lib.state.client import Client

EVERY = 5.0  # seconds
KEPT = 600.0  # seconds


class Sample(NamedTuple):
    """What was counted up to a time (seconds since 1970): delivered tokens, and upstreams' answers by how long they
    took.
    """

    at: float
    delivered: int
    latency: Sequence[float]


class Point(NamedTuple):
    """What happened between two samples, at the time of the second: tokens delivered per second, and the median time
    that upstreams took to answer, in seconds; None: none answered.
    """

    at: float
    sent: float
    latency: float | None


def sample(figures: Figures) -> Sample | None:
    """The Sample in these figures; None while the state process does not answer."""
    if figures.snapshot is None:
        return None
    counts = [sum(column) for column in zip(*(answers.latency.counts for answers in figures.upstreams.values()))]
    return Sample(figures.now, figures.snapshot.counters["delivered"], counts)


def points(samples: Sequence[Sample]) -> list[Point]:
    """The Point between each two neighbouring samples."""
    found = []
    for before, after in itertools.pairwise(samples):
        passed = max(0.001, after.at - before.at)
        answers = [max(0.0, new - old) for old, new in zip(before.latency, after.latency)]
        median = Histogram(LATENCY, answers).quantile(0.5)
        found.append(Point(after.at, max(0, after.delivered - before.delivered) / passed, median))
    return found


class Trend:
    """Takes and keeps the samples."""

    def __init__(self, collector: Collector, client: Client, expiry: Expiry) -> None:
        self._collector = collector
        self._client = client
        self._expiry = expiry
        self._samples: deque[Sample] = deque(maxlen=int(KEPT / EVERY) + 1)

    def start(self) -> None:
        """Take samples from now on."""
        threading.Thread(target=self._run, name="trend", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                if (taken := sample(self._collector.figures(self._client, self._expiry))) is not None:
                    self._samples.append(taken)
            except Exception:
                log.logger.exception("no sample of the figures; the next will come")
            time.sleep(EVERY)

    def samples(self) -> list[Sample]:
        """The samples of the last ten minutes, the newest last."""
        return list(self._samples)
