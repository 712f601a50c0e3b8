"""Spools of older formats, made into today's. Done at the start, before anybody is served.

Formats 7 and 8 become 9 in the file itself, and 10 becomes 11, each step in one transaction. Format 9 had a row for
each token; what it holds is copied into a file beside it, and that takes its place when all of it is on disk. Until
then the old file is as it was: a start that is cut short, whatever ends it, goes on with the next one; a disk that is
full, or a wish to go back, costs nothing. While the copy is not complete its format is 0, and it knows of which state
of the old file it is a copy.
"""

import contextlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from gocm_lib.message.idempotency import HASH
from gocm_lib.message.job import Skip
from gocm_lib.state import packs, turns
from gocm_lib.state.packs import PACK_TOKENS, Packed
from gocm_lib.state.sqlite import keys, notes, report
from gocm_lib.state.sqlite.spool import TOGETHER, put_ends, put_singles
from gocm_lib.state.store import FAILED, OPEN, OVER, End, Single

ROWS = 9  # the last format with a row for each token
AT_ONCE = 1000  # jobs that are converted in a transaction
PATIENCE = 30_000  # milliseconds to wait for a lock that another program holds on the old one
COPIED = ("counter", "canonical", "notregistered", "invalid", "held", "answers", "idempotency")

_TO_8 = f"""
ALTER TABLE idempotency RENAME TO whole;
{keys.SCHEMA}
INSERT OR IGNORE INTO idempotency
    SELECT job, substr(key, 1, {HASH}), substr(body, 1, {HASH}), accepted_at FROM whole ORDER BY job;
DROP TABLE whole;
"""
_TO_9 = """
CREATE TABLE receipt (job INTEGER NOT NULL, n INTEGER NOT NULL, ids TEXT NOT NULL, PRIMARY KEY (job, n)) WITHOUT ROWID;
CREATE TABLE skipped (job INTEGER NOT NULL, n INTEGER NOT NULL, why TEXT NOT NULL, PRIMARY KEY (job, n)) WITHOUT ROWID;
CREATE TABLE invalid (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, reason TEXT NOT NULL);
ALTER TABLE notregistered ADD COLUMN upstream TEXT NOT NULL DEFAULT '';
ALTER TABLE notregistered ADD COLUMN wave INTEGER NOT NULL DEFAULT 0;
CREATE TABLE answers (
    upstream TEXT NOT NULL,
    minute INTEGER NOT NULL,
    answers INTEGER NOT NULL,
    unregistered INTEGER NOT NULL,
    first INTEGER NOT NULL,
    PRIMARY KEY (upstream, minute)
) WITHOUT ROWID;
CREATE TABLE held (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, upstream TEXT NOT NULL);
"""
UPGRADES = {7: _TO_8, 8: _TO_9}  # what makes the next format of each in the file itself
_TO_11 = f"""
ALTER TABLE canonical ADD COLUMN upstream TEXT NOT NULL DEFAULT '';
ALTER TABLE invalid ADD COLUMN upstream TEXT NOT NULL DEFAULT '';
{report.BY_UPSTREAM}
{notes.SCHEMA}
"""
ADDED = {10: _TO_11}  # the same from the format with packs on
KNOWN = (*UPGRADES, ROWS, *ADDED)


class Spoiled(Exception):
    """The old spool cannot be converted just now, and why. It is as it was."""


class _Row(NamedTuple):
    """A token of format 9."""

    job: int
    n: int
    token: str
    attempts: int
    charged: int
    generation: int
    batch: int
    rank: float
    waits: int
    due_at: float
    upstream: str
    deaths: int
    failure: str
    reason: str
    canonical: str


class _Job(NamedTuple):
    """A job of format 9. `finished` is negative where all but its failed tokens is forgotten."""

    id: int
    upstream: str
    target: str
    message: str
    accepted_at: float
    since: float
    expires_at: float
    size: int
    open: int
    sound: int
    finished: float


class _Made(NamedTuple):
    """A job as a pack will have it: its tokens that are to be sent, by index; its Singles; when tokens of it
    were delivered, by index, and the upstream's ids; how many of its tokens are known.
    """

    old: _Job
    job: Packed
    fresh: int
    singles: list[Single]
    ends: dict[int, tuple[float, str]]
    size: int


def raise_to_rows(db: sqlite3.Connection) -> None:
    """Bring a spool of format 7 or 8 to 9."""
    while steps := UPGRADES.get(version := db.execute("PRAGMA user_version").fetchone()[0]):
        db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {version + 1}; COMMIT;")


def add(path: str, version: int) -> None:
    """Make today's format of one that has packs already. Raises errors of SQLite."""
    db = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(db):
        db.execute(f"PRAGMA busy_timeout = {PATIENCE}")
        db.execute("PRAGMA synchronous = FULL")
        for number in range(version, max(ADDED) + 1):
            db.executescript(f"BEGIN IMMEDIATE; {ADDED[number]} PRAGMA user_version = {number + 1}; COMMIT;")


def convert(path: str, layout: str, finish: str) -> None:
    """Put a spool of today's format in the place of one of an older. `layout` makes the tables of today's, `finish`
    marks a file as complete. Raises Spoiled, and errors of SQLite and the system.
    """
    beside = path + ".upgrade"
    stamp = _close_log(path)
    db = _open_copy(beside, stamp, layout)
    try:
        db.execute("ATTACH ? AS old", (f"file:{_quoted(path)}?mode=ro",))
        while _convert_some(db):
            pass
        db.execute("DETACH old")
        db.executescript(f"PRAGMA synchronous = FULL; BEGIN; DROP TABLE progress; {finish} COMMIT;")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError as error:
        db.close()
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            _remove(beside)  # its room is what is missing
            raise Spoiled("no room to convert it: free about as much as it has, and start again") from None
        raise
    db.close()
    _put_in_place(beside, path)


def _close_log(path: str) -> str:
    """Have all of an old spool in one file. Returns what tells this state of it from others."""
    db = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(db):
        db.execute(f"PRAGMA busy_timeout = {PATIENCE}")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check found damage")
        raise_to_rows(db)
        with contextlib.suppress(sqlite3.OperationalError):
            if db.execute("PRAGMA journal_mode = DELETE").fetchone()[0] == "delete":
                found = os.stat(path)
                return f"{found.st_mtime_ns} {found.st_size}"
    raise Spoiled("another program has it open, and it is to be converted: end that, and start again")


def _open_copy(beside: str, stamp: str, layout: str) -> sqlite3.Connection:
    """The copy so far, or an empty one."""
    if os.path.exists(beside):
        with contextlib.suppress(sqlite3.DatabaseError):
            db = _connect(beside)
            if (
                db.execute("PRAGMA user_version").fetchone() == (0,)
                and db.execute("SELECT 1 FROM progress WHERE stamp = ?", (stamp,)).fetchone()
            ):
                return db
            db.close()
    _remove(beside)
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    db = _connect(beside)
    db.executescript(
        f"BEGIN; {layout} CREATE TABLE progress (stamp TEXT NOT NULL, job INTEGER NOT NULL, copied INTEGER NOT NULL);"
        f" INSERT INTO progress VALUES ('{stamp}', 0, 0); COMMIT;"
    )
    return db


def _connect(beside: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{_quoted(beside)}", isolation_level=None, uri=True)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, if not the latest
    return db


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _remove(beside: str) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(beside + suffix).unlink(missing_ok=True)


def _put_in_place(beside: str, path: str) -> None:
    """The copy is complete, in one file: it is the spool from now on."""
    for name in (beside, os.path.dirname(path) or "."):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    for suffix in ("-wal", "-shm", "-journal"):  # they are empty, and would be taken for the new file's
        Path(path + suffix).unlink(missing_ok=True)
    os.rename(beside, path)
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _convert_some(db: sqlite3.Connection) -> bool:
    """Copy some jobs, or what is not jobs. Returns whether there may be more."""
    [[last, copied]] = db.execute("SELECT job, copied FROM progress")
    if copied:
        return False
    db.execute("BEGIN IMMEDIATE")
    jobs = [_Job(*row) for row in db.execute("SELECT * FROM old.job WHERE id > ? ORDER BY id LIMIT ?", (last, AT_ONCE))]
    if jobs:
        _put(db, list(_made(db, jobs)))
        db.execute("UPDATE progress SET job = ?", (jobs[-1].id,))
    else:
        for table in COPIED:
            names = ", ".join(row[1] for row in db.execute(f"PRAGMA old.table_info({table})"))
            db.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM old.{table}")
        db.execute("UPDATE forgotten SET job = (SELECT max(job) FROM old.forgotten)")
        db.execute("DELETE FROM main.sqlite_sequence")
        db.execute("INSERT INTO main.sqlite_sequence SELECT * FROM old.sqlite_sequence")
        db.execute("UPDATE progress SET copied = 1")
    db.execute("COMMIT")
    return True


def _made(db: sqlite3.Connection, jobs: list[_Job]) -> Iterator[_Made]:
    """Jobs of format 9 as they will be."""
    low, high = jobs[0].id, jobs[-1].id
    rows: defaultdict[int, list[_Row]] = defaultdict(list)
    for row in db.execute("SELECT * FROM old.token WHERE job BETWEEN ? AND ? ORDER BY job, n", (low, high)):
        rows[row[0]].append(_Row(*row))
    skipped: defaultdict[int, list[Skip]] = defaultdict(list)
    for job, n, why in db.execute("SELECT job, n, why FROM old.skipped WHERE job BETWEEN ? AND ?", (low, high)):
        skipped[job].append(Skip(n, why))
    receipts: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for job, n, ids in db.execute(
        "SELECT job, n, ids FROM old.receipt WHERE job BETWEEN ? AND ? ORDER BY n", (low, high)
    ):
        receipts[job].update(enumerate(ids.split(" "), n))
    for old in jobs:
        yield _make(old, rows[old.id], skipped[old.id], receipts[old.id])


def _make(old: _Job, rows: Iterable[_Row], skipped: list[Skip], receipts: dict[int, str]) -> _Made:
    left_out = {skip.n for skip in skipped}
    places = [n for n in range(old.size + len(skipped)) if n not in left_out]
    tokens = [""] * old.size
    where = {n: index for index, n in enumerate(places)}
    job = Packed(
        old.id, old.target, old.accepted_at, old.accepted_at + old.expires_at - old.since, old.message, tokens,
        places if skipped else (), skipped, -old.finished if old.finished < 0 else 0.0,
    )  # fmt: skip
    fresh, size = 0, 0
    singles: list[Single] = []
    ends: dict[int, tuple[float, str]] = {}
    replayed = old.since != old.accepted_at
    for row in rows:
        size += 1
        tokens[where[row.n]] = row.token
        if row.generation >= 0 and not (
            row.attempts or row.charged or row.deaths or row.waits or row.reason or replayed
        ):
            fresh |= 1 << where[row.n]
        elif _is_plain(row) and not (replayed and row.due_at >= old.since):
            ends[where[row.n]] = row.due_at, receipts.get(row.n, "")
        else:
            singles.append(_single(old, row))
            if row.generation == OVER and row.n in receipts and not row.failure:
                ends[where[row.n]] = row.due_at, receipts[row.n]
    return _Made(old, job, fresh, singles, ends, size)


def _is_plain(row: _Row) -> bool:
    """Whether a token was delivered at the first attempt, and there is nothing more to say of it."""
    return row.generation == OVER and row.attempts == 1 and not (row.failure or row.canonical)


def _single(old: _Job, row: _Row) -> Single:
    state = OPEN if row.generation >= 0 else row.generation
    since = old.since if old.since != old.accepted_at else 0.0
    # A failed token is marked when nothing else of its job is left.
    waits = bool(row.waits) if state == OPEN else state == FAILED and old.finished < 0
    rank = turns.rank(
        turns.lane_of(row.rank), row.due_at * 1e6 if state == OPEN and row.waits else turns.came(row.rank)
    )
    counts = row.attempts, row.charged, row.deaths
    how = row.failure, row.reason, row.canonical
    return Single(old.id, row.n, row.upstream, rank, row.due_at, waits, *counts, since, state, *how)


def _put(db: sqlite3.Connection, made: list[_Made]) -> None:
    """Keep converted jobs, in packs."""
    for pack in _together(made):
        number = pack[0].old.id
        gone = position = fresh = open_ = jobs = finished = 0
        ends: list[float] = []
        for each in pack:
            size = len(each.job.tokens)
            gone |= (packs.span(0, size) & ~each.fresh) << position
            position += size
            opened = each.fresh.bit_count() + sum(single.state == OPEN for single in each.singles)
            fresh, open_, jobs = fresh + each.fresh.bit_count(), open_ + opened, jobs + (opened > 0)
            if each.old.finished > 0:
                finished += each.old.size
                ends.append(each.old.finished)
        ended = 0.0
        if ends:
            ended = max(ends) if not jobs and max(ends) - min(ends) <= TOGETHER else min(ends)
        first = next((each.old for each in pack if not each.old.finished), pack[0].old)
        stored = packs.to_bytes(gone if fresh else 0)
        db.execute("INSERT INTO main.body VALUES (?, ?)", (number, packs.write(each.job for each in pack)))
        db.execute(
            "INSERT INTO main.pack VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number, pack[-1].old.id, first.upstream, turns.lane(pack[0].old.size), first.since,
                sum(each.size for each in pack), fresh, open_, jobs, finished, ended, stored,
            ),
        )  # fmt: skip
        put_singles(db, [single for each in pack for single in each.singles])
        put_ends(db, _ends(number, pack))


def _ends(number: int, pack: Iterable[_Made]) -> Iterator[End]:
    """How the tokens of a pack were delivered: those of one moment together."""
    at = 0
    moments: defaultdict[float, dict[int, str]] = defaultdict(dict)
    for each in pack:
        for index, (when, receipt) in sorted(each.ends.items()):
            moments[when][at + index] = receipt
        at += len(each.job.tokens)
    for when, receipts in moments.items():
        ids = list(receipts.values()) if any(receipts.values()) else ()
        yield End(number, sum(1 << position for position in receipts), when, ids)


def _together(made: list[_Made]) -> Iterator[list[_Made]]:
    """Neighbours that make a pack."""

    def kind(each: _Made) -> tuple[str, int]:
        return each.old.upstream, turns.lane(each.old.size)

    for _, neighbours in groupby(made, key=kind):
        pack: list[_Made] = []
        tokens = 0
        for each in neighbours:
            if pack and tokens + each.old.size > PACK_TOKENS:
                yield pack
                pack, tokens = [], 0
            pack.append(each)
            tokens += each.old.size
        yield pack
