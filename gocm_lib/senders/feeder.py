"""Feeder: due tokens -> the queue of the current generation. The only way onto a queue.

The disk is the buffer: the queue and the senders together hold at most so many tokens of each upstream as `rooms` says,
the rest waits in the spool.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.queues import Queue

from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import SMALL, Run, Slice, cut
from gocm_lib.message.suspect import COMPANY, FATAL
from gocm_lib.monitoring.collector import Vitals
from gocm_lib.process import cpu, log
from gocm_lib.senders.credentials import Credentials
from gocm_lib.state.client import Client, StateUnavailable

REST = 0.25  # seconds after a claim that failed: a full disk fails at once, again and again
NO_TOKEN_WAIT = 0.1  # seconds, while an upstream has no credential
WAIT = 1.0  # seconds that a claim waits in the state process for something to become due
LARGEST_PART = 1000  # tokens: what a sender gets of one message at once, a whole multicast
LINGER = 0.01  # seconds after a small claim: under load the next then has what came meanwhile, in one transaction
PACK = 64  # tokens in one queue item: fewer would cost a pickle each, more would load one sender for all


def coalesce(slices: Iterable[Slice], headers: Mapping[str, str]) -> list[Slice]:
    """The same slices, with the credentials of their upstreams (`headers`), but of those with the same message one,
    where a request takes many tokens: they share it. Not so a retry, for what they shared may have been refused for one
    of them; and suspects only in small company, twice suspect ones in none, so that the guilty is found.
    """
    shared: dict[tuple[str, str, int], list[Run]] = {}
    found: list[Slice] = []
    for upstream, target, message, runs, deaths, _ in slices:
        several = target == "token" and deaths < FATAL - 1 and DIALECTS[upstream].TOKENS_PER_REQUEST > 1
        several = several and all([run.attempt == 1 for run in runs])
        known = shared.get((upstream, message, deaths)) if several else None
        if known is not None and not (deaths and len(known) + len(runs) > COMPANY):
            known.extend(runs)
            continue
        found.append(Slice(upstream, target, message, [*runs], deaths, headers[upstream]))
        if several:
            shared[upstream, message, deaths] = found[-1].runs
    return found


def pack(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Slices in portions for the queue: small ones first, together, and large ones cut, so that senders share them."""
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


class Feeder:
    def __init__(self, client: Client, credentials: Credentials, rooms: Mapping[str, int], vitals: Vitals) -> None:
        self._client = client
        self._vitals = vitals
        self._credentials = credentials
        self._rooms = rooms
        self._current: tuple[int, Queue[list[Slice]]] | None = None
        self._troubled = False
        self._batch = 1  # the number of the next one; grows over all generations
        self._switched = threading.Event()
        self._claiming = threading.Lock()
        threading.Thread(target=self._run, name="feeder", daemon=True).start()

    def switch(self, generation: int, queue: "Queue[list[Slice]]") -> None:
        """Feed this generation from now on."""
        self._current = generation, queue
        self._switched.set()

    def hold(self) -> None:
        """Feed nothing until the next switch; returns when no claim is under way.

        Call State.begin first: it ends a claim that is waiting. After this nothing is claimed for the old generation,
        so it can be released without anything slipping in behind.
        """
        self._switched.clear()
        self._current = None
        with self._claiming:
            pass

    def _run(self) -> None:
        cpu.stay()
        while True:
            self._vitals.move("feeder")
            if not self._switched.wait(WAIT):
                self._look()
                continue
            with self._claiming:
                current = self._current
                if current is not None:
                    self._feed(*current)

    def _look(self) -> None:
        """See whether the state process answers, while there is nothing to ask it for."""
        try:
            self._client.begin(0)
        except StateUnavailable:
            return
        self._vitals.move("state")

    def _feed(self, generation: int, queue: "Queue[list[Slice]]") -> None:
        ready = self._credentials.ready()
        # With no credential nothing is claimed; ask again soon whether there is one.
        wait = WAIT if len(ready) == len(self._credentials) else NO_TOKEN_WAIT
        try:
            since = {upstream: header.since for upstream, header in ready.items()}
            slices, pauses = self._client.claim(generation, self._batch, self._rooms, since, time.time(), wait)
        except StateUnavailable as error:
            if not self._troubled:
                log.logger.warning("nothing can be sent for now: %s", error)
            self._troubled = True
            time.sleep(REST)
            return
        self._troubled = False
        self._vitals.move("state")
        self._credentials.note(pauses)
        ready |= self._credentials.ready()  # while the claim waited a token may have been renewed
        if any(part.upstream not in ready for part in slices):
            # A batch that is given again, for its answer was lost, and meanwhile its credential has run out: not taken
            # as received, it is given until there is one.
            time.sleep(REST)
            return
        if slices:
            self._batch += 1
            self._note_waits(slices)
        headers = {upstream: header.text for upstream, header in ready.items()}
        for item in pack(coalesce(slices, headers)):
            queue.put(item)
        if 0 < sum(part.size for part in slices) < PACK:
            time.sleep(LINGER)

    def _note_waits(self, slices: Iterable[Slice]) -> None:
        """Count how long each token has waited for its first attempt. A job's id is when it was accepted."""
        now = time.time()
        for part in slices:
            for run in part.runs:
                if run.attempt == 1:
                    self._vitals.queue_wait.observe(max(0.0, now - run.job / 1e6), len(run.tokens))
