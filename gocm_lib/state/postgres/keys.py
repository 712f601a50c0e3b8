"""Idempotency-Keys in PostgreSQL (module sqlite/keys says what they promise). They are the cluster's: a request that is
repeated at another node is known there. The caller owns the transaction.
"""

from collections.abc import Sequence

from gocm_lib.state.contract import Conflict, Count, Known
from gocm_lib.state.packs import Key
from gocm_lib.state.postgres.database import Database
from gocm_lib.state.sqlite.keys import LIFE, PRUNED

# Two nodes may keep the same key at the same moment: the later one waits for the other's commit, is Overtaken, and
# looks again. One whose time is over gives way.
_KEEP = """
WITH new AS (SELECT * FROM unnest(%(jobs)b::bigint[], %(keys)b::bytea[], %(bodies)b::bytea[], %(times)b::float8[])
    AS u (job, key, body, at)),
old AS (DELETE FROM idempotency USING new WHERE idempotency.key = new.key AND accepted_at <= at - %(life)s
    RETURNING idempotency.key)
SELECT count(*) FROM old
"""
_INSERT = """
INSERT INTO idempotency SELECT * FROM
    unnest(%(jobs)b::bigint[], %(keys)b::bytea[], %(bodies)b::bytea[], %(times)b::float8[])
"""
_OLDEST = "SELECT job FROM idempotency ORDER BY job LIMIT %s FOR UPDATE SKIP LOCKED"


class Keys:
    """The keys that are remembered, for PostgresStore."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def known(self, keys: Sequence[Key]) -> dict[int, Known | Conflict]:
        """Of requests with these keys those that were made before, by the ids that they would get now. Known may name
        that very id, when a caller repeats a call whose answer was lost. Conflict: the key was used for another
        request. Of two alike the second is what the first is.
        """
        if not keys:
            return {}
        rows = self.db.ask(
            "SELECT key, body, job, accepted_at FROM idempotency WHERE key = ANY(%b::bytea[])",
            ([each.key for each in keys],),
        )
        kept = {key: (body, job, at) for key, body, job, at in rows}
        found: dict[int, Known | Conflict] = {}
        new: dict[bytes, Key] = {}
        for each in keys:
            row = kept.get(each.key)
            if row and row[2] <= each.accepted_at - LIFE:
                row = None
            body, job = row[:2] if row else new.setdefault(each.key, each)[2::-2]
            if row or job != each.job:
                found[each.job] = Known(job) if body == each.body else Conflict()
        return found

    def keep(self, keys: Sequence[Key]) -> None:
        """Keep keys that are new."""
        values = {
            "jobs": [each.job for each in keys],
            "keys": [each.key for each in keys],
            "bodies": [each.body for each in keys],
            "times": [float(each.accepted_at) for each in keys],
            "life": LIFE,
        }
        [[old]] = self.db.ask(_KEEP, values)
        self.db.tell(_INSERT, values)
        self.db.count({Count("keys"): len(keys) - old})

    def prune(self, now: float) -> None:
        """Forget the keys whose time is over, among the PRUNED oldest."""
        self._forget("AND accepted_at <= %s", PRUNED, now - LIFE)

    def fit(self, excess: int) -> int:
        """Forget up to so many of the oldest keys, and PRUNED. Returns how many."""
        return self._forget("", min(excess, PRUNED))

    def _forget(self, which: str, count: int, *values: object) -> int:
        gone = self.db.changed(
            f"DELETE FROM idempotency WHERE job = ANY(ARRAY({_OLDEST})) {which} RETURNING 1", (count, *values)
        )
        self.db.count({Count("keys"): -gone})
        return gone
