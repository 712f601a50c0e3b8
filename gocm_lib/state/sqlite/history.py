"""The rows of what has ended, in SQLite (history.Rows). The caller owns the transaction."""

import sqlite3
from collections.abc import Sequence
from typing import Any

from gocm_lib.state.contract import Place, Which
from gocm_lib.state.history import Finished, Gone, Rows
from gocm_lib.state.packs import Label
from gocm_lib.state.sqlite.notes import Notes
from gocm_lib.state.sqlite.spool import Spool, put_ends, read_ends, single
from gocm_lib.state.store import FAILED, OVER, End, Single, Stored

_FAILED = f"SELECT * FROM single INDEXED BY single_failed WHERE state = {FAILED} AND (job, n) > (?, ?)"
_OLDEST_FAILED = f"""
SELECT * FROM single INDEXED BY single_failed_age WHERE state = {FAILED} AND due_at < ? ORDER BY due_at LIMIT ?
"""
_FINISHED = """
SELECT id, last, size, finished, jobs, ended FROM pack INDEXED BY pack_ended WHERE ended > 0 ORDER BY ended LIMIT ?
"""
_STAYS = f"""
SELECT EXISTS (SELECT 1 FROM single WHERE job BETWEEN :low AND :high AND (state = {FAILED} OR due_at > :before))
    OR EXISTS (SELECT 1 FROM ended WHERE pack = :low AND at > :before)
"""
_COUNT_AGAIN = """
UPDATE pack SET finished = finished + ?, ended = CASE WHEN ended > 0 THEN min(ended, ?) ELSE ? END WHERE id = ?
"""


class HistoryRows(Rows):
    """See history.Rows for what the methods do."""

    def __init__(self, spool: Spool, notes: Notes) -> None:
        self.db: sqlite3.Connection = spool.db
        self.spool = spool
        self.notes = notes

    def pack_of(self, job: int) -> Stored | None:
        return self.spool.pack_of(job)

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        return self.spool.packs(ids)

    def open_singles(self, job: int) -> list[Single]:
        return self.spool.open_singles(job)

    def singles(self, low: int, high: int) -> list[Single]:
        return self._singles("SELECT * FROM single WHERE job BETWEEN ? AND ?", low, high)

    def _singles(self, statement: str, *values: object) -> list[Single]:
        return [single(row) for row in self.db.execute(statement, values)]

    def ends(self, pack: int) -> list[End]:
        return read_ends(self.db, pack)

    def forgotten(self) -> int:
        [[job]] = self.db.execute("SELECT job FROM forgotten")
        return int(job)

    def label(self, job: int) -> Label:
        return self.notes.label(job)

    def tagged(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        return self.notes.tagged(tag, after, limit, upstreams)

    def waiting(self, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        return self.notes.waiting(after, limit, upstreams)

    def due(self, pack: int) -> float:
        return self.notes.due(pack)

    def alone(self, job: int) -> dict[tuple[int, str], int]:
        rows = self.db.execute("SELECT state, failure, count(*) FROM single WHERE job = ? GROUP BY 1, 2", (job,))
        return {(state, failure): count for state, failure, count in rows}

    def failed(self, which: Which, after: Place, limit: int) -> list[Single]:
        conditions, values = _conditions(which)
        return self._singles(f"{_FAILED} AND {conditions} ORDER BY job, n LIMIT ?", *after, *values, limit)

    def oldest_failed(self, before: float, limit: int) -> list[Single]:
        return self._singles(_OLDEST_FAILED, before, limit)

    def finished(self, limit: int) -> list[Finished]:
        return [Finished(*row) for row in self.db.execute(_FINISHED, (limit,)).fetchall()]

    def stays(self, pack: int, last: int, before: float) -> bool:
        [[stays]] = self.db.execute(_STAYS, {"low": pack, "high": last, "before": before})
        return bool(stays)

    def give_up(self, singles: Sequence[Single]) -> None:
        self.db.executemany(
            f"UPDATE single SET state = {OVER}, waits = 0 WHERE job = ? AND n = ?",
            [(each.job, each.n) for each in singles],
        )

    def count_again(self, pack: int, size: int, ended: float) -> None:
        self.db.execute(_COUNT_AGAIN, (size, ended, ended, pack))

    def forget_singles(self, jobs: Sequence[int]) -> None:
        rows = [(job,) for job in jobs]
        self.db.executemany(f"DELETE FROM single WHERE job = ? AND state = {OVER}", rows)
        self.db.executemany(f"UPDATE single SET waits = 1 WHERE job = ? AND state = {FAILED}", rows)

    def drop(self, packs: Sequence[tuple[int, int]]) -> None:
        self.db.executemany("DELETE FROM single WHERE job BETWEEN ? AND ?", packs)
        self.notes.drop(packs)
        rows = [(pack,) for pack, _ in packs]
        for which in ("pack WHERE id", "body WHERE id", "ended WHERE pack"):
            self.db.executemany(f"DELETE FROM {which} = ?", rows)

    def rewrite(self, pack: int, body: str, ends: Sequence[End], less: Gone, ended: float) -> None:
        self.db.execute("DELETE FROM ended WHERE pack = ?", (pack,))
        put_ends(self.db, ends)
        self.db.execute("UPDATE body SET text = ? WHERE id = ?", (body, pack))
        self.db.execute(
            "UPDATE pack SET size = size - ?, finished = finished - ?, ended = ? WHERE id = ?", (*less, ended, pack)
        )

    def note_forgotten(self, job: int) -> None:
        self.db.execute("UPDATE forgotten SET job = max(job, ?)", (job,))


def _conditions(which: Which) -> tuple[str, tuple[Any, ...]]:
    """A selection of failed tokens in SQL, and the values for it."""
    given = {"job = ?": which.job, "failure = ?": which.failure, "upstream = ?": which.upstream}
    given["EXISTS (SELECT 1 FROM label WHERE label.job = single.job AND name = ?)"] = which.by
    wanted = {condition: value for condition, value in given.items() if value}
    return " AND ".join(["due_at < ?", *wanted]), (which.before, *wanted.values())
