"""The run report: counters, and the tokens that an application must replace or delete.

Owns the tables `counter`, `canonical`, `notregistered` and `invalid` and all SQL for them. Each entry of a list has a
number that only grows, so that a reader can say "I have everything up to N" and loses nothing that comes meanwhile. A
token is in a list only once. A list that nobody reads grows to `longest` entries; what is dropped then is counted, and
reported again when the token is sent to again. The caller owns the transaction: a count changes together with the
token's row that it counts, or not at all.
"""

import sqlite3
from collections import deque
from collections.abc import Callable, Mapping

from gocm_lib.state import admission
from gocm_lib.state.contract import COUNTERS, Count, Entry, Invalid, Replaced, Unregistered

SCHEMA = """
CREATE TABLE counter (
    name TEXT NOT NULL,
    upstream TEXT NOT NULL,
    reason TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (name, upstream, reason)
) WITHOUT ROWID;
CREATE TABLE canonical (seq INTEGER PRIMARY KEY AUTOINCREMENT, original TEXT NOT NULL UNIQUE, canonical TEXT NOT NULL);
CREATE TABLE notregistered (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE);
"""
# A token that came in a wave (module waves) is in state 1, and in state 2 while it is held back from its readers.
MORE = """
CREATE TABLE invalid (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, reason TEXT NOT NULL);
ALTER TABLE notregistered ADD COLUMN upstream TEXT NOT NULL DEFAULT '';
ALTER TABLE notregistered ADD COLUMN wave INTEGER NOT NULL DEFAULT 0;
"""
USUAL, OF_WAVE, HELD = 0, 1, 2


LATEST = 10  # entries of each list that are remembered to be shown


PAGES = {
    "canonical": "SELECT seq, original, canonical FROM canonical WHERE seq > ? ORDER BY seq LIMIT ?",
    "notregistered": f"SELECT seq, token, wave FROM notregistered WHERE seq > ? AND wave < {HELD} ORDER BY seq LIMIT ?",
    "invalid": "SELECT seq, token, reason FROM invalid WHERE seq > ? ORDER BY seq LIMIT ?",
}
KINDS: dict[str, Callable[..., Entry]] = {
    "canonical": Replaced,
    "notregistered": lambda number, token, wave: Unregistered(number, token, wave > USUAL),
    "invalid": Invalid,
}
FORGET = {
    "canonical": "DELETE FROM canonical WHERE seq <= ?",
    "notregistered": f"DELETE FROM notregistered WHERE seq <= ? AND wave < {HELD}",
    "invalid": "DELETE FROM invalid WHERE seq <= ?",
}


class RunReport:
    """The counters and the lists, for State."""

    def __init__(self, db: sqlite3.Connection, longest: int) -> None:
        self.db = db
        self.longest = longest
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        self.lengths = {which: db.execute(f"SELECT count(*) FROM {which}").fetchone()[0] for which in PAGES}
        [[self.held]] = db.execute(f"SELECT count(*) FROM notregistered WHERE wave = {HELD}")
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

    def add_canonical(self, original: str, canonical: str) -> None:
        """Report that a token was replaced. A newer replacement takes the place of an older one."""
        gone = self.db.execute("DELETE FROM canonical WHERE original = ? AND canonical <> ?", (original, canonical))
        self.lengths["canonical"] -= gone.rowcount
        self.latest_replaced.appendleft(Replaced(0, original, canonical))
        self._add("canonical", "(original, canonical) VALUES (?, ?)", original, canonical)

    def add_notregistered(self, token: str, upstream: str, state: int) -> int:
        """Report that a token is unregistered, in one of the states above. Returns the number of its entry; 0: it has
        no new one.
        """
        self.latest_unregistered.appendleft(Unregistered(0, token, state > USUAL))
        number = self._add("notregistered", "(token, upstream, wave) VALUES (?, ?, ?)", token, upstream, state)
        self.held += bool(number) and state == HELD
        return number

    def add_invalid(self, token: str, reason: str) -> None:
        """Report something that is no token of ours, for one of outcome.INVALID."""
        self._add("invalid", "(token, reason) VALUES (?, ?)", token, reason)

    def _add(self, which: str, entry: str, *values: str | int) -> int:
        added = self.db.execute(f"INSERT OR IGNORE INTO {which} {entry}", values)
        if not added.rowcount:
            return 0
        if self.lengths[which] >= self.longest:
            self.db.execute(f"DELETE FROM {which} WHERE seq = ?", (added.lastrowid,))
            self.count({Count("dropped", reason=which): 1})
            return 0
        self.lengths[which] += 1
        return added.lastrowid or 0

    def waiting(self) -> dict[str, int]:
        """How many entries of each list wait for a reader."""
        return self.lengths | {"notregistered": self.lengths["notregistered"] - self.held}

    def mark(self, upstream: str, first: int, state: int) -> None:
        """Put an upstream's entries of the list `notregistered` from this number on into a state of a wave."""
        marked = self.db.execute(
            f"UPDATE notregistered SET wave = ? WHERE seq >= ? AND upstream = ? AND wave = {USUAL}",
            (state, first, upstream),
        )
        self.held += marked.rowcount if state == HELD else 0

    def release(self, limit: int) -> int:
        """Put up to `limit` entries that are held back into the list, as its newest: who reads by a cursor may be past
        their old numbers. Returns how many.
        """
        found = self._held(limit)
        self.db.executemany("DELETE FROM notregistered WHERE seq = ?", [row[:1] for row in found])
        self.db.executemany(
            f"INSERT INTO notregistered (token, upstream, wave) VALUES (?, ?, {OF_WAVE})", [row[1:] for row in found]
        )
        self.held -= len(found)
        return len(found)

    def discard(self, limit: int) -> int:
        """Forget up to `limit` entries that are held back. Returns how many."""
        found = self._held(limit)
        self.db.executemany("DELETE FROM notregistered WHERE seq = ?", [row[:1] for row in found])
        self.held -= len(found)
        self.lengths["notregistered"] -= len(found)
        return len(found)

    def _held(self, limit: int) -> list[tuple[int, str, str]]:
        if not self.held:
            return []
        return self.db.execute(
            f"SELECT seq, token, upstream FROM notregistered WHERE wave = {HELD} ORDER BY seq LIMIT ?", (limit,)
        ).fetchall()

    def page(self, which: str, after: int, limit: int) -> list[Entry]:
        """Up to `limit` entries of a list with numbers above `after`."""
        kind = KINDS[which]
        return admission.page(kind(*row) for row in self.db.execute(PAGES[which], (after, limit)))

    def forget(self, which: str, upto: int) -> bool:
        """Delete a list's entries up to number `upto`. When no entry ever had that number, delete nothing: the caller
        means another list, and has not got what is in this one. Returns whether they are gone; repeating the call
        changes nothing.
        """
        found = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (which,)).fetchone()
        if upto > (found[0] if found else 0):
            return False
        self.lengths[which] -= self.db.execute(FORGET[which], (upto,)).rowcount
        return True
