"""What is noted beside packs, in PostgreSQL (module sqlite/notes says what each row is).

Any node may let a pack have its turn that has waited for its time, if no other has it: such a pack is nobody's from its
acceptance on. The caller owns the transaction.
"""

from collections.abc import Mapping, Sequence

from gocm_lib.message.job import FORMER, NODES
from gocm_lib.state import turns
from gocm_lib.state.contract import Hold, Meaning
from gocm_lib.state.packs import Label, Pack
from gocm_lib.state.postgres.database import Database

SCHEMA = """
CREATE TABLE label (job bigint PRIMARY KEY, name text NOT NULL, tag text NOT NULL, upstream text NOT NULL);
CREATE INDEX label_tag ON label (tag, job) WHERE tag <> '';
CREATE TABLE later (pack bigint PRIMARY KEY, due float8 NOT NULL, upstream text NOT NULL);
CREATE INDEX later_due ON later (due);
CREATE TABLE hold (upstream text PRIMARY KEY, since float8 NOT NULL, name text NOT NULL);
CREATE TABLE meaning (upstream text PRIMARY KEY, dialect text NOT NULL, project text NOT NULL);
"""
_WAKE = f"""
WITH due AS (SELECT pack FROM later WHERE due <= %(now)s ORDER BY due LIMIT %(limit)s FOR UPDATE SKIP LOCKED),
woken AS (UPDATE pack SET lane = {turns.later(0)} - lane FROM due
    WHERE pack.id = due.pack AND lane < 0 AND node IN (0, %(node)s) RETURNING id, upstream, lane, node),
told AS (DELETE FROM later USING due WHERE later.pack = due.pack
    AND (due.pack IN (SELECT id FROM woken) OR NOT EXISTS (SELECT 1 FROM pack WHERE id = due.pack AND lane < 0)))
SELECT id, upstream, lane, node FROM woken
"""


class Notes:
    """For PostgresStore."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def keep(self, new: Sequence[Pack]) -> None:
        """Note what new packs say."""
        if labels := [label for each in new for label in each.labels]:
            columns = [list(column) for column in zip(*labels)]
            self.db.tell(
                "INSERT INTO label SELECT * FROM unnest(%b::bigint[], %b::text[], %b::text[], %b::text[])", columns
            )
        if waiting := [(each.id, float(each.due), each.upstream) for each in new if each.due]:
            columns = [list(column) for column in zip(*waiting)]
            self.db.tell("INSERT INTO later SELECT * FROM unnest(%b::bigint[], %b::float8[], %b::text[])", columns)

    def label(self, job: int) -> Label:
        """What a job is known by."""
        rows = self.db.ask("SELECT * FROM label WHERE job = %s", (job,))
        return Label(*rows[0]) if rows else Label(job, "", "", "")

    def tagged(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Jobs with a tag, with ids above `after`, for these upstreams (none: for all)."""
        rows = self.db.ask(
            f"SELECT job FROM label WHERE tag = %s AND tag <> '' AND job > %s{_OF} ORDER BY job LIMIT %s",
            (tag, after, *_of(upstreams), limit),
        )
        return [job for (job,) in rows]

    def due(self, pack: int) -> float:
        """When a pack is to be sent that waits for its time; 0: it does not."""
        rows = self.db.ask("SELECT due FROM later WHERE pack = %s", (pack,))
        return float(rows[0][0]) if rows else 0.0

    def waiting(self, after: int, limit: int, upstreams: Sequence[str]) -> list[int]:
        """Packs that wait for their time, with ids above `after`, for these upstreams (none: for all)."""
        statement = f"SELECT pack FROM later WHERE pack > %s{_OF} ORDER BY pack LIMIT %s"
        return [pack for (pack,) in self.db.ask(statement, (after, *_of(upstreams), limit))]

    def wake(self, now: float, limit: int) -> list[tuple[int, str, int, int]]:
        """Let packs that are due have their turn. Returns of each its id, upstream, lane and node."""
        rows = self.db.ask(_WAKE, {"now": now, "limit": limit, "node": self.db.node})
        return [(pack, upstream, lane, node) for pack, upstream, lane, node in rows]

    def drop(self, packs: Sequence[tuple[int, int]]) -> None:
        """Packs are forgotten: the first and the last id of each."""
        ids = [low for low, _ in packs], [high for _, high in packs]
        self.db.tell(
            "DELETE FROM label USING unnest(%b::bigint[], %b::bigint[]) AS u (id, last) WHERE job BETWEEN u.id AND"
            f" u.last AND (job & {NODES} = u.id & {NODES} OR u.id < {FORMER})",
            ids,
        )
        self.db.tell("DELETE FROM later WHERE pack = ANY(%b::bigint[])", (ids[0],))

    def hold(self, upstream: str, hold: Hold) -> None:
        """Somebody holds an upstream."""
        values = upstream, float(hold.since), hold.by
        self.db.tell("INSERT INTO hold VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", values)

    def let_go(self, upstream: str) -> None:
        """Nobody does any more."""
        self.db.tell("DELETE FROM hold WHERE upstream = %s", (upstream,))

    def meant(self) -> dict[str, Meaning]:
        """What the names of upstreams mean, or meant last."""
        return {upstream: Meaning(*rest) for upstream, *rest in self.db.ask("SELECT * FROM meaning")}

    def mean(self, meanings: Mapping[str, Meaning]) -> None:
        """They mean this."""
        for upstream, meaning in sorted(meanings.items()):
            self.db.tell(
                "INSERT INTO meaning VALUES (%s, %s, %s) ON CONFLICT (upstream) DO UPDATE SET"
                " dialect = excluded.dialect, project = excluded.project",
                (upstream, *meaning),
            )


_OF = " AND (%s OR upstream = ANY(%s::text[]))"


def _of(upstreams: Sequence[str]) -> tuple[bool, list[str]]:
    """The values for _OF."""
    return not upstreams, list(upstreams)
