"""State: spool and run report in one transaction, and the Manager that serves it.

The state process owns the only SQLite connection. Its verbs are whole steps in a message's life, each one transaction,
so "accepted", "settled", the counters and the lists cannot disagree. Promises:

* When `accept` returns, the jobs are on disk: WAL with synchronous=FULL, so the commit is fsynced before it returns.
* Every verb may be repeated: a caller whose answer was lost, because this process died, calls again. (A repeated replay
  or discard does nothing twice, either; but it cannot tell again how many there were.)
"""

import contextlib
import math
import multiprocessing.connection
import multiprocessing.managers
import os
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message.job import Job, Slice, disk_size
from gocm_lib.message.outcome import (
    BLAMES_UPSTREAM,
    FIRST_ANSWERS,
    INVALID,
    KEPT_FAILURES,
    TROUBLE,
    Outcome,
    Result,
    Verdict,
)
from gocm_lib.message.retry import LONGEST_RETRY_AFTER, Action, Held, Policy, Ruling, next_step, spread
from gocm_lib.message.suspect import FATAL, InFlight, unrest
from gocm_lib.process import child, log
from gocm_lib.state.admission import DISK_WAIT, Drain, Limits, Usage, drain_rate, drained, refuse
from gocm_lib.state.contract import (
    LISTS,
    MANY_DEFERRED,
    VERBS,
    Broken,
    Claimed,
    Count,
    Entry,
    Failed,
    Full,
    Known,
    NotKept,
    Passing,
    Past,
    Place,
    Refused,
    Shared,
    Snapshot,
    Status,
    Which,
)
from gocm_lib.state.pace import Pace, start_pace
from gocm_lib.state.pacing import Pacing
from gocm_lib.state.sqlite import keys
from gocm_lib.state.sqlite.database import (
    Database,
    DiskSpace,
    checkpoint,
    cut_log,
    open_spool,
    shrink,
    told,
    usage,
)
from gocm_lib.state.sqlite.history import FORGOTTEN, History
from gocm_lib.state.sqlite.keys import Keys
from gocm_lib.state.sqlite.report import RunReport
from gocm_lib.state.sqlite.spool import End, Span, Spool
from gocm_lib.state.waves import Bucket, Tally, Watch, minute

UNPACED = 1e6  # messages a second: no limit but what an upstream's own 429 and 503 make of it

HOUSEKEEPING, SOON = 1.0, 0.05  # seconds between two looks at what has grown too old; while there is much of it
REFUSALS_NOTED = 60.0  # seconds: how often the log is told that messages are refused
AT_ONCE = 2000  # failed tokens that are replayed or discarded in a transaction
_RULED = TROUBLE | {Verdict.PUT_OFF, Verdict.HELD, Verdict.RETURNED}  # verdicts that do not say what becomes of a token
# Of those, after which a token is as good as not sent, unless it is charged.
_UNTRIED = BLAMES_UPSTREAM | {Verdict.RETURNED}
LOOK_EVERY = 1.0  # seconds between two looks whether our socket is there
CLOCK_STEP = 1.0  # seconds by which the clock must go back before we take it for set back


# ---------------------------------------------------------------------------------------------------------- the verbs


class Keeping(NamedTuple):
    """How much is kept, and for how long: the limits of what is pending; seconds and number of failed tokens; entries
    in each list of the report; seconds and number of tokens of what is over; number of Idempotency-Keys.
    """

    limits: Limits
    failed_age: float
    max_failed: int
    max_report: int
    keep_jobs: float
    max_kept: int
    max_keys: int
    hold_waves: bool = False


class State(Shared):
    """The shared state. One lock is held for one transaction at a time; only a waiting `claim` waits without it."""

    def __init__(
        self,
        db: Database,
        disk: DiskSpace,
        policy: Policy,
        keeping: Keeping,
        paces: Mapping[str, Pace],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.db = db
        self.disk = disk
        self.policy = policy
        self.keeping = keeping
        self.draw = draw
        self.pacing = Pacing(paces, policy)
        self.spool = Spool(db)
        self.history = History(self.spool)
        self.report = RunReport(db, keeping.max_report)
        self.keys = Keys(db)
        self.waves = {upstream: Watch(self.report.answers(upstream)) for upstream in paces}
        self.drain = Drain(0.0, 0.0)
        self.refused_at = -REFUSALS_NOTED  # when the log was last told of refusals
        self.latest = 0.0  # the latest time that anybody told us
        self.tidied = 0.0  # when we last kept house
        self.deaths: deque[float] = deque(maxlen=FATAL)  # when senders died, but for those that a lone suspect ended
        self.crashes: defaultdict[int, dict[str, int]] = defaultdict(dict)  # by generation and sender: tokens set aside
        self.generation = 0  # the newest; older ones claim nothing more
        self.batches: dict[int, int] = {}  # the last batch each generation was given
        # Jobs whose first answers found the message bad: why, and how often.
        self.rejected_messages: dict[int, tuple[str, int]] = {}
        self.changed = threading.Condition(threading.Lock())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        spool, report, keys = self.spool, self.report, self.keys
        before = spool.tally.copy(), spool.in_hand.copy(), report.lengths.copy(), self.rejected_messages.copy()
        open_tokens, count = spool.open.copy(), keys.count
        try:
            with told():
                self.db.execute("BEGIN IMMEDIATE")
                yield
                self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            spool.tally, spool.in_hand, report.lengths, self.rejected_messages = before
            spool.open, keys.count = open_tokens, count
            raise

    def accept(self, jobs: Sequence[Job]) -> dict[int, NotKept]:
        """Keep jobs: when this returns they are on disk, all but those it returns, by their ids."""
        with self.changed:
            try:
                with self._transaction():
                    answers = self._accept(jobs)
            except Full:
                checkpoint(self.db)  # it may be the log that fills it
                answers = dict.fromkeys((job.id for job in jobs), Refused(507, "the disk is full", DISK_WAIT))
            if refused := [answer for answer in answers.values() if isinstance(answer, Refused)]:
                self._note_refusal(refused[0], jobs[0].accepted_at)
            self.changed.notify_all()
        return answers

    def _accept(self, jobs: Sequence[Job]) -> dict[int, NotKept]:
        """Keep the jobs whose requests are new and for which there is room. Returns what became of the others."""
        claimed = {job.id: self.keys.claim(job) for job in jobs if job.key}
        known = {job: answer for job, answer in claimed.items() if answer is not None}
        new = [job for job in jobs if job.id not in known] if known else jobs
        refused = self._make_room(new) if new else {}
        for job in new if refused else ():
            if job.id in refused:
                self.keys.forget(job)
        if forgotten := self.keys.fit(keys.most(self.keeping.max_keys, self.keeping.limits.spool)):
            self.report.count({Count("keys_forgotten"): forgotten})
        answers: dict[int, NotKept] = dict(refused)
        for job_id, answer in known.items():
            if answer != Known(job_id):  # else it is kept, and told again
                # Of two alike in one commit the second is what the first is.
                answers[job_id] = refused.get(answer.job, answer) if isinstance(answer, Known) else answer
        return answers

    def _make_room(self, jobs: Sequence[Job]) -> dict[int, Refused]:
        """Keep the jobs for which there is room. Returns the others, by id."""
        rate = drain_rate(self.drain, max(job.accepted_at for job in jobs))
        used, free = self._bytes()
        size, tokens = sum(map(disk_size, jobs)), Counter[str]()
        for job in jobs:
            tokens[job.upstream] += len(job.tokens)
        together = [(count, self._usage(name, used + size, free - size)) for name, count in tokens.items()]
        if not any(refuse(count, usage, self.keeping.limits, rate) for count, usage in together):
            self._keep(jobs)
            return {}
        if self._may_make_room(jobs) and self.history.forget(math.inf, 0):
            return self._make_room(jobs)
        refused: dict[int, Refused] = {}
        for job in jobs:
            no = refuse(len(job.tokens), self._usage(job.upstream, used, free), self.keeping.limits, rate)
            if no is None or self.spool.knows(job.id):
                self._keep([job])
                used, free = used + disk_size(job), free - disk_size(job)
            else:
                refused[job.id] = no
        return refused

    def _may_make_room(self, jobs: Sequence[Job]) -> bool:
        """Whether forgetting what is over could make room for these jobs. Not when too many tokens are pending; nor
        while a reader of the spool keeps SQLite from truncating its WAL, which would only grow.
        """
        share = self.keeping.limits.share
        fits = any(self.spool.open[job.upstream] + len(job.tokens) <= share for job in jobs)
        return fits and not self.disk.wal_excess()

    def _bytes(self) -> tuple[int, int]:
        """How many bytes are used, and how many are free."""
        used, unused = usage(self.db)
        return used + self.disk.wal_excess(), self.disk.free() + unused

    def _usage(self, upstream: str, used: int, free: int) -> Usage:
        return Usage(self.spool.tally["tokens"], used, free, self.spool.open[upstream])

    def _refuses(self) -> Refused | None:
        """Why not even the smallest message for the upstream with the most room would be taken now; None: it would."""
        tokens = self.spool.tally["tokens"]
        several = self.keeping.limits.upstreams > 1
        least = min(self.spool.open[name] for name in self.pacing.standings) if several else tokens
        return refuse(1, Usage(tokens, *self._bytes(), least), self.keeping.limits, 0.0)

    def _keep(self, jobs: Sequence[Job]) -> None:
        messages: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for job in self.spool.accept(jobs):
            messages[job.upstream] += 1
            tokens[job.upstream] += len(job.tokens)
        for upstream in messages:
            accepted = {"accepted_messages": messages[upstream], "accepted_tokens": tokens[upstream]}
            self.report.count({Count(name, upstream): value for name, value in accepted.items()})

    def _note_refusal(self, refused: Refused, now: float) -> None:
        if not 0 <= now - self.refused_at < REFUSALS_NOTED:
            self.refused_at = now
            log.logger.warning("messages are refused: %s; see gocm help limits", refused.reason)

    def begin(self, generation: int) -> None:
        """From now on only this generation, or a newer one, claims; a claim of an older one that waits ends."""
        with self.changed:
            self.generation = max(self.generation, generation)
            self.changed.notify_all()

    def claim(
        self,
        generation: int,
        batch: int,
        in_hand_limits: Mapping[str, int],
        ready: Mapping[str, float],
        now: float,
        wait: float,
    ) -> Claimed:
        started = time.monotonic()
        with self.changed:
            if self._keep_house(now):
                wait = min(wait, SOON)
            known = self.pacing.news()
            while True:
                waited = time.monotonic() - started
                if generation < self.generation:
                    return Claimed([], {})
                if batch <= self._last_batch(generation):
                    return Claimed(self.spool.claimed(generation, batch), {})
                slices: list[Slice] = []
                idle = wait - waited
                for upstream, since in ready.items():
                    self.pacing.end_pause(upstream, since, now + waited)
                    found, rest = self._claim(generation, batch, in_hand_limits[upstream], upstream, now + waited)
                    slices += found
                    idle = min(idle, rest)
                if slices or waited >= wait or self.pacing.news() != known:
                    return Claimed(slices, self.pacing.news())
                self.changed.wait(max(0.001, idle))

    def _keep_house(self, now: float) -> bool:
        """Forget what is too old or too much, keep the disk reserve, notice a clock that was set back. Returns whether
        more is to be done soon.
        """
        if now < self.latest - CLOCK_STEP:
            self._set_back(self.latest - now, now)
            self.tidied = now - HOUSEKEEPING
        self.latest = now
        if now < self.tidied + HOUSEKEEPING:
            return False
        self._look_for_waves(now)
        self.tidied = now
        try:
            with told():
                more = self._tidy(now)
            if more:
                self.tidied = now + SOON - HOUSEKEEPING
            return more
        except (Full, Passing) as error:  # what cannot be tidied now can be later, and must not keep anybody waiting
            if isinstance(error, Full) and (self.spool.tally["over"] or not self.spool.tally["tokens"]):
                self.use_reserve()  # to forget and to shrink takes room before it makes some: for the reserve, again
            return False

    def _tidy(self, now: float) -> bool:
        if self.disk.wal_excess():
            cut_log(self.db)  # by itself it is cut with the next write, for which it may have left no room
        if not self.spool.tally["tokens"]:
            shrink(self.db)
        has_reserve = self.disk.keep_reserve(self.keeping.limits.free_disk)
        if self.keys.has_old(now):
            with self._transaction():
                self.keys.prune(now)
        more = False
        if failed := self.spool.tally["failed"]:
            with self._transaction():
                dropped = self.history.prune_failed(now - self.keeping.failed_age, self.keeping.max_failed)
            more = failed - self.spool.tally["failed"] >= FORGOTTEN
            if dropped:
                log.logger.info("%d failed tokens are forgotten: there are more than --max-failed", dropped)
        self.spool.oldest()  # so that nobody who asks need pass over many
        if not self.spool.tally["over"] or self.disk.wal_excess():
            return more
        refused = self._refuses()
        for_room = not has_reserve or (refused and refused.status == 507 and not self.disk.wal_excess())
        with self._transaction():
            before = math.inf if for_room else now - self.keeping.keep_jobs
            return self.history.forget(before, self.keeping.max_kept) or more

    def _last_batch(self, generation: int) -> int:
        if generation not in self.batches:
            self.batches[generation] = self.spool.last_batch(generation)
        return self.batches[generation]

    def _claim(self, generation: int, batch: int, room: int, upstream: str, now: float) -> tuple[list[Slice], float]:
        """One upstream's share of a claim, and in how many seconds there could be more merely because time passes."""
        free = room - self.spool.in_hand[generation, upstream]
        if free <= 0:
            return [], 60.0
        allowed, rest = self.pacing.allow(upstream, now)
        if not allowed:
            return [], rest
        due = self.spool.next_due(upstream)
        if due is None or due > now:
            return [], 60.0 if due is None else due - now
        with self._transaction():
            slices, expired = self.spool.claim(
                (generation, upstream),
                batch,
                min(free, allowed),
                now,
                self.pacing.probing(upstream),
                self._holding(upstream, now),
            )
            self.report.count({Count("failures", upstream, "expired"): len(expired)})
        taken = sum(part.size for part in slices)
        if taken:
            self.pacing.sent(upstream, taken, slices[0].job, now)
            self.batches[generation] = batch
        self._log_ends([("too old", token) for token in expired])
        return slices, 0.0

    def _holding(self, upstream: str, now: float) -> Callable[[str], float] | None:
        """A function that tells until when a token must wait because it, or its topic, has had too much. None: no
        target has.
        """
        if not self.pacing.holds(upstream, now):
            return None
        return lambda token: spread(self.pacing.held(upstream, token, now), now, self.draw())

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        """Record what became of tokens in a generation's hands; those it does not hold (any more) are passed over."""
        with self.changed:
            counts: Counter[Count] = Counter()
            ends: list[tuple[str, str]] = []
            delivered = [result for result in results if _is_plain(result.outcome)]
            others = [result for result in results if not _is_plain(result.outcome)]
            self._hear(delivered, others, now)
            tokens = self.spool.tally["tokens"]
            with self._transaction():
                first = self.report.newest("notregistered") + 1 if others else 0
                self._settle_delivered(generation, delivered, now, counts)
                settled = [r for r in others if self._settle(generation, r, now, counts, ends)]
                heard = _heard(counts, first, now)
                for upstream, each in heard.items():
                    self.report.keep_answers(upstream, each, each.number > self.waves[upstream].newest)
                self._try_messages(settled, {result.job for result in delivered}, now, counts)
                self.report.count(counts)
            self.drain = drained(self.drain, tokens - self.spool.tally["tokens"], now)
            for upstream, each in heard.items():
                self.waves[upstream].hear(each.tally, each.first, now)
            self._look_for_waves(now)
            self.changed.notify_all()
        if ends:
            self._log_ends(ends)

    def _hear(self, delivered: Sequence[Result], others: Sequence[Result], now: float) -> None:
        """Tell Pacing the answers to each upstream's messages."""
        answered = [r for r in others if r.outcome.verdict not in TROUBLE and r.outcome.verdict is not Verdict.RETURNED]
        troubles = [result for result in others if result.outcome.verdict in TROUBLE]
        sound = {r.job for r in (*delivered, *answered) if _finds_sound(r.outcome)} if troubles else set()
        proven = {job: job in sound or self.spool.is_sound(job) for job in {result.job for result in troubles}}
        for upstream in {result.upstream for result in (*delivered, *answered, *troubles)}:
            self.pacing.hear(
                upstream,
                [result for result in (*delivered, *answered) if result.upstream == upstream],
                [result for result in troubles if result.upstream == upstream],
                proven.__getitem__,
                self.spool.in_hands_of_all(upstream),
                now,
            )

    def _settle_delivered(self, generation: int, results: Iterable[Result], now: float, counts: Counter[Count]) -> None:
        """Settle tokens that were simply delivered. That is nearly all of them, so few statements are used."""
        alike: defaultdict[tuple[str, bool], list[Span]] = defaultdict(list)
        for upstream, job, n, attempt, _, span, _receipts in results:
            alike[upstream, attempt == 1].append((job, n, attempt, span))
        late = False  # a settle that comes again
        for (upstream, first), spans in alike.items():
            gone = self.spool.deliver((generation, upstream), spans, now)
            counts[Count("delivered", upstream)] += gone
            counts[Count("attempts", upstream)] += gone if first else 0
            late = late or gone < sum([span[3] for span in spans])
        self.spool.keep_receipts([(each.job, each.n, each.receipts) for each in results if each.receipts], late)

    def _settle(
        self, generation: int, result: Result, now: float, counts: Counter[Count], ends: list[tuple[str, str]]
    ) -> bool:
        """Settle a result's tokens. Returns whether any of them was in the generation's hands."""
        found = self.spool.held(generation, result.job, result.n, result.attempt, result.span)
        for held in found:
            self._settle_token(generation, result, held, now, counts, ends)
        return bool(found)

    def _settle_token(
        self,
        generation: int,
        result: Result,
        held: Held,
        now: float,
        counts: Counter[Count],
        ends: list[tuple[str, str]],
    ) -> None:
        """Settle one token in the generation's hands that was not simply delivered."""
        outcome, job, n, holder = result.outcome, result.job, held.n, (generation, result.upstream)
        ruling = Ruling(held.charged)
        if outcome.verdict in _RULED:
            ruling = self.pacing.rule(result, held, now)
        step = next_step(outcome, ruling, held.expires_at, now, self.draw(), self.policy)
        if step.action is Action.RETURN:
            self.spool.give_back(holder, job, n, result.attempt - 1)
            return
        tried = ruling.charged > held.charged or outcome.verdict not in _UNTRIED
        attempts = result.attempt if tried else result.attempt - 1
        counts[Count("attempts", result.upstream)] += tried and result.attempt == 1
        if step.action is Action.RETRY:
            if outcome.verdict is not Verdict.RETURNED:
                counts[Count("retries", result.upstream, step.counted)] += 1
            self.spool.retry(holder, job, n, attempts, ruling.charged, step.due_at, step.counted)
            return
        if outcome.verdict is Verdict.DELIVERED:
            self.spool.end(holder, job, n, result.attempt, End(canonical=outcome.canonical), now)
            counts[Count("delivered", result.upstream)] += 1
            counts[Count("canonicals", result.upstream)] += 1
            self.report.add_canonical(held.token, outcome.canonical)
            self.spool.keep_receipts([(job, n, [receipt]) for receipt in result.receipts[n - result.n :][:1]], False)
            return
        how = End(step.counted, step.reason, failed=step.action is Action.SET_ASIDE)
        self.spool.end(holder, job, n, attempts, how, now)
        counts[Count("failures", result.upstream, step.counted)] += 1
        ends.append((step.reason, held.token))
        if outcome.verdict is Verdict.UNREGISTERED:
            counts[Count("notregistered", result.upstream)] += 1
            wave = bool(self.waves[result.upstream].since)
            self.report.add_notregistered(held.token, result.upstream, wave, wave and self.keeping.hold_waves)
        elif step.counted in INVALID:
            self.report.add_invalid(held.token, step.counted)

    def _look_for_waves(self, now: float) -> None:
        """Notice where a wave of unregistered tokens begins or ends. What made it one is a part of it."""
        for upstream, watch in self.waves.items():
            if not watch.look(now):
                continue
            if not watch.since:
                log.logger.warning("upstream %s: the wave of unregistered tokens is over", upstream)
                continue
            answers, unregistered = watch.recent(now)
            with self._transaction():
                self.report.mark(upstream, watch.first(now), self.keeping.hold_waves)
            log.logger.error(
                "upstream %s: %d of the last %d answers say that a token is unregistered, far more than usual: look at "
                "the credentials, the project and the app's APNs environment before anybody deletes tokens; %s; "
                "see gocm help reports",
                upstream,
                unregistered,
                answers,
                "they are held back" if self.keeping.hold_waves else "--hold-waves would hold them back",
            )

    def _try_messages(self, results: Sequence[Result], delivered: set[int], now: float, counts: Counter[Count]) -> None:
        """Stop the jobs whose first answers all rejected the message itself.

        Any other answer shows that the message is sound, and then nothing more can stop its job. Before it is decided
        here, the pool of each sender already holds back the job's other requests (Pool._judge_message).
        """
        sound = delivered | {result.job for result in results if _finds_sound(result.outcome)}
        for result in results:
            if result.outcome.rejects_message:
                reason, count = self.rejected_messages.get(result.job, (result.outcome.reason, 0))
                count = count * (reason == result.outcome.reason) + result.span
                self.rejected_messages[result.job] = result.outcome.reason, count
        told = {result.job: result.upstream for result in results}
        jobs = delivered | told.keys()
        for job in jobs & self.rejected_messages.keys():
            if job in sound:
                del self.rejected_messages[job]
            elif self.rejected_messages[job][1] >= FIRST_ANSWERS:
                stopped = self.spool.reject_ready(job, self.rejected_messages[job][0], now)
                counts[Count("failures", told[job], "bad_message")] += stopped
        self.spool.find_sound(sound)
        for job in jobs & self.rejected_messages.keys():
            if not self.spool.is_open(job):
                del self.rejected_messages[job]

    @staticmethod
    def _log_ends(ends: list[tuple[str, str]]) -> None:
        for reason, count in Counter(reason for reason, _ in ends).items():
            example = next(token for why, token in ends if why == reason)
            log.logger.info("not delivered: %s: %d tokens, one is %s", reason, count, log.token(example))

    def record_crash(self, generation: int, sender: str, flights: Sequence[InFlight], now: float) -> int:
        """Hold the death of a sender of this generation against what it had in flight (module suspect); how many
        tokens were set aside for it. A sender dies once, however often this is told.
        """
        with self.changed:
            known = self.crashes[generation]
            if sender in known:
                return known[sender]
            alone = len({in_flight.job for in_flight in flights}) == 1
            with self._transaction():
                spare = not alone or unrest(self.deaths, now)
                set_aside, spared = self.spool.record_crash(generation, flights, spare, now)
                self.report.count(Counter(Count("failures", each.upstream, "killed_senders") for each in set_aside))
                self.report.count(Counter(Count("attempts", each.upstream) for each in set_aside if each.untried))
            if not (alone and (set_aside or spared)):
                self.deaths.append(now)
            known[sender] = len(set_aside)
        self._log_ends([("its senders died", each.token) for each in set_aside])
        return len(set_aside)

    def release(self, generation: int | None) -> int:
        """Make ready again what a generation that has ended (None: every one) still has in hand; how many."""
        with self.changed:
            if generation is not None:
                # A claim of that generation that comes now was given up long ago by who asked for it.
                self.generation = max(self.generation, generation + 1)
                self.crashes.pop(generation, None)
            with self._transaction():
                released = self.spool.release(generation)
            self.changed.notify_all()
            return released

    def checkpoint(self) -> None:
        """Write SQLite's WAL into the spool and start it afresh, unless somebody reads in it."""
        with self.changed:
            checkpoint(self.db)

    def use_reserve(self) -> None:
        """Give up the disk reserve, if there is one, so that work can go on."""
        if self.disk.use_reserve():
            log.logger.warning("the disk is full: going on in the spool's reserve")

    def snapshot(self) -> Snapshot:
        """What there is to report."""
        with self.changed:
            tally, pauses = self.spool.tally, self.pacing.pauses
            refused = self._refuses()
            return Snapshot(
                counts=self.report.counts(),
                pending=tally["jobs"],
                tokens=tally["tokens"],
                claimed=self.spool.claimed_tokens(),
                deferred=self.spool.deferred(self.pacing.standings, MANY_DEFERRED),
                failed=tally["failed"],
                listed={which: self.report.lengths[which] for which in LISTS},
                latest_replaced=list(self.report.latest_replaced),
                latest_unregistered=list(self.report.latest_unregistered),
                oldest=self.spool.oldest(),
                keys=self.keys.count,
                over=tally["over"],
                bytes=usage(self.db)[0],
                paused_until={upstream: paused.until for upstream, paused in pauses.items()},
                pause_reasons={upstream: paused.reason for upstream, paused in pauses.items()},
                refusing=refused.reason if refused else "",
                waves={upstream: watch.since for upstream, watch in self.waves.items() if watch.since},
                held=self.report.lengths["held"],
            )

    def page(self, which: str, after: int, limit: int) -> Sequence[Entry]:
        """Entries of one of LISTS numbered above `after`."""
        with self.changed:
            return self.report.page(which, after, limit)

    def forget(self, which: str, upto: int) -> bool:
        """Delete a list's entries up to number `upto`: somebody has them. Whether there ever was that number."""
        with self.changed, self._transaction():
            return self.report.forget(which, upto)

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        """What became of a job."""
        with self.changed:
            found = self.history.status(job, state, after, limit)
            if not isinstance(found, Status) or found.upstream not in self.pacing.pauses:
                return found
            return found._replace(paused=self.pacing.pauses[found.upstream].reason)

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Tokens that were set aside as failed."""
        with self.changed:
            return self.history.failed(which, after, limit)

    def discard(self, which: Which) -> int:
        """Forget some of the failed tokens; how many, at most AT_ONCE."""
        with self.changed, self._transaction():
            return self.history.discard(which, AT_ONCE)

    def release_held(self) -> int:
        """Put some of the entries that are held back into the list; how many, at most AT_ONCE."""
        with self.changed, self._transaction():
            return self.report.release(AT_ONCE)

    def discard_held(self) -> int:
        """Forget some of the entries that are held back; how many, at most AT_ONCE."""
        with self.changed, self._transaction():
            return self.report.discard(AT_ONCE)

    def replay(self, which: Which, now: float) -> int:
        """Send some of the failed tokens again, as many as there is room for; how many, at most AT_ONCE."""
        with self.changed:
            with self._transaction():
                done = 0
                for upstream in [which.upstream] if which.upstream else self.pacing.standings:
                    room = min(AT_ONCE - done, self.keeping.limits.share - self.spool.open[upstream])
                    replayed = self.history.replay(which._replace(upstream=upstream), max(0, room), now)
                    self.report.count({Count("replayed", upstream): replayed})
                    done += replayed
            self.changed.notify_all()
        return done

    def last_job(self) -> int:
        """The highest job id on disk. New ids must be above it, whatever the clock says."""
        with self.changed:
            return self.spool.last_job()

    def start(self, now: float, first: bool) -> None:
        """Adjust due times to the clock, which may have been set back while no GoCM ran. The first state process of a
        run also makes ready what the last run had in hand.
        """
        if first:
            released = self.release(None)
            if released:
                log.logger.info("%d tokens that the last run had in hand are sent again", released)
        with self.changed:
            self._set_back(max(0.0, self.spool.last_accepted() - now), now)

    def _set_back(self, by: float, now: float) -> None:
        if by > CLOCK_STEP:
            log.logger.warning("the clock was set back by %.0f s", by)
        latest = now + max(self.policy.retry_cap, LONGEST_RETRY_AFTER) + self.policy.retry_base
        with self._transaction():
            if by > CLOCK_STEP:
                self.spool.accepted_by(now)  # so that the next start does not take it for set back again
            for upstream in self.pacing.standings:
                self.spool.set_back(upstream, by if by > CLOCK_STEP else 0.0, now, latest)

    def close(self) -> None:
        """Close the database between two transactions. Nothing can be called any more."""
        self.changed.acquire()
        self.db.close()


# -------------------------------------------------------------------------------------------------------- the process


def _heard(counts: Mapping[Count, int], first: int, now: float) -> dict[str, Bucket]:
    """The answers about tokens that were just counted, by upstream; what came of them in the list has numbers from
    `first` on.
    """
    answers: Counter[str] = Counter()
    for (name, upstream, reason), count in counts.items():
        if name == "delivered" or (name == "failures" and reason not in KEPT_FAILURES):
            answers[upstream] += count
    gone = {upstream: counts.get(Count("notregistered", upstream), 0) for upstream in answers}
    return {
        upstream: Bucket(minute(now), Tally(count, gone[upstream]), first if gone[upstream] else 0)
        for upstream, count in answers.items()
        if count
    }


def _is_plain(outcome: Outcome) -> bool:
    """Whether a token was delivered, and there is nothing more to say of it."""
    return outcome.verdict is Verdict.DELIVERED and not outcome.canonical


def _finds_sound(outcome: Outcome) -> bool:
    """Whether an outcome shows that the message itself is good."""
    return not outcome.rejects_message and outcome.verdict not in _RULED and outcome.verdict is not Verdict.SHARED


class _Manager(multiprocessing.managers.BaseManager):
    pass


class _Edge:
    """The verbs, as the Manager's threads call them. When the disk is full, the WAL is checkpointed, which may be
    enough, then the reserve is given up. A disk that stays full, and a spool that another program has locked, are told
    to the caller, who may try again. After any other failure nobody knows what the next commit would keep, so the
    process ends, and the next start goes on from what is on disk.
    """

    def __init__(self, state: State) -> None:
        for verb in VERBS:
            setattr(self, verb, self._guard(getattr(state, verb), state))

    @staticmethod
    def _guard(verb: Callable[..., Any], state: State) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            remedies = [state.checkpoint, state.use_reserve]
            while True:
                try:
                    with told():
                        return verb(*arguments)
                except Full:
                    if not remedies:
                        raise
                    remedies.pop(0)()
                except Passing:
                    raise
                except Exception as error:
                    _give_up(verb.__name__, error)

        return call


def _give_up(verb: str, error: Exception) -> NoReturn:
    log.logger.error("state failed in %s", verb, exc_info=error)
    # An fsync that failed once must not be tried again: the kernel has dropped what it could not write, and would say
    # that all is well. A whole new start reads what is really there.
    child.leave(Exit.SPOOL_FAILED if isinstance(error, Broken) else Exit.FAILED)


def _make(db: Database, settings: Settings, now: float) -> State:
    policy = Policy(settings.retry_base, settings.retry_cap, settings.max_attempts)
    fcm = settings.credentials or settings.token_command or settings.fcm_metadata
    upstreams = bool(settings.apikey) + bool(fcm)
    limits = Limits(settings.max_pending, settings.max_spool, settings.min_free_disk, max(1, upstreams))
    kept = settings.max_failed, settings.max_report, settings.keep_jobs, settings.max_kept, settings.max_keys
    keeping = Keeping(limits, settings.failed_age, *kept, settings.hold_waves)
    unpaced = start_pace(UNPACED, now)
    paced = start_pace(settings.fcm_rate / 60, now) if settings.fcm_rate else unpaced
    return State(db, DiskSpace(settings.spool), policy, keeping, {"gcm": unpaced, "fcm": paced})


def _serve(address: str, authkey: bytes) -> os.stat_result:
    """Listen at this address for calls, in a thread. Returns the stat of the socket."""
    server = _Manager(address=address, authkey=authkey).get_server()
    threading.Thread(target=server.serve_forever, name="manager", daemon=True).start()
    return os.lstat(address)


def _stay_reachable(address: str, authkey: bytes, socket: os.stat_result) -> None:
    """Make the socket again when it was removed. Existing connections would not notice, but nobody could connect any
    more.
    """
    while True:
        time.sleep(LOOK_EVERY)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(address), socket):
                continue
        if not os.path.lexists(address):
            try:
                socket = _serve(address, authkey)
            except OSError:
                continue  # its directory is gone, too: the supervisor makes that
            log.logger.error("somebody removed the state process's socket: made anew")


def main(settings: Settings, address: str, authkey: bytes, first: bool, control: Connection) -> None:
    """The state process: the first of this run, or one in place of another that died. Tells `control` the highest job
    id on disk once it serves, or why it refuses; then waits there for the word to finish.
    """
    child.enter("state", settings)
    try:
        db, _held = open_spool(settings.spool)
        with told():
            state = _make(db, settings, time.time())
            state.start(time.time(), first)
    except Fatal as error:
        child.refuse(control, error.code, str(error))
    except (Full, Passing, Broken) as error:
        child.refuse(control, Exit.SPOOL_UNWRITABLE, f"cannot write the spool {settings.spool}: {error}")
    Path(address).unlink(missing_ok=True)  # our predecessor's, if it was killed
    edge = _Edge(state)
    _Manager.register("State", callable=lambda: edge, exposed=VERBS)
    socket = _serve(address, authkey)
    threading.Thread(target=_stay_reachable, args=(address, authkey, socket), name="reachable", daemon=True).start()
    control.send(("ready", state.last_job()))
    child.wait_for_word(control)
    state.close()
    child.leave(Exit.OK)
