"""Intake: accepted jobs get their ids and go into the spool here, many in one commit. Nothing else puts jobs there.

Belongs to the front's loop, which it never keeps waiting: one commit is on its way at a time, and what comes meanwhile
is the next one. That waits a moment for as many clients as there seem to be, so that under load many requests share an
fsync; a lone client waits for nobody. What nothing waits before goes straight through: the state process gives it to
the senders with its answer, and it is put into their queue here.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from gocm_lib.message.job import Job, Slice, next_id
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import log
from gocm_lib.state.client import LoopClient, StateUnavailable
from gocm_lib.state.contract import Accepted, NotKept
from gocm_lib.state.packs import pack, slices

LINGER = 0.001  # seconds that a commit waits for as many clients as there seem to be: it costs what 20 messages do
LARGEST_BATCH = 512  # messages, and
BATCH_TOKENS = 20_000  # tokens in a commit, unless one request has more
PATIENCE = 1.5  # seconds a client waits for the disk before it is told 503,
TOKENS_A_SECOND = 20_000  # and a second more for each so many tokens of its message
LIMIT = 30.0  # seconds until a commit is asked for again; who waits for it has been answered long before
TOLD_EVERY = 10.0  # seconds between two lines of the log about messages that were refused
LOOK = 1.0  # seconds between two tries after a failure, to know when it is over, though nobody may dare to ask

GATHER, ENOUGH = 0.01, 64  # seconds, and tokens, for which what went straight through is gathered under load
NEVER = float("inf")

# Slices of a generation into its queue. False: not just now; True: they are there, or the generation is over.
Put = Callable[[int, Sequence[Slice]], bool]
Kept = Sequence[Job | NotKept] | StateUnavailable  # what became of jobs, each in its place
Done = Callable[[Kept], None]


def _patience(jobs: int, tokens: int) -> float:
    """Seconds until a commit counts as late."""
    return PATIENCE + (tokens + jobs) / TOKENS_A_SECOND


class _Waiting:
    """Jobs of a request, and whom to tell what became of them."""

    __slots__ = ("jobs", "tokens", "came", "late_at", "done")

    def __init__(self, jobs: Sequence[Job], done: Done, now: float) -> None:
        self.jobs = jobs
        self.tokens = sum([len(job.tokens) for job in jobs])
        self.came = now
        self.late_at = now + _patience(len(jobs), self.tokens)
        self.done: Done | None = done  # None: it was told already

    def tell(self, kept: Kept) -> None:
        """Tell it, unless it gave up before."""
        done, self.done = self.done, None
        if done:
            done(kept)


class _Straight:
    """What went straight through, on its way to the queue. Under load it is gathered for a moment, for each item in the
    queue, and what a sender has to settle, costs as much for one token as for some. All times are monotonic.
    """

    def __init__(self, put: Put) -> None:
        self._put = put
        self._generation = 0
        self._slices: list[Slice] = []
        self._tokens = 0
        self.due = NEVER  # when they go into the queue at the latest

    def add(self, generation: int, gone: Sequence[Slice], alone: bool, now: float) -> None:
        """These are a generation's. Nobody came with who is `alone`: what it brings waits for nobody, neither does what
        somebody waits for.
        """
        if generation != self._generation:
            self._slices, self._tokens = [], 0  # that generation is over, and what it had is released
        if not self._slices:
            self.due = now + GATHER
        self._generation = generation
        self._slices += gone
        self._tokens += sum([part.size for part in gone])
        if alone or self._tokens >= ENOUGH or any([part.awaited for part in gone]):
            self.flush(now)

    def flush(self, now: float) -> None:
        """Put them into the queue."""
        self.due = NEVER
        if not self._slices:
            return
        if self._put(self._generation, self._slices):
            self._slices, self._tokens = [], 0
        else:
            self.due = now + GATHER


class Intake:
    """Makes job ids and commits jobs. For the loop's thread only, but for `why_not`. All times are monotonic."""

    def __init__(self, client: LoopClient, last_id: int, collector: Collector, put: Put) -> None:
        """`last_id` is the highest there is; `put` puts slices into the queue of a generation."""
        self.client = client
        self._straight = _Straight(put)
        self._seen = 0  # the number of the last answer with which something went straight through
        self._collector = collector
        self._last_id = last_id
        self._waiting: deque[_Waiting] = deque()
        self._batch: list[_Waiting] = []  # that is being committed,
        self._jobs: Sequence[Job] = ()  # and its jobs with their ids
        self._refused, self._told_at = 0, -TOLD_EVERY  # messages since the log was last told of some
        self._trouble = ""  # why the last commit failed
        self._due: float | None = None  # when the commit that is being made is late
        self._look_at = NEVER  # when to look whether a failure is over
        self._late_at = NEVER  # when somebody may have waited for too long
        self._expected = 1  # clients that post at the moment: those just answered will be back, mostly
        self._free_at = 0.0  # when the last commit ended

    def offer(self, jobs: Sequence[Job], done: Done, now: float) -> None:
        """Commit jobs, in one commit with what came with them; `done` is told when they are on disk, with their ids, or
        that they could not be committed in time.
        """
        self._waiting.append(_Waiting(jobs, done, now))
        self._late_at = min(self._late_at, self._waiting[-1].late_at)

    def why_not(self) -> str:
        """Why messages cannot be kept just now, judged by the last ones; "" while they can. For any thread."""
        due = self._due
        if due is not None and time.monotonic() > due:
            return "the disk takes too long"
        return self._trouble

    def turn(self, now: float) -> None:
        """Commit what waits, unless a commit is on its way. Tell those who have waited for too long."""
        if not self._due:  # one that waits for a commit stands still
            self._collector.move("intake")
        if now >= self._late_at:
            self._tell_late(now)
        if not self._due and (now >= self._ready_at() or now >= self._look_at):
            self._commit(now)
        if now >= self._straight.due:
            self._straight.flush(now)

    def _ready_at(self) -> float:
        """When what waits is committed."""
        if not self._waiting:
            return NEVER
        if len(self._waiting) >= self._expected:
            return 0.0
        return max(self._waiting[0].came, self._free_at) + LINGER

    def _tell_late(self, now: float) -> None:
        self._late_at = NEVER
        for waiting in (*self._batch, *self._waiting):
            if waiting.done and now >= waiting.late_at:
                waiting.tell(StateUnavailable("the state process does not answer"))
            elif waiting.done:
                self._late_at = min(self._late_at, waiting.late_at)

    def next_moment(self) -> float:
        """When `turn` has something to do, unless something is offered before."""
        start = NEVER if self._due else min(self._ready_at(), self._look_at)
        return min(self._straight.due, self.client.next_moment(), start, self._late_at)

    def _commit(self, now: float) -> None:
        self._batch, jobs, tokens = [], 0, 0
        while self._waiting and (not self._batch or (jobs < LARGEST_BATCH and tokens < BATCH_TOKENS)):
            waiting = self._waiting.popleft()
            if waiting.done:  # else nobody waits for it any more
                self._batch.append(waiting)
                jobs, tokens = jobs + len(waiting.jobs), tokens + waiting.tokens
        if not self._batch and now < self._look_at:
            return
        self._jobs = self._with_ids([job for waiting in self._batch for job in waiting.jobs])
        self._due, self._look_at = now + _patience(jobs, tokens), NEVER
        self.client.call("accept", pack(self._jobs), self._seen)

    def read(self, now: float) -> None:
        """The state process has said something."""
        for answer in self.client.read():
            self._due, self._free_at = None, now
            self._expected = len(self._batch) + len(self._waiting)
            if isinstance(answer, StateUnavailable):
                self._failed(answer, now)
            else:
                self._kept(answer, now)

    def _failed(self, problem: StateUnavailable, now: float) -> None:
        self._trouble, self._look_at = str(problem), now + LOOK
        self._refused += len(self._jobs)
        if self._refused and now >= self._told_at + TOLD_EVERY:
            log.logger.warning("%d messages refused: %s", self._refused, problem)
            self._refused, self._told_at = 0, now
        for waiting in self._batch:
            waiting.tell(problem)

    def _kept(self, accepted: Accepted, now: float) -> None:
        self._trouble = ""
        answers: Iterator[Job | NotKept] = (accepted.not_kept.get(job.id, job) for job in self._jobs)
        for waiting in self._batch:
            waiting.tell(list(islice(answers, len(waiting.jobs))))
        if accepted.number:
            self._seen = accepted.number
            gone = set(accepted.gone)  # of a pack perhaps not all: some may have been refused, or been known
            alone = len(self._batch) == 1 and not self._waiting
            straight = slices(job for job in self._jobs if job.id in gone)
            self._straight.add(accepted.generation, straight, alone, now)

    def _with_ids(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with ids. Those for one upstream and of about one size get neighbouring ids: they make a pack."""
        now = time.time()
        found = list(jobs)
        for place in sorted(range(len(jobs)), key=lambda place: (jobs[place].upstream, len(jobs[place].tokens))):
            self._last_id = next_id(self._last_id, now)
            found[place] = jobs[place]._replace(id=self._last_id)
        return found
