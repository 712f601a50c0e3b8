"""The last ten minutes: samples of a few figures, which a thread of its own takes every few seconds."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gocm_lib.monitoring.collector import Collector, Expiry, Figures
from gocm_lib.monitoring.counters import LATENCY, Histogram
from gocm_lib.process import log
from gocm_lib.state.client import Client

EVERY = 5.0  # seconds
KEPT = 600.0  # seconds
FULL = ("busy", "no_room")  # of collector.CAUSES: somebody had to come again
ODD = 0.01  # share of 5xx: on a good day Google answers a few in a thousand so


class Share(NamedTuple):
    """How many there were, and how many of these went wrong."""

    all: int
    bad: int


class Sample(NamedTuple):
    """What was counted up to a time (seconds since 1970)."""

    at: float
    delivered: int  # tokens
    latency: Sequence[float]  # upstreams' answers by how long they took
    refused: int = 0  # posts, for want of room or of time
    answers: Mapping[str, Share] = {}  # of each upstream
    feedback: Share = Share(0, 0)  # requests of the webhook


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
    taken, failed = figures.feedback["taken"], figures.feedback["failed"]
    return Sample(
        figures.now,
        figures.snapshot.counters["delivered"],
        counts,
        sum(figures.rejected[cause] for cause in FULL),
        {name: _share(figures.upstreams[name].codes) for name in figures.token_expiry},
        Share(taken + failed, failed),
    )


def _share(codes: Mapping[str, float]) -> Share:
    """An upstream's answers, and those of them that are 5xx."""
    return Share(int(sum(codes.values())), int(sum(count for code, count in codes.items() if code.startswith("5"))))


def troubles(samples: Sequence[Sample]) -> list[str]:
    """What went wrong between the first of these samples and the last, for people."""
    if len(samples) < 2:
        return []
    first, last = samples[0], samples[-1]
    found = []
    if (refused := last.refused - first.refused) > 0:
        found.append(f"{refused:,} {'post was' if refused == 1 else 'posts were'} refused in the last minute")
    for name, (count, bad) in last.answers.items():
        before = first.answers.get(name, Share(0, 0))
        if bad - before.bad > ODD * (count - before.all):
            found.append(f"upstream {name} answered {(bad - before.bad) / (count - before.all):.0%} with 5xx")
    asked, failed = last.feedback.all - first.feedback.all, last.feedback.bad - first.feedback.bad
    if asked == failed > 0:
        found.append("--feedback-url takes nothing")
    return found


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
