"""Pacing: whether and how fast each upstream may be sent to, and whose fault it is when that fails.

Owns the memory of answers (module blame has the rules), the pauses and the paces (module pace), and the targets that
have had too much. All of it starts afresh with the process: a paused upstream is probed again, a pace ramps up again,
troubles are forgiven once. Promises that a paused upstream is probed with one token at a time, each of another job
where there is one.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gocm_lib.message.job import format_id
from gocm_lib.message.outcome import BLAMES_UPSTREAM, UNAUTHORIZED, Outcome, Result, Verdict
from gocm_lib.message.retry import Held, Policy, Ruling
from gocm_lib.process import log
from gocm_lib.state.blame import Answers, Row, Trouble, again, remember
from gocm_lib.state.contract import Hold, Pause
from gocm_lib.state.pace import Pace, advance, heard, pause, prolong, resume, slow, spend, start_pace, until_credit

PROBE_WAIT = 60.0  # seconds until a probe of a paused upstream that nobody reported on is given up
SET_BACK = 1.0  # seconds beyond the longest that something can wait: then the clock was set back
RENEW_EVERY = 30.0  # seconds between two renewals of a credential that single messages were refused for
ODD_LATER = 120.0  # seconds by which a job that is odd is a probe later than others
LOOK_EVERY = 60.0  # seconds between two looks whether a held upstream is let go: whoever does that tells at once
UNPACED = 1e6  # messages a second: no limit but what an upstream's own 429 and 503 make of it
LOG_EVERY = 60.0  # seconds between two lines about an upstream's pace


class TargetHold(NamedTuple):
    """A device or topic that has had too much. Nothing goes to it until `until`, `delay` seconds after it said so."""

    until: float
    delay: float

    def matters(self, now: float) -> bool:
        """Whether this hold would still make the next one longer."""
        return now < self.until + 2 * self.delay


class Standing:
    """Everything known of one upstream."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.whole = pace.limit  # of which we may have a part only
        self.answers = Answers()
        self.row = Row()
        self.blamed: OrderedDict[int, float] = OrderedDict()  # jobs that met trouble, when they last did
        self.troubles: OrderedDict[tuple[int, int], Trouble] = OrderedDict()  # of tokens: job and place
        self.suspects: set[int] = set()  # of the jobs that were heard of last
        self.odd: OrderedDict[int, None] = OrderedDict()  # jobs that were suspects once
        self.holds: OrderedDict[str, TargetHold] = OrderedDict()  # by token, topic or condition
        self.unauthorized: Pause | None = None  # as if for it: since when single messages are refused with 401
        self.told_at = 0.0

    def recover(self, through: Sequence[Result]) -> None:
        """These messages got through: their earlier troubles were chance."""
        for result in through:
            for n in range(result.n, result.n + result.span) if result.attempt > 1 else ():
                trouble = self.troubles.pop((result.job, n), None)
                for at in trouble.at if trouble else ():
                    self.answers.note(0, 1, at)

    def find_suspects(self, troubles: Sequence[Result], proven: Callable[[int], bool]) -> None:
        """Note the jobs that had trouble before while others got through since. Their trouble says little of the
        upstream.
        """
        jobs = {result.job for result in troubles}
        self.suspects = {
            job
            for job in jobs
            if (job in self.odd or self.blamed.get(job, math.inf) < self.row.through_at) and not proven(job)
        }
        for job in self.suspects:
            remember(self.odd, job, None)

    def last_trouble(self, job: int) -> float:
        """When a job last met trouble, 0 if never: the next probe is of the job for which that is longest ago. An odd
        job's answer would tell little.
        """
        return self.blamed.get(job, 0.0) + (ODD_LATER if job in self.odd else 0.0)


def _unknown() -> Standing:
    """An upstream that nobody has told of: it may be one of yesterday's."""
    return Standing(start_pace(UNPACED, 0.0))


class Pacing:
    """What State remembers of its upstreams. State owns it, and calls it under its lock."""

    def __init__(self, paces: Mapping[str, Pace], policy: Policy) -> None:
        self.policy = policy
        self.names = tuple(paces)  # the upstreams that there are
        # And those that there were: what is left of their messages is kept.
        self.standings = defaultdict(_unknown, {name: Standing(pace) for name, pace in paces.items()})
        self.pauses: dict[str, Pause] = {}
        self.stopped: Mapping[str, Hold] = {}  # upstreams that somebody holds
        self._slowed: dict[str, float] = {}

    def follow(self, rates: Mapping[str, float], now: float) -> None:
        """There are these upstreams from now on, each with its rate in messages a second (0: nobody knows)."""
        self.names = tuple(rates)
        for name, rate in rates.items():
            if name not in self.standings or self.standings[name].whole != (rate or UNPACED):
                self.standings[name] = Standing(start_pace(rate or UNPACED, now))
                self.pauses.pop(name, None)

    # --------------------------------------------------------------------------------------------- what may be sent

    def end_pause(self, upstream: str, since: float, now: float) -> None:
        """Let a paused upstream be probed at once if its credential, which we have had `since` then, is newer than the
        pause, or if the clock was set back.
        """
        paused = self.pauses.get(upstream)
        if not paused or paused.until <= now:
            return
        if not paused.probe and paused.began < since and paused.cause == UNAUTHORIZED:
            # Half of it, so that it is what it was, not doubled, if this one is refused as well.
            self.pauses[upstream] = paused._replace(until=now, delay=paused.delay / 2)
        elif paused.until > now + PROBE_WAIT + SET_BACK:
            self.pauses[upstream] = paused._replace(began=now, until=now)

    def divide(self, among: int) -> None:
        """Send with this part of what each upstream takes: so many share it."""
        for standing in self.standings.values():
            if standing.pace.limit != (limit := standing.whole / among):
                standing.pace = standing.pace._replace(limit=limit)

    def take_slowed(self) -> dict[str, float]:
        """The rates that upstreams were slowed down to since this was last asked, because they refused too much."""
        slowed, self._slowed = self._slowed, {}
        return slowed

    def slow_down(self, upstream: str, rate: float, now: float) -> None:
        """Send no faster than this from now on: somebody else found that the upstream refuses more."""
        if standing := self.standings.get(upstream):
            standing.pace = slow(standing.pace, rate, now)

    def allow(self, upstream: str, now: float) -> tuple[int, float]:
        """How many tokens may go to an upstream now; when none may, after how many seconds to ask again."""
        if upstream in self.stopped:
            return 0, LOOK_EVERY
        paused = self.pauses.get(upstream)
        if paused and now < paused.until:
            return 0, paused.until - now
        if paused:
            return 1, 0.0
        standing = self.standings[upstream]
        standing.pace = advance(standing.pace, now)
        if standing.pace.credit < 1:
            return 0, until_credit(standing.pace)
        return int(standing.pace.credit), 0.0

    def probing(self, upstream: str) -> Callable[[int], float] | None:
        """For a paused upstream a function that tells when a job last met trouble, so that the probe is of another job.
        None: it is not paused.
        """
        return self.standings[upstream].last_trouble if upstream in self.pauses else None

    def holds(self, upstream: str, now: float) -> bool:
        """Whether any target of an upstream has had too much lately."""
        holds = self.standings[upstream].holds
        while holds and not next(iter(holds.values())).matters(now):
            holds.popitem(last=False)
        return bool(holds)

    def held(self, upstream: str, target: str, now: float) -> float:
        """Until when a target that has had too much must wait; 0 when it may be sent to."""
        hold = self.standings[upstream].holds.get(target)
        if hold is None or hold.until <= now or hold.until > now + hold.delay + SET_BACK:
            return 0.0
        return hold.until

    def sent(self, upstream: str, count: int, job: int, now: float) -> None:
        """`count` tokens were sent, the first of this job. For a paused upstream it is the probe."""
        if not count:
            return
        standing = self.standings[upstream]
        standing.pace = spend(standing.pace, count)
        if paused := self.pauses.get(upstream):
            self.pauses[upstream] = paused._replace(until=now + PROBE_WAIT, probe=job)

    def news(self) -> dict[str, Pause]:
        """The pauses; for an upstream that refuses our credential, when it first did. After a renewal, requests with
        the old credential are refused for a while.
        """
        news = dict(self.pauses)
        for name, standing in self.standings.items():
            if standing.unauthorized and (name not in news or news[name].cause == UNAUTHORIZED):
                news[name] = standing.unauthorized
        return news

    # ----------------------------------------------------------------------------------------------- what was answered

    def hear(
        self,
        upstream: str,
        through: Sequence[Result],
        troubles: Sequence[Result],
        proven: Callable[[int], bool],
        in_hand: int,
        now: float,
    ) -> None:
        """Take in the answers to messages that got through and to messages that met trouble. Pause the upstream or end
        its pause, and set its pace. `proven` tells whether some of a job's tokens have got through.
        """
        standing = self.standings[upstream]
        taken = sum([result.span for result in through])
        if taken:
            standing.row.end(taken, now)
            standing.recover(through)
        standing.find_suspects(troubles, proven)
        slowed = 0
        for result in troubles:
            weight = self._witness(standing, result, proven(result.job), now)
            slowed += weight if result.outcome.verdict not in BLAMES_UPSTREAM else 0  # those are not about load
        standing.answers.note(taken, 0, now)
        if upstream in self.pauses:
            self._judge_probe(upstream, bool(taken), troubles, now)
        elif troubles and standing.row.is_everybodys(now):
            self._pause(upstream, troubles[-1], now)
        if taken or slowed:
            self._set_pace(upstream, taken, slowed, in_hand, now)
        for result in troubles:
            remember(standing.blamed, result.job, now)

    def _witness(self, standing: Standing, result: Result, proven: bool, now: float) -> int:
        """Lengthen the row by the weight of an answer that tells of trouble; a suspect job's answer weighs little."""
        suspect = result.job in standing.suspects
        refused = result.outcome.verdict is Verdict.UPSTREAM_CONFIG
        if refused and result.outcome.cause == UNAUTHORIZED and not suspect:
            known = standing.unauthorized
            if known is None or not known.began <= now < known.until:
                standing.unauthorized = Pause(
                    result.outcome.reason, now, RENEW_EVERY, now + RENEW_EVERY, now, cause=UNAUTHORIZED
                )
        if suspect:
            standing.row.doubt(result.job)
        if suspect and refused:
            return 0
        weight = standing.row.weigh(result.job, proven, result.span, now)
        if not suspect:
            standing.row.lengthen(weight, result.outcome.verdict is Verdict.UNREACHABLE, now)
        return weight

    def _judge_probe(self, upstream: str, through: bool, troubles: Sequence[Result], now: float) -> None:
        """Take in what came during a pause: answers to requests from before it, or to the probe."""
        paused, standing = self.pauses[upstream], self.standings[upstream]
        if through and (paused.probe or now >= paused.until):
            del self.pauses[upstream]
            standing.pace = resume(standing.pace, now)
            log.logger.warning("upstream %s answers again", upstream)
            return
        failed = [result for result in troubles if result.job == paused.probe]
        if failed and paused.probe in standing.suspects:
            self.pauses[upstream] = prolong(paused, now)
        elif failed:
            self._pause(upstream, failed[-1], now)

    def _pause(self, upstream: str, result: Result, now: float) -> None:
        self.pauses[upstream] = paused = pause(self.pauses.get(upstream), result.outcome, now)
        log.logger.warning(
            "upstream %s is paused for %.0f s: %s; its messages are kept (job %s); see gocm help %s",
            upstream,
            paused.until - now,
            paused.reason,
            format_id(result.job),
            "credentials" if paused.manner == "refuses" else "promise",
        )

    def _set_pace(self, upstream: str, taken: int, refused: int, in_hand: int, now: float) -> None:
        standing = self.standings[upstream]
        before = standing.pace
        standing.pace = heard(before, taken, refused, in_hand, now)
        if standing.pace.rate < before.rate:
            self._slowed[upstream] = standing.pace.rate
        if standing.pace.rate < before.rate and not 0 <= now - standing.told_at < LOG_EVERY:
            standing.told_at = now
            share = 100 * standing.pace.first.share
            log.logger.warning(
                "upstream %s refuses %.0f %%: slowing down to %.0f/s", upstream, share, standing.pace.rate
            )

    # ------------------------------------------------------------------------------------------ whose trouble it is

    def rule(self, result: Result, held: Held, now: float) -> Ruling:
        """Decide what to hold against a token whose result `hear` has taken in, and against its target. This is
        remembered at once. If the settle then fails and is repeated, nothing is charged twice, because nobody gets
        through between the two.
        """
        standing, outcome = self.standings[result.upstream], result.outcome
        if outcome.verdict is Verdict.RETURNED:
            return Ruling(held.charged, back=result.job not in standing.blamed)
        if outcome.verdict is Verdict.PUT_OFF:
            return Ruling(held.charged + 1, tries=held.charged + 1)
        if outcome.verdict is Verdict.HELD:
            return Ruling(held.charged, held=self._hold(standing, held.token, outcome, now))
        if result.upstream in self.pauses and result.job not in standing.suspects and not outcome.may_be_taken:
            # It is everybody's: at worst it is tried again after the first wait, however often that has been.
            return Ruling(held.charged, back=outcome.verdict in BLAMES_UPSTREAM)
        trouble, charged = again(standing.troubles.get((result.job, held.n)), outcome, standing.answers, now)
        remember(standing.troubles, (result.job, held.n), trouble)
        return Ruling(held.charged + charged, tries=trouble.tries)

    def _hold(self, standing: Standing, target: str, outcome: Outcome, now: float) -> float:
        """Until when to hold a target that has said it had too much: longer each time."""
        known = standing.holds.get(target)
        if known and now < known.until:
            return known.until  # of a request from before
        delay = outcome.retry_after if outcome.retry_after is not None else self.policy.retry_base
        if known and known.matters(now):
            delay = max(delay, min(2 * known.delay, self.policy.retry_cap))
        remember(standing.holds, target, TargetHold(now + delay, delay))
        return now + delay
