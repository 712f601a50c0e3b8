"""Job: one message and the tokens it is for; parsed from a form or JSON, or refused with a reason. Pure.

Promises that whatever bytes arrive, the result is a Job that every upstream can be sent, or a BadRequest that names
the field and what to do. Nothing is repaired by guessing.
"""

import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

MAX_TOKEN = 4096  # bytes; today's are near 160, so this only stops nonsense
MAX_PAYLOAD = 4096  # bytes as compact JSON: Google's limit for a message's data
MAX_TOKENS = 100_000  # in one call
MAX_FIELDS = MAX_TOKENS + 16
MAX_DEPTH = 32  # of nested arrays and objects: the parser recurses, and a thread's stack is finite
MAX_TTL = 2_419_200  # seconds: four weeks, Google's limit
SHORTEST_LIFE = 10.0  # seconds; time_to_live 0 means "now or never" to Google and must survive our queue


class BadRequest(Exception):
    """The client's mistake, as it is told: `error` in a sentence, the `field` at fault, the HTTP status; for a wrong
    method, the methods to `allow`.
    """

    def __init__(self, error: str, field: str = "", status: int = 400, allow: str = "") -> None:
        super().__init__(error)
        self.error = error
        self.field = field
        self.status = status
        self.allow = allow


class Job(NamedTuple):
    """An accepted message. `payload` and `options` are compact JSON objects as text, ready to be put in a Message."""

    id: int
    upstream: str
    tokens: tuple[str, ...]
    payload: str
    options: str
    accepted_at: float
    expires_at: float


class Claimed(NamedTuple):
    """A token in a sender's hands: its place in its job, the token, which attempt this is (from 1)."""

    n: int
    token: str
    attempt: int


class Slice(NamedTuple):
    """The claimed tokens of one job that travel together to a sender."""

    job: int
    upstream: str
    payload: str
    options: str
    tokens: Sequence[Claimed]


def format_id(job_id: int) -> str:
    """A job id as users see it: 16 hexadecimal digits, in the order of acceptance."""
    return f"{job_id:016x}"


# ------------------------------------------------------------------------------------------------ JSON, strictly

_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|[\[{]|[\]}]', re.DOTALL)


def _nests_too_deep(source: str) -> bool:
    if source.count("[") + source.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _STRUCTURE.finditer(source):
        first = match.group()[0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif first in "]}":
            depth -= 1
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(source: str, field: str) -> Any:
    """The value of a JSON text. BadRequest when it is no JSON, nests too deep, repeats a name or is not Unicode."""
    if _nests_too_deep(source):
        raise BadRequest(f"{field or 'the body'} nests deeper than {MAX_DEPTH} levels", field)
    try:
        return json.loads(source, object_pairs_hook=_once, parse_constant=_no_constant)
    except ValueError as error:  # JSONDecodeError is one; a number of 5,000 digits is another
        raise BadRequest(f"{field or 'the body'} is not valid JSON: {error}", field) from None


def compact(value: Any, field: str) -> str:
    """A JSON value as compact text. BadRequest when it holds what JSON cannot: half a surrogate, infinity."""
    try:
        result = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        result.encode()
    except ValueError:  # UnicodeEncodeError is one
        raise BadRequest(f"{field} holds a number or character that JSON cannot carry", field) from None
    return result


# ---------------------------------------------------------------------------------------------- options, one row each


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1024 and value.isprintable()


def _ttl(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TTL


class Option(NamedTuple):
    valid: Callable[[Any], bool]
    must: str  # the end of "NAME must be ..."
    plain: bool  # a form gives it as plain text, not as JSON


OPTIONS = {
    "collapse_key": Option(_text, "a text of 1 to 1024 printable characters", True),
    "time_to_live": Option(_ttl, f"a whole number of seconds from 0 to {MAX_TTL}", False),
    "priority": Option(lambda value: value in ("normal", "high"), "normal or high", True),
    "restricted_package_name": Option(_text, "a text of 1 to 1024 printable characters", True),
    "dry_run": Option(lambda value: isinstance(value, bool), "true or false", False),
    "notification": Option(lambda value: isinstance(value, dict), "a JSON object", False),
}
FIELDS = ("tokens", "payload", *OPTIONS)


# -------------------------------------------------------------------------------------------------------- reading


def _unquote(raw: bytes, field: str) -> str:
    if b"+" in raw:
        raw = raw.replace(b"+", b" ")
    if b"%" in raw:
        if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
            raise BadRequest("broken percent-encoding: % must be followed by two hexadecimal digits", field)
        raw = unquote_to_bytes(raw)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadRequest("not valid UTF-8", field) from None


def _known(name: str) -> str:
    if name not in FIELDS:
        near = get_close_matches(name[:64], FIELDS, 1)
        hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(FIELDS)
        raise BadRequest(f"unknown field; {hint}", name[:64])
    return name


def _form_fields(body: bytes) -> dict[str, Any]:
    """The fields of application/x-www-form-urlencoded, as JSON would have given them."""
    if body.count(b"&") >= MAX_FIELDS:
        raise BadRequest(f"more than {MAX_FIELDS} fields", status=413)
    found: dict[str, Any] = {}
    tokens: list[str] = []
    for pair in body.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        if raw_name == b"tokens":
            tokens.append(_unquote(raw_value, "tokens"))
            continue
        name = _known(_unquote(raw_name, ""))
        value = _unquote(raw_value, name)
        if name == "tokens":
            tokens.append(value)
        elif name in found:
            raise BadRequest(f"{name} is given twice", name)
        elif name != "payload" and OPTIONS[name].plain:
            found[name] = value
        elif not value:
            raise BadRequest(f"{name} is empty", name)
        else:
            found[name] = read_json(value, name)
    if tokens:
        found["tokens"] = tokens
    return found


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        source = body.decode()
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    found = read_json(source, "")
    if not isinstance(found, dict):
        raise BadRequest('the body must be a JSON object: {"tokens": [...], "payload": {...}}')
    for name in found:
        _known(name)
    return found


def _check_tokens(tokens: Any) -> tuple[str, ...]:
    if not tokens:
        raise BadRequest("no tokens: give at least one device token", "tokens")
    if not isinstance(tokens, list):
        raise BadRequest("tokens must be a list of texts", "tokens")
    if len(tokens) > MAX_TOKENS:
        raise BadRequest(f"more than {MAX_TOKENS} tokens: send them in several calls", "tokens", 413)
    for place, token in enumerate(tokens):
        if not isinstance(token, str):
            raise BadRequest(f"token number {place + 1} is not a text", "tokens")
        if not token:
            raise BadRequest(f"token number {place + 1} is empty", "tokens")
        # Not printable are control characters and halves of surrogate pairs, which JSON can write and UTF-8 cannot.
        if not token.isprintable():
            raise BadRequest(f"token number {place + 1} has a control character", "tokens")
        if len(token) > MAX_TOKEN or len(token.encode()) > MAX_TOKEN:
            raise BadRequest(f"token number {place + 1} is longer than {MAX_TOKEN} bytes", "tokens")
    return tuple(tokens)


def _check_payload(payload: Any) -> str:
    if payload is None:
        raise BadRequest("payload is missing: give a JSON object", "payload")
    if not isinstance(payload, dict):
        raise BadRequest("payload must be a JSON object", "payload")
    result = compact(payload, "payload")
    if len(result.encode()) > MAX_PAYLOAD:
        raise BadRequest(f"payload is longer than {MAX_PAYLOAD} bytes as JSON, which is Google's limit", "payload")
    return result


def _check_options(found: dict[str, Any]) -> str:
    given = {name: value for name, value in found.items() if name in OPTIONS}
    for name, value in given.items():
        if not OPTIONS[name].valid(value):
            raise BadRequest(f"{name} must be {OPTIONS[name].must}", name)
        if len(compact(value, name).encode()) > MAX_PAYLOAD:
            raise BadRequest(f"{name} is longer than {MAX_PAYLOAD} bytes as JSON", name)
    return compact(given, "options") if given else "{}"


READERS = {"application/x-www-form-urlencoded": _form_fields, "application/json": _json_fields}


def parse(content_type: str, body: bytes, *, job_id: int, upstream: str, now: float, max_age: float) -> Job:
    """The Job that a POST to /gcm/send asks for. Raises BadRequest (415 for another content type, 413 for too many)."""
    reader = READERS.get(content_type.partition(";")[0].strip().lower())
    if reader is None:
        raise BadRequest("Content-Type must be " + " or ".join(READERS), "Content-Type", 415)
    if b"\0" in body:
        raise BadRequest("the body has a NUL byte")
    found = reader(body)
    tokens = _check_tokens(found.get("tokens"))
    payload = _check_payload(found.get("payload"))
    options = _check_options(found)
    life = min(max_age, max(found.get("time_to_live", max_age), SHORTEST_LIFE))
    return Job(job_id, upstream, tokens, payload, options, now, now + life)
