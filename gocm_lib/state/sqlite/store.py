"""SqliteStore: packs, Singles, report and keys in one file (module store). Each change is one transaction.

Counts what there is in memory, so that nothing is counted by SQL; a transaction that fails leaves the counts alone.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Self

from gocm_lib.state.admission import Keeping
from gocm_lib.state.contract import (
    BEFORE_ALL,
    Conflict,
    Count,
    Deferred,
    Entry,
    Failed,
    Hold,
    Known,
    Meaning,
    Node,
    Past,
    Place,
    Replaced,
    Status,
    Summary,
    Unregistered,
    Which,
)
from gocm_lib.state.history import FORGOTTEN, History
from gocm_lib.state.packs import Key, Pack, disk_size
from gocm_lib.state.sqlite.database import DiskSpace, checkpoint, cut_log, open_spool, shrink, told, usage
from gocm_lib.state.sqlite.history import HistoryRows
from gocm_lib.state.sqlite.keys import Keys, most
from gocm_lib.state.sqlite.notes import Notes
from gocm_lib.state.sqlite.report import RunReport
from gocm_lib.state.sqlite.spool import Spool
from gocm_lib.state.store import FAILED, Finish, Single, Spot, Store, Stored, Totals
from gocm_lib.state.waves import Bucket

ROOM_IS_GOOD = 0.02  # seconds for which what was measured of the disk is believed: to measure costs as much as to write


class SqliteStore(Store):
    """See module store for what the methods do."""

    number, rescued = 0, False

    def __init__(self, db: sqlite3.Connection, disk: DiskSpace, keeping: Keeping) -> None:
        self.db = db
        self.disk = disk
        self._turning = False
        self._room = 0, 0  # as it was measured, less what was kept since
        self._room_good_until = 0.0
        self.spool = Spool(db)
        self.notes = Notes(db)
        self.rows = HistoryRows(self.spool, self.notes)
        self.history = History(self.rows)
        self.report = RunReport(db, keeping.max_report)
        self.keys = Keys(db)
        self._wakes_at: float | None = None  # when the next pack is due that waits for its time; None: look
        self.most_keys = most(keeping.max_keys, keeping.limits.spool)
        self.jobs, self.finished, self.failed_tokens, self.over, self.open_tokens = _count(db)

    @classmethod
    def open(cls, path: str, keeping: Keeping) -> Self:
        """The store in the spool at `path`, which is made if it is not there. Raises Fatal."""
        db, _held = open_spool(path)
        return cls(db, DiskSpace(path), keeping)

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._turning = True
        with self._restoring():
            try:
                yield
                with told():
                    if self.db.in_transaction:
                        self.db.execute("COMMIT")
            finally:
                self._turning = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all the changes in this block, or none. Raises Full, Passing and Broken."""
        with self._restoring() if not self._turning else nullcontext(), told():
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            yield
            if not self._turning:
                self.db.execute("COMMIT")
        self._room_good_until = 0.0

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Leave no change, and the counts as they were, when this block fails."""
        before = self.jobs, self.finished, self.failed_tokens, self.over, self.keys.count
        opened, lengths = self.open_tokens.copy(), self.report.lengths.copy()
        try:
            yield
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.jobs, self.finished, self.failed_tokens, self.over, self.keys.count = before
            self.open_tokens, self.report.lengths = opened, lengths
            self._room_good_until = 0.0
            raise

    @property
    def totals(self) -> Totals:  # type: ignore[override]
        """How much there is."""
        counts = self.jobs, dict(self.open_tokens), self.failed_tokens, self.over, self.finished, self.keys.count
        return Totals(*counts, dict(self.report.lengths))

    # ------------------------------------------------------------------------------------------------------ accepting

    def known(self, keys: Sequence[Key]) -> dict[int, Known | Conflict]:
        return self.keys.known(keys)

    def has(self, job: int) -> bool:
        return self.spool.has(job)

    def keep(self, packs: Sequence[Pack], counts: Mapping[Count, int]) -> None:
        good_until = self._room_good_until
        with self.transaction():
            self.spool.keep(packs)
            self.notes.keep(packs)
            if keys := [key for each in packs for key in each.keys]:
                self.keys.keep(keys)
            if forgotten := self.keys.fit(self.most_keys):
                self.report.count({Count("keys_forgotten"): forgotten})
            self.report.count(counts)
            self.jobs += sum([len(each.jobs) for each in packs])
            for each in packs:
                self.open_tokens[each.upstream] += each.size
                if each.due:
                    self._wakes_at = None
        used, free = self._room
        size = disk_size(packs)
        self._room, self._room_good_until = (used + size, free - size), good_until

    # ----------------------------------------------------------------------------------------------- what is to be sent

    def serve(self, upstreams: Collection[str]) -> None:
        pass

    def held(self) -> Mapping[str, Hold]:
        return self.notes.held

    def hold(self, upstream: str, hold: Hold) -> None:
        with self.transaction():
            self.notes.hold(upstream, hold)
        self.notes.held.setdefault(upstream, hold)

    def let_go(self, upstream: str) -> None:
        with self.transaction():
            self.notes.let_go(upstream)
        self.notes.held.pop(upstream, None)

    def wake(self, now: float, limit: int) -> list[Stored]:
        if self._wakes_at is None:
            self._wakes_at = self.notes.next_due()
        if now < self._wakes_at:
            return []
        with self.transaction():
            woken = self.notes.wake(now, limit)
        self._wakes_at = None
        self.spool.first_open = min([self.spool.first_open, *woken])
        return self.spool.packs(woken)

    def fresh(self, upstream: str, lane: int, after: int, tokens: int) -> list[Stored]:
        return self.spool.fresh(upstream, lane, after, tokens)

    def newest(self, upstream: str, lane: int, before: int, count: int) -> list[Stored]:
        return self.spool.newest_fresh(upstream, lane, before, count)

    def take(self, upstream: str, lane: int, tokens: int) -> list[Stored]:
        return []

    def give(self, upstream: str, lane: int, after: int, kept: Collection[int]) -> None:
        pass

    def resume(self) -> None:
        pass

    @property
    def sharers(self) -> int:
        return 1

    def own(self, job: int) -> Stored | None:
        return None

    def order(self, job: int) -> None:
        pass

    def orders(self) -> Collection[int]:
        return ()

    def carried_out(self, job: int) -> None:
        pass

    def tell_slowed(self, rates: Mapping[str, float]) -> None:
        pass

    def heard_slowed(self) -> Mapping[str, float]:
        return {}

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        return self.spool.packs(ids)

    def pack_of(self, job: int) -> Stored | None:
        return self.spool.pack_of(job)

    def due(self, upstream: str, after: Spot, rank: int, count: int, above: int) -> list[Single]:
        return self.spool.due(upstream, after, rank, count, above)

    def next_rank(self, upstream: str, after: Spot, below: int, above: int) -> int | None:
        return self.spool.next_rank(upstream, after, below, above)

    def open_singles(self, job: int) -> list[Single]:
        return self.spool.open_singles(job)

    def died(self, job: int, reason: str) -> bool:
        return self.spool.died(job, reason)

    def is_sound(self, job: int) -> bool:
        return self.spool.is_sound(job)

    def deferred(self, upstream: str, after: Sequence[tuple[Spot, int]], most: int) -> Deferred:
        return self.spool.deferred(upstream, after, most)

    def finish(self, change: Finish) -> None:
        with self.transaction():
            self.spool.change(change.packs, change.now)
            if change.singles:
                self.spool.put(change.singles)
            if change.ends:
                self.spool.end(change.ends)
            for upstream, (heard, fresh) in change.answers.items():
                self.report.keep_answers(upstream, heard, fresh)
            for replaced in change.replaced:
                self.report.add_canonical(*replaced)
            for listed in change.unregistered:
                self.report.add_notregistered(*listed)
            for invalid in change.invalid:
                self.report.add_invalid(*invalid)
            self.report.count(change.counts)
            self._note(change)

    def _note(self, change: Finish) -> None:
        """Keep the counts with what was changed."""
        opened = 0
        for _id, _gone, _fresh, count, jobs, finished in change.packs:
            opened += count
            self.jobs += jobs
            self.finished += finished
        for upstream, count in change.opened.items():
            self.open_tokens[upstream] += count
        failed = sum([single.state == FAILED for single in change.singles]) - change.revived
        self.failed_tokens += failed
        self.over -= opened + failed

    # ----------------------------------------------------------------------------------------------------- looking back

    def status(
        self, job: int, sending: Container[int], queued: Container[int], state: str, after: int, limit: int
    ) -> Status | Past | None:
        return self.history.status(job, sending, queued, state, after, limit)

    def summaries(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[Summary]:
        return self.history.summaries(tag, after, limit, upstreams)

    def meant(self) -> Mapping[str, Meaning]:
        return self.notes.meant()

    def mean(self, meanings: Mapping[str, Meaning]) -> None:
        with self.transaction():
            self.notes.mean(meanings)

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        return self.history.failed(which, after, limit)

    def failed_singles(self, which: Which, limit: int) -> list[Single]:
        return self.rows.failed(which, BEFORE_ALL, limit)

    def is_counted(self, job: int) -> bool:
        return self.history.is_counted(job)

    def discard(self, which: Which, limit: int) -> int:
        with self.transaction():
            found = self.rows.failed(which, BEFORE_ALL, limit)
            self._gave_up(len(found), self.history.give_up(found))
        return len(found)

    def _gave_up(self, count: int, sizes: int) -> None:
        self.failed_tokens -= count
        self.over += count
        self.finished += sizes

    def prune_failed(self, before: float, most: int) -> tuple[int, bool]:
        with self.transaction():
            count, too_many, sizes = self.history.prune_failed(before, self.failed_tokens - most)
            self._gave_up(count, sizes)
        return too_many, count >= FORGOTTEN

    def forget_jobs(self, before: float, most: int) -> bool:
        with self.transaction():
            gone = self.history.forget(before, self.finished - most)
            if gone:
                self.over -= gone.over
                self.finished -= gone.finished
        return gone is not None

    def prune_keys(self, now: float) -> None:
        if self.keys.has_old(now):
            with self.transaction():
                self.keys.prune(now)

    # ------------------------------------------------------------------------------------------------------- the report

    def counts(self) -> tuple[dict[Count, int], dict[Count, int]]:
        counts = self.report.counts()
        return counts, counts

    def nodes(self) -> list[Node]:
        return []

    def latest(self) -> tuple[list[Replaced], list[Unregistered]]:
        return list(self.report.latest_replaced), list(self.report.latest_unregistered)

    def page(self, which: str, after: int, limit: int, upstream: str) -> list[Entry]:
        return self.report.page(which, after, limit, upstream)

    def forget(self, which: str, upto: int, upstream: str) -> bool:
        with self.transaction():
            return self.report.forget(which, upto, upstream)

    def hand_out(self, which: str, limit: int, upstream: str) -> list[Entry] | None:
        return self.report.page(which, 0, limit, upstream)

    def handed_out(self, which: str, upto: int, upstream: str) -> None:
        if upto:
            self.forget(which, upto, upstream)

    def newest_entry(self, which: str) -> int:
        return self.report.newest(which)

    def answers(self, upstream: str) -> list[Bucket]:
        return self.report.answers(upstream)

    def mark(self, upstream: str, first: int, hold: bool) -> None:
        with self.transaction():
            self.report.mark(upstream, first, hold)

    def release_held(self, limit: int) -> int:
        with self.transaction():
            return self.report.release(limit)

    def discard_held(self, limit: int) -> int:
        with self.transaction():
            return self.report.discard(limit)

    # ------------------------------------------------------------------------------------------------- clocks, and room

    def last_job(self) -> int:
        return self.spool.last_job()

    def last_accepted(self) -> float:
        return self.spool.last_accepted()

    def oldest(self) -> float | None:
        return self.spool.oldest(self.jobs)

    def set_back(self, by: float, now: float, latest: float) -> None:
        with self.transaction():
            if by:
                self.spool.accepted_by(now)  # so that the next start does not take it for set back again
            self.spool.set_back(by, now, latest)

    def room(self) -> tuple[int, int]:
        now = time.monotonic()
        if now >= self._room_good_until:
            used, unused = usage(self.db)
            # What is in the log needs as much room in the file, before the log is begun anew.
            excess = self.disk.wal_excess()
            self._room = used + excess, self.disk.free() + unused - excess
            self._room_good_until = now + ROOM_IS_GOOD
        return self._room

    def used(self) -> int:
        return usage(self.db)[0]

    def overgrown(self) -> bool:
        return bool(self.disk.wal_excess())

    def tend(self, least: int) -> bool:
        self.oldest()  # so that nobody who asks need pass over many
        with told():
            if self.disk.wal_excess():
                cut_log(self.db)  # by itself it is cut with the next write, for which it may have left no room
            if not self.jobs:
                shrink(self.db)
        return self.disk.keep_reserve(least)

    def make_way(self) -> None:
        checkpoint(self.db)

    def use_reserve(self) -> bool:
        return self.disk.use_reserve()

    def close(self) -> None:
        self.db.close()


def _count(db: sqlite3.Connection) -> tuple[int, int, int, int, Counter[str]]:
    """Jobs with open tokens, the tokens with which finished ones came, failed tokens, those that are over, and the open
    ones by upstream. Counting a million packs takes a tenth of a second.
    """
    names: list[str] = []
    while row := db.execute(
        f"SELECT upstream FROM pack WHERE upstream NOT IN ({', '.join('?' * len(names))}) LIMIT 1", names
    ).fetchone():
        names.append(row[0])
    by_name = "".join(", coalesce(sum(open) FILTER (WHERE upstream = ?), 0)" for _ in names)
    [[jobs, finished, size, *opened]] = db.execute(
        f"SELECT coalesce(sum(jobs), 0), coalesce(sum(finished), 0), coalesce(sum(size), 0){by_name} FROM pack", names
    )
    [[failed]] = db.execute(f"SELECT count(*) FROM single INDEXED BY single_failed WHERE state = {FAILED}")
    return jobs, finished, failed, size - sum(opened) - failed, Counter(dict(zip(names, opened)))
