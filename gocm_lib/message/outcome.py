"""What one attempt did for one token. Pure.

A dialect (gcm, fcm) turns an upstream's answer into Outcomes; module retry turns an Outcome into what the spool does.
Every way an attempt can end is one of the verdicts below, crashes and silence included, so nothing falls between.
"""

import enum
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from gocm_lib.message.job import Slice

FIRST_ANSWERS = 3  # so many tokens of a job told that its message is bad: the others need not be asked
NO_ANSWER = "no answer in time"  # the reason when the upstream was silent for too long


class Verdict(enum.StrEnum):
    """How an attempt ended for one token."""

    DELIVERED = "delivered"  # the upstream took it, perhaps naming a canonical token
    DEFERRED = "deferred"  # not now: try this token again later
    PUT_OFF = "put_off"  # not now, says the upstream of this very token
    HELD = "held"  # not now, for this device or topic has had too much: whatever is for it waits
    SHARED = "shared"  # a request that messages shared was refused: each is to be tried alone
    UNREGISTERED = "unregistered"  # the upstream says, of this very token, that it is unregistered
    REJECTED = "rejected"  # this message will never be taken for this token
    UPSTREAM_CONFIG = "upstream_config"  # the upstream refuses us, not the token: bad key, wrong URL, bad certificate
    UNREACHABLE = "unreachable"  # no connection could be made, so nothing was sent
    RETURNED = "returned"  # it was not sent, because of what others of its job were told


# What may be the upstream's trouble or one message's: module blame tells which.
TROUBLE = frozenset({Verdict.DEFERRED, Verdict.UPSTREAM_CONFIG, Verdict.UNREACHABLE})
# Of that, what tells for certain that the message was not taken: it may go back as if it had never been sent.
BLAMES_UPSTREAM = frozenset({Verdict.UPSTREAM_CONFIG, Verdict.UNREACHABLE})


class Outcome(NamedTuple):
    """`reason` is for people. `cause` is a word for it: one of FAILURES or RETRIES, or UNAUTHORIZED. `retry_after` is
    in seconds, None when the upstream did not say.
    """

    verdict: Verdict
    reason: str = ""
    canonical: str = ""
    retry_after: float | None = None
    answered: bool = True  # there was an answer; False: the connection broke or was silent
    garbled: bool = False  # the answer does not say whether the message was taken
    rejects_message: bool = False  # it is about the message: every other token of the job would hear the same
    cause: str = ""
    receipt: str = ""  # the upstream's own id of the message that it took

    @property
    def may_be_taken(self) -> bool:
        """Whether the upstream may have taken the message, so that sending it again may push it twice."""
        return self.garbled or not self.answered


DELIVERED = Outcome(Verdict.DELIVERED)


class Result(NamedTuple):
    """The Outcome of one attempt, addressed to its token: job id, place in the job, number of the attempt. It holds for
    `span` tokens of the job from that place on. The upstream's ids of what it took, in which they differ, are in
    `receipts` instead: one for each token, or none.
    """

    upstream: str
    job: int
    n: int
    attempt: int
    outcome: Outcome
    span: int = 1
    receipts: tuple[str, ...] = ()


def address(part: Slice, outcomes: Sequence[Outcome]) -> list[Result]:
    """The outcomes of a slice's tokens as Results. Neighbours with equal outcomes share one."""
    results: list[Result] = []
    place = 0
    for job, first, attempt, tokens in part.runs:
        if len(tokens) == 1:  # as nearly always, but in multicasts
            outcome = outcomes[place]
            receipts: tuple[str, ...] = (outcome.receipt,) if outcome.receipt else ()
            results.append(Result(part.upstream, job, first, attempt, _without_receipt(outcome), 1, receipts))
            place += 1
            continue
        for outcome, alike in groupby(outcomes[place : place + len(tokens)], _without_receipt):
            there = list(alike)
            results.append(Result(part.upstream, job, first, attempt, outcome, len(there), _receipts(there)))
            first += len(there)
        place += len(tokens)
    return results


def _receipts(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    return tuple([outcome.receipt for outcome in outcomes]) if any(outcome.receipt for outcome in outcomes) else ()


def _without_receipt(outcome: Outcome) -> Outcome:
    if not outcome.receipt:
        return outcome
    return Outcome(Verdict.DELIVERED, canonical=outcome.canonical) if outcome.canonical else DELIVERED


def join(results: Iterable[Result]) -> list[Result]:
    """The same Results, with neighbours that have equal outcomes merged. Each had a request of its own, and the answers
    came in any order.
    """
    joined: list[Result] = []
    alike: list[Result] = []  # neighbours, of which the next may be one
    goes_on: tuple[object, ...] = ()  # how the next one begins if it is
    for result in sorted(results, key=lambda result: result[:3]):
        upstream, job, n, attempt, outcome, span, receipts = result
        if alike and goes_on != (upstream, job, n, attempt, outcome, not receipts):
            joined.append(_joined(alike))
            alike = []
        alike.append(result)
        goes_on = (upstream, job, n + span, attempt, outcome, not receipts)
    if alike:
        joined.append(_joined(alike))
    return joined


def _joined(alike: Sequence[Result]) -> Result:
    if len(alike) == 1:
        return alike[0]
    receipts = tuple([receipt for result in alike for receipt in result.receipts])
    return alike[0]._replace(span=sum(result.span for result in alike), receipts=receipts)


# The reasons that are counted are few and fixed, so that somebody can watch them: why tokens fail,
FAILURES = {
    "unregistered": "the upstream says that the token is not registered any more",
    "invalid_token": "what was given as a token is none",
    "wrong_sender": "the token belongs to another sender or project",
    "bad_message": "the upstream takes this message for no token",
    "third_party_auth": "the key for APNs or web push, which Google holds for the application, is refused there",
    "rejected": "the upstream refused it for another reason; the log has its word",
    "attempts": "--max-attempts were used up",
    "expired": "its time_to_live or --max-age passed before it could be sent",
    "killed_senders": "its senders, or all machines that sent it, died with it in flight",
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
    """One of FAILURES: why a token failed that will not be tried again."""
    return outcome.cause if outcome.cause in FAILURES else "rejected"


KEPT_FAILURES = ("attempts", "expired", "killed_senders")  # of these, what no answer said: the token may be replayed
# Of the others, that say that what was given as a token is none of ours: told in a list of its own.
INVALID = ("invalid_token", "wrong_sender")


def of_no_token(outcome: Outcome) -> Outcome:
    """The outcome for a topic or condition, which no token is: it cannot be an invalid or a foreign one."""
    return outcome._replace(cause="rejected") if outcome.cause in INVALID else outcome


_RECEIPT = re.compile("[!-~]{1,200}")


def readable(receipt: object) -> str:
    """An upstream's id of a message, if it may stand in our answers; else ""."""
    return receipt if isinstance(receipt, str) and _RECEIPT.fullmatch(receipt) else ""


def retry_reason(outcome: Outcome) -> str:
    """One of RETRIES: why a token is tried again."""
    return _RETRIED.get(outcome.verdict) or (outcome.cause if outcome.cause in RETRIES else "odd_answer")


def cause_of(status: int) -> str:
    """The cause that an HTTP status stands for, when the upstream says nothing more."""
    if status == 429:
        return "quota"
    if status >= 500 or status == 408:
        return "unavailable"
    if status in (400, 413):
        return "bad_message"
    return UNAUTHORIZED if status == 401 else ""
