"""Intake: accepted jobs get their ids and go into the spool here, many in one commit. Nothing else puts jobs there.

Request threads hand in a job and wait. One thread commits all waiting jobs in one call (group commit), so that under
load many requests share one fsync. It waits a moment for as many jobs as came last time; a lone client, whose last
request came alone, waits for nobody. What nothing waits before goes straight through: the state process gives it to the
senders with its answer, and it is put into their queue here.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from queue import Empty, SimpleQueue

from gocm_lib.message.job import Job, Slice, next_id
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import cpu, log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import Accepted, NotKept
from gocm_lib.state.packs import pack, slices

LARGEST_BATCH = 512  # messages, and
LINGER = 0.002  # seconds in which a batch may become as large as the one before: a commit costs what 20 messages do
BATCH_TOKENS = 20_000  # tokens in a commit, unless one request has more
PATIENCE = 1.5  # seconds a client waits for the disk before it is told 503,
TOKENS_A_SECOND = 20_000  # and a second more for each so many tokens of its message
LIMIT = 30.0  # seconds for a commit; who waits for it has been answered long before

GATHER, ENOUGH = 0.01, 64  # seconds, and tokens, for which what went straight through is gathered under load

# Slices of a generation into its queue. False: not just now; True: they are there, or the generation is over.
Put = Callable[[int, Sequence[Slice]], bool]


def _patience(jobs: int, tokens: int) -> float:
    """Seconds until a commit counts as late."""
    return PATIENCE + (tokens + jobs) / TOKENS_A_SECOND


class _Waiting:
    __slots__ = ("jobs", "tokens", "problem", "answers", "given_up", "done")
    answers: Sequence[Job | NotKept]

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.tokens = sum(len(job.tokens) for job in jobs)
        self.problem: str | None = None
        self.answers = ()
        self.given_up = False
        self.done = threading.Lock()  # a lock held until the commit: the cheapest thing a thread can wait on
        self.done.acquire()


class _Straight:
    """What went straight through, on its way to the queue. Under load it is gathered for a moment, for each item in the
    queue, and what a sender has to settle, costs as much for one token as for some.
    """

    def __init__(self, put: Put) -> None:
        self._put = put
        self._generation = 0
        self._slices: list[Slice] = []
        self._tokens = 0
        self._since = 0.0  # when the first of them came

    @property
    def patience(self) -> float:
        """For how many seconds more they may wait; 1 when there are none."""
        return max(0.001, self._since + GATHER - time.monotonic()) if self._slices else 1.0

    @property
    def waits(self) -> bool:
        """Whether they may wait a little longer."""
        return not self._slices or time.monotonic() < self._since + GATHER

    def add(self, generation: int, gone: Sequence[Slice], alone: bool) -> None:
        """These are a generation's. Nobody came with who is `alone`: what it brings waits for nobody."""
        if generation != self._generation:
            self._slices, self._tokens = [], 0  # that generation is over, and what it had is released
        if not self._slices:
            self._since = time.monotonic()
        self._generation = generation
        self._slices += gone
        self._tokens += sum([part.size for part in gone])
        if alone or self._tokens >= ENOUGH:
            self.flush()

    def flush(self) -> None:
        """Put them into the queue."""
        if not self._slices:
            return
        if self._put(self._generation, self._slices):
            self._slices, self._tokens = [], 0
        else:
            self._since = time.monotonic()


class Intake:
    """Used by all threads that answer clients. Makes job ids and commits jobs."""

    def __init__(self, client: Client, last_id: int, collector: Collector, put: Put) -> None:
        """`last_id` is the highest there is; `put` puts slices into the queue of a generation."""
        self._client = client
        self._straight = _Straight(put)
        self._seen = 0  # the number of the last answer with which something went straight through
        self._lost = False  # whether something may have with an answer that we have not: it waits for our next call
        self._collector = collector
        self._last_id = last_id
        self._trouble = ""  # why the last commit failed
        self._due: float | None = None  # when the commit that is being made is late
        self._queue: SimpleQueue[_Waiting] = SimpleQueue()
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    def submit(self, jobs: Sequence[Job]) -> Sequence[Job | NotKept]:
        """Return when the jobs are on disk, in one commit, with their ids, each in its place; for those that are not,
        the reason. Raises StateUnavailable when they could not be committed in time.
        """
        waiting = _Waiting(jobs)
        self._queue.put(waiting)
        if not waiting.done.acquire(timeout=_patience(len(jobs), waiting.tokens)):
            waiting.given_up = True
            raise StateUnavailable("the state process does not answer")
        if waiting.problem is not None:
            raise StateUnavailable(waiting.problem)
        return waiting.answers

    def why_not(self) -> str:
        """Why messages cannot be kept just now, judged by the last ones; "" while they can."""
        due = self._due
        if due is not None and time.monotonic() > due:
            return "the disk takes too long"
        return self._trouble

    def _run(self) -> None:
        cpu.stay()
        batch: list[_Waiting] = []
        while True:
            self._collector.move("intake")
            expected = len(batch)
            try:
                batch = [self._queue.get(timeout=self._straight.patience)]
            except Empty:
                batch = []
                self._straight.flush()
                if self._trouble or self._lost:
                    self._commit(batch)  # to know when it is over, though nobody may dare to ask
                continue
            deadline = time.monotonic() + LINGER
            while self._queue.qsize() + 1 < expected and time.monotonic() < deadline:
                time.sleep(LINGER / 4)
            jobs, tokens = len(batch[0].jobs), batch[0].tokens
            try:
                while jobs < LARGEST_BATCH and tokens < BATCH_TOKENS:
                    batch.append(self._queue.get_nowait())
                    jobs, tokens = jobs + len(batch[-1].jobs), tokens + batch[-1].tokens
            except Empty:
                pass
            if still_waiting := [waiting for waiting in batch if not waiting.given_up]:
                self._commit(still_waiting)

    def _commit(self, batch: list[_Waiting]) -> None:
        problem, accepted = None, Accepted({})
        jobs = self._with_ids([job for waiting in batch for job in waiting.jobs])
        self._due = time.monotonic() + _patience(len(jobs), sum(waiting.tokens for waiting in batch))
        try:
            accepted = self._client.accept(pack(jobs), self._seen)
            self._lost = False
        except StateUnavailable as error:
            problem, self._lost = str(error), True
            if batch:
                log.logger.warning("%d messages refused: %s", len(jobs), problem)
        self._trouble, self._due = problem or "", None
        answers: Iterator[Job | NotKept] = (accepted.not_kept.get(job.id, job) for job in jobs)
        for waiting in batch:
            waiting.problem = problem
            waiting.answers = list(islice(answers, len(waiting.jobs)))
            waiting.done.release()
        if accepted.number:
            self._seen = accepted.number
            gone = set(accepted.gone)  # of a pack perhaps not all: some may have been refused, or been known
            alone = len(batch) == 1 and self._queue.empty()
            self._straight.add(accepted.generation, slices(job for job in jobs if job.id in gone), alone)
        if not self._straight.waits:
            self._straight.flush()

    def _with_ids(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with ids. Those for one upstream and of about one size get neighbouring ids: they make a pack."""
        now = time.time()
        found = list(jobs)
        for place in sorted(range(len(jobs)), key=lambda place: (jobs[place].upstream, len(jobs[place].tokens))):
            self._last_id = next_id(self._last_id, now)
            found[place] = jobs[place]._replace(id=self._last_id)
        return found
