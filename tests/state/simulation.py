"""GoCM's State against a simulated upstream, on a simulated clock: hours of bad days in seconds."""

import heapq
import itertools
import math
import random
from collections import Counter
from typing import NamedTuple

from kit import KEEPING, accept

from gocm_lib.message.job import Job
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.message.retry import Policy
from gocm_lib.state.pace import start_pace
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.state import State

TICK = 0.04  # seconds: how often answers are settled and tokens claimed, if nothing else is said
START = 1_000_000.0
UNAVAILABLE = Outcome(Verdict.DEFERRED, "HTTP 503 UNAVAILABLE", cause="unavailable")
INTERNAL = Outcome(Verdict.DEFERRED, "HTTP 500 INTERNAL", cause="unavailable")
QUOTA = Outcome(Verdict.DEFERRED, "HTTP 429", cause="quota")
NOT_FOUND = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 404")
UNAUTHORIZED = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized")
UNREACHABLE = Outcome(Verdict.UNREACHABLE, "ConnectionRefusedError")
SILENT = Outcome(Verdict.DEFERRED, "no answer in time", answered=False, cause="timeout")
BROKEN = Outcome(Verdict.DEFERRED, "ConnectionResetError", answered=False, cause="connection")
TARGET_QUOTA = Outcome(Verdict.HELD, "HTTP 429 QUOTA_EXCEEDED")


class Arrival(NamedTuple):
    at: float  # seconds after the start
    tokens: tuple[str, ...]
    life: float = 86400.0


class Upstream:
    """What an upstream answers, and when. A token of an odd job begins with `odd-`, and is answered with `odd`."""

    def __init__(
        self, *, latency=0.1, sporadic=(), capacity=0.0, refusal=UNAVAILABLE, bad=(), trouble=UNAVAILABLE,
        odd=NOT_FOUND, device_quota=0.0, timeout=20.0, seed=1,
    ):  # fmt: skip
        self.latency, self.sporadic, self.capacity, self.refusal = latency, sporadic, capacity, refusal
        self.bad, self.trouble, self.odd, self.timeout = bad, trouble, odd, timeout
        self.device_quota, self.devices = device_quota, {}
        self.chance = random.Random(seed)
        self.level, self.at = 0.0, 0.0

    def is_bad(self, at):
        """Whether everybody has trouble then."""
        return self.bad(at) if callable(self.bad) else any(begin <= at < end for begin, end in self.bad)

    def answer(self, token, at):
        """(how many seconds later, what): the answer to a token that arrives `at` seconds after the start."""
        outcome = self.judge(token, at)
        return (self.timeout if outcome is SILENT else self.latency), outcome

    def judge(self, token, at):
        if self.is_bad(at):
            return self.trouble
        if token.startswith("odd-"):
            return self.odd
        draw = self.chance.random()
        for outcome, share in self.sporadic:
            if draw < share:
                return outcome
            draw -= share
        if self.capacity and not self.take(at):
            return self.refusal
        if self.device_quota and token.startswith("busy-"):
            level, last = self.devices.get(token, (self.device_quota, at))
            level = min(self.device_quota, level + (at - last) * self.device_quota / 60)
            self.devices[token] = (level - 1, at) if level >= 1 else (level, at)
            if level < 1:
                return TARGET_QUOTA
        return DELIVERED

    def take(self, at):
        depth = max(1.0, self.capacity * 0.1)
        self.level, self.at = min(depth, self.level + (at - self.at) * self.capacity), at
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Ended(NamedTuple):
    at: float
    waited: float


class Simulation:
    """Run arrivals against an upstream for so many seconds; what became of the tokens is in the attributes."""

    def __init__(self, upstream, arrivals, *, limit=10_000.0, room=4096, policy=None, seed=1, tick=TICK):
        chance = random.Random(seed)
        policy = policy or Policy(10.0, 600.0, 5)
        store = SqliteStore.open(":memory:", KEEPING)
        self.state = State(store, policy, KEEPING, {"fcm": start_pace(limit, START)}, draw=chance.random)
        self.upstream, self.room, self.tick = upstream, room, tick
        self.arrivals = sorted(arrivals)
        self.asked = []  # when the upstream was, and with which job
        self.answers = []  # when, and what
        self.delivered: dict[str, Ended] = {}
        self.times = Counter()  # how often each token was taken
        self.now = 0.0
        self._flying = []
        self._last = 0
        self._batches = itertools.count(1)
        self._accepted = {}
        self._next = 0
        self.state.begin(1)

    def run(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self._turn()
            idle = min(self._next_moment(), end) - self.now
            self.now = round(self.now + self.tick * max(1, math.ceil(idle / self.tick - 1e-6)), 6)
        return self

    def _next_moment(self):
        """When something can happen next: an answer, an arrival, a retry, the end of a pause, or housekeeping."""
        moments = [self.now + 1.0]
        if self._flying:
            moments.append(self._flying[0][0])
        if self._next < len(self.arrivals):
            moments.append(self.arrivals[self._next].at)
        if (due := self.state.backlog.next_due("fcm", START + self.now)) is not None:
            pause = self.state.pacing.pauses.get("fcm")
            moments.append(max(due, pause.until if pause else 0.0) - START)
        return min(moments)

    def _turn(self):
        self._accept()
        self._settle()
        now = START + self.now
        slices, *_ = self.state.claim(1, next(self._batches), {"fcm": self.room}, {"fcm": 0.0}, now, 0.0)
        for run in [run for part in slices for run in part.runs]:
            for n, token in enumerate(run.tokens, run.first):
                later, outcome = self.upstream.answer(token, self.now)
                self.asked.append((self.now, run.job))
                result = Result("fcm", run.job, n, run.attempt, outcome)
                heapq.heappush(self._flying, (self.now + later, len(self.asked), result, token))

    def _accept(self):
        jobs = []
        while self._next < len(self.arrivals) and self.arrivals[self._next].at <= self.now:
            at, tokens, life = self.arrivals[self._next]
            self._next += 1
            self._last = max(self._last + 1, int((START + at) * 1e6))
            now = START + self.now
            jobs.append(Job(self._last, "fcm", "token", tokens, "{}", now, now + life))
            self._accepted.update(dict.fromkeys(tokens, at))
        if jobs:
            accept(self.state, jobs)

    def _settle(self):
        results = []
        while self._flying and self._flying[0][0] <= self.now:
            _, _, result, token = heapq.heappop(self._flying)
            results.append(result)
            self.answers.append((self.now, result.outcome))
            if result.outcome.verdict is Verdict.DELIVERED:
                self.times[token] += 1
                self.delivered.setdefault(token, Ended(self.now, self.now - self._accepted[token]))
        if results:
            self.state.settle(1, results, START + self.now)

    # ------------------------------------------------------------------------------------------------ what came of it

    def waits(self, prefix="good-"):
        """How long each delivered token of a kind waited from its acceptance; those that still wait, so far."""
        told = []
        for token, at in self._accepted.items():
            if token.startswith(prefix):
                told.append(self.delivered[token].waited if token in self.delivered else self.now - at)
        return sorted(told)

    def late(self, seconds, prefix="good-"):
        """How many tokens of a kind took longer."""
        return sum(wait > seconds for wait in self.waits(prefix))

    def set_aside(self):
        """Tokens that were given up, and why."""
        jobs = self.state.store.db.execute("SELECT DISTINCT job FROM single WHERE failure <> ''").fetchall()
        fates = [fate for (job,) in jobs for fate in self.state.status(job, "failed", -1, 10**6).fates]
        return {fate.token: fate.reason for fate in fates}

    def rate(self, begin, end):
        """Deliveries a second between two times."""
        return sum(begin <= ended.at < end for ended in self.delivered.values()) / (end - begin)

    def refused(self, begin, end):
        """The share of answers that said no between two times."""
        told = [outcome for at, outcome in self.answers if begin <= at < end]
        return sum(outcome is not DELIVERED for outcome in told) / max(1, len(told))

    def asks(self, begin, end):
        return sum(begin <= at < end for at, _ in self.asked)


def stream(rate, seconds, prefix="good-", begin=0.0):
    """One-token jobs, evenly spread."""
    return [Arrival(begin + n / rate, (f"{prefix}{begin}-{n}",)) for n in range(int(rate * seconds))]
