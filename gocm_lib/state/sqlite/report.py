"""The run report: counters, and the tokens that an application must replace or delete.

Owns the tables `counter`, `canonical`, `notregistered`, `held`, `invalid` and `answers` and all SQL for them. Each
entry of a list has a number that only grows, so that a reader can say "I have everything up to N" and loses nothing
that comes meanwhile. A token is in a list only once. A list that nobody reads grows to `longest` entries; what is
dropped then is counted, and reported again when the token is sent to again. The caller owns the transaction: a count
changes together with the token's row that it counts, or not at all.
"""

import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from gocm_lib.state import admission
from gocm_lib.state.contract import COUNTERS, Count, Entry, Invalid, Replaced, Unregistered
from gocm_lib.state.waves import BEFORE, RECENT, Bucket, Tally

# What came in a wave (module waves) is marked; what is held back of it is not in the list at all, or its readers would
# pass over it again and again.
BY_UPSTREAM = "".join(
    f"CREATE INDEX {which}_upstream ON {which} (upstream, seq);" for which in ("canonical", "notregistered", "invalid")
)
SCHEMA = f"""
CREATE TABLE counter (
    name TEXT NOT NULL,
    upstream TEXT NOT NULL,
    reason TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (name, upstream, reason)
) WITHOUT ROWID;
CREATE TABLE canonical (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    original TEXT NOT NULL UNIQUE,
    canonical TEXT NOT NULL,
    upstream TEXT NOT NULL DEFAULT ''
);
CREATE TABLE notregistered (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL UNIQUE,
    upstream TEXT NOT NULL DEFAULT '',
    wave INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE invalid (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL UNIQUE,
    reason TEXT NOT NULL,
    upstream TEXT NOT NULL DEFAULT ''
);
CREATE TABLE answers (
    upstream TEXT NOT NULL,
    minute INTEGER NOT NULL,
    answers INTEGER NOT NULL,
    unregistered INTEGER NOT NULL,
    first INTEGER NOT NULL,
    PRIMARY KEY (upstream, minute)
) WITHOUT ROWID;
CREATE TABLE held (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, upstream TEXT NOT NULL);
{BY_UPSTREAM}
"""


LATEST = 10  # entries of each list that are remembered to be shown


_COLUMNS = {
    "canonical": "seq, original, canonical",
    "notregistered": "seq, token, wave",
    "invalid": "seq, token, reason",
}
KINDS: dict[str, Callable[..., Entry]] = {
    "canonical": Replaced,
    "notregistered": lambda number, token, wave: Unregistered(number, token, bool(wave)),
    "invalid": Invalid,
}


class RunReport:
    """The counters and the lists, for State."""

    def __init__(self, db: sqlite3.Connection, longest: int) -> None:
        self.db = db
        self.longest = longest
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        self.lengths = {which: db.execute(f"SELECT count(*) FROM {which}").fetchone()[0] for which in (*KINDS, "held")}
        self.latest_replaced: deque[Replaced] = deque(maxlen=LATEST)
        self.latest_unregistered: deque[Unregistered] = deque(maxlen=LATEST)

    def count(self, changes: Mapping[Count, int]) -> None:
        """Add to counters. A name outside COUNTERS is a mistake of ours."""
        for count, change in changes.items():
            assert count.name in COUNTERS, count
            if change:
                self.db.execute(
                    "INSERT INTO counter VALUES (?, ?, ?, ?)"
                    " ON CONFLICT (name, upstream, reason) DO UPDATE SET value = value + ?",
                    (*count, change, change),
                )

    def counts(self) -> dict[Count, int]:
        """Every counter that is not 0."""
        rows = self.db.execute("SELECT name, upstream, reason, value FROM counter")
        return {Count(*row[:3]): row[3] for row in rows}

    def add_canonical(self, original: str, canonical: str, upstream: str) -> None:
        """Report that a token was replaced. A newer replacement takes the place of an older one."""
        gone = self.db.execute("DELETE FROM canonical WHERE original = ? AND canonical <> ?", (original, canonical))
        self.lengths["canonical"] -= gone.rowcount
        self.latest_replaced.appendleft(Replaced(0, original, canonical))
        self._add("canonical", "(original, canonical, upstream) VALUES (?, ?, ?)", original, canonical, upstream)

    def add_notregistered(self, token: str, upstream: str, wave: bool, hold: bool) -> None:
        """Report that a token is unregistered: one of a `wave`, or one to `hold` back."""
        self.latest_unregistered.appendleft(Unregistered(0, token, wave))
        if hold:
            self._add("held", "(token, upstream) VALUES (?, ?)", token, upstream)
        else:
            self._add("notregistered", "(token, upstream, wave) VALUES (?, ?, ?)", token, upstream, wave)

    def add_invalid(self, token: str, reason: str, upstream: str) -> None:
        """Report something that is no token of ours, for one of outcome.INVALID."""
        self._add("invalid", "(token, reason, upstream) VALUES (?, ?, ?)", token, reason, upstream)

    def _add(self, which: str, entry: str, *values: str | int) -> None:
        added = self.db.execute(f"INSERT OR IGNORE INTO {which} {entry}", values)
        if added.rowcount and self.lengths[which] >= self.longest:
            self.db.execute(f"DELETE FROM {which} WHERE seq = ?", (added.lastrowid,))
            self.count({Count("dropped", reason="notregistered" if which == "held" else which): 1})
        else:
            self.lengths[which] += added.rowcount

    def newest(self, which: str) -> int:
        """The highest number that an entry of a list has or had; 0: none."""
        found = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (which,)).fetchone()
        return found[0] if found else 0

    def answers(self, upstream: str) -> list[Bucket]:
        """What was kept of an upstream's answers."""
        rows = self.db.execute("SELECT * FROM answers WHERE upstream = ? ORDER BY minute", (upstream,))
        return [Bucket(minute, Tally(answers, unregistered), first) for _, minute, answers, unregistered, first in rows]

    def keep_answers(self, upstream: str, heard: Bucket, fresh: bool) -> None:
        """Add to a minute of an upstream's answers. With a `fresh` one, what is older than a day is forgotten."""
        self.db.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?) ON CONFLICT (upstream, minute) DO UPDATE SET"
            " answers = answers + excluded.answers, unregistered = unregistered + excluded.unregistered,"
            " first = iif(first = 0, excluded.first, first)",
            (upstream, heard.number, *heard.tally, heard.first),
        )
        if fresh:
            oldest = heard.number - RECENT - BEFORE
            self.db.execute("DELETE FROM answers WHERE upstream = ? AND minute <= ?", (upstream, oldest))

    def mark(self, upstream: str, first: int, hold: bool) -> None:
        """Mark an upstream's entries of the list `notregistered` from this number on as a wave's, or hold them back.
        What was released before has its mark, and stays.
        """
        which = "WHERE seq >= ? AND upstream = ? AND wave = 0"
        if not hold:
            self.db.execute(f"UPDATE notregistered SET wave = 1 {which}", (first, upstream))
            return
        found = self.db.execute(f"SELECT seq, token, upstream FROM notregistered {which}", (first, upstream))
        self._move("notregistered", "held", "(token, upstream) VALUES (?, ?)", found.fetchall())

    def release(self, limit: int) -> int:
        """Put up to `limit` entries that are held back into the list, as its newest: who reads by a cursor may be past
        the numbers that they would have had. Returns how many.
        """
        found = self._held(limit)
        self._move("held", "notregistered", "(token, upstream, wave) VALUES (?, ?, 1)", found)
        return len(found)

    def discard(self, limit: int) -> int:
        """Forget up to `limit` entries that are held back. Returns how many."""
        found = self._held(limit)
        self._take("held", found)
        return len(found)

    def _held(self, limit: int) -> list[tuple[int, str, str]]:
        return self.db.execute("SELECT seq, token, upstream FROM held ORDER BY seq LIMIT ?", (limit,)).fetchall()

    def _move(self, here: str, there: str, entry: str, rows: Sequence[tuple[int, str, str]]) -> None:
        self._take(here, rows)
        added = self.db.executemany(f"INSERT OR IGNORE INTO {there} {entry}", [row[1:] for row in rows])
        self.lengths[there] += max(0, added.rowcount)

    def _take(self, here: str, rows: Sequence[tuple[int, str, str]]) -> None:
        self.db.executemany(f"DELETE FROM {here} WHERE seq = ?", [row[:1] for row in rows])
        self.lengths[here] -= len(rows)

    def page(self, which: str, after: int, limit: int, upstream: str) -> list[Entry]:
        """Up to `limit` entries of a list with numbers above `after`, those of an upstream ("": of all)."""
        kind, (only, values) = KINDS[which], _only(upstream)
        statement = f"SELECT {_COLUMNS[which]} FROM {which} WHERE seq > ?{only} ORDER BY seq LIMIT ?"
        return admission.page(kind(*row) for row in self.db.execute(statement, (after, *values, limit)))

    def forget(self, which: str, upto: int, upstream: str) -> bool:
        """Delete a list's entries up to number `upto`. When no entry ever had that number, delete nothing: the caller
        means another list, and has not got what is in this one. Returns whether they are gone; repeating the call
        changes nothing.
        """
        if upto > self.newest(which):
            return False
        only, values = _only(upstream)
        gone = self.db.execute(f"DELETE FROM {which} WHERE seq <= ?{only}", (upto, *values))
        self.lengths[which] -= gone.rowcount
        return True


def _only(upstream: str) -> tuple[str, tuple[str, ...]]:
    """The end of a condition for the entries of an upstream ("": of all), and its values."""
    return (" AND upstream = ?", (upstream,)) if upstream else ("", ())
