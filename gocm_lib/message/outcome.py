"""What one attempt did for one token, and the rule for what happens next to it. Pure: `now` and chance are arguments.

A dialect (gcm, fcm) turns an upstream's answer into Outcomes; `next_step` turns an Outcome into what the spool does.
Every way an attempt can end is one of the verdicts below, crashes and silence included, so nothing falls between.
"""

import enum
from collections.abc import Iterable, Sequence
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import NamedTuple

from gocm_lib.message.job import Slice

LONGEST_RETRY_AFTER = 3600.0  # seconds; an upstream that asks for a day would otherwise outlive most messages
FIRST_ANSWERS = 3  # so many tokens of a job told that its message is bad: the others need not be asked
NO_ANSWER = "no answer in time"  # the reason when the upstream was silent for too long
RATE_LIMIT_WAIT = 60.0  # seconds to wait after a 429 that does not say: what Google's quota page asks for
SECOND_LOOK = 1.0  # seconds, the base of what was refused: whether it is itself at fault is not known yet


class Verdict(enum.StrEnum):
    DELIVERED = "delivered"  # the upstream took it, perhaps naming a canonical token
    DEFERRED = "deferred"  # not now: try this token again later
    PUT_OFF = "put_off"  # not now, says the upstream of this very token
    HELD = "held"  # not now, for this device or topic has had too much: whatever is for it waits
    SHARED = "shared"  # a request that messages shared was refused: each is to be tried alone
    UNREGISTERED = "unregistered"  # the upstream says, of this very token, that it is dead
    REJECTED = "rejected"  # this message will never be taken for this token
    UPSTREAM_CONFIG = "upstream_config"  # the upstream refuses us, not the token: bad key, wrong URL, bad certificate
    UNREACHABLE = "unreachable"  # no connection could be made, so nothing was sent
    RETURNED = "returned"  # it was not sent, because of what others of its job were told


# What may be the upstream's trouble or one message's: module blame tells which.
TROUBLE = frozenset({Verdict.DEFERRED, Verdict.UPSTREAM_CONFIG, Verdict.UNREACHABLE})
# Of that, what tells for certain that the message was not taken: it may go back as if it had never been sent.
BLAMES_UPSTREAM = frozenset({Verdict.UPSTREAM_CONFIG, Verdict.UNREACHABLE})


class Outcome(NamedTuple):
    """`reason` is for people; `cause` is a word for it, of FAILURES, RETRIES, or UNAUTHORIZED; `retry_after` is in
    seconds, None when the upstream did not say.
    """

    verdict: Verdict
    reason: str = ""
    canonical: str = ""
    retry_after: float | None = None
    answered: bool = True  # there was an answer; False: the connection broke or was silent
    garbled: bool = False  # the answer does not say whether the message was taken
    condemns: bool = False  # it is about the message: every other token of the job would hear the same
    cause: str = ""

    @property
    def may_be_taken(self) -> bool:
        """Whether to send it again may be one more push on somebody's phone."""
        return self.garbled or not self.answered


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
    "target": "this device, or topic, has had too much; whatever is for it waits",
    "refused": "the upstream refused it, or could not be reached, while others got through",
    "shared": "a request that messages shared was refused; each is tried alone",
}
UNAUTHORIZED = "unauthorized"  # the upstream refuses our credential, which may be renewed
_RETRIED = {
    Verdict.PUT_OFF: "token",
    Verdict.HELD: "target",
    Verdict.SHARED: "shared",
    Verdict.UPSTREAM_CONFIG: "refused",
    Verdict.UNREACHABLE: "refused",
    Verdict.RETURNED: "refused",
}


def failure(outcome: Outcome) -> str:
    """The reason, of FAILURES, for which a token has failed that will not be tried again."""
    return outcome.cause if outcome.cause in FAILURES else "rejected"


def retry_reason(outcome: Outcome) -> str:
    """The reason, of RETRIES, for which a token is tried again."""
    return _RETRIED.get(outcome.verdict) or (outcome.cause if outcome.cause in RETRIES else "odd_answer")


def cause_of(status: int) -> str:
    """The cause that an HTTP status tells, where the upstream says nothing more."""
    if status == 429:
        return "quota"
    if status >= 500 or status == 408:
        return "unavailable"
    if status in (400, 413):
        return "bad_message"
    return UNAUTHORIZED if status == 401 else ""


class Action(enum.Enum):
    FINISH = "the token's row goes"
    RETRY = "it is ready again, later"
    BURY = "it is set aside as failed"
    RETURN = "it is ready again as if never tried"


class Step(NamedTuple):
    """`counted` is the reason, of FAILURES or RETRIES, under which it is counted."""

    action: Action
    reason: str = ""
    due_at: float = 0.0
    counted: str = ""


class Held(NamedTuple):
    """A token in a generation's hands: its number, itself, how many attempts are held against it, when its job was
    accepted, or replayed, and expires.
    """

    n: int
    token: str
    charged: int
    since: float
    expires_at: float


class Ruling(NamedTuple):
    """Whose trouble it is that a token met: how many attempts are by now `charged` to it, or whether it goes `back` as
    if it had never been sent; how many `tries` it has behind it, charged or not; until when all for its target is
    `held`.
    """

    charged: int = 0
    back: bool = False
    tries: int = 1
    held: float = 0.0


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


def spread(until: float, now: float, draw: float) -> float:
    """When something goes that had to wait until then, with others: over as long again. Else all would be too much at
    once, once more.
    """
    return until + draw * max(0.0, until - now)


def next_step(outcome: Outcome, ruling: Ruling, expires_at: float, now: float, draw: float, policy: Policy) -> Step:
    """What becomes of a token after an attempt ended with `outcome`, of which `ruling` is made."""
    if ruling.back:
        return Step(Action.RETURN, outcome.reason, now)
    if outcome.verdict is Verdict.SHARED:
        return Step(Action.RETRY, outcome.reason, now, retry_reason(outcome))
    if outcome.verdict is Verdict.HELD:
        return _later(outcome, spread(ruling.held, now, draw), expires_at)
    if outcome.verdict not in TROUBLE and outcome.verdict not in (Verdict.PUT_OFF, Verdict.RETURNED):
        return Step(Action.FINISH, outcome.reason, counted=failure(outcome))
    if ruling.charged >= policy.max_attempts:
        reason = f"{outcome.reason}, attempt {ruling.charged} of {policy.max_attempts}"
        return Step(Action.BURY, reason, counted="attempts")
    wait = outcome.retry_after
    if wait is None and retry_reason(outcome) == "quota":
        wait = RATE_LIMIT_WAIT
    if outcome.verdict is Verdict.UPSTREAM_CONFIG and not ruling.charged:
        policy = policy._replace(retry_base=min(SECOND_LOOK, policy.retry_base))
    due_at = now + retry_delay(ruling.tries, wait, draw, policy)
    if wait is None and due_at >= expires_at > now + policy.retry_base:
        due_at = now + (expires_at - now) / 2  # the back-off is ours: it must not be what ends a message
    return _later(outcome, due_at, expires_at)


def _later(outcome: Outcome, due_at: float, expires_at: float) -> Step:
    if due_at >= expires_at:
        return Step(Action.BURY, f"{outcome.reason}, too old for another attempt", counted="expired")
    return Step(Action.RETRY, outcome.reason, due_at, retry_reason(outcome))
