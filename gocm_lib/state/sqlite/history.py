"""What became of tokens: looked up, discarded if they failed, and in the end forgotten.

Works on the spool's tables, on what nobody sends any more. Finished messages are kept for those who ask, and never
stand in the way of a new message: they are forgotten when their time is over, when there are more than `most`, and
before a message is refused for want of room. A message with failed tokens is kept for them, its other tokens are not;
those rows of failed tokens are marked then (`waits`), and their message counts no more as one that is kept. The caller
owns the transaction.
"""

import math
import sqlite3
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gocm_lib.state import admission, packs
from gocm_lib.state.contract import STATES, Failed, Fate, Past, Place, Status, Which
from gocm_lib.state.packs import Packed
from gocm_lib.state.sqlite.spool import Spool, put_ends, read_ends, single
from gocm_lib.state.store import FAILED, OPEN, OVER, End, Single, Stored

FORGOTTEN = 5000  # tokens that are forgotten at once, or those of one job, so that nobody waits long


class Gone(NamedTuple):
    """What was forgotten: tokens that had ended, and tokens with which finished jobs had come."""

    over: int
    finished: int


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


def _conditions(which: Which) -> tuple[str, tuple[Any, ...]]:
    """A selection of failed tokens in SQL, and the values for it."""
    given = {"job = ?": which.job, "failure = ?": which.failure, "upstream = ?": which.upstream}
    wanted = {condition: value for condition, value in given.items() if value}
    return " AND ".join(["due_at < ?", *wanted]), (which.before, *wanted.values())


class History:
    """The part of the spool that has ended, for SqliteStore."""

    def __init__(self, spool: Spool) -> None:
        self.db: sqlite3.Connection = spool.db
        self.spool = spool

    # -------------------------------------------------------------------------------------------------------- looked up

    def status(
        self, job: int, sending: Container[int], queued: Container[int], state: str, after: int, limit: int
    ) -> Status | Past | None:
        """Store.status."""
        stored = self.spool.pack_of(job) if job <= self.spool.newest else None
        traces = next((each for each in self._traces(stored, job) if each.job.job == job), None) if stored else None
        if stored is None or traces is None or not traces.job.message:
            [[forgotten]] = self.db.execute("SELECT job FROM forgotten")
            return Past() if job <= forgotten else None
        fates = list(_fates(traces, sending, queued))
        counts = Counter(fate.state for fate in fates)
        found = [fate for fate in fates if fate.n > after and state in ("", fate.state)]
        page = admission.page(found[:limit])
        # What was left out stands between the tokens, and after the last page's last.
        last = page[-1].n if len(page) == limit else math.inf
        skipped = [skip for skip in traces.job.skipped if after < skip.n < last][:limit]
        since = max([traces.job.accepted_at, *(each.since for each in traces.singles.values())])
        return Status(
            job,
            stored.upstream,
            traces.job.target,
            traces.job.accepted_at,
            since,
            traces.job.expires_at + since - traces.job.accepted_at,
            len(traces.job.tokens),
            traces.finished(),
            {name: counts[name] for name in STATES},
            page,
            "",
            skipped,
        )

    def _traces(self, stored: Stored, only: int = 0) -> list[_Traces]:
        """What is known of the jobs of a pack, or of one of them."""
        low, high = (only, only) if only else (stored.id, stored.last)
        rows = [single(row) for row in self.db.execute("SELECT * FROM single WHERE job BETWEEN ? AND ?", (low, high))]
        ends = read_ends(self.db, stored.id)
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
        conditions, values = _conditions(which)
        rows = self.db.execute(
            "SELECT job, n, upstream, attempts, failure, reason, due_at FROM single INDEXED BY single_failed"
            f" WHERE state = {FAILED} AND (job, n) > (?, ?) AND {conditions} ORDER BY job, n LIMIT ?",
            (*after, *values, limit),
        ).fetchall()
        return admission.page(
            Failed(job, n, token, upstream, attempts, failure, reason, failed_at)
            for (job, n, upstream, attempts, failure, reason, failed_at), token in self._named(rows)
        )

    def _named(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], str]]:
        """Rows of Singles, which begin with job and place, in the order of jobs, each with its token."""
        jobs: dict[int, Packed] = {}
        for row in rows:
            if row[0] not in jobs:
                stored = self.spool.pack_of(row[0])
                jobs = {each.job: each for each in packs.read(stored.body)} if stored else {}
            if job := jobs.get(row[0]):
                yield row, job.tokens[job.index_of(row[1])]

    def failed_singles(self, which: Which, limit: int) -> list[Single]:
        """Store.failed_singles."""
        conditions, values = _conditions(which)
        rows = self.db.execute(
            f"SELECT * FROM single INDEXED BY single_failed WHERE state = {FAILED} AND {conditions}"
            " ORDER BY job, n LIMIT ?",
            (*values, limit),
        )
        return [single(row) for row in rows]

    def is_counted(self, job: int) -> bool:
        """Whether a finished job is among those that are kept."""
        stored = self.spool.pack_of(job)
        return stored is not None and any(each.is_counted() for each in self._traces(stored, job))

    # -------------------------------------------------------------------------------------------------------- discarded

    def discard(self, which: Which, limit: int) -> tuple[int, int]:
        """Discard up to `limit` failed tokens. Returns how many, and with how many tokens jobs had come that are kept
        again for it.
        """
        found = self.failed_singles(which, limit)
        return len(found), self._give_up(found)

    def _give_up(self, singles: Sequence[Single]) -> int:
        """These failed tokens are over. Their jobs are forgotten with the next ones if their time has come. Returns
        with how many tokens those had come that count again.
        """
        marked = {each.job: each for each in singles if each.waits}
        revived = [
            each for job, each in marked.items() if not self.is_counted(job) and not self.spool.open_singles(job)
        ]
        self.db.executemany(
            f"UPDATE single SET state = {OVER}, waits = 0 WHERE job = ? AND n = ?",
            [(each.job, each.n) for each in singles],
        )
        sizes = 0
        for each in revived:
            stored = self.spool.pack_of(each.job)
            assert stored
            size = next(head[1] for head in packs.heads(stored.body) if head[0] == each.job)
            self.db.execute(
                "UPDATE pack SET finished = finished + ?, ended = CASE WHEN ended > 0 THEN min(ended, ?) ELSE ? END"
                " WHERE id = ?",
                (size, each.due_at, each.due_at, stored.id),
            )
            sizes += size
        return sizes

    def prune_failed(self, before: float, excess: int) -> tuple[int, int, int]:
        """Discard some of the tokens that failed before a time, or the `excess` oldest. Returns how many, how many of
        them only because there are too many, and with how many tokens jobs had come that count again.
        """
        excess = min(excess, FORGOTTEN)
        too_many, limit = (float("inf"), excess) if excess > 0 else (before, FORGOTTEN)
        found = [
            single(row)
            for row in self.db.execute(
                f"SELECT * FROM single INDEXED BY single_failed_age WHERE state = {FAILED} AND due_at < ?"
                " ORDER BY due_at LIMIT ?",
                (too_many, limit),
            )
        ]
        sizes = self._give_up(found)
        return len(found), sum(each.due_at >= before for each in found), sizes

    # -------------------------------------------------------------------------------------------------------- forgotten

    def forget(self, before: float, excess: int) -> Gone | None:
        """Forget some of the jobs that finished before a time, and of those that finished first until they had so many
        tokens. None: there was nothing to forget.
        """
        rows = self.db.execute(
            "SELECT id, last, size, finished, jobs, ended FROM pack INDEXED BY pack_ended WHERE ended > 0"
            " ORDER BY ended LIMIT ?",
            (FORGOTTEN,),
        ).fetchall()
        over = finished = 0
        whole: list[tuple[int, int]] = []
        for pack, last, size, count, jobs, ended in rows:
            if finished >= FORGOTTEN or (ended > before and finished >= excess):
                break
            latest = math.inf if count <= excess - finished else before
            if not jobs and ended <= latest and self._ends_whole(pack, last, latest):
                whole.append((pack, last))
                over, finished = over + size, finished + count
                continue
            gone = self._forget_part(pack, before, excess - finished)
            over, finished = over + gone.over, finished + gone.finished
        self._forget_whole(whole)
        return Gone(over, finished) if over or finished else None

    def _ends_whole(self, pack: int, last: int, before: float) -> bool:
        """Whether a pack that has ended has no failed token, and nothing that ended later than `before`."""
        [[stays]] = self.db.execute(
            f"SELECT EXISTS (SELECT 1 FROM single WHERE job BETWEEN :low AND :high AND"
            f" (state = {FAILED} OR due_at > :before))"
            " OR EXISTS (SELECT 1 FROM ended WHERE pack = :low AND at > :before)",
            {"low": pack, "high": last, "before": before},
        )
        return not stays

    def _forget_whole(self, ids: Sequence[tuple[int, int]]) -> None:
        if ids:
            self.db.executemany("DELETE FROM single WHERE job BETWEEN ? AND ?", ids)
            self._drop([pack for pack, _ in ids], max(last for _, last in ids))

    def _drop(self, ids: Sequence[int], job: int) -> None:
        rows = [(each,) for each in ids]
        for which in ("pack WHERE id", "body WHERE id", "ended WHERE pack"):
            self.db.executemany(f"DELETE FROM {which} = ?", rows)
        self.db.execute("UPDATE forgotten SET job = max(job, ?)", (job,))

    def _keep_ends(self, pack: int, traces: Iterable[_Traces]) -> None:
        """Remember of a pack only how these jobs of it were delivered."""
        kept = {each.job.job for each in traces}
        [stored] = self.spool.packs([pack])
        mine, at = 0, 0
        for job, size, _ in packs.heads(stored.body):
            mine |= packs.span(at, size) if job in kept else 0
            at += size
        ends = read_ends(self.db, pack)
        self.db.execute("DELETE FROM ended WHERE pack = ?", (pack,))
        put_ends(self.db, [part for each in ends for part in _only(each, mine)])

    def _forget_part(self, pack: int, before: float, excess: int) -> Gone:
        """Forget those jobs of a pack whose time has come."""
        [stored] = self.spool.packs([pack])
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
        jobs = [(job,) for job in gone]
        self.db.executemany(f"DELETE FROM single WHERE job = ? AND state = {OVER}", jobs)
        self.db.executemany(f"UPDATE single SET waits = 1 WHERE job = ? AND state = {FAILED}", jobs)
        if not any(job.message for job in left):
            self._drop([pack], stored.last)
            return Gone(over, finished)
        self._keep_ends(pack, [each for each in traces if each.job.job not in gone])
        following = min((end for job, end in ends.items() if end and job not in gone), default=0.0)
        self.db.execute("UPDATE body SET text = ? WHERE id = ?", (packs.write(left), pack))
        self.db.execute(
            "UPDATE pack SET size = size - ?, finished = finished - ?, ended = ? WHERE id = ?",
            (over, finished, following, pack),
        )
        self.db.execute("UPDATE forgotten SET job = max(job, ?)", (max(gone, default=0),))
        return Gone(over, finished)


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
            state = "failed" if alone.failure else "delivered"
        how = alone.failure, alone.reason, alone.canonical
        yield Fate(n, token, state, alone.attempts, *how, alone.due_at, receipt if state == "delivered" else "")
