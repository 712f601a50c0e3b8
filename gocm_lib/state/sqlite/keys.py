"""Idempotency-Keys: a request that carries one is made once, however often it is sent.

Owns the table `idempotency` and all SQL for it. The same key with the same body within LIFE is one job, and gets the
same answer; with another body it is a mistake. The caller owns the transaction: a key is kept together with its job or
not at all, so neither a crash nor a restart comes between. Only hashes of keys and bodies are kept. Keys have room of
their own: when there are too many, the oldest are forgotten early, and no message is refused because of them.
"""

import sqlite3

from gocm_lib.message.idempotency import HASH
from gocm_lib.message.job import Job
from gocm_lib.state.contract import Conflict, Known

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

# From format 7, which kept whole hashes, and them by their value.
UPGRADE = f"""
ALTER TABLE idempotency RENAME TO whole;
{SCHEMA}
INSERT OR IGNORE INTO idempotency
    SELECT job, substr(key, 1, {HASH}), substr(body, 1, {HASH}), accepted_at FROM whole ORDER BY job;
DROP TABLE whole;
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

    def claim(self, job: Job) -> Known | Conflict | None:
        """Claim a job's key for it. None: the key is new, and is kept now. Known: the request was made before; perhaps
        it became this very job, when a caller repeats a call whose answer was lost. Conflict: the key was used for
        another request.
        """
        assert job.key is not None
        key, body = job.key
        found = self.db.execute("SELECT body, job, accepted_at FROM idempotency WHERE key = ?", (key,)).fetchone()
        if found is None or found[2] <= job.accepted_at - LIFE:
            self.db.execute(
                "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)", (job.id, key, body, job.accepted_at)
            )
            self.count += found is None
            return None
        return Known(found[1]) if found[0] == body else Conflict()

    def forget(self, job: Job) -> None:
        """Give a job's key back, because there was no room for the job."""
        if job.key is not None:
            self._forget("key = ? AND job = ?", job.key.key, job.id)

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
