"""What became of tokens: looked up, replayed or discarded if they failed, and in the end forgotten.

Works on the spool's tables, on rows that nobody sends any more. Finished messages are kept for those who ask, and never
stand in the way of a new message: they are forgotten when their time is over, when there are more than `most`, and
before a message is refused for want of room. The caller owns the transaction and the lock.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gocm_lib.message.job import Skip
from gocm_lib.state import admission
from gocm_lib.state.contract import BEFORE_ALL, Failed, Fate, Past, Place, Status, Which
from gocm_lib.state.sqlite.spool import FAILED, OVER, Spool
from gocm_lib.state.turns import lane, rank

FORGOTTEN = 5000  # tokens that are forgotten at once, or those of one job, so that nobody waits long for the lock

# What a token can be (contract.STATES), told from its row, for whoever asks.
_STATES = {
    "ready": "generation = 0 AND waits = 0",
    "deferred": "generation = 0 AND waits = 1",
    "sending": "generation > 0",
    "delivered": f"generation = {OVER} AND failure = ''",
    "failed": "generation < 0 AND failure <> ''",
}
_STATE = "CASE " + " ".join(f"WHEN {is_so} THEN '{state}'" for state, is_so in _STATES.items()) + " END"
_COUNTS = ", ".join(f"count(*) FILTER (WHERE {is_so})" for is_so in _STATES.values())  # a third of GROUP BY's price


def _conditions(which: Which) -> tuple[str, tuple[Any, ...]]:
    """A selection of failed tokens in SQL, and the values for it."""
    given = {"job = ?": which.job, "failure = ?": which.failure, "upstream = ?": which.upstream}
    wanted = {condition: value for condition, value in given.items() if value}
    return " AND ".join(["due_at < ?", *wanted]), (which.before, *wanted.values())


class History:
    """The part of the spool that has ended, for State."""

    def __init__(self, spool: Spool) -> None:
        self.db = spool.db
        self.spool = spool

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        """What became of a job, with up to `limit` of its tokens after place `after`, in one state ("": any). None:
        there is no such job. Past: jobs as late as this one were forgotten, and it may have been one of them.
        """
        row = self.db.execute(
            "SELECT id, upstream, target, accepted_at, since, expires_at, size, abs(finished) FROM job WHERE id = ?",
            (job,),
        ).fetchone()
        if row is None:
            [[forgotten]] = self.db.execute("SELECT job FROM forgotten")
            return Past() if job <= forgotten else None
        [counts] = self.db.execute(f"SELECT {_COUNTS} FROM token WHERE job = ?", (job,))
        fates = self.db.execute(
            f"SELECT n, token, {_STATE}, attempts, failure, reason, canonical, due_at FROM token"
            f" WHERE job = ? AND n > ? AND {_STATES.get(state, '1')} ORDER BY n LIMIT ?",
            (job, after, limit),
        )
        page = [Fate(*fate) for fate in admission.page(fates)]
        if page:
            ids = self._receipts(job, page[0].n, page[-1].n)
            page = [fate._replace(receipt=ids.get(fate.n, "")) if fate.state == "delivered" else fate for fate in page]
        # What was left out stands between the tokens, and after the last page's last.
        last = page[-1].n if len(page) == limit else math.inf
        skipped = self.db.execute(
            "SELECT n, why FROM skipped WHERE job = ? AND n > ? AND n < ? ORDER BY n LIMIT ?", (job, after, last, limit)
        )
        return Status._make([*row, dict(zip(_STATES, counts)), page, "", [Skip(*each) for each in skipped]])

    def _receipts(self, job: int, first: int, last: int) -> dict[int, str]:
        """The upstream's ids of tokens from place `first` to `last`, by place."""
        rows = self.db.execute(
            "SELECT n, ids FROM receipt WHERE job = :job AND n <= :last AND n >= coalesce("
            "(SELECT max(n) FROM receipt WHERE job = :job AND n <= :first), 0)",
            {"job": job, "first": first, "last": last},
        )
        return {n: receipt for start, ids in rows for n, receipt in enumerate(ids.split(" "), start)}

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Up to `limit` failed tokens after a place, in the order of places."""
        conditions, values = _conditions(which)
        rows = self.db.execute(
            "SELECT job, n, token, upstream, attempts, failure, reason, due_at FROM token INDEXED BY token_dead"
            f" WHERE generation = {FAILED} AND (job, n) > (?, ?) AND {conditions} ORDER BY job, n LIMIT ?",
            (*after, *values, limit),
        )
        return [Failed(*row) for row in admission.page(rows)]

    def discard(self, which: Which, limit: int) -> int:
        """Discard up to `limit` failed tokens. Returns how many."""
        found = self.failed(which, BEFORE_ALL, limit)
        self._give_up([(each.job, each.n) for each in found])
        return len(found)

    def _give_up(self, places: Sequence[tuple[int, int]]) -> None:
        """These failed tokens, by job and place, are over. Their jobs are forgotten with the next ones if their time
        has come.
        """
        self.db.executemany(f"UPDATE token SET generation = {OVER} WHERE job = ? AND n = ?", places)
        for job in _jobs(places):
            row = self.db.execute(
                "UPDATE job SET finished = -finished WHERE id = ? AND finished < 0 RETURNING size", job
            ).fetchone()
            self.spool.tally["finished"] += row[0] if row else 0
        self.spool.tally["failed"] -= len(places)
        self.spool.tally["over"] += len(places)

    def replay(self, which: Which, limit: int, now: float) -> int:
        """Make up to `limit` failed tokens ready again, as if they had come now. Returns how many."""
        found = self.failed(which, BEFORE_ALL, limit)
        jobs = _jobs((each.job, each.n) for each in found)
        reopened = [self._reopen(job) for (job,) in jobs]
        self.db.executemany(
            "UPDATE job SET expires_at = ? + expires_at - since, since = ? WHERE id = ?",
            [(now, now, job) for (job,) in jobs],
        )
        self.db.executemany("UPDATE job SET open = open + 1 WHERE id = ?", [(each.job,) for each in found])
        for (job,) in jobs:
            self.spool.recent.pop(job, None)
            self.spool.first_open = min(self.spool.first_open, job)
        sizes = Counter(each.job for each in found)
        self.db.executemany(
            "UPDATE token SET generation = 0, waits = 0, deaths = 0, attempts = 0, charged = 0, failure = '',"
            " reason = '', rank = ?, due_at = ? WHERE job = ? AND n = ?",
            [(rank(lane(sizes[each.job]), now * 1e6), now, each.job, each.n) for each in found],
        )
        self.spool.tally["jobs"] += sum(reopened)
        self.spool.tally["tokens"] += len(found)
        self.spool.open.update(each.upstream for each in found)
        self.spool.tally["failed"] -= len(found)
        return len(found)

    def _reopen(self, job: int) -> bool:
        """A job is no longer finished. Returns whether it was."""
        row = self.db.execute("SELECT finished, size FROM job WHERE id = ? AND finished <> 0", (job,)).fetchone()
        if row is None:
            return False
        self.db.execute("UPDATE job SET finished = 0 WHERE id = ?", (job,))
        self.spool.tally["finished"] -= row[1] if row[0] > 0 else 0
        return True

    def prune_failed(self, before: float, most: int) -> int:
        """Discard some of the tokens that failed before a time, and of the oldest if there are more than `most`.
        Returns how many were discarded only because there are too many.
        """
        excess = min(self.spool.tally["failed"] - most, FORGOTTEN)
        too_many, limit = (float("inf"), excess) if excess > 0 else (before, FORGOTTEN)
        rows = self.db.execute(
            f"SELECT job, n, due_at FROM token INDEXED BY token_dead_age WHERE generation = {FAILED} AND due_at < ?"
            " ORDER BY due_at LIMIT ?",
            (too_many, limit),
        ).fetchall()
        self._give_up([row[:2] for row in rows])
        return sum(row[2] >= before for row in rows)

    def forget(self, before: float, most: int) -> bool:
        """Forget some of the jobs that finished before a time, and of those that finished first if finished jobs have
        more than `most` tokens. Returns whether there was something to forget.
        """
        excess = self.spool.tally["finished"] - most
        jobs, count = [], 0
        rows = self.db.execute(
            "SELECT id, size, finished FROM job INDEXED BY job_finished WHERE finished > 0 ORDER BY finished LIMIT ?",
            (FORGOTTEN,),
        )
        for job, size, finished in rows:
            if count >= FORGOTTEN or (finished > before and count >= excess):
                break
            jobs.append((job,))
            count += size
        if not jobs:
            return False
        gone = self.db.executemany(f"DELETE FROM token WHERE job = ? AND generation = {OVER}", jobs).rowcount
        self.spool.tally["over"] -= gone
        self.spool.tally["finished"] -= count
        for table in ("receipt", "skipped"):
            self.db.executemany(f"DELETE FROM {table} WHERE job = ?", jobs)
        self.db.executemany("DELETE FROM job WHERE id = ? AND NOT EXISTS (SELECT 1 FROM token WHERE job = id)", jobs)
        self.db.executemany("UPDATE job SET finished = -finished WHERE id = ?", jobs)  # of those with failed tokens
        self.db.execute("UPDATE forgotten SET job = max(job, ?)", max(jobs))
        return True


def _jobs(places: Iterable[tuple[int, int]]) -> list[tuple[int]]:
    return [(job,) for job in {job for job, _ in places}]
