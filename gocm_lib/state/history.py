"""What became of tokens: looked up, discarded if they failed, and in the end forgotten. For any Store.

Works on what nobody sends any more. Finished messages are kept for those who ask, and never stand in the way of a new
message: they are forgotten when their time is over, when there are more than `most`, and before a message is refused
for want of room. A message with failed tokens is kept for them, its other tokens are not; those rows of failed tokens
are marked then (`waits`), and their message counts no more as one that is kept. A Store gives the Rows, and owns the
transaction.
"""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from gocm_lib.message.job import FORMER, job_time
from gocm_lib.state import admission, packs
from gocm_lib.state.contract import STATES, Failed, Fate, Past, Place, Status, Summary, Which
from gocm_lib.state.packs import Label, Packed
from gocm_lib.state.store import CANCELLED, FAILED, OPEN, OVER, End, Single, Stored

LATER = 1.0  # seconds by which a job's life begins after its acceptance, if it was to be sent later
FORGOTTEN = 5000  # tokens that are forgotten at once, or those of one job, so that nobody waits long


class Gone(NamedTuple):
    """What was forgotten: tokens that had ended, and tokens with which finished jobs had come."""

    over: int
    finished: int


class Finished(NamedTuple):
    """The row of a pack with finished jobs: with how many tokens it came that somebody may ask for, with how many its
    finished jobs came, how many jobs are not finished, and when to look whether the finished ones may be forgotten.
    """

    id: int
    last: int
    size: int
    finished: int
    jobs: int
    ended: float


class Rows(Protocol):
    """What a Store knows of what has ended: a statement or two each."""

    def pack_of(self, job: int) -> Stored | None:
        """The pack that a job is in."""

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        """These packs."""

    def open_singles(self, job: int) -> list[Single]:
        """The open Singles of a job."""

    def singles(self, low: int, high: int) -> list[Single]:
        """All Singles of jobs with ids from `low` to `high`."""

    def ends(self, pack: int) -> list[End]:
        """How tokens of a pack were delivered."""

    def forgotten(self) -> int:
        """The highest job that is forgotten."""

    def label(self, job: int) -> Label:
        """What a job is known by."""

    def tagged(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Jobs with a tag, with ids above `after`, for these upstreams (none: for all)."""

    def waiting(self, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Packs that wait for their time, with ids above `after`, for these upstreams (none: for all)."""

    def due(self, pack: int) -> float:
        """When a pack is to be sent that waits for its time; 0: it does not."""

    def alone(self, job: int) -> dict[tuple[int, str], int]:
        """How many Singles a job has, by state and failure."""

    def failed(self, which: Which, after: Place, limit: int) -> list[Single]:
        """Failed Singles after a place, in the order of places."""

    def oldest_failed(self, before: float, limit: int) -> list[Single]:
        """Those that failed first, before a time."""

    def finished(self, limit: int) -> list[Finished]:
        """Packs with finished jobs, in the order in which they may be forgotten."""

    def stays(self, pack: int, last: int, before: float) -> bool:
        """Whether a pack has a failed token, or anything that ended later than `before`."""

    def give_up(self, singles: Sequence[Single]) -> None:
        """These failed Singles are over."""

    def count_again(self, pack: int, size: int, ended: float) -> None:
        """A finished job with so many tokens is kept again."""

    def forget_singles(self, jobs: Sequence[int]) -> None:
        """Forget the Singles of these jobs, but for the failed ones, which are marked."""

    def drop(self, packs: Sequence[tuple[int, int]]) -> None:
        """Forget packs whole: the first and the last id of each."""

    def rewrite(self, pack: int, body: str, ends: Sequence[End], less: Gone, ended: float) -> None:
        """Let a pack have this body and these Ends only, and count for less."""

    def note_forgotten(self, job: int) -> None:
        """Jobs were forgotten, this one the latest."""


class _Traces(NamedTuple):
    """All that is known of a job: it as its pack has it, which of its tokens (by index) have left the pack, its
    Singles, and when the tokens were delivered that were, and the upstream's ids.
    """

    job: Packed
    gone: int
    singles: dict[int, Single]
    delivered: dict[int, tuple[float, str]]

    def finished(self) -> float:
        """When its last token ended; 0: it has not."""
        whole = packs.span(0, len(self.job.tokens))
        alone = sum(1 << self.job.index_of(n) for n in self.singles)
        if whole & ~self.gone & ~alone or any(each.state == OPEN for each in self.singles.values()):
            return 0.0
        times = [each.due_at for each in self.singles.values()] + [at for at, _ in self.delivered.values()]
        return max([*times, self.job.forgotten])

    def is_counted(self) -> bool:
        """Whether there is more to forget of it than was: anything but failed tokens that it is kept for."""
        marked = all(each.state == FAILED and each.waits for each in self.singles.values())
        named = sum(1 for token in self.job.tokens if token)
        return not marked or named > len(self.singles)


class History:
    """The part of a spool that has ended."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    # -------------------------------------------------------------------------------------------------------- looked up

    def status(
        self, job: int, sending: Container[int], queued: Container[int], state: str, after: int, limit: int
    ) -> Status | Past | None:
        """Store.status."""
        stored = self.rows.pack_of(job)
        traces = next((each for each in self._traces(stored, job) if each.job.job == job), None) if stored else None
        if stored is None or traces is None or not traces.job.message:
            return Past() if job <= self.rows.forgotten() else None
        fates = list(_fates(traces, sending, queued))
        counts = Counter(fate.state for fate in fates)
        found = [fate for fate in fates if fate.n > after and state in ("", fate.state)]
        page = admission.page(found[:limit])
        # What was left out stands between the tokens, and after the last page's last.
        last = page[-1].n if len(page) == limit else math.inf
        skipped = [skip for skip in traces.job.skipped if after < skip.n < last][:limit]
        since = max([traces.job.accepted_at, *(each.since for each in traces.singles.values())])
        label, accepted_at = self.rows.label(job), _accepted_at(traces.job)
        return Status(
            job,
            stored.upstream,
            traces.job.target,
            accepted_at,
            since,
            traces.job.expires_at + since - traces.job.accepted_at,
            len(traces.job.tokens),
            traces.finished(),
            {name: counts[name] for name in STATES},
            page,
            "",
            skipped,
            label.name,
            label.tag,
            traces.job.accepted_at if accepted_at != traces.job.accepted_at else 0.0,
        )

    def summaries(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[Summary]:
        """Store.summaries."""
        found: list[Summary] = []
        room = admission.PAGE  # packs are read for it: more of them would take long
        if not tag:
            # A page may end within a pack: its other jobs come first then.
            begin = self.rows.pack_of(after)
            ids = [begin.id] if begin and begin.last > after and self.rows.due(begin.id) else []
            for pack in [*ids, *self.rows.waiting(after, limit, upstreams)]:
                [stored] = self.rows.packs([pack])
                found += self._summaries(stored, lambda job: job > after)
                room -= len(stored.body)
                if len(found) >= limit or room <= 0:
                    break
            return found[:limit]
        jobs = self.rows.tagged(tag, after, limit, upstreams)
        mine, known = set(jobs), dict[int, Summary]()
        for job in jobs:
            if job not in known and room > 0 and (its := self.rows.pack_of(job)):
                known |= {each.job: each for each in self._summaries(its, mine.__contains__)}
                room -= len(its.body)
            if job in known:
                found.append(known[job])
            elif room <= 0:
                break
        return found

    def _summaries(self, stored: Stored, wanted: Callable[[int], bool]) -> list[Summary]:
        """Some of the jobs of a pack."""
        found, at, due = [], 0, self.rows.due(stored.id)
        for job, size, _ in packs.heads(stored.body):
            if wanted(job):
                gone = ((stored.gone >> at) & packs.span(0, size)).bit_count()
                found.append(self._summary(stored.upstream, job, size, gone, due))
            at += size
        return found

    def _summary(self, upstream: str, job: int, size: int, gone: int, due: float) -> Summary:
        alone, label = self.rows.alone(job), self.rows.label(job)
        failed = sum([count for (state, failure), count in alone.items() if _is_failure(state, failure)])
        cancelled = alone.get((OVER, CANCELLED), 0)
        pending = size - gone + sum([count for (state, _), count in alone.items() if state == OPEN])
        told = label.name, label.tag, job_time(job), due, size
        return Summary(job, upstream, *told, pending, size - pending - failed - cancelled, failed, cancelled)

    def _traces(self, stored: Stored, only: int = 0) -> list[_Traces]:
        """What is known of the jobs of a pack, or of one of them."""
        low, high = (only, only) if only else (stored.id, stored.last)
        rows, ends = self.rows.singles(low, high), self.rows.ends(stored.id)
        found, at = [], 0
        for job in packs.read(stored.body):
            size = len(job.tokens)
            if not only or job.job == only:
                gone = (stored.gone >> at) & packs.span(0, size)
                singles = {each.n: each for each in rows if each.job == job.job}
                found.append(_Traces(job, gone, singles, dict(_delivered(ends, at, size))))
            at += size
        return found

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Store.failed."""
        return admission.page(
            Failed(each.job, each.n, token, each.upstream, each.attempts, each.failure, each.reason, each.due_at)
            for each, token in self._named(self.rows.failed(which, after, limit))
        )

    def _named(self, singles: Iterable[Single]) -> Iterator[tuple[Single, str]]:
        """Singles in the order of jobs, each with its token."""
        jobs: dict[int, Packed] = {}
        for single in singles:
            if single.job not in jobs:
                stored = self.rows.pack_of(single.job)
                jobs = {each.job: each for each in packs.read(stored.body)} if stored else {}
            if job := jobs.get(single.job):
                yield single, job.tokens[job.index_of(single.n)]

    def is_counted(self, job: int) -> bool:
        """Whether a finished job is among those that are kept."""
        stored = self.rows.pack_of(job)
        return stored is not None and any(each.is_counted() for each in self._traces(stored, job))

    # -------------------------------------------------------------------------------------------------------- discarded

    def give_up(self, singles: Sequence[Single]) -> int:
        """These failed tokens are over. Their jobs are forgotten with the next ones if their time has come. Returns
        with how many tokens those had come that count again.
        """
        marked = {each.job: each for each in singles if each.waits}
        revived = [each for job, each in marked.items() if not self.is_counted(job) and not self.rows.open_singles(job)]
        self.rows.give_up(singles)
        sizes = 0
        for each in revived:
            stored = self.rows.pack_of(each.job)
            assert stored
            size = next(head[1] for head in packs.heads(stored.body) if head[0] == each.job)
            self.rows.count_again(stored.id, size, each.due_at)
            sizes += size
        return sizes

    def prune_failed(self, before: float, excess: int) -> tuple[int, int, int]:
        """Discard some of the tokens that failed before a time, or the `excess` oldest. Returns how many, how many of
        them only because there are too many, and with how many tokens jobs had come that count again.
        """
        excess = min(excess, FORGOTTEN)
        too_many, limit = (math.inf, excess) if excess > 0 else (before, FORGOTTEN)
        found = self.rows.oldest_failed(too_many, limit)
        sizes = self.give_up(found)
        return len(found), sum(each.due_at >= before for each in found), sizes

    # -------------------------------------------------------------------------------------------------------- forgotten

    def forget(self, before: float, excess: int) -> Gone | None:
        """Forget some of the jobs that finished before a time, and of those that finished first until they had so many
        tokens. None: there was nothing to forget.
        """
        over = finished = 0
        whole: list[tuple[int, int]] = []
        for pack, last, size, count, jobs, ended in self.rows.finished(FORGOTTEN):
            if finished >= FORGOTTEN or (ended > before and finished >= excess):
                break
            latest = math.inf if count <= excess - finished else before
            if not jobs and ended <= latest and not self.rows.stays(pack, last, latest):
                whole.append((pack, last))
                over, finished = over + size, finished + count
                continue
            gone = self._forget_part(pack, before, excess - finished)
            over, finished = over + gone.over, finished + gone.finished
        if whole:
            self.rows.drop(whole)
            self.rows.note_forgotten(max(last for _, last in whole))
        return Gone(over, finished) if over or finished else None

    def _forget_part(self, pack: int, before: float, excess: int) -> Gone:
        """Forget those jobs of a pack whose time has come."""
        [stored] = self.rows.packs([pack])
        traces = self._traces(stored)
        ends = {each.job.job: each.finished() for each in traces if each.job.message and each.is_counted()}
        gone: dict[int, float] = {}
        finished = over = 0
        for each in sorted(traces, key=lambda each: ends.get(each.job.job, 0.0)):
            end = ends.get(each.job.job, 0.0)
            if end and (end <= before or finished < excess):
                gone[each.job.job] = end
                finished += len(each.job.tokens)
        left = []
        for each in traces:
            job = each.job
            if job.job in gone:
                failed = {job.index_of(n) for n, found in each.singles.items() if found.state == FAILED}
                over += sum(1 for token in job.tokens if token) - len(failed)
                tokens = [token if index in failed else "" for index, token in enumerate(job.tokens)]
                job = job._replace(tokens=tokens, forgotten=gone[job.job], message=job.message if failed else "")
            left.append(job)
        less = Gone(over, finished)
        if not any(job.message for job in left):
            self.rows.drop([(pack, stored.last)])
            self.rows.note_forgotten(stored.last)
            return less
        self.rows.forget_singles(list(gone))
        following = min((end for job, end in ends.items() if end and job not in gone), default=0.0)
        self.rows.rewrite(pack, packs.write(left), self._ends_without(stored, gone), less, following)
        self.rows.note_forgotten(max(gone, default=0))
        return less

    def _ends_without(self, stored: Stored, gone: Container[int]) -> list[End]:
        """How the tokens of a pack were delivered, but for those of some jobs."""
        mine, at = 0, 0
        for job, size, _ in packs.heads(stored.body):
            mine |= packs.span(at, size) if job not in gone else 0
            at += size
        return [part for each in self.rows.ends(stored.id) for part in _only(each, mine)]


def _accepted_at(job: Packed) -> float:
    """When a job was accepted: one that was to be sent later lives from then on, but its id knows."""
    came = job_time(job.job)
    return came if job.job >= FORMER and job.accepted_at > came + LATER else job.accepted_at


def _is_failure(state: int, failure: str) -> bool:
    return state == FAILED or (state == OVER and failure not in ("", CANCELLED))


def _only(end: End, mine: int) -> Iterator[End]:
    """The part of an End that is about these positions, if there is any."""
    if not end.positions & mine:
        return
    places = [at for low, high in packs.runs(end.positions) for at in range(low, high)]
    receipts = [receipt for at, receipt in zip(places, end.receipts) if mine >> at & 1]
    yield end._replace(positions=end.positions & mine, receipts=receipts)


def _delivered(ends: Iterable[End], at: int, size: int) -> Iterator[tuple[int, tuple[float, str]]]:
    """Of what was delivered of a pack, that which is from position `at` on: the index from there, when, and the id."""
    mine = packs.span(at, size)
    for each in ends:
        if not each.positions & mine:
            continue
        receipts = iter(each.receipts)
        for low, high in packs.runs(each.positions):
            for position in range(low, high):
                receipt = next(receipts, "")
                if at <= position < at + size:
                    yield position - at, (each.at, receipt)


def _fates(traces: _Traces, sending: Container[int], queued: Container[int]) -> Iterable[Fate]:
    """What became of each token of a job, in their order; of those that are forgotten, nothing."""
    job = traces.job
    for index, token in enumerate(job.tokens):
        n = job.place(index)
        at, receipt = traces.delivered.get(index, (0.0, ""))
        if not token:
            continue
        if (alone := traces.singles.get(n)) is None:
            gone = traces.gone >> index & 1
            state = "delivered" if gone else "sending" if n in sending else "ready"
            yield Fate(n, token, state, gone, "", "", "", at if gone else job.accepted_at, receipt)
            continue
        if alone.state == OPEN:
            state = "sending" if n in sending else "deferred" if alone.waits and n not in queued else "ready"
        else:
            state = "cancelled" if alone.failure == CANCELLED else "failed" if alone.failure else "delivered"
        how = alone.failure, alone.reason, alone.canonical
        yield Fate(n, token, state, alone.attempts, *how, alone.due_at, receipt if state == "delivered" else "")
