"""Settler: has outcomes recorded by the state process, in batches, one at a time, without waiting for it.

Belongs to a sender's loop. Promises that what was added is settled once the state process answers, however long that
takes: until then it is told again.
"""

import time
from collections.abc import Sequence

from gocm_lib.message.outcome import Result, join
from gocm_lib.process import log
from gocm_lib.state.client import LoopClient, StateUnavailable

EVERY = 0.02  # seconds: outcomes that end within it share a transaction and its fsync
REST = 0.1  # seconds after an answer that says: not now


class Settler:
    """All times are monotonic."""

    def __init__(self, client: LoopClient, generation: int) -> None:
        self.client = client
        self._generation = generation
        self._waiting: list[Result] = []
        self._batch: Sequence[Result] = ()  # that is being settled
        self._due = float("inf")  # when those that wait are settled
        self._since: float | None = None  # when the batch was first told
        self._troubled = self._awaited = False

    @property
    def idle(self) -> bool:
        """Whether everything is settled."""
        return not self._waiting and not self._batch

    def settled_at(self) -> float:
        """When all had been settled that there was: now, unless something has been waiting since then."""
        since = self._since
        return time.monotonic() if since is None else since

    def add(self, results: list[Result], now: float, awaited: bool = False) -> None:
        """Outcomes to settle. For some that are `awaited` somebody waits, so they wait for no others."""
        if not self._waiting:
            self._due = max(now + EVERY, self._due if self._batch else 0.0)
        self._waiting += results
        if awaited:
            self._due, self._awaited = now, True

    def turn(self, now: float, last: bool) -> None:
        """Settle what is due; if these are the `last`, whatever there is."""
        if self._batch:
            if self.client.troubled and not self._troubled:
                self._troubled = True
                log.logger.warning("outcomes wait to be settled: %s", self.client.troubled)
            if not self.client.busy and now >= self._due:
                self._tell()
        elif self._waiting and (last or now >= self._due):
            self._batch, self._waiting, self._awaited = join(self._waiting), [], False
            self._since = now
            self._tell()

    def _tell(self) -> None:
        self.client.call("settle", self._generation, self._batch, time.time())

    def read(self, now: float) -> None:
        """The state process has said something."""
        for answer in self.client.read():
            if isinstance(answer, StateUnavailable):
                if not self._troubled:
                    log.logger.warning("outcomes wait to be settled: %s", answer)
                self._troubled, self._due = True, now + REST
                continue
            self._batch, self._since, self._troubled = (), None, False
            self._due = now if self._awaited else now + EVERY

    def next_moment(self) -> float:
        """When `turn` has something to do, unless something happens before."""
        if self._batch:
            return float("inf") if self.client.busy else self._due
        return self._due if self._waiting else float("inf")
