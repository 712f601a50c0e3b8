"""Feeder: from due tokens to the queue of the current generation. Nothing else puts anything on a queue; what goes
straight through is put there by whoever had it accepted, with `put`.

The disk is the buffer: the queue and the senders together hold at most as many tokens of each upstream as
`in_hand_limits` says. The rest waits in the spool.
"""

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gocm_lib.message.job import SMALL, Run, Slice, cut, job_time
from gocm_lib.message.suspect import COMPANY, FATAL
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import cpu, log
from gocm_lib.senders.credentials import Credentials
from gocm_lib.senders.pipe import Outlet
from gocm_lib.state.client import Client, StateUnavailable

REST = 0.25  # seconds after a claim that failed: a full disk fails at once, again and again
NO_TOKEN_WAIT = 0.1  # seconds, while an upstream has no credential
WAIT = 1.0  # seconds that a claim waits in the state process for something to become due
LARGEST_PART = 1000  # tokens: what a sender gets of one message at once, a whole multicast
LINGER = 0.01  # seconds after a small claim: under load the next then has what came meanwhile, in one transaction
NOTHING: Mapping[int, float] = {}
PACK = 64  # tokens in one queue item: fewer would cost a pickle each, more would load one sender for all


def coalesce(slices: Iterable[Slice], headers: Mapping[str, str], multicast: Collection[str]) -> list[Slice]:
    """Put the credentials of their upstreams into slices, and merge slices that carry the same message, so that one
    request of a `multicast` upstream serves several jobs. Never merge a retry: the shared request may have failed
    because of one of its jobs. Suspects are merged in small company only, and not at all the second time, so that the
    guilty one is found.
    """
    shared: dict[tuple[str, str, int, bool], list[Run]] = {}
    found: list[Slice] = []
    for upstream, target, message, runs, deaths, _, awaited in slices:
        several = target == "token" and deaths < FATAL - 1 and upstream in multicast
        several = several and all([run.attempt == 1 for run in runs])
        known = shared.get((upstream, message, deaths, awaited)) if several else None
        if known is not None and not (deaths and len(known) + len(runs) > COMPANY):
            known.extend(runs)
            continue
        found.append(Slice(upstream, target, message, [*runs], deaths, headers[upstream], awaited))
        if several:
            shared[upstream, message, deaths, awaited] = found[-1].runs
    return found


def pack(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    """The slices in portions for the queue. Small slices come first, together; large ones are cut, so that senders
    share them.
    """
    item: list[Slice] = []
    weight = 0
    for claimed in sorted(slices, key=lambda part: part.size > SMALL):
        for part in cut(claimed, LARGEST_PART):
            item.append(part)
            weight += part.size
            if weight >= PACK:
                yield item
                item, weight = [], 0
    if item:
        yield item


class Terms(NamedTuple):
    """How many tokens of each upstream may be in hand, and which take several in a request."""

    in_hand_limits: Mapping[str, int]
    multicast: Collection[str] = ()


class Feeder:
    """Claims tokens for the senders, in a thread of its own in the front process."""

    def __init__(self, client: Client, credentials: Credentials, terms: Terms, collector: Collector) -> None:
        self._client = client
        self._collector = collector
        self._credentials = credentials
        self._terms = terms
        self._current: tuple[int, Outlet] | None = None
        self._troubled = False
        self._batch = 1  # the number of the next one; grows over all generations
        self._switched = threading.Event()
        self._claiming = threading.Lock()
        self._putting = threading.Lock()
        threading.Thread(target=self._run, name="feeder", daemon=True).start()

    def follow(self, terms: Terms) -> None:
        """Feed on these terms from now on."""
        self._terms = terms

    def switch(self, generation: int, outlet: Outlet) -> None:
        """Feed this generation from now on."""
        self._current = generation, outlet
        self._switched.set()

    def hold(self) -> None:
        """Feed nothing until the next `switch`; returns when no claim and no `put` is under way.

        Call State.begin first: it ends a claim that is waiting. After this nothing is claimed for the old generation,
        so that its release cannot miss a token.
        """
        self._switched.clear()
        self._current = None
        with self._claiming, self._putting:
            pass

    def put(self, generation: int, slices: Sequence[Slice]) -> bool:
        """Put slices that a generation has in hand into its queue, unless it is not the one that is fed any more: then
        they are released with it. Returns False when an upstream has no credential just now.
        """
        with self._putting:
            current, ready = self._current, self._credentials.ready()
            if current is None or current[0] != generation:
                return True
            if any(part.upstream not in ready for part in slices):
                return False
            self._note_waits(slices)
            headers = {upstream: header.text for upstream, header in ready.items()}
            for item in pack(coalesce(slices, headers, self._terms.multicast)):
                current[1].put(item)
            return True

    def _run(self) -> None:
        cpu.stay()
        while True:
            self._collector.move("feeder")
            if not self._switched.wait(WAIT):
                self._look()
                continue
            with self._claiming:
                current = self._current
                if current is not None:
                    self._feed(*current)

    def _look(self) -> None:
        """See whether the state process answers, while there is nothing to claim."""
        try:
            self._client.begin(0)
        except StateUnavailable:
            return
        self._collector.move("state")

    def _feed(self, generation: int, outlet: Outlet) -> None:
        terms, ready = self._terms, self._credentials.ready()
        # With no credential nothing is claimed; ask again soon whether there is one.
        wait = WAIT if len(ready) == len(self._credentials) else NO_TOKEN_WAIT
        try:
            since = {name: header.since for name, header in ready.items() if name in terms.in_hand_limits}
            slices, pauses, came = self._client.claim(
                generation, self._batch, terms.in_hand_limits, since, time.time(), wait
            )
        except StateUnavailable as error:
            if not self._troubled:
                log.logger.warning("nothing can be sent for now: %s", error)
            self._troubled = True
            time.sleep(REST)
            return
        self._troubled = False
        self._collector.move("state")
        self._credentials.note(pauses)
        ready |= self._credentials.ready()  # while the claim waited a token may have been renewed
        if any(part.upstream not in ready for part in slices):
            # A batch that is given again, for its answer was lost, and meanwhile its credential has run out: not taken
            # as received, it is given until there is one.
            time.sleep(REST)
            return
        if slices:
            self._batch += 1
            self._note_waits(slices, came)
        headers = {upstream: header.text for upstream, header in ready.items()}
        for item in pack(coalesce(slices, headers, terms.multicast)):
            outlet.put(item)
        if 0 < sum(part.size for part in slices) < PACK:
            time.sleep(LINGER)

    def _note_waits(self, slices: Iterable[Slice], came: Mapping[int, float] = NOTHING) -> None:
        """Count how long each token has waited for its first attempt. A job's id is the time of its acceptance, but
        where `came` has another from which it waits.
        """
        now = time.time()
        for part in slices:
            for run in part.runs:
                if run.attempt == 1:
                    self._collector.queue_wait.observe(
                        max(0.0, now - (came.get(run.job) or job_time(run.job))), len(run.tokens)
                    )
