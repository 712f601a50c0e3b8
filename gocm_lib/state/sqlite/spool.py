"""The tokens on disk, from their acceptance to their end. All SQL for them is here, except for tokens that have
ended: module history looks those up and forgets them.

Owns the tables `job`, `token`, `receipt` and `skipped`. The unit of truth is the token: a job of 1,000 tokens of which
one failed has one left to send. A token is one row, in exactly one of these states:

        accept             claim               deliver, or end: unregistered, rejected
      ---------> READY -------------> CLAIMED ---------------------------------------------> OVER
                 ^ | |                | | |
                 | | |                | | +-- end: out of attempts, too old ---------------> FAILED
                 +-|-|----------------+ |
                 | | |   retry: deferred (due later); give_back: not tried, through no fault of its own
                 +-|-|------------------+
                   | |   release: its generation ended
                   | +--- claim: its job has expired --------------------------------------> FAILED
                   +----- reject_ready: the job's message was found bad -------------------> OVER

    CLAIMED --- record_crash: its sender died a third time with it in flight -------------> FAILED
    FAILED ---- replay ------------------------------------------------------------------> READY
    FAILED ---- discard; too old, or too many of them -----------------------------------> OVER
    OVER ------ its job ended long ago, or there is no room to remember it --------------> gone

READY and CLAIMED are rows of `token` with generation 0 and above 0; of a claimed token only the generation that
claimed it may say what became of it. The ready ones are taken in the order that module turns makes of their `rank`. One
that waits for a retry (`waits`) gets a new rank, and is taken by it, once it is due. `deaths` counts the senders that
died with it in flight since it last had an answer.

OVER and FAILED are the generations below 0, and `due_at` is when they ended. Only a FAILED token's message is needed
again. A job's row has the number of its tokens that are `open`, ready or claimed; when that comes to 0 it is
`finished`, at that time, and negative when there is no more to forget of it than its failed tokens. The
row stays as long as any of its tokens' rows.

Every method may be repeated safely; `retry`, `give_back` and `end` for what `held`, in the same transaction, says is in
the generation's hands. The caller owns the transaction and the lock.
"""

import json
import math
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

from gocm_lib.message.job import Job, Run, Slice
from gocm_lib.message.retry import Held
from gocm_lib.message.suspect import FATAL, InFlight
from gocm_lib.state.contract import Deferred
from gocm_lib.state.turns import LANES, bounds, lane, lane_of, pick, rank, save

OVER, FAILED = -1, -2  # generations of tokens that nobody sends any more

SCHEMA = f"""
CREATE TABLE job (
    id INTEGER PRIMARY KEY,
    upstream TEXT NOT NULL,
    target TEXT NOT NULL,
    message TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    since REAL NOT NULL,
    expires_at REAL NOT NULL,
    size INTEGER NOT NULL,
    open INTEGER NOT NULL,
    sound INTEGER NOT NULL DEFAULT 0,
    finished REAL NOT NULL DEFAULT 0
);
CREATE INDEX job_finished ON job (finished) WHERE finished > 0;
CREATE TABLE token (
    job INTEGER NOT NULL,
    n INTEGER NOT NULL,
    token TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    charged INTEGER NOT NULL DEFAULT 0,
    generation INTEGER NOT NULL DEFAULT 0,
    batch INTEGER NOT NULL DEFAULT 0,
    rank REAL NOT NULL,
    waits INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL,
    upstream TEXT NOT NULL,
    deaths INTEGER NOT NULL DEFAULT 0,
    failure TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    canonical TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job, n)
) WITHOUT ROWID;
CREATE INDEX token_fresh ON token (upstream, rank) WHERE generation = 0 AND waits = 0;
CREATE INDEX token_waiting ON token (upstream, due_at) WHERE generation = 0 AND waits = 1;
CREATE INDEX token_claimed ON token (generation, batch) WHERE generation > 0;
CREATE INDEX token_dead ON token (job) WHERE generation = {FAILED};
CREATE INDEX token_dead_age ON token (due_at) WHERE generation = {FAILED};
CREATE TABLE forgotten (job INTEGER NOT NULL);
INSERT INTO forgotten VALUES (0);
"""
# Of delivered tokens, from place n on, the upstream's ids, parted by spaces; and what was left out of a list.
MORE = """
CREATE TABLE receipt (job INTEGER NOT NULL, n INTEGER NOT NULL, ids TEXT NOT NULL, PRIMARY KEY (job, n)) WITHOUT ROWID;
CREATE TABLE skipped (job INTEGER NOT NULL, n INTEGER NOT NULL, why TEXT NOT NULL, PRIMARY KEY (job, n)) WITHOUT ROWID;
"""

_COLUMNS = "job, n, token, attempts, deaths, rank"

_FRESH = f"""
SELECT {_COLUMNS} FROM token INDEXED BY token_fresh
WHERE generation = 0 AND waits = 0 AND upstream = ? AND rank >= ? AND rank < ? ORDER BY rank LIMIT ?
"""
_NEWEST = f"""
SELECT {_COLUMNS} FROM token INDEXED BY token_fresh
WHERE generation = 0 AND waits = 0 AND upstream = ? AND rank >= ? AND (rank, job) < (?, ?)
ORDER BY rank DESC, job DESC LIMIT 1
"""
_FURTHER = f"""
SELECT {_COLUMNS} FROM token INDEXED BY token_fresh
WHERE generation = 0 AND waits = 0 AND upstream = ? AND rank < ? AND (rank, job) > (?, ?)
ORDER BY rank, job LIMIT 1
"""
_FIRST = f"""
SELECT {_COLUMNS} FROM token WHERE job = ? AND generation = 0 AND waits = 0 ORDER BY rank, n LIMIT 1
"""
_DUE = """
SELECT job, n, rank, due_at FROM token INDEXED BY token_waiting
WHERE generation = 0 AND waits = 1 AND upstream = ? AND due_at <= ? ORDER BY due_at LIMIT ?
"""
_JOBS = """
SELECT id, upstream, target, message, expires_at FROM job WHERE id IN (SELECT value FROM json_each(?))
"""
_NEXT_DUE = """
SELECT 0.0 WHERE EXISTS
    (SELECT 1 FROM token INDEXED BY token_fresh WHERE generation = 0 AND waits = 0 AND upstream = ?)
UNION ALL
SELECT min(due_at) FROM token INDEXED BY token_waiting WHERE generation = 0 AND waits = 1 AND upstream = ?
"""
_DEFERRED = """
SELECT count(*), min(due_at) FROM
    (SELECT due_at FROM token INDEXED BY token_waiting
     WHERE generation = 0 AND waits = 1 AND upstream = ? ORDER BY due_at LIMIT ?)
"""
_CLAIMED = f"""
SELECT {_COLUMNS} FROM token INDEXED BY token_claimed
WHERE generation > 0 AND generation = ? AND batch = ? ORDER BY job, n
"""
_IF_THERE = "SELECT * FROM (VALUES (?, ?, ?)) WHERE EXISTS (SELECT 1 FROM job WHERE id = column1)"
SENDERS_DIED = f"its sender died {FATAL} times"  # why a token has failed
RECENT = 1000  # jobs
LOOKED_AT = 100  # jobs of a lane among which the probe of a paused upstream is chosen
QUEUED = 2000  # retries that get their turns in one claim: if more are due, nobody waits for the lock so long


Holder = tuple[int, str]  # a generation, 0 for none, and an upstream: who has a token in hand
Span = tuple[int, int, int, int]  # job, number of the first token, attempt, how many tokens


class End(NamedTuple):
    """How a token ended that was not simply delivered: with a `canonical` token to take its place, or for one of
    outcome.FAILURES (`failure`) and in words (`reason`). `failed`: it is set aside and may be replayed.
    """

    failure: str = ""
    reason: str = ""
    canonical: str = ""
    failed: bool = False


class SetAside(NamedTuple):
    """A token set aside because its senders died. `untried`: it had been in flight for the first time."""

    upstream: str
    token: str
    untried: bool


class _JobRow(NamedTuple):
    upstream: str
    target: str
    message: str
    expires_at: float


def _slices(rows: Iterable[tuple[Any, ...]], jobs: Mapping[int, _JobRow]) -> list[Slice]:
    """Rows of the queries above, in the order of their jobs, as slices: the tokens of a job that are equally suspect go
    together, in runs.
    """
    slices: list[Slice] = []
    tokens: list[str] = []
    last: tuple[Any, ...] = ()
    for job, n, token, attempts, deaths, _rank in rows:
        if last != (job, n, attempts, deaths):
            tokens = [token]
            run = Run(job, n, attempts + 1, tokens)
            if last[:1] == (job,) and slices[-1].deaths == deaths:
                slices[-1].runs.append(run)
            else:
                slices.append(Slice(jobs[job].upstream, jobs[job].target, jobs[job].message, [run], deaths))
        else:
            tokens.append(token)
        last = job, n + 1, attempts, deaths
    return slices


class Spool:
    """The tokens that are to be sent, for State. Counts what it holds in memory, so that nothing is counted by SQL."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.large_credit: defaultdict[str, float] = defaultdict(float)  # what the large jobs may take: module turns
        self.probes: Counter[str] = Counter()  # how often a probe of a paused upstream was chosen,
        self.looked_at: dict[tuple[str, int], tuple[float, int]] = {}  # and the last row looked at of its lanes
        # Counted once, from the rows, and then kept with them: counting a million rows takes 50 ms. Who rolls a
        # transaction back puts back the copy of before.
        [[jobs, finished]] = db.execute(
            "SELECT count(*) FILTER (WHERE finished = 0), coalesce(sum(size) FILTER (WHERE finished > 0), 0) FROM job"
        )
        [[rows]], [[failed]] = (
            db.execute(f"SELECT count(*) FROM token {which}").fetchall()
            for which in ("", f"INDEXED BY token_dead WHERE generation = {FAILED}")
        )
        self.open: Counter[str] = Counter()  # tokens of each upstream that are ready or claimed
        for which in (
            "INDEXED BY token_fresh WHERE generation = 0 AND waits = 0",
            "INDEXED BY token_waiting WHERE generation = 0 AND waits = 1",
            "INDEXED BY token_claimed WHERE generation > 0",
        ):
            self.open.update(dict(db.execute(f"SELECT upstream, count(*) FROM token {which} GROUP BY upstream")))
        tokens = self.open.total()
        # Open jobs and their open tokens; failed tokens; those that are over; with how many the finished jobs came.
        self.tally = {
            "jobs": jobs,
            "tokens": tokens,
            "failed": failed,
            "over": rows - tokens - failed,
            "finished": finished,
        }
        held = db.execute(
            "SELECT generation, upstream, count(*) FROM token WHERE generation > 0 GROUP BY generation, upstream"
        )
        self.in_hand: defaultdict[Holder, int] = defaultdict(
            int, {(generation, upstream): count for generation, upstream, count in held}
        )
        # What never changes of the jobs that came last: mostly they are claimed at once, and need not be read.
        self.recent: dict[int, _JobRow] = {}
        self.newest = self.last_job()  # of all that came, whether they were kept or not
        self.first_open = 0  # no job before this one is open

    def knows(self, job: int) -> bool:
        """Whether a job was accepted and is not forgotten yet."""
        return self.db.execute("SELECT 1 FROM job WHERE id = ?", (job,)).fetchone() is not None

    def is_open(self, job: int) -> bool:
        """Whether a job has tokens left to send."""
        return self.db.execute("SELECT 1 FROM job WHERE id = ? AND finished = 0", (job,)).fetchone() is not None

    def accept(self, jobs: Iterable[Job]) -> list[Job]:
        """Keep jobs and their tokens, ready at once. Returns the jobs that were not known before; a known id changes
        nothing.
        """
        new = [job for job in jobs if job.id > self.newest or not self.knows(job.id)]
        self.newest = max([self.newest, *(job.id for job in new)])
        self.first_open = min([self.first_open, *(job.id for job in new)])  # ids do not come in their order
        self.recent.update((job.id, _JobRow(job.upstream, job.target, job.message, job.expires_at)) for job in new)
        while len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        self.db.executemany(
            "INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0)",
            [
                (*job[:3], job.message, job.accepted_at, job.accepted_at, job.expires_at, *[len(job.tokens)] * 2)
                for job in new
            ],
        )
        self.db.executemany(
            "INSERT INTO token (job, n, token, rank, due_at, upstream) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (job.id, n, token, turn, job.accepted_at, job.upstream)
                for job in new
                for turn in [rank(lane(len(job.tokens)), job.id)]
                for n, token in (zip(job.places, job.tokens) if job.skipped else enumerate(job.tokens))
            ],
        )
        skipped = [(job.id, *each) for job in new for each in job.skipped]
        if skipped:
            self.db.executemany("INSERT INTO skipped VALUES (?, ?, ?)", skipped)
        self.tally["jobs"] += len(new)
        self.tally["tokens"] += sum([len(job.tokens) for job in new])
        for job in new:
            self.open[job.upstream] += len(job.tokens)
        return new

    def claim(
        self,
        holder: Holder,
        batch: int,
        limit: int,
        now: float,
        last_trouble: Callable[[int], float] | None = None,
        held: Callable[[str], float] | None = None,
    ) -> tuple[list[Slice], list[str]]:
        """Give up to `limit` due tokens to a generation, as part of its numbered batch: slices of their jobs. With
        `last_trouble`, which tells when a job last had trouble (0: never), give one token only, of the job this
        favours.

        `held` tells until when a token must wait (0: it need not); such tokens become deferred. Tokens of a job that
        has expired are set aside as failed; they are the second list.
        """
        generation, upstream = holder
        self._queue_due(upstream, now)
        found = self._next(upstream, limit) if last_trouble is None else self._other(upstream, last_trouble)
        jobs = self._jobs(found)
        expired = [row for row in found if jobs[row[0]].expires_at <= now]
        rows = [row for row in found if jobs[row[0]].expires_at > now] if expired else found
        waits = [(until, *row[:2]) for row in rows if (until := held(row[2]))] if held else []
        if waits:
            self.db.executemany("UPDATE token SET waits = 1, due_at = ? WHERE job = ? AND n = ?", waits)
            gone = {place[1:] for place in waits}
            rows = [row for row in rows if row[:2] not in gone]
        slices = _slices(sorted(rows), jobs)  # those of a job together, in their order
        self._for_spans(
            "UPDATE token SET generation = ?, batch = ? WHERE job = ? AND {}",
            [
                (generation, batch, run.job, run.first, run.first + len(run.tokens) - 1)
                for claimed in slices
                for run in claimed.runs
            ],
        )
        self.in_hand[holder] += len(rows)
        for job, n, _token, attempts, *_ in expired:
            self.end((0, upstream), job, n, attempts, End("expired", "too old", failed=True), now)
        return slices, [row[2] for row in expired]

    def _for_spans(self, statement: str, spans: Sequence[tuple[Any, ...]]) -> int:
        """Execute a statement once for each span. The statement has `{}` where a condition on n goes; a span holds the
        values of the statement, then the first and the last n. Returns how many rows changed.
        """
        # Of a range SQLite first notes the rows in a table: dear, when it is one row.
        single = [span[:-1] for span in spans if span[-2] == span[-1]]
        several = [span for span in spans if span[-2] < span[-1]]
        changed = self.db.executemany(statement.format("n = ?"), single).rowcount
        return changed + self.db.executemany(statement.format("n BETWEEN ? AND ?"), several).rowcount

    def _jobs(self, rows: Iterable[tuple[Any, ...]]) -> dict[int, _JobRow]:
        wanted = {row[0] for row in rows}
        found = {job: self.recent[job] for job in wanted if job in self.recent}
        if missing := wanted.difference(found):
            rest = self.db.execute(_JOBS, (json.dumps(list(missing)),))
            found |= {job: _JobRow(*columns) for job, *columns in rest}
        return found

    def _queue_due(self, upstream: str, now: float) -> None:
        """Give retries that are due their turns, as if they had just arrived."""
        due = self.db.execute(_DUE, (upstream, now, QUEUED)).fetchall()
        if due:
            self.db.executemany(
                "UPDATE token SET waits = 0, rank = ? WHERE job = ? AND n = ?",
                [(rank(lane_of(before), due_at * 1e6), job, n) for job, n, before, due_at in due],
            )

    def _next(self, upstream: str, limit: int) -> list[tuple[Any, ...]]:
        """The rows of up to `limit` tokens whose turn it is."""
        lanes = [self._in_lane(upstream, which, limit) for which in range(LANES)]
        credit = save(self.large_credit[upstream], limit)
        chosen, self.large_credit[upstream] = pick(lanes, limit, credit)
        return chosen

    def _in_lane(self, upstream: str, which: int, limit: int) -> list[tuple[Any, ...]]:
        low, high = bounds(which)
        return self.db.execute(_FRESH, (upstream, low, high, limit)).fetchall()

    def _other(self, upstream: str, last_trouble: Callable[[int], float]) -> list[tuple[Any, ...]]:
        """The row of a ready token of a job that has had no trouble, or had it the longest ago. Mostly one of the jobs
        that came last, because those were not tried yet. But every third time one of the others: however many jobs
        cannot be sent, one that can is not missed.
        """
        self.probes[upstream] += 1
        look = self._newest if self.probes[upstream] % 3 else self._others
        best: tuple[float, tuple[Any, ...]] = math.inf, ()
        for which in range(LANES):
            for row in islice(look(upstream, which), LOOKED_AT):
                best = min(best, (last_trouble(row[0]), row), key=itemgetter(0))
                if not best[0]:
                    return self._first_of(row)
        return self._first_of(best[1]) if best[1] else []

    def _newest(self, upstream: str, which: int) -> Iterator[tuple[Any, ...]]:
        """One ready row of each job in a lane, the latest jobs first."""
        low, high = bounds(which)
        below: tuple[float, int] = high, 0
        while row := self.db.execute(_NEWEST, (upstream, low, *below)).fetchone():
            yield row
            below = row[-1], row[0]  # past the whole job: its tokens have one rank, but for its retries

    def _others(self, upstream: str, which: int) -> Iterator[tuple[Any, ...]]:
        """The same, the earliest jobs first, from where the last call stopped, round and round."""
        low, high = bounds(which)
        place, first = (upstream, which), (low, 0)
        for above in (self.looked_at.get(place, first), first):
            while row := self.db.execute(_FURTHER, (upstream, high, *above)).fetchone():
                self.looked_at[place] = above = row[-1], row[0]
                yield row

    def _first_of(self, row: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The row of the ready token of the same job that has waited longest, so that it is not always the same one."""
        return self.db.execute(_FIRST, (row[0],)).fetchall()

    def claimed(self, generation: int, batch: int) -> list[Slice]:
        """What is left of a batch in a generation's hands."""
        rows = self.db.execute(_CLAIMED, (generation, batch)).fetchall()
        return _slices(rows, self._jobs(rows))

    def last_batch(self, generation: int) -> int:
        """The highest batch with tokens in a generation's hands; 0: there is none."""
        [[batch]] = self.db.execute(
            "SELECT coalesce(max(batch), 0) FROM token INDEXED BY token_claimed"
            " WHERE generation > 0 AND generation = ?",
            (generation,),
        )
        return int(batch)

    def held(self, generation: int, job: int, n: int, attempt: int, span: int) -> list[Held]:
        """Those of `span` tokens of a job, from place `n` on, that this generation has in hand for this attempt. The
        others were settled before.
        """
        found = self.db.execute(
            "SELECT token.n, token.token, token.charged, job.since, job.expires_at"
            " FROM token JOIN job ON job.id = token.job"
            " WHERE token.job = ? AND token.n BETWEEN ? AND ? AND token.generation = ? AND token.attempts = ?",
            (job, n, n + span - 1, generation, attempt - 1),
        )
        return [Held(*row) for row in found]

    def deliver(self, holder: Holder, spans: Sequence[Span], now: float) -> int:
        """End tokens that were delivered: in each span those that this generation has in hand for this attempt. Returns
        how many. The attempt matters: a settle that is repeated late may find a token claimed again.
        """
        ended = self._for_spans(
            f"UPDATE token SET generation = {OVER}, attempts = ?, reason = '', due_at = ?"
            " WHERE generation = ? AND attempts = ? AND job = ? AND {}",
            [(attempt, now, holder[0], attempt - 1, job, n, n + span - 1) for job, n, attempt, span in spans],
        )
        counts: Counter[int] = Counter()
        for job, _, _, span in spans:
            counts[job] += span
        if ended < sum(counts.values()):  # some were settled before: rare, and dear
            counts = Counter({job: self._uncounted(job) for job in counts})
        self.in_hand[holder] -= ended
        self._close(holder[1], counts, OVER, now)
        return ended

    def keep_receipts(self, receipts: Iterable[tuple[int, int, Sequence[str]]], doubtful: bool) -> None:
        """Remember the upstream's ids of delivered tokens: job, number of the first token, ids. `doubtful`: some may be
        of jobs that are forgotten, and then their ids would never be.
        """
        self.db.executemany(
            f"INSERT OR REPLACE INTO receipt {_IF_THERE if doubtful else 'VALUES (?, ?, ?)'}",
            [(job, n, " ".join(ids)) for job, n, ids in receipts],
        )

    def _uncounted(self, job: int) -> int:
        """How many tokens of a job have ended since they were last counted."""
        found = self.db.execute(
            "SELECT open - (SELECT count(*) FROM token WHERE job = id AND generation >= 0) FROM job WHERE id = ?",
            (job,),
        ).fetchone()
        return found[0] if found else 0

    def _close(self, upstream: str, ended: Mapping[int, int], generation: int, now: float) -> None:
        """Count tokens of an upstream that have just ended, by job, as OVER or FAILED. Jobs with no token left to send
        are finished.
        """
        jobs = [(count, job) for job, count in ended.items() if count]
        count = size = sum(ended.values())
        # Mostly all tokens of a job end together: in one statement for all jobs, which does not say for which it held.
        finished = self.db.executemany(
            "UPDATE job SET open = 0, finished = ? WHERE open = ? AND size = open AND id = ?",
            [(now, *each) for each in jobs],
        ).rowcount
        for part, job in jobs if finished < len(jobs) else ():
            row = self.db.execute(
                "UPDATE job SET open = open - :part, finished = iif(open = :part, :now, 0)"
                " WHERE id = :job AND open > 0 RETURNING finished, size",
                {"part": part, "now": now, "job": job},
            ).fetchone()
            if row:
                finished += row[0] > 0
                size += (row[1] if row[0] else 0) - part
        self.tally["jobs"] -= finished
        self.tally["tokens"] -= count
        self.open[upstream] -= count
        self.tally["over" if generation == OVER else "failed"] += count
        self.tally["finished"] += size

    def retry(self, holder: Holder, job: int, n: int, attempts: int, charged: int, due_at: float, reason: str) -> None:
        """Make a token in this generation's hands ready again at `due_at`, with `attempts` behind it of which `charged`
        count against it, and why.
        """
        self.db.execute(
            "UPDATE token SET generation = 0, waits = 1, deaths = 0, attempts = ?, charged = ?, reason = ?, due_at = ?"
            " WHERE job = ? AND n = ?",
            (attempts, charged, reason, due_at, job, n),
        )
        self.in_hand[holder] -= 1

    def give_back(self, holder: Holder, job: int, n: int, attempts: int) -> None:
        """Make a token in this generation's hands ready again at once, with `attempts` behind it, and in its old turn:
        before everything that came after it.
        """
        self.db.execute(
            "UPDATE token SET generation = 0, waits = 0, deaths = 0, attempts = ?, reason = '' WHERE job = ? AND n = ?",
            (attempts, job, n),
        )
        self.in_hand[holder] -= 1

    def end(self, holder: Holder, job: int, n: int, attempts: int, how: End, now: float) -> None:
        """End a token in a generation's hands (generation 0: a ready one), after this many attempts."""
        generation = FAILED if how.failed else OVER
        self.db.execute(
            "UPDATE token SET generation = ?, attempts = ?, failure = ?, reason = ?, canonical = ?, due_at = ?"
            " WHERE job = ? AND n = ?",
            (generation, attempts, how.failure, how.reason, how.canonical, now, job, n),
        )
        self.in_hand[holder] -= 1
        self._close(holder[1], {job: 1}, generation, now)

    def record_crash(
        self, generation: int, flights: Iterable[InFlight], spare: bool, now: float
    ) -> tuple[list[SetAside], int]:
        """Count a death for each token that a sender of this generation had in flight when it died. Tokens for which
        that is one death too many are set aside; with `spare` they are left as they are. When a second token of a job
        is set aside so, the message is at fault, and the whole job is. Returns the tokens set aside, and how many were
        spared.
        """
        suspects: dict[tuple[int, int], tuple[str, int, int]] = {}  # each once, however it was noted: it is one death
        for job, low, high in flights:
            rows = self.db.execute(
                "SELECT job, n, token, attempts, deaths FROM token WHERE job = ? AND n BETWEEN ? AND ?"
                " AND generation = ?",
                (job, low, high, generation),
            )
            suspects.update(((job, n), rest) for job, n, *rest in rows)
        doomed = [
            (*place, token, tries, True) for place, (token, tries, deaths) in suspects.items() if deaths + 1 >= FATAL
        ]
        self.db.executemany(
            "UPDATE token SET deaths = deaths + 1 WHERE job = ? AND n = ?",
            [place for place, (_, _, deaths) in suspects.items() if deaths + 1 < FATAL],
        )
        if spare:
            return [], len(doomed)
        for job in {row[0] for row in doomed}:
            if self.db.execute(
                f"SELECT 1 FROM token WHERE generation = {FAILED} AND job = ? AND reason = ?", (job, SENDERS_DIED)
            ).fetchone():
                known = {row[1] for row in doomed if row[0] == job}
                others = self.db.execute(
                    "SELECT n, token, attempts FROM token WHERE job = ? AND generation IN (0, ?)", (job, generation)
                ).fetchall()
                doomed += [(job, n, token, tries, False) for n, token, tries in others if n not in known]
        set_aside = []
        for job, n, token, tries, in_flight in doomed:
            holder = self.db.execute(
                "SELECT generation, upstream FROM token WHERE job = ? AND n = ?", (job, n)
            ).fetchone()
            self.end(holder, job, n, tries, End("killed_senders", SENDERS_DIED, failed=True), now)
            set_aside.append(SetAside(holder[1], token, in_flight and tries == 0))
        return set_aside, 0

    def find_sound(self, jobs: Iterable[int]) -> None:
        """Remember that the upstream has said something of a token of these jobs: their messages are good."""
        self.db.executemany(
            "UPDATE job SET sound = 1 WHERE id = ? AND sound = 0 AND finished = 0", [(job,) for job in jobs]
        )

    def release(self, generation: int | None) -> int:
        """Make ready what a generation still has in hand (None: every generation). Returns how many tokens."""
        which = "generation > 0" + ("" if generation is None else f" AND generation = {int(generation)}")
        released = self.db.execute(f"UPDATE token SET generation = 0 WHERE {which}").rowcount  # they keep their turns
        if generation is None:
            self.in_hand.clear()
        else:
            for holder in [holder for holder in self.in_hand if holder[0] == generation]:
                del self.in_hand[holder]
        return released

    def set_back(self, upstream: str, by: float, now: float, latest: float) -> None:
        """Bring due times forward after the clock was set back by `by` seconds, or more: to `now` for tokens in hand,
        by as much for deferred ones, and to `now` for those that would still be after `latest`.
        """
        for index, which, due_at in (
            ("token_waiting", "generation = 0 AND waits = 1 AND :by > 0", "due_at - :by"),
            ("token_waiting", "generation = 0 AND waits = 1 AND due_at > :latest", ":now"),
            ("token_claimed", "generation > 0 AND due_at > :now", ":now"),
        ):
            self.db.execute(
                f"UPDATE token INDEXED BY {index} SET due_at = {due_at} WHERE {which} AND upstream = :upstream",
                {"upstream": upstream, "by": by, "now": now, "latest": latest},
            )

    def next_due(self, upstream: str) -> float | None:
        """When the upstream's next ready token is due; None: there is none."""
        return min(
            (due for (due,) in self.db.execute(_NEXT_DUE, (upstream, upstream)) if due is not None), default=None
        )

    def deferred(self, upstreams: Iterable[str], most: int) -> Deferred:
        """The upstreams' tokens that wait to be tried again. Of each no more than `most` are counted."""
        found = [self.db.execute(_DEFERRED, (upstream, most)).fetchone() for upstream in upstreams]
        return Deferred(
            sum(count for count, _ in found), min((due for _, due in found if due is not None), default=None)
        )

    def reject_ready(self, job: int, reason: str, now: float) -> int:
        """End the tokens of a job that nobody has in hand, because its message is bad, unless it was found sound
        before. Returns how many.
        """
        gone = self.db.execute(
            f"UPDATE token SET generation = {OVER}, failure = 'bad_message', reason = ?, due_at = ?"
            " WHERE job = ? AND generation = 0 AND (SELECT sound FROM job WHERE id = ?) = 0",
            (reason, now, job, job),
        ).rowcount
        if gone:
            [[upstream]] = self.db.execute("SELECT upstream FROM job WHERE id = ?", (job,))
            self._close(upstream, {job: gone}, OVER, now)
        return gone

    def oldest(self) -> float | None:
        """When the oldest job with tokens left was accepted or replayed; None: there is none."""
        if not self.tally["jobs"]:
            self.first_open = self.newest
            return None
        # Asked often enough, this passes over each job once: an index of the open ones costs more.
        row = self.db.execute(
            "SELECT id, since FROM job WHERE id >= ? AND finished = 0 ORDER BY id LIMIT 1", (self.first_open,)
        ).fetchone()
        self.first_open, since = row
        return float(since)

    def is_sound(self, job: int) -> bool:
        """Whether the upstream has said something of a token of this job: its message is good."""
        return self.db.execute("SELECT 1 FROM job WHERE id = ? AND sound = 1", (job,)).fetchone() is not None

    def in_hands_of_all(self, upstream: str) -> int:
        """How many tokens of an upstream all generations together have in hand."""
        return sum(count for holder, count in self.in_hand.items() if holder[0] > 0 and holder[1] == upstream)

    def claimed_tokens(self) -> int:
        """How many tokens all generations together have in hand."""
        return sum(count for (generation, _), count in self.in_hand.items() if generation > 0)

    def last_accepted(self) -> float:
        """When the last job was accepted, by the clock of that time; 0: there is none."""
        row = self.db.execute("SELECT accepted_at FROM job ORDER BY id DESC LIMIT 1").fetchone()
        return row[0] if row else 0.0

    def accepted_by(self, now: float) -> None:
        """Let no job seem accepted later than now."""
        self.db.execute(
            "UPDATE job SET accepted_at = min(accepted_at, :now), since = min(since, :now)"
            " WHERE accepted_at > :now OR since > :now",
            {"now": now},
        )

    def last_job(self) -> int:
        """The highest job id that is or was there, as far as known; 0: none."""
        [[newest]] = self.db.execute("SELECT max((SELECT coalesce(max(id), 0) FROM job), job) FROM forgotten")
        return int(newest)
