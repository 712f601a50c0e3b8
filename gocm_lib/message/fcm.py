"""The FCM HTTP v1 dialect: writes Messages for the tokens of a job, reads an answer into one Outcome. Pure.

Obeys firebase.google.com's reference of projects.messages:send and its error codes. One request per token. The most
important rule: a token is UNREGISTERED only when an FcmError detail says so. A bare 404 means a wrong URL or project,
and reading it as an unregistered token would wipe the token table of every application that trusts the report.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gocm_lib.message import platforms, v1_schema
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Draft, Run, Slice, check_weight, weigh
from gocm_lib.message.outcome import Outcome, Verdict, cause_of, of_no_token, readable
from gocm_lib.message.retry import RATE_LIMIT_WAIT, parse_retry_after
from gocm_lib.message.strict_json import compact

NAME = "fcm"
TOKENS_PER_REQUEST = 1

# ---------------------------------------------------------------------------------------------------- the request


def message(draft: Draft, now: float) -> str:
    """The Message for a draft without its target, as compact JSON. Raises BadRequest for what FCM would refuse."""
    merged = v1_schema.read(draft.template) if draft.template else {}
    merged.pop("name", None)  # output only
    if draft.payload is not None:
        if "data" in merged:
            raise BadRequest("give the data in payload or in message, not in both", "payload")
        merged["data"] = {name: as_text(value) for name, value in draft.payload.items()}
    merged = platforms.fill(merged, draft.options, now)
    if "android" in merged and "android_v2" in merged:
        raise BadRequest("FCM takes android or android_v2 in message, not both; options mean android", "message")
    _check_data(merged, "message" if draft.payload is None else "payload")
    # "message" goes last: the target is spliced in before the two closing braces.
    envelope = {"validate_only": True} if draft.options.get("dry_run") else {}
    written = compact({**envelope, "message": merged}, "message")
    if draft.template:  # else it was weighed before: as texts the values are as long as they were
        check_weight(weigh(merged.get("data", {})) + weigh(merged.get("notification", {})), draft.target)
        for place, size in platforms.weights(merged):
            check_weight(size, draft.target, place)
    return written


def as_text(value: Any) -> str:
    """A payload's value as a text, the only type that v1 takes: a text stays as it is, all else becomes its JSON."""
    return value if isinstance(value, str) else compact(value, "payload")


def _check_data(message: Mapping[str, Any], field: str) -> None:
    for part in (message, *(message[name] for name in ("android", "android_v2", "webpush") if name in message)):
        for name in part.get("data", ()):
            if name in ("from", "message_type") or name.startswith(("google.", "gcm.notification.")):
                raise BadRequest(f"the key {name[:64]} is reserved by FCM", field)


def requests(claimed: Slice) -> Iterator[tuple[Slice, bytes]]:
    """One request for each token of the slice. The Message is rendered once; only the target differs."""
    upstream, target, message, runs, deaths, authorization, awaited = claimed
    quote = json.JSONEncoder(ensure_ascii=False).encode
    before = message[:-2]
    before += f'"{target}":' if before.endswith("{") else f',"{target}":'
    for job, first, attempt, tokens in runs:
        for n, token in enumerate(tokens, first):
            part = Slice(upstream, target, message, [Run(job, n, attempt, (token,))], deaths, authorization, awaited)
            yield part, (before + quote(token) + "}}").encode()


# ----------------------------------------------------------------------------------------------------- the answer


def outcomes(part: Slice, status: int, headers: Mapping[str, str], body: bytes, now: float) -> list[Outcome]:
    """The Outcome of the one token of a request, from its answer. Header names are in lower case."""
    outcome = _judge(status, headers, body, now)
    if outcome.verdict is Verdict.HELD and part.target != "token":
        outcome = outcome._replace(retry_after=max(RATE_LIMIT_WAIT, outcome.retry_after or 0.0))
    return [of_no_token(outcome) if part.target in ("topic", "condition") else outcome]


def _judge(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Outcome:
    if status == 200:
        return _judge_sent(body)
    codes, fields, retry_delay, text = _parse_error(body)
    reason = f"HTTP {status}" + (f" {sorted(codes)[0]}" if codes else "")
    retry_after = parse_retry_after(headers.get("retry-after"), now)
    if retry_after is None:
        retry_after = retry_delay
    match status:
        case 400:
            return _judge_bad_request(fields, text)
        case 401 if "THIRD_PARTY_AUTH_ERROR" in codes:  # the application's APNs or web push key, for this device only
            return Outcome(Verdict.REJECTED, "THIRD_PARTY_AUTH_ERROR", cause="third_party_auth")
        case 403 if "SENDER_ID_MISMATCH" in codes:
            return Outcome(Verdict.REJECTED, "SENDER_ID_MISMATCH", cause="wrong_sender")
        case 404 if "UNREGISTERED" in codes:
            return Outcome(Verdict.UNREGISTERED, "UNREGISTERED", cause="unregistered")
        case 429 if "QUOTA_EXCEEDED" in codes:  # the device's or the topic's; the project's comes without FCM's word
            return Outcome(Verdict.HELD, reason, retry_after=retry_after)
    if status >= 500 or status in (408, 429) or 200 <= status < 300:
        garbled = status < 300
        return Outcome(Verdict.DEFERRED, reason, retry_after=retry_after, garbled=garbled, cause=cause_of(status))
    if status == 413:
        return Outcome(Verdict.REJECTED, reason, rejects_message=True, cause=cause_of(status))
    # 401, 403, 404 without a word of FCM's about the token, and redirects: credentials, project, URL.
    return Outcome(Verdict.UPSTREAM_CONFIG, reason, cause=cause_of(status))


def _judge_bad_request(fields: list[str], text: str) -> Outcome:
    """A 400 is about the token only when it says so: an oversize payload carries the same INVALID_ARGUMENT."""
    if fields and all(field in ("message.token", "message.fid") for field in fields):
        return Outcome(Verdict.REJECTED, "invalid token", cause="invalid_token")
    if not fields and "not a valid FCM registration token" in text:
        return Outcome(Verdict.REJECTED, "invalid token", cause="invalid_token")
    reason = f"bad payload: {fields[0]}" if fields else "bad payload"
    return Outcome(Verdict.REJECTED, reason, rejects_message=True, cause="bad_message")


_SENT = re.compile(
    rb'[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*"([ !#-\[\]-~]*)"[ \t\r\n]*\}[ \t\r\n]*'
)  # no escapes, ASCII


def _judge_sent(body: bytes) -> Outcome:
    """A 200 says that the message was taken only with the name that it was given."""
    plain = _SENT.fullmatch(body)  # as nearly always; JSON's parser takes three times as long for the same
    if plain:
        return Outcome(Verdict.DELIVERED, receipt=readable(plain[1].decode("ascii")))
    try:
        name = json.loads(body.decode())["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str):
        return Outcome(Verdict.DEFERRED, "answer without name", garbled=True)
    return Outcome(Verdict.DELIVERED, receipt=readable(name))


def _parse_error(body: bytes) -> tuple[set[str], list[str], float | None, str]:
    """FcmError codes, violated fields, RetryInfo's delay and message of a google.rpc.Status; all empty for anything
    else.
    """
    try:
        error = json.loads(body)["error"]
        details = error.get("details")
        text = error.get("message")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set(), [], None, ""
    codes: set[str] = set()
    fields: list[str] = []
    delay: float | None = None
    for detail in details if isinstance(details, list) else []:
        kind = detail.get("@type") if isinstance(detail, dict) else None
        if not isinstance(kind, str):
            continue
        if kind.endswith("/google.firebase.fcm.v1.FcmError") and _is_word(detail.get("errorCode")):
            codes.add(detail["errorCode"])
        elif kind.endswith("/google.rpc.BadRequest"):
            violations = detail.get("fieldViolations")
            for violation in violations if isinstance(violations, list) else []:
                field = violation.get("field") if isinstance(violation, dict) else None
                fields.append(field if isinstance(field, str) and _is_word(field) else "?")
        elif kind.endswith("/google.rpc.RetryInfo"):
            delay = _seconds(detail.get("retryDelay"))
    return codes, fields, delay, text if isinstance(text, str) else ""


def _is_word(value: object) -> bool:
    """Whether a text may stand in our log: an error code or a field's name, never the upstream's free text."""
    return isinstance(value, str) and re.fullmatch(r"[\w.\[\]-]{1,64}", value, re.ASCII) is not None


def _seconds(duration: object) -> float | None:
    """The seconds of a protobuf Duration in JSON, like "3.5s", within bounds."""
    if not isinstance(duration, str) or not duration.endswith("s"):
        return None
    whole, _, part = duration[:-1].partition(".")
    if not (whole.isascii() and whole.isdigit() and (not part or (part.isascii() and part.isdigit()))):
        return None
    return parse_retry_after(str(int(whole[:9]) + bool(part.strip("0"))), 0.0)
