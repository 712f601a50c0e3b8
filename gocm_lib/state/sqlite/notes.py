"""What is noted beside packs, in SQLite: whose jobs are and their tags, packs that wait for their time, upstreams that
somebody holds, and what the names of upstreams mean.

Owns these tables, and all SQL for them. A job has a row in `label` only if somebody gave it a name or a tag. A pack in
`later` has a lane that nobody looks at (turns.later) until it is due. The caller owns the transaction.
"""

import sqlite3
from collections.abc import Collection, Mapping, Sequence

from gocm_lib.state import turns
from gocm_lib.state.contract import Hold, Meaning
from gocm_lib.state.packs import Label, Pack

SCHEMA = """
CREATE TABLE label (job INTEGER PRIMARY KEY, name TEXT NOT NULL, tag TEXT NOT NULL, upstream TEXT NOT NULL);
CREATE INDEX label_tag ON label (tag, job) WHERE tag <> '';
CREATE TABLE later (pack INTEGER PRIMARY KEY, due REAL NOT NULL, upstream TEXT NOT NULL);
CREATE INDEX later_due ON later (due);
CREATE TABLE hold (upstream TEXT PRIMARY KEY, since REAL NOT NULL, name TEXT NOT NULL);
CREATE TABLE meaning (upstream TEXT PRIMARY KEY, dialect TEXT NOT NULL, project TEXT NOT NULL);
"""


class Notes:
    """For SqliteStore."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.held = self._read_held()

    def keep(self, new: Sequence[Pack]) -> None:
        """Note what new packs say."""
        if labels := [label for each in new for label in each.labels]:
            self.db.executemany("INSERT INTO label VALUES (?, ?, ?, ?)", labels)
        if waiting := [(each.id, each.due, each.upstream) for each in new if each.due]:
            self.db.executemany("INSERT INTO later VALUES (?, ?, ?)", waiting)

    def label(self, job: int) -> Label:
        """What a job is known by."""
        row = self.db.execute("SELECT * FROM label WHERE job = ?", (job,)).fetchone()
        return Label(*row) if row else Label(job, "", "", "")

    def tagged(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Jobs with a tag, with ids above `after`, for these upstreams (none: for all)."""
        rows = self.db.execute(
            "SELECT job FROM label INDEXED BY label_tag WHERE tag = ? AND tag <> '' AND job > ?"
            f"{_of(upstreams)} ORDER BY job LIMIT ?",
            (tag, after, *upstreams, limit),
        )
        return [job for (job,) in rows]

    # ------------------------------------------------------------------------------------------ packs for another time

    def due(self, pack: int) -> float:
        """When a pack is to be sent that waits for its time; 0: it does not."""
        row = self.db.execute("SELECT due FROM later WHERE pack = ?", (pack,)).fetchone()
        return row[0] if row else 0.0

    def waiting(self, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Packs that wait for their time, with ids above `after`, for these upstreams (none: for all)."""
        statement = f"SELECT pack FROM later WHERE pack > ?{_of(upstreams)} ORDER BY pack LIMIT ?"
        return [pack for (pack,) in self.db.execute(statement, (after, *upstreams, limit))]

    def next_due(self) -> float:
        """When the first of them is due; infinite, if there is none."""
        [[first]] = self.db.execute("SELECT min(due) FROM later")
        return float("inf") if first is None else first

    def wake(self, now: float, limit: int) -> list[int]:
        """Let packs that are due have their turn. Returns which."""
        found = self.db.execute("SELECT pack FROM later WHERE due <= ? ORDER BY due LIMIT ?", (now, limit)).fetchall()
        self.db.executemany("DELETE FROM later WHERE pack = ?", found)
        self.db.executemany(f"UPDATE pack SET lane = {turns.later(0)} - lane WHERE id = ? AND lane < 0", found)
        return [pack for (pack,) in found]

    def drop(self, packs: Collection[tuple[int, int]]) -> None:
        """Packs are forgotten: the first and the last id of each."""
        self.db.executemany("DELETE FROM label WHERE job BETWEEN ? AND ?", packs)
        self.db.executemany("DELETE FROM later WHERE pack = ?", [(pack,) for pack, _ in packs])

    # ------------------------------------------------------------------------------------------------------- upstreams

    def _read_held(self) -> dict[str, Hold]:
        return {upstream: Hold(since, name) for upstream, since, name in self.db.execute("SELECT * FROM hold")}

    def hold(self, upstream: str, hold: Hold) -> None:
        """Somebody holds an upstream."""
        self.db.execute("INSERT OR IGNORE INTO hold VALUES (?, ?, ?)", (upstream, *hold))

    def let_go(self, upstream: str) -> None:
        """Nobody does any more."""
        self.db.execute("DELETE FROM hold WHERE upstream = ?", (upstream,))

    def meant(self) -> dict[str, Meaning]:
        """What the names of upstreams mean, or meant last."""
        return {upstream: Meaning(*rest) for upstream, *rest in self.db.execute("SELECT * FROM meaning")}

    def mean(self, meanings: Mapping[str, Meaning]) -> None:
        """They mean this."""
        rows = [(upstream, *meaning) for upstream, meaning in meanings.items()]
        self.db.executemany("INSERT OR REPLACE INTO meaning VALUES (?, ?, ?)", rows)


def _of(upstreams: Sequence[str]) -> str:
    """The end of a condition for these upstreams."""
    return f" AND upstream IN ({', '.join('?' * len(upstreams))})" if upstreams else ""
