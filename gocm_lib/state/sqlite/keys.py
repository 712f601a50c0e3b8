"""Idempotency-Keys: a request that carries one is made once, however often it is sent.

Owns the table `idempotency` and all SQL for it. The same key with the same body within LIFE is one job, and gets the
same answer; with another body it is a mistake. The caller owns the transaction: a key is kept together with its job or
not at all, so neither a crash nor a restart comes between. Only hashes of keys and bodies are kept. Keys have room of
their own: when there are too many, the oldest are forgotten early, and no message is refused because of them.
"""

import sqlite3
from collections.abc import Sequence

from gocm_lib.state.contract import Conflict, Known
from gocm_lib.state.packs import Key

LIFE = 86400.0  # seconds for which a key is kept
PRUNED = 5000  # keys that are forgotten at once, so that nobody waits long for the lock
BYTES = 110  # that a key takes on the disk, at most: with its job's id, which says which is the oldest, and one index
PART = 4  # keys may take this part of --max-spool

SCHEMA = """
CREATE TABLE idempotency (
    job INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    body BLOB NOT NULL,
    accepted_at REAL NOT NULL
);
"""


def most(keys: int, spool: int) -> int:
    """How many keys are kept: `keys`, but no more than a share of a spool of this many bytes has room for."""
    return min(keys, spool // PART // BYTES)


class Keys:
    """The keys that are remembered, for State."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        [[self.count]] = db.execute("SELECT count(*) FROM idempotency")

    def known(self, keys: Sequence[Key]) -> dict[int, Known | Conflict]:
        """Of requests with these keys those that were made before, by the ids that they would get now. Known may name
        that very id, when a caller repeats a call whose answer was lost. Conflict: the key was used for another
        request. Of two alike the second is what the first is.
        """
        found: dict[int, Known | Conflict] = {}
        new: dict[bytes, Key] = {}
        for each in keys:
            row = self.db.execute(
                "SELECT body, job FROM idempotency WHERE key = ? AND accepted_at > ?",
                (each.key, each.accepted_at - LIFE),
            ).fetchone()
            body, job = row or new.setdefault(each.key, each)[2::-2]
            if row or job != each.job:
                found[each.job] = Known(job) if body == each.body else Conflict()
        return found

    def keep(self, keys: Sequence[Key]) -> None:
        """Keep keys that are new."""
        for each in keys:
            found = self.db.execute("SELECT 1 FROM idempotency WHERE key = ?", (each.key,)).fetchone()
            self.db.execute(
                "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)",
                (each.job, each.key, each.body, each.accepted_at),
            )
            self.count += found is None

    def has_old(self, now: float) -> bool:
        """Whether any key's time is over."""
        oldest = self.db.execute("SELECT accepted_at FROM idempotency ORDER BY job LIMIT 1").fetchone()
        return oldest is not None and oldest[0] <= now - LIFE

    def prune(self, now: float) -> None:
        """Forget the keys whose time is over, among the PRUNED oldest."""
        oldest = "job IN (SELECT job FROM idempotency ORDER BY job LIMIT ?)"
        self._forget(f"{oldest} AND accepted_at <= ?", PRUNED, now - LIFE)

    def fit(self, most: int) -> int:
        """Forget up to PRUNED of the oldest keys if there are more than `most`. Returns how many."""
        if (excess := min(self.count - most, PRUNED)) <= 0:
            return 0
        return self._forget("job IN (SELECT job FROM idempotency ORDER BY job LIMIT ?)", excess)

    def _forget(self, which: str, *values: object) -> int:
        gone = self.db.execute(f"DELETE FROM idempotency WHERE {which}", values).rowcount
        self.count -= gone
        return gone
