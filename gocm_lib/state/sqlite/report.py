"""The run report: counters, and the tokens that an application must replace or delete.

Owns the tables `counter`, `canonical` and `notregistered` and all SQL for them. Each entry of the two lists has a
number that only grows, so that a reader can say "I have everything up to N" and loses nothing that comes meanwhile. A
token is in a list only once. A list that nobody reads grows to `longest` entries; what is dropped then is counted, and
reported again when the token is sent to again. The caller owns the transaction: a count changes together with the
token's row that it counts, or not at all.
"""

import sqlite3
from collections import deque
from collections.abc import Mapping

from gocm_lib.state import admission
from gocm_lib.state.contract import COUNTERS, Count, Entry, Replaced, Unregistered

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


LATEST = 10  # entries of each list that are remembered to be shown


PAGES = {
    "canonical": "SELECT seq, original, canonical FROM canonical WHERE seq > ? ORDER BY seq LIMIT ?",
    "notregistered": "SELECT seq, token FROM notregistered WHERE seq > ? ORDER BY seq LIMIT ?",
}
KINDS: dict[str, type[Replaced] | type[Unregistered]] = {"canonical": Replaced, "notregistered": Unregistered}
FORGET = {
    "canonical": "DELETE FROM canonical WHERE seq <= ?",
    "notregistered": "DELETE FROM notregistered WHERE seq <= ?",
}


class RunReport:
    """The counters and the two lists, for State."""

    def __init__(self, db: sqlite3.Connection, longest: int) -> None:
        self.db = db
        self.longest = longest
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        self.lengths = {which: db.execute(f"SELECT count(*) FROM {which}").fetchone()[0] for which in PAGES}
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

    def add_notregistered(self, token: str) -> None:
        """Report that a token is unregistered."""
        self.latest_unregistered.appendleft(Unregistered(0, token))
        self._add("notregistered", "(token) VALUES (?)", token)

    def _add(self, which: str, entry: str, *values: str) -> None:
        added = self.db.execute(f"INSERT OR IGNORE INTO {which} {entry}", values)
        if added.rowcount and self.lengths[which] >= self.longest:
            self.db.execute(f"DELETE FROM {which} WHERE seq = ?", (added.lastrowid,))
            self.count({Count("dropped", reason=which): 1})
        else:
            self.lengths[which] += added.rowcount

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
