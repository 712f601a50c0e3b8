"""PostgresStore: packs, Singles, report and keys in a PostgreSQL that several nodes share (module store).

Each change is one transaction, sent to the server in one go. What there is of everything is counted in tables (module
report); a node knows its own share of that exactly, in memory, and what the others have as of their last beat.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Self

from gocm_lib.message.job import NODE_BITS, format_id
from gocm_lib.process import log
from gocm_lib.state.admission import Keeping
from gocm_lib.state.contract import (
    BEFORE_ALL,
    COUNTERS,
    LISTS,
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
from gocm_lib.state.packs import Key, Pack
from gocm_lib.state.postgres.database import Database
from gocm_lib.state.postgres.history import HistoryRows
from gocm_lib.state.postgres.keys import Keys
from gocm_lib.state.postgres.node import Me, Membership
from gocm_lib.state.postgres.notes import Notes
from gocm_lib.state.postgres.report import GAUGES, RunReport, sums
from gocm_lib.state.postgres.spool import ROW, Spool
from gocm_lib.state.store import FAILED, Finish, Single, Spot, Store, Stored, Totals
from gocm_lib.state.waves import Bucket

REST = 5.0  # seconds between two looks for what may be forgotten, when there is nothing


class PostgresStore(Store):
    """See module store for what the methods do."""

    def __init__(self, db: Database, member: Membership, keeping: Keeping) -> None:
        self.db = db
        self.number, self.rescued = member.number, member.rescued
        self.member = member
        self.spool = Spool(db)
        self.notes = Notes(db)
        self.rows = HistoryRows(self.spool, self.notes)
        self.history = History(self.rows)
        self.report = RunReport(db, keeping.max_report)
        self.keys = Keys(db)
        self.most_keys = keeping.max_keys
        self._due: dict[str, float] = {}  # nothing is there to be forgotten from before that time
        self._news = member.news
        self._orders: Collection[int] = member.news.orders  # that the last beat brought
        self._slowed: dict[str, float] = {}  # what others told of since it was last asked
        self._pool = set(self._news.pool)  # upstreams and lanes of which there may be packs that are nobody's
        self._others: Mapping[Count, int]
        own, self._others = sums(db)
        # What this node has counted of GAUGES: it knows that exactly, and of the others what it has last heard.
        self._own = Counter({count: value for count, value in own.items() if count.name in GAUGES})

    @classmethod
    def open(cls, address: str, me: Me, upstreams: Sequence[str], keeping: Keeping) -> Self:
        """The store at an address, for the node that we have become (node.join). Raises psycopg.Error."""
        member = Membership(address, me, upstreams)
        return cls(Database(address, me.number, me.epoch), member, keeping)

    def start(self, cell: MutableSequence[float], give_up: Callable[[str], None], waits: bool = False) -> None:
        """Keep the node's lease (Membership.start), and look whether the server has what it has answered."""
        job = int(cell[1]) << NODE_BITS | self.number
        if cell[1] and job > self.rows.forgotten() and self.spool.find(job) is None:
            log.logger.error(
                "the spool's server does not have message %s any more, which it had committed, so neither what came "
                "with it: was a standby promoted that is not a synchronous one? see gocm help fleet",
                format_id(job),
            )
        self.member.start(cell, give_up, waits)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._counting(), self.db.turn():
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all the changes in this block, or none."""
        with self._counting(), self.db.transaction():
            yield

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """When this block has made its changes, we have so much more or less of everything."""
        yield
        if not self.db.is_open:
            for count, value in self.db.counted.items():
                if count.name in GAUGES:
                    self._own[count] += value
            self.db.counted.clear()
            self.member.committed(self.spool.newest)

    @property
    def totals(self) -> Totals:  # type: ignore[override]
        """How much there is on all nodes, what the others have as of their last beat."""
        found = self._sums()
        opened = {count.upstream: value for count, value in found.items() if count.name == "open"}
        listed = {which: found[Count("listed", reason=which)] for which in (*LISTS, "held")}
        jobs, failed, over, finished, keys = (
            found[Count(name)] for name in ("jobs", "failed", "over", "finished", "keys")
        )
        return Totals(jobs, opened, failed, over, finished, keys, listed)

    def _sums(self) -> Counter[Count]:
        found = self._own.copy()
        self._hear()
        for counts in (self._others, self.db.counted):
            for count, value in counts.items():
                if count.name in GAUGES:
                    found[count] += value
        return found

    def _hear(self) -> None:
        """Take in what the last beat has brought."""
        news = self.member.news
        if news is self._news:
            return
        before = {each.id: each.slowed for each in self._news.nodes}
        for each in news.nodes:
            for upstream, told in each.slowed.items() if each.id in before and each.id != self.number else ():
                if before[each.id].get(upstream) != told:
                    self._slowed[upstream] = min(told[0], self._slowed.get(upstream, math.inf))
        if news.pool is not self._news.pool:  # else we have only learned something ourselves
            self._pool, self._others, self._orders = set(news.pool), news.others, news.orders
        self._news = news

    # ------------------------------------------------------------------------------------------------------ accepting

    def known(self, keys: Sequence[Key]) -> dict[int, Known | Conflict]:
        return self.keys.known(keys)

    def has(self, job: int) -> bool:
        return self.spool.has(job)

    def keep(self, packs: Sequence[Pack], counts: Mapping[Count, int]) -> None:
        with self.transaction():
            self.spool.keep(packs)
            self.notes.keep(packs)
            if keys := [key for each in packs for key in each.keys]:
                self.keys.keep(keys)
                if (excess := self.totals.keys - self.most_keys) > 0:
                    self.db.count({Count("keys_forgotten"): self.keys.fit(excess)})
            self.db.count(counts)
            self.db.count({Count("jobs"): sum([len(each.jobs) for each in packs])})
            self.db.count({Count("bytes"): sum([len(each.body) + ROW for each in packs])})
            for each in packs:
                self.db.count({Count("open", each.upstream): each.size})
            self.spool.kept(packs)
        if waiting := [each.due for each in packs if each.due]:
            self.member.learn(due=min([self.member.news.due, *waiting]))

    # ----------------------------------------------------------------------------------------------- what is to be sent

    def serve(self, upstreams: Collection[str]) -> None:
        self.member.serve(upstreams)

    def held(self) -> Mapping[str, Hold]:
        return self.member.news.held

    def hold(self, upstream: str, hold: Hold) -> None:
        with self.transaction():
            self.notes.hold(upstream, hold)
        self.member.learn(held={upstream: hold, **self.member.news.held})

    def let_go(self, upstream: str) -> None:
        with self.transaction():
            self.notes.let_go(upstream)
        self.member.learn(held={name: hold for name, hold in self.member.news.held.items() if name != upstream})

    def wake(self, now: float, limit: int) -> list[Stored]:
        self._hear()
        if now < self.member.news.due:
            return []
        with self.transaction():
            woken = self.notes.wake(now, limit)
        if not woken:
            self.member.learn(due=math.inf)  # until the next beat tells of others
        self._pool |= {(upstream, lane) for _, upstream, lane, node in woken if not node}
        return self.spool.packs([pack for pack, _, _, node in woken if node])

    def fresh(self, upstream: str, lane: int, after: int, tokens: int) -> list[Stored]:
        return self.spool.fresh(upstream, lane, after, tokens)

    def newest(self, upstream: str, lane: int, before: int, count: int) -> list[Stored]:
        return self.spool.newest_fresh(upstream, lane, before, count)

    def take(self, upstream: str, lane: int, tokens: int) -> list[Stored]:
        self._hear()
        if (upstream, lane) not in self._pool:
            return []
        with self.transaction():
            taken = self.spool.take(upstream, lane, tokens)
        if sum([each.fresh + sum(each.singles.values()) for each in taken]) < tokens:
            self._pool.discard((upstream, lane))
        return taken

    def give(self, upstream: str, lane: int, after: int, kept: Collection[int]) -> None:
        with self.transaction():
            self.spool.give(upstream, lane, after, kept)
        self._pool.add((upstream, lane))

    def resume(self) -> None:
        self.member.resume()

    @property
    def sharers(self) -> int:
        return max(1, self.member.news.alive)

    def own(self, job: int) -> Stored | None:
        with self.transaction():
            return self.spool.own(job, done=False)

    def order(self, job: int) -> None:
        with self.transaction():
            self.spool.order(job)

    def orders(self) -> Collection[int]:
        self._hear()
        orders, self._orders = self._orders, ()
        return orders

    def carried_out(self, job: int) -> None:
        with self.transaction():
            self.spool.carried_out(job)

    def tell_slowed(self, rates: Mapping[str, float]) -> None:
        self.member.tell_slowed(rates)

    def heard_slowed(self) -> Mapping[str, float]:
        self._hear()
        slowed, self._slowed = self._slowed, {}
        return slowed

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
            for upstream, (heard, _) in change.answers.items():
                self.report.keep_answers(upstream, heard)
            if change.replaced:
                self.report.add_canonicals(change.replaced)
            if change.unregistered:
                self.report.add_unregistered(change.unregistered)
            if change.invalid:
                self.report.add_invalid(change.invalid)
            self.db.count(change.counts)
            self._note(change)

    def _note(self, change: Finish) -> None:
        """Count how much there is now."""
        opened = sum(each.open for each in change.packs)
        failed = sum([single.state == FAILED for single in change.singles]) - change.revived
        self.db.count(
            {
                Count("jobs"): sum(each.jobs for each in change.packs),
                Count("finished"): sum(each.finished for each in change.packs),
                Count("failed"): failed,
                Count("over"): -opened - failed,
                **{Count("open", upstream): count for upstream, count in change.opened.items()},
            }
        )

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
        """Those of packs that are ours, or that can be, because nothing of them is in another node's hands."""
        with self.transaction():
            self.rows.hold()
            found = self.rows.failed(which, BEFORE_ALL, limit)
            ours = {job for job in {single.job for single in found} if self.spool.own(job, done=True)}
        return [single for single in found if single.job in ours]

    def is_counted(self, job: int) -> bool:
        return self.history.is_counted(job)

    def discard(self, which: Which, limit: int) -> int:
        with self.transaction():
            self.rows.hold()
            found = self.rows.failed(which, BEFORE_ALL, limit)
            if found:
                self._gave_up(len(found), self.history.give_up(found))
        return len(found)

    def _gave_up(self, count: int, sizes: int) -> None:
        self.db.count({Count("failed"): -count, Count("over"): count, Count("finished"): sizes})

    def prune_failed(self, before: float, most: int) -> tuple[int, bool]:
        if self.totals.failed <= most and self._rests("failed", before):
            return 0, False
        with self.transaction():
            self.rows.hold()
            count, too_many, sizes = self.history.prune_failed(before, self.totals.failed - most)
            self._gave_up(count, sizes)
        self._due["failed"] = before + REST if not count else 0.0
        return too_many, count >= FORGOTTEN

    def forget_jobs(self, before: float, most: int) -> bool:
        if self.totals.finished <= most and self._rests("jobs", before):
            return False
        with self.transaction():
            self.rows.hold()
            gone = self.history.forget(before, self.totals.finished - most)
            if gone:
                self.db.count({Count("over"): -gone.over, Count("finished"): -gone.finished})
            found = self.rows.finished(1)
        self._due["jobs"] = found[0].ended if found else before + REST
        return gone is not None

    def prune_keys(self, now: float) -> None:
        if self.totals.keys and not self._rests("keys", now):
            with self.transaction():
                self.keys.prune(now)
            self._due["keys"] = now + REST

    def _rests(self, what: str, before: float) -> bool:
        """Whether what is from before a time need not be forgotten now: that is for one node, and none of it is due."""
        return before < math.inf and (not self.member.is_first or before <= self._due.get(what, 0.0))

    # ------------------------------------------------------------------------------------------------------- the report

    def counts(self) -> tuple[dict[Count, int], dict[Count, int]]:
        own, self._others = sums(self.db)
        counters = [count for count in own if count.name in COUNTERS]
        whole = {count: own[count] + self._others[count] for count in counters}
        return {each: n for each, n in whole.items() if n}, {each: own[each] for each in counters if own[each]}

    def nodes(self) -> list[Node]:
        return [
            Node(each.name, each.id == self.number, each.alive or each.id == self.number, each.version)
            for each in self.member.news.nodes
            if each.alive or not each.departed
        ]

    def latest(self) -> tuple[list[Replaced], list[Unregistered]]:
        return list(self.report.latest_replaced), list(self.report.latest_unregistered)

    def page(self, which: str, after: int, limit: int, upstream: str) -> list[Entry]:
        return self.report.page(which, after, limit, upstream)

    def forget(self, which: str, upto: int, upstream: str) -> bool:
        with self.transaction():
            return self.report.forget(which, upto, upstream)

    def hand_out(self, which: str, limit: int, upstream: str) -> list[Entry] | None:
        with self.transaction():
            return self.report.hand_out(which, limit, upstream) if self.report.borrow(which) else None

    def handed_out(self, which: str, upto: int, upstream: str) -> None:
        with self.transaction():
            if upto:
                self.report.forget(which, upto, upstream)
            self.report.give_back(which)

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
        return self.spool.oldest()

    def set_back(self, by: float, now: float, latest: float) -> None:
        with self.transaction():
            if by:
                self.spool.accepted_by(now)  # so that the next start does not take it for set back again
            self.spool.set_back(by, now, latest)

    def room(self) -> tuple[int, int]:
        return self.used(), sys.maxsize  # when its disk is full, the server says so

    def used(self) -> int:
        return self._sums()[Count("bytes")]

    def overgrown(self) -> bool:
        return False

    def tend(self, least: int) -> bool:
        return True

    def make_way(self) -> None:
        pass

    def use_reserve(self) -> bool:
        return False

    def close(self) -> None:
        self.member.stop()
        self.db.close()
