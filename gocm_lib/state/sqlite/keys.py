"""Requests that are made once, however often they are sent: the client names each by an Idempotency-Key.

Owns the table `idempotency`, the only SQL for it. The same key with the same body within LIFE is one job, and is
answered alike; with another body it is a mistake. The caller owns the transaction: a key is kept together with its job
or not at all, so neither a crash nor a restart comes between. Of keys and bodies only hashes are kept. Keys take room
of their own: when there are too many the oldest are forgotten, before their time, and no message is refused because of
them.
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
    """How many keys are kept: so many, but no more than a spool of so many bytes has room for."""
    return min(keys, spool // PART // BYTES)


class Keys:
    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        # As with the spool's tally: counted once, and put back by who rolls a transaction back.
        [[self.count]] = db.execute("SELECT count(*) FROM idempotency")

    def meet(self, job: Job) -> Known | Conflict | None:
        """Whether the job's request was made before; it may have become this very job, if a caller repeats itself whose
        answer was lost. None: it was not, and now its key is kept.
        """
        assert job.once is not None
        key, body = job.once
        found = self.db.execute("SELECT body, job, accepted_at FROM idempotency WHERE key = ?", (key,)).fetchone()
        if found is None or found[2] <= job.accepted_at - LIFE:
            self.db.execute(
                "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)", (job.id, key, body, job.accepted_at)
            )
            self.count += found is None
            return None
        return Known(found[1]) if found[0] == body else Conflict()

    def forget(self, job: Job) -> None:
        """Take a job's key back: there was no room for it."""
        if job.once is not None:
            self._forget("key = ? AND job = ?", job.once.key, job.id)

    def has_old(self, now: float) -> bool:
        """Whether some keys' time is over."""
        oldest = self.db.execute("SELECT accepted_at FROM idempotency ORDER BY job LIMIT 1").fetchone()
        return oldest is not None and oldest[0] <= now - LIFE

    def prune(self, now: float) -> None:
        """Forget keys whose time is over, of the PRUNED oldest."""
        oldest = "job IN (SELECT job FROM idempotency ORDER BY job LIMIT ?)"
        self._forget(f"{oldest} AND accepted_at <= ?", PRUNED, now - LIFE)

    def fit(self, most: int) -> int:
        """Forget the oldest keys if there are more than `most`, up to PRUNED of them; how many."""
        if (excess := min(self.count - most, PRUNED)) <= 0:
            return 0
        return self._forget("job IN (SELECT job FROM idempotency ORDER BY job LIMIT ?)", excess)

    def _forget(self, which: str, *values: object) -> int:
        gone = self.db.execute(f"DELETE FROM idempotency WHERE {which}", values).rowcount
        self.count -= gone
        return gone
