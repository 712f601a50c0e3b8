"""What happens to a token after an attempt, and how long anything of ours backs off. Pure: `now` and chance are
arguments.
"""

import enum
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from gocm_lib.message.outcome import TROUBLE, Outcome, Verdict, failure, retry_reason

LONGEST_RETRY_AFTER = 3600.0  # seconds; an upstream that asks for a day would otherwise outlive most messages
RATE_LIMIT_WAIT = 60.0  # seconds to wait after a 429 that does not say: what Google's quota page asks for
SECOND_LOOK = 1.0  # seconds, the base of what was refused: whether it is itself at fault is not known yet


def backoff(failures: int, first: float, longest: float, draw: float = 1.0) -> float:
    """Seconds to wait after this many failures in a row: `first`, doubled with each failure, up to `longest`. `draw`,
    from 0 to 1, is the share of that to wait, so that those who failed together do not come back together.
    """
    return draw * min(longest, first * 2.0 ** min(failures - 1, 64))


class Policy(NamedTuple):
    """How long to go on trying. `retry_base` and `retry_cap` are seconds."""

    retry_base: float
    retry_cap: float
    max_attempts: int


class Action(enum.Enum):
    """What becomes of a token's row in the spool."""

    FINISH = "the token's row goes"
    RETRY = "it is ready again, later"
    SET_ASIDE = "it is set aside as failed"
    RETURN = "it is ready again as if never tried"


class Step(NamedTuple):
    """The Action for a token, and why: for people (`reason`) and for counting (`counted`, of FAILURES or RETRIES)."""

    action: Action
    reason: str = ""
    due_at: float = 0.0
    counted: str = ""


class Held(NamedTuple):
    """A token in a generation's hands: its place in the job, the token itself, how many attempts are charged to it,
    when its job was accepted or replayed, and when it expires.
    """

    n: int
    token: str
    charged: int
    since: float
    expires_at: float


class Ruling(NamedTuple):
    """Whose fault the trouble of a token is. `charged`: how many attempts count against it by now. `back`: it returns
    as if it had never been sent. `tries`: how many attempts it has had, charged or not. `held`: until when everything
    for its target must wait.
    """

    charged: int = 0
    back: bool = False
    tries: int = 1
    held: float = 0.0


def parse_retry_after(value: str | None, now: float) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110 section 10.2.3: a number or an HTTP-date), else None."""
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
    """Seconds until the next attempt: the share `draw`, from 0 to 1, of a ceiling that doubles with each attempt.

    Full jitter, so that a thousand tokens deferred by one failure do not come back at once. Never earlier than
    Retry-After; then the retries are spread over the base, so that they do not all come at its end.
    """
    if retry_after is None:
        return backoff(attempt, policy.retry_base, policy.retry_cap, draw)
    return retry_after + draw * min(policy.retry_base, policy.retry_cap)


def spread(until: float, now: float, draw: float) -> float:
    """The time for one of many that all had to wait `until` then: spread over as long again. All at once would be too
    much once more.
    """
    return until + draw * max(0.0, until - now)


def next_step(outcome: Outcome, ruling: Ruling, expires_at: float, now: float, draw: float, policy: Policy) -> Step:
    """What becomes of a token after an attempt that ended with `outcome`, about which `ruling` was made."""
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
        return Step(Action.SET_ASIDE, reason, counted="attempts")
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
        return Step(Action.SET_ASIDE, f"{outcome.reason}, too old for another attempt", counted="expired")
    return Step(Action.RETRY, outcome.reason, due_at, retry_reason(outcome))
