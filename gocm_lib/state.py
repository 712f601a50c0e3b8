"""State: spool and run report in one transaction; the Manager that serves it, and the client that calls it.

The state process owns the only SQLite connection. Its verbs are whole steps in a message's life, each one transaction,
so "accepted", "settled", the counters and the lists cannot disagree. Promises:

* What `accept` has returned for is on disk: WAL with synchronous=FULL, so the commit is fsynced before it returns.
* Every verb may be repeated: a caller whose answer was lost, because this process died, calls again.
* No call through a Client takes longer than its limit: it ends in StateUnavailable instead.
"""

import multiprocessing.connection
import multiprocessing.managers
import os
import random
import socket
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gocm_lib import child, log
from gocm_lib.database import SpoolError, open_spool
from gocm_lib.job import Job, Slice, format_id
from gocm_lib.outcome import (
    BLAMES_UPSTREAM,
    LONGEST_RETRY_AFTER,
    Action,
    Outcome,
    Pace,
    Pause,
    Policy,
    Result,
    Verdict,
    advance,
    next_step,
    pause,
    slow_down,
    spend,
    start_pace,
    until_credit,
)
from gocm_lib.report import RunReport, Snapshot
from gocm_lib.settings import Exit, Settings
from gocm_lib.spool import Spool

LIMIT = 1.5  # seconds for a call, and
TURN = 0.4  # for the calls before it: a client of ours is answered within 2, if only with 503
FIRST_ANSWERS = 3  # so many tokens of a job told that its message is bad: the others need not be asked
UNPACED = 1e6  # messages a second: no limit but what an upstream's own 429 and 503 make of it
PROBE_WAIT = 60.0  # seconds until a probe of a paused upstream that nobody reported on is given up

VERBS = ("accept", "begin", "claim", "settle", "release", "snapshot", "page", "forget")


# ---------------------------------------------------------------------------------------------------------- the verbs


class State:
    """The shared state. One lock, held for one transaction at a time; `claim` alone waits, without the lock."""

    def __init__(
        self,
        db: sqlite3.Connection,
        policy: Policy,
        paces: Mapping[str, Pace],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.db = db
        self.policy = policy
        self.paces = dict(paces)
        self.draw = draw
        self.spool = Spool(db)
        self.report = RunReport(db)
        self.generation = 0  # the newest; older ones claim nothing more
        self.batches: dict[int, int] = {}  # the last batch each generation was given
        self.pauses: dict[str, Pause] = {}
        self.condemned: dict[
            int, tuple[str, int]
        ] = {}  # jobs whose first answers found the message bad: why, how often
        self.changed = threading.Condition(threading.Lock())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.spool.recount()
            raise

    def accept(self, jobs: Sequence[Job]) -> None:
        """Keep jobs: when this returns they are on disk, all of them."""
        with self.changed:
            with self._transaction():
                for job in jobs:
                    self.spool.accept(job)
            self.changed.notify_all()

    def begin(self, generation: int) -> None:
        """From now on only this generation, or a newer one, claims; a claim of an older one that waits ends."""
        with self.changed:
            self.generation = max(self.generation, generation)
            self.changed.notify_all()

    def claim(
        self, generation: int, batch: int, room: int, ready: Mapping[str, float], now: float, wait: float
    ) -> tuple[list[Slice], dict[str, Pause]]:
        """Due tokens of the `ready` upstreams for a generation that may have `room` in hand, and who is paused. `ready`
        says since when each has had its credential.

        Waits up to `wait` seconds for the first, or for news of a pause. The caller numbers its batches, and goes on to
        the next number when it has received one. So a batch whose answer was lost, because this process was killed or
        stood still, is given again, not forgotten in the generation's hands.
        """
        started = time.monotonic()
        with self.changed:
            known = dict(self.pauses)
            while True:
                waited = time.monotonic() - started
                if generation < self.generation:
                    return [], {}
                if batch <= self._last_batch(generation):
                    return self.spool.claimed(generation, batch), {}
                slices: list[Slice] = []
                idle = wait - waited
                for upstream, since in ready.items():
                    self._end_pause(upstream, since, now + waited)
                    found, rest = self._claim(generation, batch, room, upstream, now + waited)
                    slices += found
                    idle = min(idle, rest)
                if slices or waited >= wait or self.pauses != known:
                    return slices, dict(self.pauses)
                self.changed.wait(max(0.001, idle))

    def _end_pause(self, upstream: str, since: float, now: float) -> None:
        """Let a paused upstream be probed at once if its credential is newer than that, or the clock went back."""
        paused = self.pauses.get(upstream)
        if paused and not paused.probing and paused.began < since and paused.reason.startswith("HTTP 401"):
            self.pauses[upstream] = paused._replace(until=now)
        elif paused and paused.until > now + max(paused.delay, PROBE_WAIT):
            self.pauses[upstream] = paused._replace(began=now, until=now)

    def _last_batch(self, generation: int) -> int:
        if generation not in self.batches:
            self.batches[generation] = self.spool.last_batch(generation)
        return self.batches[generation]

    def _claim(self, generation: int, batch: int, room: int, upstream: str, now: float) -> tuple[list[Slice], float]:
        """An upstream's share of a claim, and in how many seconds time alone could bring (more of) it."""
        free = room - self.spool.in_hand[generation]
        if free <= 0:
            return [], 60.0
        paused = self.pauses.get(upstream)
        if paused and now < paused.until:
            return [], paused.until - now
        due = self.spool.next_due(upstream)
        if due is None or due > now:
            return [], 60.0 if due is None else due - now
        pace = self.paces[upstream] = advance(self.paces[upstream], now)
        if pace.credit < 1:
            return [], until_credit(pace)
        with self._transaction():
            limit = 1 if paused else min(free, int(pace.credit))
            slices, expired = self.spool.claim(generation, batch, upstream, limit, now)
            self.report.count({"failures": len(expired)})
        taken = sum(len(part.tokens) for part in slices)
        self.paces[upstream] = spend(pace, taken)
        if taken:
            self.batches[generation] = batch
            if paused:
                self.pauses[upstream] = paused._replace(until=now + PROBE_WAIT, probing=True)
        self._log_ends([("too old", token) for token in expired])
        return slices, 0.0

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        """Record what became of tokens in a generation's hands; those it does not hold (any more) are passed over."""
        with self.changed:
            counts: Counter[str] = Counter()
            ends: list[tuple[str, str]] = []
            for result in results:
                self._judge_upstream(result, now)
            with self._transaction():
                settled = [r for r in results if self._settle(generation, r, now, counts, ends)]
                self._try_messages(settled, counts)
                self.report.count(counts)
            self.changed.notify_all()
        self._log_ends(ends)

    def _settle(
        self, generation: int, result: Result, now: float, counts: Counter[str], ends: list[tuple[str, str]]
    ) -> bool:
        """Settle one token; whether it was in the generation's hands."""
        outcome, job, n = result.outcome, result.job, result.n
        if outcome.verdict is Verdict.DELIVERED and not outcome.canonical:
            if not self.spool.remove(generation, job, n, result.attempt):
                return False
            counts["attempts"] += result.attempt == 1
            return True
        held = self.spool.holds(generation, job, n, result.attempt)
        if held is None:
            return False
        token, accepted_at, expires_at = held
        step = next_step(outcome, result.attempt, expires_at, now, self.draw(), self.policy)
        if step.action is Action.RETURN:
            # After the pause, and the later the older it is: the probe goes to another token if there is one, for it
            # may be this one's fault alone. A message with an odd answer would else keep the upstream paused.
            paused = self.pauses.get(result.upstream)
            again = max(now, paused.until) + 0.1 + min((now - accepted_at) / 8, 60.0) if paused else now
            self.spool.retry(generation, job, n, result.attempt - 1, again)
            return True
        counts["attempts"] += result.attempt == 1
        if step.action is Action.RETRY:
            self.spool.retry(generation, job, n, result.attempt, step.due_at)
            return True
        if step.action is Action.BURY:
            self.spool.bury(generation, job, n, result.attempt, result.attempt, step.reason, now)
        else:
            self.spool.remove(generation, job, n, result.attempt)
        if outcome.verdict is Verdict.DELIVERED:
            counts["canonicals"] += 1
            self.report.add_canonical(token, outcome.canonical)
            return True
        counts["failures"] += 1
        ends.append((step.reason, token))
        if outcome.verdict is Verdict.UNREGISTERED:
            counts["notregistered"] += 1
            self.report.add_notregistered(token)
        return True

    def _try_messages(self, results: Sequence[Result], counts: Counter[str]) -> None:
        """Stop the jobs whose first answers all found the message itself bad; close those that are done.

        An answer of any other kind shows that the message is sound, and then nothing more can stop its job.
        """
        sound = {result.job for result in results if not (result.outcome.condemns or _says_nothing(result.outcome))}
        for result in results:
            if result.outcome.condemns:
                reason, count = self.condemned.get(result.job, (result.outcome.reason, 0))
                count = count + 1 if reason == result.outcome.reason else 1
                self.condemned[result.job] = result.outcome.reason, count
        for job in {result.job for result in results}:
            if job in sound:
                self.condemned.pop(job, None)
            elif self.condemned.get(job, ("", 0))[1] >= FIRST_ANSWERS:
                counts["failures"] += self.spool.reject_ready(job)
        left = self.spool.finish({result.job for result in results})
        for job in sound.intersection(left):
            self.spool.find_sound(job)
        for job in {result.job for result in results}.difference(left):
            self.condemned.pop(job, None)

    def _judge_upstream(self, result: Result, now: float) -> None:
        if result.outcome.slows:
            pace = self.paces[result.upstream]
            self.paces[result.upstream] = slower = slow_down(advance(pace, now), now)
            if slower.slowed_at != pace.slowed_at:
                log.logger.warning(
                    "upstream %s says %s: slowing down to %.0f/s", result.upstream, result.outcome.reason, slower.rate
                )
        known = self.pauses.get(result.upstream)
        if result.outcome.verdict in BLAMES_UPSTREAM:
            paused = pause(known, result.outcome, now)
            if paused != known:
                log.logger.warning(
                    "upstream %s is paused for %.0f s: %s; its messages are kept (job %s)",
                    result.upstream,
                    paused.delay,
                    paused.reason,
                    format_id(result.job),
                )
            self.pauses[result.upstream] = paused
        elif known and (result.outcome.verdict is Verdict.RETURNED or (now < known.until and not known.probing)):
            pass  # of a request from before the pause: the probe will tell
        elif known and not result.outcome.answered:
            # Connected, and no answer: that proves nothing. The pause goes on, and then another token is tried.
            self.pauses[result.upstream] = known._replace(until=now + known.delay, probing=False)
        elif known:
            del self.pauses[result.upstream]
            self.paces[result.upstream] = start_pace(self.paces[result.upstream].limit, now)
            log.logger.warning("upstream %s answers again", result.upstream)

    @staticmethod
    def _log_ends(ends: list[tuple[str, str]]) -> None:
        for reason, count in Counter(reason for reason, _ in ends).items():
            example = next(token for why, token in ends if why == reason)
            log.logger.info("not delivered: %s: %d tokens, one is %s", reason, count, log.token(example))

    def release(self, generation: int | None) -> int:
        """Make ready again what a generation that has ended (None: every one) still has in hand; how many."""
        with self.changed:
            with self._transaction():
                released = self.spool.release(generation)
            self.changed.notify_all()
            return released

    def snapshot(self) -> Snapshot:
        with self.changed:
            return Snapshot(self.report.counters(), self.spool.pending())

    def page(self, which: str, after: int, limit: int) -> list[tuple]:
        """Entries of the list `canonical` or `notregistered` numbered above `after`."""
        with self.changed:
            return self.report.page(which, after, limit)

    def forget(self, which: str, upto: int) -> None:
        """Delete a list's entries up to number `upto`: somebody has them."""
        with self.changed, self._transaction():
            self.report.forget(which, upto)

    def last_job(self) -> int:
        """The highest job id on disk: new ids must be above it, whatever the clock says."""
        with self.changed:
            return self.spool.last_job()

    def clamp(self, now: float) -> None:
        """Bring back due times that no rule could have set: the clock has been set back."""
        latest = now + max(self.policy.retry_cap, LONGEST_RETRY_AFTER) + self.policy.retry_base
        with self.changed, self._transaction():
            self.spool.clamp(latest)

    def close(self) -> None:
        """Close the database between two transactions; nothing can be called any more."""
        self.changed.acquire()
        self.db.close()


# --------------------------------------------------------------------------------------------------------- the client


class StateUnavailable(Exception):
    """The state process did not answer within the limit. Whether it did what was asked is not known."""


class Client:
    """Calls State's verbs in the state process, each within a time limit. Threads may share one; they take turns.

    It speaks to multiprocessing's Manager, but over a socket with kernel time limits: the Manager's own proxies wait
    for ever for a process that is stopped, in the middle of an answer as in the greeting.
    """

    def __init__(self, address: str, authkey: bytes, limit: float = LIMIT) -> None:
        self.address = address
        self.authkey = authkey
        self.limit = limit
        self._turn = threading.Lock()
        self._connection: Connection | None = None
        self._ident = ""

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in VERBS:
            raise AttributeError(verb)
        return lambda *arguments: self._call(verb, arguments)

    def _call(self, verb: str, arguments: tuple) -> Any:
        deadline = time.monotonic() + self.limit
        if not self._turn.acquire(timeout=TURN):
            raise StateUnavailable("another call is waiting for the state process")
        try:
            while True:
                try:
                    if self._connection is None:
                        self._dial()
                    self._connection.send((self._ident, verb, arguments, {}))
                    kind, answer = self._connection.recv()
                    break
                except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
                    self.close()
                    # It died, or is being replaced: every verb may be repeated, so ask again while there is time.
                    if isinstance(error, BlockingIOError) or time.monotonic() + 0.05 > deadline:
                        raise StateUnavailable(f"the state process does not answer ({type(error).__name__})") from None
                    time.sleep(0.02)
        finally:
            self._turn.release()
        if isinstance(answer, sqlite3.OperationalError):
            raise StateUnavailable(str(answer))
        if kind != "#RETURN":
            raise RuntimeError(f"state process failed in {verb}: {answer}")
        return answer

    def _dial(self) -> None:
        self._ident, _verbs = self._greet("create", "State", keep=False)
        self._greet("accept_connection", threading.current_thread().name, keep=True)

    def _greet(self, function: str, argument: str, *, keep: bool) -> Any:
        """Call one of the Manager's own functions; keep the connection for verbs if it is to serve them."""
        sock = socket.socket(socket.AF_UNIX)
        limit = struct.pack("ll", int(self.limit), int(self.limit % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        connection = Connection(sock.detach())
        try:
            multiprocessing.connection.answer_challenge(connection, self.authkey)
            multiprocessing.connection.deliver_challenge(connection, self.authkey)
            answer = multiprocessing.managers.dispatch(connection, None, function, (argument,))
        except BaseException:
            connection.close()
            raise
        if keep:
            self._connection = connection
        else:
            connection.close()
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


# -------------------------------------------------------------------------------------------------------- the process


def _says_nothing(outcome: Outcome) -> bool:
    """Whether an outcome leaves open what the upstream thinks of the message."""
    return outcome.verdict in BLAMES_UPSTREAM or outcome.verdict is Verdict.RETURNED or not outcome.answered


class _Manager(multiprocessing.managers.BaseManager):
    pass


class _Edge:
    """The verbs as the Manager's threads call them. A full disk is told to the caller, who may try again; after any
    other failure nobody knows what the next commit would keep, so the process ends and the log decides at the restart.
    """

    def __init__(self, state: State) -> None:
        for verb in VERBS:
            setattr(self, verb, self._guard(getattr(state, verb)))

    @staticmethod
    def _guard(verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return verb(*arguments)
            except Exception as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                    raise
                log.logger.exception("state failed in %s", verb.__name__)
                os._exit(Exit.FAILED)

        return call


def main(settings: Settings, address: str, authkey: bytes, control: Connection) -> None:
    """The state process. Tells `control` the highest job id on disk when it serves, or why it refuses; then waits
    there for the word to finish.
    """
    child.enter("state", settings.log_level, settings.logto)
    policy = Policy(settings.retry_base, settings.retry_cap, settings.max_attempts)
    try:
        db, _held = open_spool(settings.spool)
    except SpoolError as error:
        child.refuse(control, error.code, str(error))
    unpaced = start_pace(UNPACED, time.time())
    paced = start_pace(settings.fcm_rate / 60, time.time()) if settings.fcm_rate else unpaced
    state = State(db, policy, {"gcm": unpaced, "fcm": paced})
    state.clamp(time.time())
    Path(address).unlink(missing_ok=True)  # our predecessor's, if it was killed
    edge = _Edge(state)
    _Manager.register("State", callable=lambda: edge, exposed=VERBS)
    server = _Manager(address=address, authkey=authkey).get_server()
    threading.Thread(target=server.serve_forever, name="manager", daemon=True).start()
    control.send(("ready", state.last_job()))
    child.wait_for_word(control)
    state.close()
    os._exit(Exit.OK)
