"""The legacy GCM dialect: writes Messages for the tokens of a job, reads an answer into one Outcome per token. Pure.

Obeys the GCM HTTP reference (JSON form): up to 1,000 tokens per request, results in the order of the tokens. Promises
exactly one Outcome per token whatever status and bytes arrive, and UNREGISTERED only where the upstream said
NotRegistered of that token.
"""

import json
import re
from collections.abc import Iterator, Mapping

from gocm_lib.message import platforms
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Draft, Slice, cut
from gocm_lib.message.outcome import DELIVERED, Outcome, Verdict, cause_of, of_no_token, readable
from gocm_lib.message.retry import RATE_LIMIT_WAIT, parse_retry_after
from gocm_lib.message.strict_json import compact

NAME = "gcm"
TOKENS_PER_REQUEST = 1000

# Error words of a result, from the reference's table of downstream error codes. A word that is not here is REJECTED
# with that word as its reason: the reference calls unknown errors non-recoverable, but only NotRegistered may report
# a token as unregistered, for a wrong payload or sender must not empty anybody's token table.
ERRORS = {
    "NotRegistered": Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"),
    "Unavailable": Outcome(Verdict.PUT_OFF, "Unavailable"),
    "InternalServerError": Outcome(Verdict.PUT_OFF, "InternalServerError"),
    # "Do not immediately retry": the same wait as a 429.
    "DeviceMessageRateExceeded": Outcome(Verdict.HELD, "DeviceMessageRateExceeded", retry_after=RATE_LIMIT_WAIT),
    "TopicsMessageRateExceeded": Outcome(Verdict.HELD, "TopicsMessageRateExceeded", retry_after=RATE_LIMIT_WAIT),
    "QuotaExceeded": Outcome(Verdict.DEFERRED, "QuotaExceeded", cause="quota"),
    "DeviceQuotaExceeded": Outcome(Verdict.HELD, "DeviceQuotaExceeded", retry_after=RATE_LIMIT_WAIT),
    # Google answers this for every token since it closed the API in 2024: it says nothing of the token.
    "DeprecatedApi": Outcome(Verdict.UPSTREAM_CONFIG, "DeprecatedApi"),
}
# Why others are refused, of outcome.FAILURES.
_REFUSALS = {
    "InvalidRegistration": "invalid_token",
    "MissingRegistration": "invalid_token",
    "MismatchSenderId": "wrong_sender",
    "MessageTooBig": "bad_message",
    "InvalidDataKey": "bad_message",
    "InvalidTtl": "bad_message",
    "InvalidPackageName": "bad_message",
    "InvalidParameters": "bad_message",
}


def message(draft: Draft, now: float) -> str:
    """The Message for a draft without its target, as compact JSON. Raises BadRequest for what legacy GCM cannot do."""
    for field, given in (("fid", draft.target == "fid"), ("message", draft.template is not None)):
        if given:
            raise BadRequest(f"{field} is for upstream=fcm only", field)
    platforms.check(draft.options.get("notification", {}))
    return compact({"data": draft.payload, **draft.options}, "payload")  # the options' names are the legacy API's own


def requests(claimed: Slice) -> Iterator[tuple[Slice, bytes]]:
    """The slice cut into requests of up to 1,000 tokens, each with the Message to post as JSON bytes."""
    rest = "," + claimed.message[1:]
    if claimed.target != "token":
        [[target]] = [run.tokens for run in claimed.runs]
        to = {"to": "/topics/" + target} if claimed.target == "topic" else {"condition": target}
        yield claimed, (compact(to, claimed.target)[:-1] + rest).encode()
        return
    for part in cut(claimed, TOKENS_PER_REQUEST):
        ids = json.dumps(
            [token for run in part.runs for token in run.tokens], ensure_ascii=False, separators=(",", ":")
        )
        yield part, f'{{"registration_ids":{ids}{rest}'.encode()


def outcomes(part: Slice, status: int, headers: Mapping[str, str], body: bytes, now: float) -> list[Outcome]:
    """One Outcome for each token of a request, from its answer. Header names are in lower case."""
    if status in (400, 413) and any(run.job != part.job for run in part.runs):
        # One message of those that share this request may be at fault. They are sent again, each by itself.
        return [Outcome(Verdict.SHARED, f"HTTP {status} to a shared request")] * part.size
    if status != 200:
        return [_from_status(status, headers, now)] * part.size
    if part.target != "token":
        return [_from_topic(body)]
    return _from_results(body, part.size)


def _from_status(status: int, headers: Mapping[str, str], now: float) -> Outcome:
    reason = f"HTTP {status}"
    retry_after = parse_retry_after(headers.get("retry-after"), now)
    if status >= 500 or status in (408, 429) or 200 <= status < 300:
        garbled = status < 300
        return Outcome(Verdict.DEFERRED, reason, retry_after=retry_after, garbled=garbled, cause=cause_of(status))
    if status in (400, 413):
        return Outcome(Verdict.REJECTED, reason, cause=cause_of(status))
    # 401 and 403: the key. 404 and 3xx: the URL (today's Google answers 404 to everything). No token is to blame.
    return Outcome(Verdict.UPSTREAM_CONFIG, reason, cause=cause_of(status))


def _from_topic(body: bytes) -> Outcome:
    """A topic's or condition's answer is a single result, not a list. It never makes a token unregistered."""
    try:
        outcome = _from_result(json.loads(body))
    except (ValueError, RecursionError):
        return Outcome(Verdict.DEFERRED, "answer without result", garbled=True)
    if outcome.verdict is Verdict.UNREGISTERED:
        return outcome._replace(verdict=Verdict.REJECTED, cause="rejected")
    return of_no_token(outcome)


def _from_results(body: bytes, count: int) -> list[Outcome]:
    try:
        results = json.loads(body)["results"]
    except (ValueError, KeyError, TypeError, RecursionError):
        results = None
    if not isinstance(results, list):
        return [Outcome(Verdict.DEFERRED, "answer without results", garbled=True)] * count
    told = [_from_result(result) for result in results[:count]]
    if len(results) != count:
        # Somebody miscounted, so we cannot know which token bad news, a canonical token or an id is about. A message
        # that was taken is not sent again; whatever else was said is asked again.
        told = [DELIVERED if outcome.verdict is Verdict.DELIVERED else WRONG_COUNT for outcome in told]
        told += [WRONG_COUNT] * (count - len(told))
    return told


WRONG_COUNT = Outcome(Verdict.DEFERRED, "wrong number of results", garbled=True)


def _from_result(result: object) -> Outcome:
    if not isinstance(result, dict):
        return Outcome(Verdict.DEFERRED, "result is no object", garbled=True)
    error = result.get("error")
    if isinstance(error, str) and error:
        # Only what looks like one of the API's words: a text of the upstream's choice has no place in our log.
        word = error if re.fullmatch("[A-Za-z]{1,40}", error) else "unknown error"
        return ERRORS.get(error) or Outcome(Verdict.REJECTED, word, cause=_REFUSALS.get(word, "rejected"))
    if "message_id" not in result:
        return Outcome(Verdict.DEFERRED, "result without message_id", garbled=True)
    canonical, receipt = result.get("registration_id"), readable(str(result["message_id"]))
    if isinstance(canonical, str) and canonical and canonical.isprintable():
        return Outcome(Verdict.DELIVERED, canonical=canonical, receipt=receipt)
    return Outcome(Verdict.DELIVERED, receipt=receipt)
