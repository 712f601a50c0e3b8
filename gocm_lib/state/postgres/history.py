"""The rows of what has ended, in PostgreSQL (history.Rows). The caller owns the transaction.

Several nodes may forget at the same time: who is about to forget something of a pack holds its row, and passes over
those that others hold. Who settles tokens of such a pack waits for that, so nothing of it changes meanwhile.
"""

from collections.abc import Sequence
from typing import Any

from gocm_lib.state.contract import Count, Place, Which
from gocm_lib.state.history import Finished, Gone, Rows
from gocm_lib.state.packs import Label
from gocm_lib.state.postgres.database import Database
from gocm_lib.state.postgres.notes import Notes
from gocm_lib.state.postgres.spool import ROW, Spool, within
from gocm_lib.state.store import FAILED, OVER, End, Single, Stored

# With each, when the last of it ended: never, for one with a failed token. To ask for each alone would be slow.
_FINISHED = f"""
SELECT id, last, size, finished, jobs, ended, greatest(
    (SELECT max(CASE state WHEN {FAILED} THEN 'infinity' ELSE due_at END) FROM single WHERE {within("p")}),
    (SELECT max(at) FROM ended AS e WHERE e.pack = p.id), 0)
FROM pack AS p WHERE ended > 0 ORDER BY ended LIMIT %s FOR UPDATE SKIP LOCKED
"""
_COUNT_AGAIN = """
UPDATE pack SET finished = finished + %(size)s,
    ended = CASE WHEN ended > 0 THEN least(ended, %(ended)s) ELSE %(ended)s END WHERE id = %(id)s
"""


class HistoryRows(Rows):
    """See history.Rows for what the methods do."""

    def __init__(self, spool: Spool, notes: Notes) -> None:
        self.notes = notes
        self.db: Database = spool.db
        self.spool = spool
        self._latest: dict[int, float] = {}  # of the packs that `finished` gave last, when the last of them ended

    def pack_of(self, job: int) -> Stored | None:
        return self.spool.find(job)

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        return self.spool.packs(ids)

    def open_singles(self, job: int) -> list[Single]:
        return self.spool.open_singles(job)

    def singles(self, low: int, high: int) -> list[Single]:
        return self.spool.singles(low, high)

    def ends(self, pack: int) -> list[End]:
        return self.spool.ends(pack)

    def forgotten(self) -> int:
        [[job]] = self.db.ask("SELECT max(job) FROM forgotten")
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
        rows = self.db.ask("SELECT state, failure, count(*) FROM single WHERE job = %s GROUP BY 1, 2", (job,))
        return {(state, failure): count for state, failure, count in rows}

    def failed(self, which: Which, after: Place, limit: int) -> list[Single]:
        given = {"job = %s": which.job, "failure = %s": which.failure, "upstream = %s": which.upstream}
        given["EXISTS (SELECT 1 FROM label WHERE label.job = single.job AND name = %s)"] = which.by
        wanted = {condition: value for condition, value in given.items() if value}
        conditions = " AND ".join(["due_at < %s", *wanted])
        values: Sequence[Any] = (*after, which.before, *wanted.values(), limit)
        return self.spool.failed_singles(f"AND (job, n) > (%s, %s) AND {conditions} ORDER BY job, n LIMIT %s", values)

    def hold(self) -> None:
        """Be the only node that deals with what has ended, until the end of the transaction."""
        self.db.tell("SELECT 1 FROM forgotten FOR UPDATE")

    def oldest_failed(self, before: float, limit: int) -> list[Single]:
        rest = "AND due_at < %s ORDER BY due_at LIMIT %s FOR UPDATE SKIP LOCKED"
        return self.spool.failed_singles(rest, (before, limit))

    def finished(self, limit: int) -> list[Finished]:
        rows = self.db.ask(_FINISHED, (limit,))
        self._latest = {row[0]: row[-1] for row in rows}
        return [Finished(*row[:-1]) for row in rows]

    def stays(self, pack: int, last: int, before: float) -> bool:
        return self._latest[pack] > before

    def give_up(self, singles: Sequence[Single]) -> None:
        self.db.tell(
            f"UPDATE single SET state = {OVER}, waits = false FROM unnest(%b::bigint[], %b::int[]) AS u (job, n)"
            " WHERE single.job = u.job AND single.n = u.n",
            ([each.job for each in singles], [each.n for each in singles]),
        )

    def count_again(self, pack: int, size: int, ended: float) -> None:
        self.db.tell(_COUNT_AGAIN, {"id": pack, "size": size, "ended": ended})

    def forget_singles(self, jobs: Sequence[int]) -> None:
        which = "job = ANY(%s::bigint[]) AND state ="
        self.db.tell(f"DELETE FROM single WHERE {which} {OVER}", (list(jobs),))
        self.db.tell(f"UPDATE single SET waits = true WHERE {which} {FAILED}", (list(jobs),))

    def drop(self, packs: Sequence[tuple[int, int]]) -> None:
        self.db.tell(
            f"DELETE FROM single USING unnest(%b::bigint[], %b::bigint[]) AS u (id, last) WHERE {within('u')}",
            ([low for low, _ in packs], [high for _, high in packs]),
        )
        self.notes.drop(packs)
        ids = ([pack for pack, _ in packs],)
        gone = self.db.ask("DELETE FROM body WHERE id = ANY(%s::bigint[]) RETURNING octet_length(text)", ids)
        self.db.count({Count("bytes"): -sum([size + ROW for (size,) in gone])})
        for which in ("pack WHERE id", "ended WHERE pack"):
            self.db.tell(f"DELETE FROM {which} = ANY(%s::bigint[])", ids)

    def rewrite(self, pack: int, body: str, ends: Sequence[End], less: Gone, ended: float) -> None:
        self.db.tell("DELETE FROM ended WHERE pack = %s", (pack,))
        self.spool.end(ends)
        text = body.encode()
        [[before]] = self.db.ask("SELECT octet_length(text) FROM body WHERE id = %s", (pack,))
        self.db.count({Count("bytes"): len(text) - before})
        self.db.tell("UPDATE body SET text = %s WHERE id = %s", (text, pack))
        self.db.tell(
            "UPDATE pack SET size = size - %s, finished = finished - %s, ended = %s WHERE id = %s",
            (*less, ended, pack),
        )

    def note_forgotten(self, job: int) -> None:
        self.db.tell("UPDATE forgotten SET job = greatest(job, %s)", (job,))
