"""Packs and Singles in SQLite, from their acceptance to their end. All SQL for them is here, but for those that have
ended: module history looks those up and forgets them.

Owns these tables. What each row and index is for:

    body      the text of a pack (module packs), immutable, and apart, or each change of the row would write it again
    pack      the narrow row that changes. `last` finds a job's pack; `since` tells the oldest; `size` is how many of
              its tokens somebody may ask for; `fresh` are those that have not left, and `gone` says which did; `open`
              adds its open Singles; `jobs` have any open; `finished` is with how many tokens the others came, and
              `ended` when to look whether they may be forgotten
    pack_fresh     packs in the order in which they are sent; smallest where most have ended
    pack_ended     packs in the order in which they may be forgotten
    single    a token that has a fate of its own (store.Single); of a pack that goes as most do there is none
    single_open    those that are to be sent, by their turns
    single_failed, single_failed_age    those that were set aside, for who pages through them; the oldest
    ended     tokens of a pack that were delivered together: which (a bitmap from the first on), when, the ids
    forgotten the highest job that is forgotten

The caller owns the transaction.
"""

import sqlite3
from collections.abc import Iterable, Sequence

from gocm_lib.state import packs
from gocm_lib.state.contract import Deferred
from gocm_lib.state.packs import Pack
from gocm_lib.state.store import FAILED, OPEN, OVER, Changed, End, Single, Spot, Stored
from gocm_lib.state.turns import WIDTH

SCHEMA = f"""
CREATE TABLE body (id INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE pack (
    id INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    upstream TEXT NOT NULL,
    lane INTEGER NOT NULL,
    since REAL NOT NULL,
    size INTEGER NOT NULL,
    fresh INTEGER NOT NULL,
    open INTEGER NOT NULL,
    jobs INTEGER NOT NULL,
    finished INTEGER NOT NULL DEFAULT 0,
    ended REAL NOT NULL DEFAULT 0,
    gone BLOB NOT NULL DEFAULT x''
);
CREATE INDEX pack_fresh ON pack (upstream, lane, id) WHERE fresh > 0;
CREATE INDEX pack_ended ON pack (ended) WHERE ended > 0;
CREATE TABLE single (
    job INTEGER NOT NULL,
    n INTEGER NOT NULL,
    upstream TEXT NOT NULL,
    rank INTEGER NOT NULL,
    due_at REAL NOT NULL,
    waits INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    charged INTEGER NOT NULL,
    deaths INTEGER NOT NULL,
    since REAL NOT NULL,
    state INTEGER NOT NULL,
    failure TEXT NOT NULL,
    reason TEXT NOT NULL,
    canonical TEXT NOT NULL,
    PRIMARY KEY (job, n)
) WITHOUT ROWID;
CREATE INDEX single_open ON single (upstream, rank) WHERE state = {OPEN};
CREATE INDEX single_failed ON single (job) WHERE state = {FAILED};
CREATE INDEX single_failed_age ON single (due_at) WHERE state = {FAILED};
CREATE TABLE ended (
    pack INTEGER NOT NULL,
    first INTEGER NOT NULL,
    positions BLOB NOT NULL,
    at REAL NOT NULL,
    ids TEXT NOT NULL,
    PRIMARY KEY (pack, first)
) WITHOUT ROWID;
CREATE TABLE forgotten (job INTEGER NOT NULL);
INSERT INTO forgotten VALUES (0);
"""

# Jobs of a pack that end within so many seconds are forgotten together, each a little later than it might be: else most
# packs would be written once more, without what ended first.
TOGETHER = 2.0

_STORED = "pack.id, last, upstream, lane, fresh, gone, open, text"
_FRESH = f"""
SELECT {_STORED} FROM pack INDEXED BY pack_fresh CROSS JOIN body USING (id)
WHERE fresh > 0 AND upstream = ? AND lane = ? AND pack.id > ? ORDER BY pack.id
"""
_NEWEST = f"""
SELECT {_STORED} FROM pack INDEXED BY pack_fresh CROSS JOIN body USING (id)
WHERE fresh > 0 AND upstream = ? AND lane = ? AND pack.id < ? ORDER BY pack.id DESC LIMIT ?
"""
_PACK_OF = f"""
SELECT {_STORED} FROM pack CROSS JOIN body USING (id) WHERE pack.id <= ? ORDER BY pack.id DESC LIMIT {{}}
"""
# Ids come in their order but by accident; then a job's pack is one of these.
_LOOKED_AT = 4
_DUE = f"""
SELECT * FROM single INDEXED BY single_open
WHERE state = {OPEN} AND upstream = ? AND (rank, job, n) > (?, ?, ?) AND rank <= ? AND job > ?
ORDER BY rank, job, n LIMIT ?
"""
_NEXT_RANK = f"""
SELECT rank FROM single INDEXED BY single_open
WHERE state = {OPEN} AND upstream = ? AND (rank, job, n) > (?, ?, ?) AND rank < ? AND job > ?
ORDER BY rank, job, n LIMIT 1
"""
_DEFERRED = f"""
SELECT count(*), min(due_at) FROM
    (SELECT due_at FROM single INDEXED BY single_open
     WHERE state = {OPEN} AND upstream = ? AND (rank, job, n) > (?, ?, ?) AND rank < ? AND waits = 1
     ORDER BY rank LIMIT ?)
"""
_CHANGE = f"""
UPDATE pack SET gone = :gone, fresh = fresh + :fresh, open = open + :open, jobs = jobs + :jobs,
    finished = finished + :finished, since = CASE WHEN :jobs > 0 AND jobs = 0 THEN :now ELSE since END,
    ended = CASE
        WHEN finished + :finished <= 0 THEN 0
        WHEN :finished <= 0 THEN ended
        WHEN ended = 0 OR (jobs + :jobs = 0 AND :now - ended <= {TOGETHER}) THEN :now
        ELSE ended END
WHERE id = :id
"""
_SINGLE = "INSERT OR REPLACE INTO single VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class Spool:
    """The tokens that are to be sent, for SqliteStore."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.newest = self.last_job()  # of all that came
        self.first_open = 0  # no pack before this one has open tokens

    def keep(self, new: Sequence[Pack]) -> None:
        """Keep packs. None of their jobs is known."""
        self.newest = max([self.newest, *(each.last for each in new)])
        self.first_open = min([self.first_open, *(each.id for each in new)])  # ids do not come in their order
        self.db.executemany("INSERT INTO body VALUES (?, ?)", [(each.id, each.body) for each in new])
        self.db.executemany(
            "INSERT INTO pack (id, last, upstream, lane, since, size, fresh, open, jobs)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(*each[:5], size, size, size, len(each.jobs)) for each in new for size in [each.size]],
        )

    def has(self, job: int) -> bool:
        """Whether a job was kept and is not forgotten yet."""
        return job <= self.newest and self.pack_of(job) is not None

    def fresh(self, upstream: str, lane: int, after: int, tokens: int) -> list[Stored]:
        """Store.fresh."""
        found = []
        rows = self.db.execute(_FRESH, (upstream, lane, after))
        for row in rows:
            found.append(self._stored(row))
            tokens -= found[-1].fresh
            if tokens <= 0:
                rows.close()
                break
        return found

    def newest_fresh(self, upstream: str, lane: int, before: int, count: int) -> list[Stored]:
        """Store.newest."""
        return [self._stored(row) for row in self.db.execute(_NEWEST, (upstream, lane, before, count)).fetchall()]

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        """These packs."""
        marks = ", ".join("?" * len(ids))
        rows = self.db.execute(f"SELECT {_STORED} FROM pack JOIN body USING (id) WHERE pack.id IN ({marks})", ids)
        return [self._stored(row) for row in rows.fetchall()]

    def pack_of(self, job: int) -> Stored | None:
        """The pack that a job is in."""
        for many in (1, _LOOKED_AT):
            for row in self.db.execute(_PACK_OF.format(many), (job,)).fetchall():
                if row[1] >= job and any(head[0] == job for head in packs.heads(row[-1])):
                    return self._stored(row)
        return None

    def _stored(self, row: tuple[int, int, str, int, int, bytes, int, str]) -> Stored:
        number, last, upstream, lane, fresh, gone, open_, text = row
        singles: dict[int, int] = {}
        if open_ > fresh:
            singles = dict(
                self.db.execute(
                    f"SELECT job, count(*) FROM single WHERE job BETWEEN ? AND ? AND state = {OPEN} GROUP BY job",
                    (number, last),
                )
            )
        left = (1 << sum([head[1] for head in packs.heads(text)])) - 1 if not fresh else packs.from_bytes(gone)
        return Stored(number, last, upstream, lane, fresh, left, singles, text)

    def due(self, upstream: str, after: Spot, rank: int, count: int, above: int) -> list[Single]:
        """Store.due."""
        return [single(row) for row in self.db.execute(_DUE, (upstream, *after, rank, above, count))]

    def next_rank(self, upstream: str, after: Spot, below: int, above: int) -> int | None:
        """Store.next_rank."""
        row = self.db.execute(_NEXT_RANK, (upstream, *after, below, above)).fetchone()
        return row[0] if row else None

    def open_singles(self, job: int) -> list[Single]:
        """The open Singles of a job."""
        return [
            single(row) for row in self.db.execute(f"SELECT * FROM single WHERE job = ? AND state = {OPEN}", (job,))
        ]

    def died(self, job: int, reason: str) -> bool:
        """Whether a job has a failed token with this reason."""
        row = self.db.execute(
            f"SELECT 1 FROM single INDEXED BY single_failed WHERE state = {FAILED} AND job = ? AND reason = ?",
            (job, reason),
        )
        return row.fetchone() is not None

    def is_sound(self, job: int) -> bool:
        """Store.is_sound."""
        [[alone, sound]] = self.db.execute(
            f"SELECT count(*), count(*) FILTER (WHERE state = {OVER} AND failure NOT IN"
            " ('rejected', 'bad_message', 'attempts', 'expired', 'killed_senders', 'cancelled'))"
            " FROM single WHERE job = ?",
            (job,),
        )
        if sound:
            return True
        stored = self.pack_of(job)
        return stored is not None and (stored.gone & packs.span_of(stored.body, job)).bit_count() > alone

    def deferred(self, upstream: str, after: Sequence[tuple[Spot, int]], most: int) -> Deferred:
        """Store.deferred."""
        count, due = 0, []
        for spot, below in after:
            found, first = self.db.execute(_DEFERRED, (upstream, *spot, below, most - count)).fetchone()
            count += found
            due += [first] if found else []
        return Deferred(count, min(due, default=None))

    def change(self, changed: Iterable[Changed], now: float) -> None:
        """Change packs."""
        rows = []
        for number, gone, fresh, opened, jobs, finished in changed:
            stored = packs.to_bytes(gone)
            rows.append(
                {
                    "id": number, "gone": stored, "fresh": fresh, "open": opened, "jobs": jobs, "finished": finished,
                    "now": now,
                }
            )  # fmt: skip
            if jobs > 0:
                self.first_open = min(self.first_open, number)
        self.db.executemany(_CHANGE, rows)

    def put(self, singles: Iterable[Single]) -> None:
        """Keep Singles as they are now."""
        put_singles(self.db, singles)

    def end(self, ends: Iterable[End]) -> None:
        """Remember how tokens were delivered."""
        put_ends(self.db, ends)

    def set_back(self, by: float, now: float, latest: float) -> None:
        """Store.set_back."""
        shifted = "rank - CAST((due_at - ({0})) * 1e6 AS INTEGER)"
        for which, due_at in ((":by > 0", "due_at - :by"), ("due_at > :latest", ":now")):
            self.db.execute(
                f"UPDATE single SET rank = {shifted.format(due_at)}, due_at = {due_at}"
                f" WHERE state = {OPEN} AND waits = 1 AND {which}",
                {"by": by, "now": now, "latest": latest},
            )
        # What does not wait has the turn of its arrival, which may be later than now as well.
        self.db.execute(
            f"UPDATE single SET rank = rank - rank % {WIDTH} + :now WHERE state = {OPEN} AND waits = 0"
            f" AND rank % {WIDTH} > :now",
            {"now": int(now * 1e6)},
        )

    def oldest(self, jobs: int) -> float | None:
        """When the oldest of so many jobs with open tokens was accepted or replayed; None: there is none."""
        if not jobs:
            self.first_open = self.newest
            return None
        # Asked often enough, this passes over each pack once: an index of the open ones costs more.
        row = self.db.execute(
            "SELECT id, since FROM pack WHERE id >= ? AND open > 0 AND lane >= 0 ORDER BY id LIMIT 1",
            (self.first_open,),
        ).fetchone()
        if row is None:  # all there is waits for its time
            return None
        self.first_open, since = row
        return float(since)

    def last_accepted(self) -> float:
        """When the last job was accepted, by the clock of that time; 0: there is none."""
        row = self.db.execute("SELECT since FROM pack WHERE lane >= 0 ORDER BY id DESC LIMIT 1").fetchone()
        return row[0] if row else 0.0

    def accepted_by(self, now: float) -> None:
        """Let no pack seem accepted later than now."""
        self.db.execute("UPDATE pack SET since = ? WHERE since > ? AND lane >= 0", (now, now))

    def last_job(self) -> int:
        """The highest job id that is or was there, as far as known; 0: none."""
        [[newest]] = self.db.execute(
            "SELECT max((SELECT coalesce(max(last), 0) FROM (SELECT last FROM pack ORDER BY id DESC LIMIT 1)), job)"
            " FROM forgotten"
        )
        return int(newest)


def put_singles(db: sqlite3.Connection, singles: Iterable[Single]) -> None:
    """Keep Singles as they are now."""
    db.executemany(_SINGLE, singles)


def put_ends(db: sqlite3.Connection, ends: Iterable[End]) -> None:
    """Remember how tokens were delivered."""
    rows = []
    for pack, positions, at, receipts in ends:
        first = (positions & -positions).bit_length() - 1
        rows.append((pack, first, packs.to_bytes(positions >> first), at, " ".join(receipts)))
    db.executemany("INSERT OR REPLACE INTO ended VALUES (?, ?, ?, ?, ?)", rows)


def read_ends(db: sqlite3.Connection, pack: int) -> list[End]:
    """How tokens of a pack were delivered."""
    rows = db.execute("SELECT first, positions, at, ids FROM ended WHERE pack = ?", (pack,)).fetchall()
    return [
        End(pack, packs.from_bytes(positions) << first, at, ids.split(" ") if ids else ())
        for first, positions, at, ids in rows
    ]


def single(row: tuple[object, ...]) -> Single:
    job, n, upstream, rank, due_at, waits, *rest = row
    return Single(job, n, upstream, rank, due_at, bool(waits), *rest)  # type: ignore[arg-type]
