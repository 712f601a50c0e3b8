"""What one attempt did for one token, and the rule for what happens next. Pure: `now` and chance are arguments.

A dialect (gcm, fcm) turns an upstream's answer into Outcomes; `next_step` turns an Outcome into what the spool does.
Every way an attempt can end is one of the verdicts below, crashes and silence included, so nothing falls between.
"""

import enum
import re
from collections.abc import Iterable, Sequence
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import NamedTuple

from gocm_lib.job import Slice

LONGEST_RETRY_AFTER = 3600.0  # seconds; an upstream that asks for a day would otherwise outlive most messages
FIRST_ANSWERS = 3  # so many tokens of a job told that its message is bad: the others need not be asked
NO_ANSWER = "no answer in time"  # the reason when the upstream was silent for too long
RATE_LIMIT_WAIT = 60.0  # seconds to wait after a 429 that does not say: what Google's quota page asks for


class Verdict(enum.StrEnum):
    DELIVERED = "delivered"  # the upstream took it, perhaps naming a canonical token
    DEFERRED = "deferred"  # not now: try this token again later
    UNREGISTERED = "unregistered"  # the upstream says, of this very token, that it is dead
    REJECTED = "rejected"  # this message will never be taken for this token
    UPSTREAM_CONFIG = "upstream_config"  # the upstream refuses us, not the token: bad key, wrong URL, bad certificate
    UNREACHABLE = "unreachable"  # no connection could be made, so nothing was sent
    RETURNED = "returned"  # it was not sent, because of what others of its job were told


# These two say nothing of the token: it goes back as it was, its attempt not counted, and the upstream is paused.
BLAMES_UPSTREAM = frozenset({Verdict.UPSTREAM_CONFIG, Verdict.UNREACHABLE})


class Outcome(NamedTuple):
    """`reason` is a short word for logs and counts; `retry_after` is in seconds, None when the upstream did not say."""

    verdict: Verdict
    reason: str = ""
    canonical: str = ""
    retry_after: float | None = None
    slows: bool = False  # the upstream has too much to do: everything for it is to go slower
    answered: bool = True  # there was an answer; False: the connection broke or was silent
    condemns: bool = False  # it is about the message: every other token of the job would hear the same


DELIVERED = Outcome(Verdict.DELIVERED)


class Result(NamedTuple):
    """The Outcome of one attempt, addressed to its token: job id, place in the job, which attempt it was. It holds for
    `span` tokens of the job from there on.
    """

    upstream: str
    job: int
    n: int
    attempt: int
    outcome: Outcome
    span: int = 1


def address(part: Slice, outcomes: Sequence[Outcome]) -> list[Result]:
    """The outcomes of a slice's tokens as Results: neighbours that fared alike share one."""
    results: list[Result] = []
    place = 0
    for job, first, attempt, tokens in part.runs:
        if len(tokens) == 1:  # as nearly always, but in multicasts
            results.append(Result(part.upstream, job, first, attempt, outcomes[place]))
            place += 1
            continue
        for outcome, alike in groupby(outcomes[place : place + len(tokens)]):
            span = sum(1 for _ in alike)
            results.append(Result(part.upstream, job, first, attempt, outcome, span))
            first += span
        place += len(tokens)
    return results


def join(results: Iterable[Result]) -> list[Result]:
    """The same Results, those of neighbours that fared alike made one: a request each, they came in any order."""
    joined: list[Result] = []
    for result in sorted(results, key=lambda result: result[:3]):
        if joined:
            upstream, job, n, attempt, outcome, span = joined[-1]
            if (upstream, job, n + span, attempt, outcome) == result[:5]:
                joined[-1] = Result(upstream, job, n, attempt, outcome, span + result.span)
                continue
        joined.append(result)
    return joined


class Policy(NamedTuple):
    """How long to go on: seconds for base and cap."""

    retry_base: float
    retry_cap: float
    max_attempts: int


# The reasons that are counted are few and fixed, so that somebody can watch them: why tokens fail,
FAILURES = {
    "unregistered": "the upstream says that the token is dead",
    "invalid_token": "what was given as a token is none",
    "wrong_sender": "the token belongs to another sender or project",
    "bad_message": "the upstream takes this message for no token",
    "rejected": "the upstream refused it for another reason; the log has its word",
    "attempts": "--max-attempts were used up",
    "expired": "its time_to_live or --max-age passed before it could be sent",
    "killed_senders": "its senders died with it in the air",
}
# and why they are tried again.
RETRIES = {
    "unavailable": "the upstream cannot serve just now (5xx)",
    "quota": "the upstream has had too much (429)",
    "token": "the upstream cannot reach this device's queue just now",
    "timeout": "no answer came in time",
    "connection": "the connection broke before the answer",
    "odd_answer": "the answer makes no sense",
    "shared": "a request that messages shared was refused; each is tried alone",
}
_REFUSALS = {
    "InvalidRegistration": "invalid_token",
    "MissingRegistration": "invalid_token",
    "invalid token": "invalid_token",
    "MismatchSenderId": "wrong_sender",
    "SENDER_ID_MISMATCH": "wrong_sender",
    "MessageTooBig": "bad_message",
    "InvalidDataKey": "bad_message",
    "InvalidTtl": "bad_message",
    "InvalidPackageName": "bad_message",
    "InvalidParameters": "bad_message",
}
_TOO_MUCH = {"DeviceMessageRateExceeded", "TopicsMessageRateExceeded", "QuotaExceeded", "DeviceQuotaExceeded"}


def failure(outcome: Outcome) -> str:
    """The reason, of FAILURES, for which a token has failed that will not be tried again."""
    if outcome.verdict is Verdict.UNREGISTERED:
        return "unregistered"
    if outcome.condemns or outcome.reason.startswith("HTTP 4"):
        return "bad_message"
    return _REFUSALS.get(outcome.reason, "rejected")


def retry_reason(outcome: Outcome) -> str:
    """The reason, of RETRIES, for which a token is tried again."""
    if not outcome.answered:
        return "timeout" if outcome.reason == NO_ANSWER else "connection"
    if outcome.reason.endswith("to a shared request"):
        return "shared"
    if outcome.reason.startswith("HTTP 429") or outcome.reason in _TOO_MUCH:
        return "quota"
    if re.match("HTTP (5|408)", outcome.reason):
        return "unavailable"
    return "token" if outcome.reason in ("Unavailable", "InternalServerError") else "odd_answer"


class Action(enum.Enum):
    FINISH = "the token's row goes"
    RETRY = "it is ready again, later"
    BURY = "it is set aside as failed"
    RETURN = "it is ready again as if never tried"


class Step(NamedTuple):
    """`counted`: the reason, of FAILURES or RETRIES, under which it is counted."""

    action: Action
    reason: str = ""
    due_at: float = 0.0
    counted: str = ""


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 section 10.2.3: a number, or an HTTP-date), else None."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        wait = float(value[:9])
    else:
        try:
            wait = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(wait, 0.0), LONGEST_RETRY_AFTER)


def retry_delay(attempt: int, retry_after: float | None, draw: float, policy: Policy) -> float:
    """Seconds until the next attempt: a random share (`draw`, 0 to 1) of a ceiling that doubles with each attempt.

    Full jitter, so that a thousand tokens deferred by one failure do not come back as one. Never earlier than
    Retry-After, and then spread over the base so that they do not all come back at its very end.
    """
    ceiling = min(policy.retry_cap, policy.retry_base * 2.0 ** min(attempt - 1, 64))
    return draw * ceiling if retry_after is None else retry_after + draw * min(ceiling, policy.retry_base)


def next_step(outcome: Outcome, attempt: int, expires_at: float, now: float, draw: float, policy: Policy) -> Step:
    """What becomes of a token after its attempt number `attempt` ended with `outcome`."""
    if outcome.verdict in BLAMES_UPSTREAM or outcome.verdict is Verdict.RETURNED:
        return Step(Action.RETURN, outcome.reason, now)
    if outcome.verdict is not Verdict.DEFERRED:
        return Step(Action.FINISH, outcome.reason, counted=failure(outcome))
    if attempt >= policy.max_attempts:
        return Step(Action.BURY, f"{outcome.reason}, attempt {attempt} of {policy.max_attempts}", counted="attempts")
    due_at = now + retry_delay(attempt, outcome.retry_after, draw, policy)
    if due_at >= expires_at:
        return Step(Action.BURY, f"{outcome.reason}, too old for another attempt", counted="expired")
    return Step(Action.RETRY, outcome.reason, due_at, retry_reason(outcome))


class Pause(NamedTuple):
    """An upstream that is not sent to until `until`; then one token probes whether the cause is gone.

    While `probing`, `until` is when we stop waiting for the probe's end and send another.
    """

    reason: str
    began: float
    delay: float
    until: float
    probing: bool = False


# Seconds: the first pause and the longest. What nobody can reach may be back in a second; a wrong key stays wrong
# until somebody edits it, and asking too often can get a server blocked.
PAUSES = {Verdict.UNREACHABLE: (1.0, 30.0), Verdict.UPSTREAM_CONFIG: (2.0, 300.0)}


def pause(previous: Pause | None, outcome: Outcome, now: float) -> Pause:
    """The pause after an outcome that blames the upstream: it doubles when the probe that ended `previous` failed too.

    Hundreds of requests in flight fail together; only the first of them, or a later probe, changes anything.
    """
    first, longest = PAUSES[outcome.verdict]
    if previous is None:
        return Pause(outcome.reason, now, first, now + first)
    if now < previous.until and not previous.probing:
        return previous
    delay = min(max(previous.delay * 2, first), longest)
    return Pause(outcome.reason, now, delay, now + delay)


class Pace(NamedTuple):
    """How fast an upstream may be sent to: a token bucket whose rate ramps up, is halved, and recovers.

    `limit` and `rate` are messages a second, `credit` messages that may go now. `recent` is what really went, a moving
    average: halving a rate that is not used up would slow nothing down.
    """

    limit: float
    rate: float
    credit: float
    recent: float
    at: float
    slowed_at: float = 0.0


RAMP = 60.0  # seconds from a start to the full rate: Google's page on scaling FCM asks for 60 at least
FIRST_SHARE = 0.1  # of the limit, allowed at once
BURST = 0.05  # seconds' worth of messages that may go at once: smooth within the second
SLOWEST = 1.0  # messages a second
SLOW_EVERY = 1.0  # seconds: hundreds of answers say the same at once, and the rate is halved once


def start_pace(limit: float, now: float) -> Pace:
    """The pace after a start or an outage: a share of the limit, growing to all of it over RAMP seconds."""
    rate = max(SLOWEST, limit * FIRST_SHARE)
    return Pace(limit, rate, max(1.0, rate * BURST), 0.0, now)


def advance(pace: Pace, now: float) -> Pace:
    """The pace at `now`: grown by what RAMP gives for the time passed, with the credit that has come in."""
    passed = max(0.0, now - pace.at)
    rate = min(pace.limit, pace.rate + passed * pace.limit * (1 - FIRST_SHARE) / RAMP)
    credit = min(max(1.0, rate * BURST), pace.credit + passed * rate)
    return pace._replace(rate=rate, credit=credit, recent=pace.recent * 0.5**passed, at=now)


def spend(pace: Pace, count: int) -> Pace:
    """The pace after `count` messages went."""
    # Half of `recent` fades in a second, so a steady stream of r a second settles at r / ln 2.
    return pace._replace(credit=pace.credit - count, recent=pace.recent + count)


def slow_down(pace: Pace, now: float) -> Pace:
    """Half of what really went, after the upstream said it is too much; once in SLOW_EVERY seconds."""
    if 0 <= now - pace.slowed_at < SLOW_EVERY:
        return pace
    rate = max(SLOWEST, min(pace.rate, pace.recent * 0.69) / 2)
    return pace._replace(rate=rate, credit=min(pace.credit, rate * BURST), slowed_at=now)


def until_credit(pace: Pace) -> float:
    """Seconds until a message may go, and rather a handful than one."""
    return max(0.0, max(1.0, min(4.0, pace.rate * BURST)) - pace.credit) / pace.rate
