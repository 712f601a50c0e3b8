"""Packs and Singles in PostgreSQL, from their acceptance to their end (module sqlite/spool says what each row is).

A node works on packs that are its own: those that it has kept, and those that it took when they were nobody's. Each
change of a pack names its node, and fails as a whole if a pack is somebody else's by now; so what a node believes of
its packs in memory is so. What is the same for all nodes is asked without that.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from gocm_lib.message.job import FORMER, NODE_BITS, NODES
from gocm_lib.state import packs
from gocm_lib.state.contract import Deferred
from gocm_lib.state.packs import Pack
from gocm_lib.state.postgres.database import Database, Row, clean
from gocm_lib.state.sqlite.spool import TOGETHER
from gocm_lib.state.store import FAILED, OPEN, OVER, Changed, End, Single, Spot, Stored
from gocm_lib.state.turns import WIDTH

ROW = 300  # bytes, roughly, that a pack takes besides its body
FLOOR_IS_GOOD = 5.0  # seconds; then what others have put below it is found
OVERLAP = 2_000_000 << NODE_BITS  # two seconds of ids: what was kept at the same time by others
_LOOKED_AT = 4, NODES + 1  # packs among which a job's is: those of several nodes come between each other


def within(pack: str) -> str:
    """In SQL, whether a job, of which the id is `job`, is in this pack: between its first and its last, and made by the
    same node. Ids from before there were nodes have no number of one, and none come between them.
    """
    same_node = f"(job & {NODES} = {pack}.id & {NODES} OR {pack}.id < {FORMER})"
    return f"job BETWEEN {pack}.id AND {pack}.last AND {same_node}"


_KEEP = """
WITH me AS (SELECT 1 FROM node WHERE id = %(node)s AND epoch = %(epoch)s),
new AS (SELECT u.* FROM me, unnest(%(ids)b::bigint[], %(lasts)b::bigint[], %(upstreams)b::text[], %(lanes)b::int[],
    %(sinces)b::float8[], %(sizes)b::int[], %(jobs)b::int[], %(bodies)b::bytea[])
    AS u (id, last, upstream, lane, since, size, jobs, text)),
bodies AS (INSERT INTO body SELECT id, text FROM new),
kept AS (INSERT INTO pack (id, last, upstream, lane, since, size, fresh, open, jobs, node)
    SELECT id, last, upstream, lane, since, size, size, size, jobs, CASE WHEN lane < 0 THEN 0 ELSE %(node)s END
    FROM new RETURNING 1)
SELECT 1 / (count(*) = %(count)s)::int FROM kept
"""
_STORED = "id, last, upstream, lane, losses, fresh, gone, open, text"
# As few packs as have so many tokens: the narrow rows are added up, and only then are bodies read.
_FRESH = f"""
WITH narrow AS MATERIALIZED (
    SELECT id, last, upstream, lane, losses, fresh, gone, open, sum(fresh) OVER (ORDER BY id) - fresh AS before
    FROM (SELECT * FROM pack WHERE node = %(node)s AND NOT done AND fresh > 0 AND upstream = %(upstream)s
          AND lane = %(lane)s AND id > %(after)s ORDER BY id LIMIT %(tokens)s) AS first)
SELECT {_STORED} FROM narrow JOIN body USING (id) WHERE before < %(tokens)s ORDER BY id
"""
_NEWEST = f"""
SELECT {_STORED} FROM pack JOIN body USING (id)
WHERE node = %s AND NOT done AND fresh > 0 AND upstream = %s AND lane = %s AND id < %s ORDER BY id DESC LIMIT %s
"""
_PACK_OF = f"""
SELECT {_STORED}, node FROM (SELECT * FROM pack WHERE id <= %(job)s ORDER BY id DESC LIMIT %(many)s) AS near
JOIN body USING (id) WHERE last >= %(job)s ORDER BY id DESC
"""
_SINGLE = """
    job, n, upstream, rank, due_at, waits, attempts, charged, deaths, since, state, failure, reason, canonical
"""
_AFTER = f"""
FROM single WHERE state = {OPEN} AND node = %(node)s AND upstream = %(upstream)s AND (rank, job, n) > (%(rank)s,
    %(job)s, %(n)s)
"""
_DUE = f"SELECT {_SINGLE} {_AFTER} AND rank <= %(upto)s AND job > %(above)s ORDER BY rank, job, n LIMIT %(count)s"
_NEXT_RANK = f"SELECT rank {_AFTER} AND rank < %(below)s AND job > %(above)s ORDER BY rank, job, n LIMIT 1"
_DEFERRED = f"""
SELECT count(*), min(due_at) FROM
    (SELECT due_at {_AFTER} AND rank < %(below)s AND waits ORDER BY rank LIMIT %(count)s) AS waiting
"""
_CHANGE = f"""
WITH changed AS (
    UPDATE pack p SET gone = u.gone, fresh = p.fresh + u.fresh, open = p.open + u.open, jobs = p.jobs + u.jobs,
        finished = p.finished + u.finished, done = p.open + u.open = 0,
        since = CASE WHEN u.jobs > 0 AND p.jobs = 0 THEN %(now)s ELSE since END,
        ended = CASE
            WHEN p.finished + u.finished <= 0 THEN 0
            WHEN u.finished <= 0 THEN ended
            WHEN ended = 0 OR (p.jobs + u.jobs = 0 AND %(now)s - ended <= {TOGETHER}) THEN %(now)s
            ELSE ended END
    FROM unnest(%(ids)b::bigint[], %(gone)b::bytea[], %(fresh)b::int[], %(open)b::int[], %(jobs)b::int[],
        %(finished)b::int[]) AS u (id, gone, fresh, open, jobs, finished)
    WHERE p.id = u.id AND p.node = %(node)s RETURNING 1)
SELECT 1 / (count(*) = %(count)s)::int FROM changed
"""
_COLUMNS = "job n upstream rank due_at waits attempts charged deaths since state failure reason canonical".split()
_TYPES = "bigint int text bigint float8 bool int int int float8 int text text text".split()
_PUT = f"""
INSERT INTO single SELECT u.*, %(node)s FROM
    unnest({", ".join(f"%({name})b::{kind}[]" for name, kind in zip(_COLUMNS, _TYPES))}) AS u
ON CONFLICT (job, n) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in [*_COLUMNS[2:], "node"])}
"""
_END = """
INSERT INTO ended SELECT * FROM
    unnest(%(packs)b::bigint[], %(firsts)b::int[], %(positions)b::bytea[], %(ats)b::float8[], %(ids)b::text[])
ON CONFLICT (pack, first) DO UPDATE SET positions = excluded.positions, at = excluded.at, ids = excluded.ids
"""
_IS_SOUND = f"""
SELECT count(*), count(*) FILTER (WHERE state = {OVER} AND failure NOT IN
    ('rejected', 'bad_message', 'attempts', 'expired', 'killed_senders', 'cancelled')) FROM single WHERE job = %s
"""
_TAKE = f"""
WITH due AS MATERIALIZED (
    SELECT id FROM pack WHERE node = 0 AND NOT done AND upstream = %(upstream)s AND lane = %(lane)s AND id >= %(floor)s
    ORDER BY id LIMIT %(count)s FOR UPDATE SKIP LOCKED),
few AS (SELECT id FROM (SELECT id, sum(open) OVER (ORDER BY id) - open AS before FROM due JOIN pack USING (id)) AS sums
    WHERE before < %(tokens)s),
taken AS (UPDATE pack SET node = %(node)s FROM few, node
    WHERE pack.id = few.id AND node.id = %(node)s AND node.epoch = %(epoch)s RETURNING pack.id, last),
singles AS (UPDATE single SET node = %(node)s FROM taken
    WHERE {within("taken")} AND state = {OPEN})
SELECT id FROM taken
"""
_OWN = f"""
WITH owned AS (UPDATE pack SET node = %(node)s WHERE id = %(id)s AND (done AND %(done)s OR node IN (0, %(node)s))
    RETURNING id, last),
singles AS (UPDATE single SET node = %(node)s FROM owned WHERE {within("owned")} AND state = {OPEN})
SELECT 1 FROM owned
"""
_GIVE = f"""
WITH given AS (UPDATE pack SET node = 0 WHERE node = %s AND NOT done AND upstream = %s AND lane = %s AND id > %s
    AND id <> ALL(%s::bigint[]) RETURNING id, last)
UPDATE single SET node = 0 FROM given WHERE {within("given")} AND state = {OPEN}
"""


class Spool:
    """The tokens that are to be sent, for PostgresStore."""

    def __init__(self, db: Database) -> None:
        self.db = db
        # Where the rows begin that are worth reading, and until when that is believed. While somebody holds a snapshot,
        # those that are done stay in the index, and whoever begins at its low end reads all of them to find nothing.
        self._floors: dict[tuple[str, int], tuple[int, float]] = {}
        # Of those that this node kept. No other has ids like its own, so an id above is nobody's.
        [[self.newest]] = db.ask(
            "SELECT coalesce(max(last), 0) FROM (SELECT last FROM pack WHERE id & 255 = %s ORDER BY id DESC LIMIT 1)"
            " AS newest",
            (db.node,),
        )

    def keep(self, new: Sequence[Pack]) -> None:
        """Keep packs, as this node's, but for those that wait for their time. None of their jobs is known."""
        values = {
            "node": self.db.node,
            "epoch": self.db.epoch,
            "ids": [each.id for each in new],
            "lasts": [each.last for each in new],
            "upstreams": [each.upstream for each in new],
            "lanes": [each.lane for each in new],
            "sinces": [float(each.since) for each in new],
            "sizes": [each.size for each in new],
            "jobs": [len(each.jobs) for each in new],
            "bodies": [each.body.encode() for each in new],
            "count": len(new),
        }
        self.db.tell(_KEEP, values)

    def kept(self, new: Sequence[Pack]) -> None:
        """These are there."""
        self.newest = max([self.newest, *(each.last for each in new)])

    def has(self, job: int) -> bool:
        """Whether a job of this node's was kept and is not forgotten yet."""
        return job <= self.newest and self.find(job) is not None

    # -------------------------------------------------------------------------------------------------- of this node

    def fresh(self, upstream: str, lane: int, after: int, tokens: int) -> list[Stored]:
        """Store.fresh."""
        values = {"node": self.db.node, "upstream": upstream, "lane": lane, "after": after, "tokens": tokens}
        return [self._stored(row) for row in self.db.ask(_FRESH, values)]

    def newest_fresh(self, upstream: str, lane: int, before: int, count: int) -> list[Stored]:
        """Store.newest."""
        rows = self.db.ask(_NEWEST, (self.db.node, upstream, lane, before, count))
        return [self._stored(row) for row in rows]

    def pack_of(self, job: int) -> Stored | None:
        """The pack that a job is in, if it is this node's."""
        return self._find(job, self.db.node)

    def _spot(self, upstream: str, after: Spot, **more: int) -> dict[str, object]:
        return {"node": self.db.node, "upstream": upstream, **after._asdict(), **more}

    def due(self, upstream: str, after: Spot, rank: int, count: int, above: int) -> list[Single]:
        """Store.due."""
        rows = self.db.ask(_DUE, self._spot(upstream, after, upto=rank, count=count, above=above))
        return [Single(*row) for row in rows]

    def next_rank(self, upstream: str, after: Spot, below: int, above: int) -> int | None:
        """Store.next_rank."""
        rows = self.db.ask(_NEXT_RANK, self._spot(upstream, after, below=below, above=above))
        return rows[0][0] if rows else None

    def deferred(self, upstream: str, after: Sequence[tuple[Spot, int]], most: int) -> Deferred:
        """Store.deferred."""
        count, due = 0, []
        for spot, below in after:
            [[found, first]] = self.db.ask(_DEFERRED, self._spot(upstream, spot, below=below, count=most - count))
            count += found
            due += [first] if found else []
        return Deferred(count, min(due, default=None))

    def take(self, upstream: str, lane: int, tokens: int) -> list[Stored]:
        """Make packs this node's that are nobody's, the oldest: as few as have so many open tokens, or all of them."""
        now = time.monotonic()
        floor, good_until = self._floors.get((upstream, lane), (0, 0.0))
        if now >= good_until:
            floor, good_until = 0, now + FLOOR_IS_GOOD
        values = {"node": self.db.node, "epoch": self.db.epoch, "upstream": upstream, "lane": lane, "floor": floor}
        taken = sorted(row[0] for row in self.db.ask(_TAKE, {**values, "count": tokens, "tokens": tokens}))
        if taken:
            floor = max(floor, taken[-1] - OVERLAP)
        self._floors[upstream, lane] = floor, good_until
        return self.packs(taken)

    def own(self, job: int, done: bool) -> Stored | None:
        """Make the pack of a job this node's, if it is nobody's, or anybody's and `done`. None: it is not."""
        stored = self.find(job)
        if stored is None:
            return None
        values = {"id": stored.id, "node": self.db.node, "done": done}
        return stored if self.db.changed(_OWN, values) else None

    def order(self, job: int) -> None:
        """Have a job cancelled by whoever has it."""
        self.db.tell("INSERT INTO cancelled VALUES (%s) ON CONFLICT DO NOTHING", (job,))

    def carried_out(self, job: int) -> None:
        """That order is carried out."""
        self.db.tell("DELETE FROM cancelled WHERE job = %s", (job,))

    def give(self, upstream: str, lane: int, after: int, kept: Collection[int]) -> None:
        """Make packs of this node's nobody's, those with ids above `after`, but these."""
        self.db.tell(_GIVE, (self.db.node, upstream, lane, after, sorted(kept)))

    def change(self, changed: Sequence[Changed], now: float) -> None:
        """Change packs of this node's."""
        if not changed:
            return
        if any(row.jobs > 0 for row in changed):
            self._floors.pop(("", 0), None)  # an old one is open again
        rows = sorted(changed)
        values = {
            "node": self.db.node,
            "now": now,
            "ids": [row.id for row in rows],
            "gone": [packs.to_bytes(row.gone) for row in rows],
            "fresh": [row.fresh for row in rows],
            "open": [row.open for row in rows],
            "jobs": [row.jobs for row in rows],
            "finished": [row.finished for row in rows],
            "count": len(rows),
        }
        self.db.tell(_CHANGE, values)

    def put(self, singles: Sequence[Single]) -> None:
        """Keep Singles as they are now, as this node's."""
        rows = [
            each._replace(
                due_at=float(each.due_at),
                waits=bool(each.waits),
                since=float(each.since),
                failure=clean(each.failure),
                reason=clean(each.reason),
                canonical=clean(each.canonical),
            )
            for each in sorted(singles)
        ]
        values: dict[str, Any] = {name: list(column) for name, column in zip(_COLUMNS, zip(*rows))}
        self.db.tell(_PUT, {**values, "node": self.db.node})

    def end(self, ends: Iterable[End]) -> None:
        """Remember how tokens were delivered."""
        rows = []
        for pack, positions, at, receipts in ends:
            first = (positions & -positions).bit_length() - 1
            rows.append((pack, first, packs.to_bytes(positions >> first), float(at), clean(" ".join(receipts))))
        if rows:
            columns = [list(column) for column in zip(*rows)]
            self.db.tell(_END, dict(zip(("packs", "firsts", "positions", "ats", "ids"), columns)))

    def set_back(self, by: float, now: float, latest: float) -> None:
        """Store.set_back."""
        shifted = "rank - ((due_at - ({0})) * 1e6)::bigint"
        values = {"by": by, "now": now, "latest": latest, "node": self.db.node, "came": int(now * 1e6)}
        which = f"state = {OPEN} AND node IN (0, %(node)s)"  # who takes what is nobody's, takes it as it is
        for wanted, due_at in (("%(by)s > 0", "due_at - %(by)s"), ("due_at > %(latest)s", "%(now)s")):
            self.db.tell(
                f"UPDATE single SET rank = {shifted.format(due_at)}, due_at = {due_at}"
                f" WHERE {which} AND waits AND {wanted}",
                values,
            )
        # What does not wait has the turn of its arrival, which may be later than now as well.
        self.db.tell(
            f"UPDATE single SET rank = rank - rank %% {WIDTH} + %(came)s"
            f" WHERE {which} AND NOT waits AND rank %% {WIDTH} > %(came)s",
            values,
        )

    def accepted_by(self, now: float) -> None:
        """Let no pack of this node's seem accepted later than now."""
        self.db.tell(
            "UPDATE pack SET since = %s WHERE since > %s AND node = %s AND lane >= 0", (now, now, self.db.node)
        )

    # ------------------------------------------------------------------------------------------------- of all nodes

    def find(self, job: int) -> Stored | None:
        """The pack that a job is in, whosever it is."""
        return self._find(job, None)

    def _find(self, job: int, node: int | None) -> Stored | None:
        for many in _LOOKED_AT:
            for row in self.db.ask(_PACK_OF, {"job": job, "many": many}):
                if any(head[0] == job for head in packs.heads(row[8].decode())):
                    return self._stored(row) if node in (None, row[9]) else None
        return None

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        """These packs, in the order of their ids."""
        rows = self.db.ask(
            f"SELECT {_STORED} FROM pack JOIN body USING (id) WHERE id = ANY(%s::bigint[]) ORDER BY id", (list(ids),)
        )
        return [self._stored(row) for row in rows]

    def _stored(self, row: Row) -> Stored:
        number, last, upstream, lane, losses, fresh, gone, open_, body, *_ = row
        text = body.decode()
        singles: dict[int, int] = {}
        if open_ > fresh:
            singles = dict(
                self.db.ask(
                    f"SELECT job, count(*) FROM single, (SELECT %s::bigint AS id, %s::bigint AS last) AS it"
                    f" WHERE {within('it')} AND state = {OPEN} GROUP BY job",
                    (number, last),
                )
            )
        left = (1 << sum([head[1] for head in packs.heads(text)])) - 1 if not fresh else packs.from_bytes(gone)
        return Stored(number, last, upstream, lane, fresh, left, singles, text, losses)

    def open_singles(self, job: int) -> list[Single]:
        """The open Singles of a job."""
        rows = self.db.ask(f"SELECT {_SINGLE} FROM single WHERE job = %s AND state = {OPEN} ORDER BY n", (job,))
        return [Single(*row) for row in rows]

    def singles(self, low: int, high: int) -> list[Single]:
        """All Singles of jobs with ids from `low` to `high`."""
        rows = self.db.ask(f"SELECT {_SINGLE} FROM single WHERE job BETWEEN %s AND %s ORDER BY job, n", (low, high))
        return [Single(*row) for row in rows]

    def failed_singles(self, rest: str, values: Sequence[object]) -> list[Single]:
        """Failed Singles: `rest` of the statement, and the values in it."""
        rows = self.db.ask(f"SELECT {_SINGLE} FROM single WHERE state = {FAILED} {rest}", values)
        return [Single(*row) for row in rows]

    def died(self, job: int, reason: str) -> bool:
        """Whether a job has a failed token with this reason."""
        found = self.db.ask(f"SELECT 1 FROM single WHERE state = {FAILED} AND job = %s AND reason = %s", (job, reason))
        return bool(found)

    def is_sound(self, job: int) -> bool:
        """Store.is_sound."""
        [[alone, sound]] = self.db.ask(_IS_SOUND, (job,))
        if sound:
            return True
        stored = self.find(job)
        return stored is not None and (stored.gone & packs.span_of(stored.body, job)).bit_count() > alone

    def ends(self, pack: int) -> list[End]:
        """How tokens of a pack were delivered."""
        rows = self.db.ask("SELECT first, positions, at, ids FROM ended WHERE pack = %s ORDER BY first", (pack,))
        return [
            End(pack, packs.from_bytes(positions) << first, at, ids.split(" ") if ids else ())
            for first, positions, at, ids in rows
        ]

    def oldest(self) -> float | None:
        """When the oldest job with open tokens was accepted or replayed; None: there is none."""
        now = time.monotonic()
        floor, good_until = self._floors.get(("", 0), (0, 0.0))
        if now >= good_until:
            floor, good_until = 0, now + FLOOR_IS_GOOD
        rows = self.db.ask(
            "SELECT id, since FROM pack WHERE NOT done AND lane >= 0 AND id >= %s ORDER BY id LIMIT 1", (floor,)
        )
        self._floors["", 0] = rows[0][0] if rows else floor, good_until
        return float(rows[0][1]) if rows else None

    def last_accepted(self) -> float:
        """When this node's last job was accepted, by the clock of that time; 0: there is none."""
        rows = self.db.ask(
            "SELECT since FROM pack WHERE node = %s AND lane >= 0 ORDER BY id DESC LIMIT 1", (self.db.node,)
        )
        return float(rows[0][0]) if rows else 0.0

    def last_job(self) -> int:
        """The highest job id that is or was there, as far as known; 0: none."""
        [[newest]] = self.db.ask(
            "SELECT max(greatest((SELECT coalesce(max(last), 0) FROM (SELECT last FROM pack ORDER BY id DESC LIMIT 1)"
            " AS newest), job)) FROM forgotten"
        )
        return int(newest)
