"""The run report: counters, and the tokens an application must replace or delete. The only SQL for them.

Owns the tables `counter`, `canonical` and `notregistered`. Each entry of the two lists has a number that only grows,
so a reader can say "I have everything up to N" and nothing that came meanwhile is lost. A token is in a list once. A
list that nobody reads grows to `longest` entries; what is dropped then is counted, and will be reported again when the
token is sent to again. The caller owns the transaction: a count changes together with the token's row that it counts,
or not at all.
"""

import sqlite3
from collections.abc import Mapping
from typing import NamedTuple

SCHEMA = """
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE canonical (seq INTEGER PRIMARY KEY AUTOINCREMENT, original TEXT NOT NULL UNIQUE, canonical TEXT NOT NULL);
CREATE TABLE notregistered (seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE);
"""

# attempts: tokens that were tried, each once however often it was retried, as the Go server counted its calls.
# failures: tokens that came to an end other than being delivered.
# dropped: entries that a full list had no room for.
COUNTERS = ("attempts", "failures", "canonicals", "notregistered", "dropped")

PAGES = {
    "canonical": "SELECT seq, original, canonical FROM canonical WHERE seq > ? ORDER BY seq LIMIT ?",
    "notregistered": "SELECT seq, token FROM notregistered WHERE seq > ? ORDER BY seq LIMIT ?",
}
FORGET = {
    "canonical": "DELETE FROM canonical WHERE seq <= ?",
    "notregistered": "DELETE FROM notregistered WHERE seq <= ?",
}


class Snapshot(NamedTuple):
    """What the reports show, all of one moment."""

    counters: dict[str, int]
    pending: int


class RunReport:
    def __init__(self, db: sqlite3.Connection, longest: int) -> None:
        self.db = db
        self.longest = longest
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        self.lengths = {which: db.execute(f"SELECT count(*) FROM {which}").fetchone()[0] for which in PAGES}

    def count(self, changes: Mapping[str, int]) -> None:
        """Add to counters; names not in COUNTERS are a mistake of ours."""
        for name, change in changes.items():
            assert name in COUNTERS, name
            if change:
                self.db.execute(
                    "INSERT INTO counter VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?",
                    (name, change, change),
                )

    def counters(self) -> dict[str, int]:
        return dict.fromkeys(COUNTERS, 0) | dict(self.db.execute("SELECT name, value FROM counter"))

    def add_canonical(self, original: str, canonical: str) -> None:
        """Report that a token was replaced; a newer replacement takes the place of an older one."""
        gone = self.db.execute("DELETE FROM canonical WHERE original = ? AND canonical <> ?", (original, canonical))
        self.lengths["canonical"] -= gone.rowcount
        self._add("canonical", "(original, canonical) VALUES (?, ?)", (original, canonical))

    def add_notregistered(self, token: str) -> None:
        """Report that a token is dead."""
        self._add("notregistered", "(token) VALUES (?)", (token,))

    def _add(self, which: str, entry: str, values: tuple[str, ...]) -> None:
        added = self.db.execute(f"INSERT OR IGNORE INTO {which} {entry}", values)
        if added.rowcount and self.lengths[which] >= self.longest:
            self.db.execute(f"DELETE FROM {which} WHERE seq = ?", (added.lastrowid,))
            self.count({"dropped": 1})
        else:
            self.lengths[which] += added.rowcount

    def page(self, which: str, after: int, limit: int) -> list[tuple]:
        """Up to `limit` entries of a list numbered above `after`: (number, token) or (number, original, canonical)."""
        return self.db.execute(PAGES[which], (after, limit)).fetchall()

    def forget(self, which: str, upto: int) -> None:
        """Delete a list's entries up to number `upto`. Repeating it changes nothing."""
        self.lengths[which] -= self.db.execute(FORGET[which], (upto,)).rowcount
