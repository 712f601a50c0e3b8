"""Google's legacy protocol as its clients speak it to us: what they ask for, and what became of it in Google's words.

Obeys the reference (firebase.google.com/docs/cloud-messaging/http-server-ref): JSON with `to`, `registration_ids` or
`condition`, or the older form with `registration_id` and `data.NAME`; fields that it does not know are ignored, as
there. Promises a result for each token, in the order of the tokens, and that a token of which nothing is known yet
counts as sent: it is on disk, and a client that is told otherwise sends it again. Pure.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from gocm_lib.message import platforms
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import FORM, OPTIONS, TooHeavy, media_type
from gocm_lib.message.strict_json import MAX_VALUES, read_json

MOST = 1000  # tokens in a request
OURS = {"payload", "message", "tokens"}  # fields of our own API, which knows `condition` as well
JSON, TEXT = "application/json; charset=UTF-8", "text/plain; charset=UTF-8"
# Our words for why a token failed, and theirs. What is not here may be tried again, as far as a client knows.
WORDS = {
    "unregistered": "NotRegistered",
    "invalid_token": "InvalidRegistration",
    "wrong_sender": "MismatchSenderId",
    "third_party_auth": "InvalidApnsCredential",
    "bad_message": "InvalidParameters",
    "rejected": "InvalidParameters",
}
OTHER = "InternalServerError"
_OF_FIELD = {
    "tokens": "InvalidRegistration",
    "topic": "InvalidRegistration",
    "time_to_live": "InvalidTtl",
    "restricted_package_name": "InvalidPackageName",
}


class Asked(NamedTuple):
    """What a client asks for: the fields as our own API has them, how many tokens (1 for a topic or a condition, which
    `is_topic` says), and whether it is to be told in the form of before JSON.
    """

    fields: dict[str, Any]
    size: int
    is_topic: bool
    plain: bool


class Result(NamedTuple):
    """What became of a token: the upstream's id, "" for none; the token to use instead; or why it failed ("": it did
    not), with the upstream's own word.
    """

    receipt: str = ""
    canonical: str = ""
    failure: str = ""
    detail: str = ""


def speaks(headers: Mapping[str, str], body: bytes) -> bool:
    """Whether a request to our own address is one of this protocol: it has a key as Google's clients give it, and their
    fields.
    """
    if not headers.get("authorization", "").startswith("key="):
        return False
    if media_type(headers.get("content-type", "")) == FORM:
        return bool(re.search(rb"(?:^|&)registration_id=", body))
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    names = found.keys() if isinstance(found, dict) else set()
    return bool(names & {"to", "registration_ids", "notification_key"}) or ("condition" in names and not names & OURS)


def read(content_type: str, body: bytes) -> Asked:
    """What a request asks for. Raises BadRequest with Google's text: 400."""
    plain = media_type(content_type) in (FORM, "") and not body.lstrip().startswith(b"{")
    found = _form(body) if plain else _json(body)
    tokens, to = found.get("registration_ids"), found.get("to") or found.get("notification_key")
    condition = found.get("condition")
    if tokens is not None and not isinstance(tokens, list):
        raise BadRequest('"registration_ids" field is not a JSON array')
    if not all(isinstance(token, str) for token in tokens or ()):
        raise BadRequest('JSON_TYPE_ERROR: "registration_ids" must have texts only')
    if to is not None and not isinstance(to, str):
        raise BadRequest('Field "to" must be a JSON string')
    if sum([bool(given) for given in (tokens, to, condition)]) > 1:
        raise BadRequest('Must use either "registration_ids" field or "to", not both')
    if tokens and len(tokens) > MOST:
        raise BadRequest(f"Number of messages on bulk exceeds maximum allowed ({MOST})")
    fields: dict[str, Any] = {"payload": found.get("data") or {}, "skip_invalid": True, **_options(found)}
    if not isinstance(fields["payload"], dict):
        raise BadRequest('JSON_TYPE_ERROR: "data" must be an object')
    if condition:
        return Asked({**fields, "condition": condition}, 1, True, plain)
    if to and to.startswith("/topics/"):
        return Asked({**fields, "topic": to.removeprefix("/topics/")}, 1, True, plain)
    tokens = [to] if to else tokens or []
    return Asked({**fields, "tokens": tokens}, len(tokens), False, plain)


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = read_json(body.decode(), "", MOST + MAX_VALUES)
    except (UnicodeDecodeError, BadRequest) as problem:
        why = problem.error if isinstance(problem, BadRequest) else "not UTF-8"
        raise BadRequest(f"JSON_PARSING_ERROR: {why}") from None
    if not isinstance(found, dict):
        raise BadRequest("JSON_PARSING_ERROR: not an object")
    return found


def _form(body: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MOST)
    except (UnicodeDecodeError, ValueError):
        raise BadRequest("the form cannot be read") from None
    found: dict[str, Any] = {name: value for name, value in pairs if not name.startswith("data.")}
    found["data"] = {name.removeprefix("data."): value for name, value in pairs if name.startswith("data.")}
    found["to"] = found.pop("registration_id", "")
    return found


def _options(found: Mapping[str, Any]) -> dict[str, Any]:
    """The options, in the types that they have: some clients write numbers and truths as text, and priorities in
    capitals. Of a notification what is known.
    """
    given = {name: found[name] for name in OPTIONS if found.get(name) is not None}
    if isinstance(seconds := given.get("time_to_live"), str) and re.fullmatch("[0-9]{1,9}", seconds):
        given["time_to_live"] = int(seconds)
    if isinstance(priority := given.get("priority"), str):
        given["priority"] = priority.lower()
    for name in ("content_available", "mutable_content", "dry_run"):
        if (spelt := str(given.get(name, "")).lower()) in ("true", "1", "false", "0"):
            given[name] = spelt in ("true", "1")
    if isinstance(shown := given.get("notification"), dict):
        given["notification"] = {name: value for name, value in shown.items() if name in platforms.NOTIFICATION}
    return given


# ------------------------------------------------------------------------------------------------------- the answer


def refusal(asked: Asked, problem: BadRequest) -> tuple[int, str, bytes]:
    """The answer when the message cannot be one: its status, type and body."""
    word = "MessageTooBig" if isinstance(problem, TooHeavy) else _OF_FIELD.get(problem.field, "")
    if not asked.size:
        word = "MissingRegistration"
    if not word:
        return 400, TEXT, problem.error.encode()
    results = [{"error": word}] * max(1, asked.size)
    return _written(asked, 0, results)


def answer(asked: Asked, job: int, results: Mapping[int, Result], invalid: Iterable[int]) -> tuple[int, str, bytes]:
    """The answer for a message that is on disk as this job: what became of its tokens by their places, as far as that
    is known, and which places had no token.
    """
    told = [_result(results.get(n, Result()), f"0:{job:x}%{n:x}") for n in range(asked.size)]
    for place in invalid:
        told[place] = {"error": WORDS["invalid_token"]}
    return _written(asked, job, told)


def _result(result: Result, name: str) -> dict[str, str]:
    if result.failure:
        own_word = re.fullmatch("[A-Z][A-Za-z]{5,40}", result.detail)
        usual = WORDS.get(result.failure, OTHER)
        return {"error": result.detail if own_word and usual == "InvalidParameters" else usual}
    told = {"message_id": result.receipt.rpartition("/")[2] or name}
    return told | {"registration_id": result.canonical} if result.canonical else told


def _written(asked: Asked, job: int, results: Sequence[Mapping[str, str]]) -> tuple[int, str, bytes]:
    number = job >> 8 & 0x7FFFFFFF  # below 2^31: what clients with small integers can read
    first = results[0]
    if asked.plain:
        lines = [f"Error={first['error']}"] if "error" in first else [f"id={first['message_id']}"]
        lines += [f"registration_id={first['registration_id']}"] if "registration_id" in first else []
        return 200, TEXT, "".join(f"{line}\n" for line in lines).encode()
    if asked.is_topic:
        return 200, JSON, json.dumps(first if "error" in first else {"message_id": number}).encode()
    failures = sum("error" in each for each in results)
    told = {
        "multicast_id": number,
        "success": len(results) - failures,
        "failure": failures,
        "canonical_ids": sum("registration_id" in each for each in results),
        "results": results,
    }
    return 200, JSON, json.dumps(told).encode()
