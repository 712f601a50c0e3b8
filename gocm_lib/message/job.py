"""Job: one message and the tokens it is for, parsed from a form or JSON, or refused with a reason. Pure.

Promises that whatever bytes arrive, the result is a Job that can be sent to every upstream, or a BadRequest that names
the field and what to do. Nothing is repaired by guessing.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

SMALL = 10  # tokens: a job with no more does not wait for larger ones
MAX_TOKEN = 4096  # bytes; today's are near 160, so this only stops nonsense
MAX_PAYLOAD = 4096  # bytes as compact JSON: Google's limit for a message's data
OTHER_FIELDS = 16  # in a form, beside its tokens: more than there are
MAX_DEPTH = 32  # of nested arrays and objects: the parser recurses, and a thread's stack is finite
MAX_VALUES = 20_000  # in a JSON text, beside its tokens: each becomes an object of 50 bytes and more
LINE_VALUES = 30  # of a line of many: what that leaves for each
MAX_LINES = 10_000  # in a body of many messages: one commit, which holds up everybody else's
MAX_TTL = 2_419_200  # seconds: four weeks, Google's limit
SHORTEST_LIFE = 10.0  # seconds; time_to_live 0 means "now or never" to Google and must survive our queue


class BadRequest(Exception):
    """A client's mistake: `error` is a sentence, `field` the field at fault, then the HTTP status; for a wrong method
    `allow` lists the right ones.
    """

    def __init__(self, error: str, field: str = "", status: int = 400, allow: str = "") -> None:
        super().__init__(error)
        self.error = error
        self.field = field
        self.status = status
        self.allow = allow


class Draft(NamedTuple):
    """What a client asks for, checked but not accepted yet. `upstream` is "" when the client leaves it to us."""

    upstream: str
    target: str  # what the tokens are: one of TARGETS
    tokens: tuple[str, ...]
    payload: dict[str, Any] | None
    options: dict[str, Any]
    template: dict[str, Any] | None  # a whole FCM v1 message


class IdempotencyKey(NamedTuple):
    """What identifies a repeated request (module idempotency): the hashes of its key and of its body."""

    key: bytes
    body: bytes


class Job(NamedTuple):
    """An accepted message. `message` is the Message without its target, as compact JSON in its dialect. A job with a
    `key` is accepted only once.
    """

    id: int
    upstream: str
    target: str
    tokens: tuple[str, ...]
    message: str
    accepted_at: float
    expires_at: float
    key: IdempotencyKey | None = None


class Run(NamedTuple):
    """Neighbouring tokens of a job that are on the same attempt: the place of the first one in its job, the number of
    the attempt (from 1), the tokens.
    """

    job: int
    first: int
    attempt: int
    tokens: Sequence[str]


class Slice(NamedTuple):
    """Claimed tokens that share one message and travel together to a sender; how many senders have died with them in
    flight; the credential to send them with. They belong to one job or, where one request serves many tokens, to
    several jobs with the same message.
    """

    upstream: str
    target: str
    message: str
    runs: list[Run]
    deaths: int = 0
    authorization: str = ""

    @property
    def job(self) -> int:
        """The slice's job, or one of them: a slice of several jobs never becomes more than one request."""
        return self.runs[0].job

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return sum([len(run.tokens) for run in self.runs])


def cut(claimed: Slice, most: int) -> Iterator[Slice]:
    """A slice cut into parts of up to `most` tokens."""
    if claimed.size <= most:
        yield claimed
        return
    runs: list[Run] = []
    room = most
    for job, first, attempt, tokens in claimed.runs:
        start = 0
        while start < len(tokens):
            runs.append(Run(job, first + start, attempt, tokens[start : start + room]))
            start, room = start + room, room - len(runs[-1].tokens)
            if room == 0:
                yield claimed._replace(runs=runs)
                runs, room = [], most
    if runs:
        yield claimed._replace(runs=runs)


def disk_size(job: Job) -> int:
    """Roughly how many bytes a job takes on disk: its message, and for each token a row and an index entry."""
    return len(job.message) + sum(map(len, job.tokens)) + 150 * (len(job.tokens) + 1)


def parse_id(text: str) -> int:
    """The number of a job id in the form of `format_id`. Raises BadRequest."""
    if not re.fullmatch("[0-9a-f]{16}", text) or not 0 < int(text, 16) < 1 << 62:
        raise BadRequest("a job's id is the 16 digits of X-GoCM-Job", "job")
    return int(text, 16)


def format_id(job_id: int) -> str:
    """A job id as users see it: 16 hexadecimal digits, in the order of acceptance."""
    return f"{job_id:016x}"


# ------------------------------------------------------------------------------------------------ JSON, strictly

# A string to its end, or to the text's end, or what begins, parts or ends values. The possessive *+ and an alternative
# for every way the text may end mean that a match once begun never fails: else an unclosed string would be scanned
# again from each quote.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[,\[{]|[\]}]', re.DOTALL)


def _check_structure(source: str, field: str, most: int, deepest: float = MAX_DEPTH) -> None:
    """Raise BadRequest for a JSON text that nests too deep or has more than `most` values, before any is built."""
    openings = source.count("[") + source.count("{")
    if openings <= deepest and openings + source.count(",") <= most:
        return
    depth = values = 0
    for match in _STRUCTURE.finditer(source):
        first = match[0][0]
        if first == '"':
            continue
        if first in "]}":
            depth -= 1
            continue
        values += 1
        depth += first != ","
        if depth > deepest:
            raise BadRequest(f"{field or 'the body'} nests deeper than {MAX_DEPTH} levels", field)
        if values > most:
            raise BadRequest(f"{field or 'the body'} has more than {most} values", field, 413)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads and json.dumps make one for each call that is given options.
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_json(source: str, field: str, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text. Raises BadRequest when it is not JSON, nests too deep, has too many values, repeats a
    name, or is not Unicode.
    """
    _check_structure(source, field, most)
    try:
        return _DECODER.decode(source)
    except ValueError as error:  # JSONDecodeError is one; a number of 5,000 digits is another
        raise BadRequest(f"{field or 'the body'} is not valid JSON: {error}", field) from None


def compact(value: Any, field: str) -> str:
    """A JSON value as compact text. Raises BadRequest for what JSON cannot hold: half a surrogate, infinity."""
    try:
        result = _ENCODER.encode(value)
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
    """A field that GCM calls an option: how it is read from a form, and what values it may have."""

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
# A message goes to one of these. The first two may be many: each is a row in the spool like a token.
TARGETS = {"tokens": "token", "fid": "fid", "topic": "topic", "condition": "condition"}
FIELDS = (*TARGETS, "payload", "upstream", "message", *OPTIONS)
_TOPIC = re.compile("[a-zA-Z0-9_.~%-]{1,900}")
PLAIN = {"topic", "condition", "upstream", *(name for name, option in OPTIONS.items() if option.plain)}


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


def _form_fields(body: bytes, max_tokens: int) -> dict[str, Any]:
    """The fields of application/x-www-form-urlencoded, as JSON would have given them."""
    if body.count(b"&") >= max_tokens + OTHER_FIELDS:
        raise BadRequest(f"more than {max_tokens + OTHER_FIELDS} fields", status=413)
    found: dict[str, Any] = {}
    for pair in body.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        name = _known(_unquote(raw_name, ""))
        value = _unquote(raw_value, name)
        if name in ("tokens", "fid"):
            found.setdefault(name, []).append(value)
        elif name in found:
            raise BadRequest(f"{name} is given twice", name)
        elif name in PLAIN:
            found[name] = value
        elif not value:
            raise BadRequest(f"{name} is empty", name)
        else:
            found[name] = read_json(value, name)
    return found


def _json_fields(body: bytes, max_tokens: int) -> dict[str, Any]:
    try:
        source = body.decode()
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    found = read_json(source, "", max_tokens + MAX_VALUES)
    if not isinstance(found, dict):
        raise BadRequest('the body must be a JSON object: {"tokens": [...], "payload": {...}}')
    for name in found:
        _known(name)
    return found


def _check_target(found: dict[str, Any], max_tokens: int) -> tuple[str, tuple[str, ...]]:
    """The target of the message: its kind, and the tokens, ids, topic or condition."""
    given = [name for name in TARGETS if name in found]
    if len(given) > 1:
        raise BadRequest(f"give {given[0]} or {given[1]}, not both", given[1])
    name = given[0] if given else "tokens"
    values = found.get(name)
    if name == "topic" and not (isinstance(values, str) and _TOPIC.fullmatch(values)):
        raise BadRequest("a topic is a name of letters, digits and -_.~%, without /topics/ before it", "topic")
    if name in ("topic", "condition") or (name == "fid" and isinstance(values, str)):
        values = [values]
    return TARGETS[name], _check_tokens(values, name, max_tokens)


def _check_tokens(tokens: Any, field: str, max_tokens: int) -> tuple[str, ...]:
    what = "token" if field == "tokens" else field
    if not tokens:
        raise BadRequest("no tokens: give at least one device token", field)
    if not isinstance(tokens, list):
        raise BadRequest(f"{field} must be a list of texts", field)
    if len(tokens) > max_tokens:
        what_fits = f"more than {max_tokens} of them" if max_tokens else "no more fits into one call"
        raise BadRequest(f"{what_fits}: send them in several calls", field, 413)
    for place, token in enumerate(tokens):
        if not isinstance(token, str):
            raise BadRequest(f"{what} number {place + 1} is not a text", field)
        if not token:
            raise BadRequest(f"{what} number {place + 1} is empty", field)
        if field != "condition" and " " in token:
            raise BadRequest(f"{what} number {place + 1} has a space: + stands for one in a form, send %2B", field)
        # Not printable are control characters and halves of surrogate pairs, which JSON can write and UTF-8 cannot.
        if not token.isprintable():
            raise BadRequest(f"{what} number {place + 1} has a control character", field)
        if len(token) > MAX_TOKEN or len(token.encode()) > MAX_TOKEN:
            raise BadRequest(f"{what} number {place + 1} is longer than {MAX_TOKEN} bytes", field)
    return tuple(tokens)


def _check_payload(found: dict[str, Any]) -> dict[str, Any] | None:
    payload = found.get("payload")
    if payload is None:
        if "message" in found and "payload" not in found:
            return None
        raise BadRequest("payload is missing: give a JSON object", "payload")
    if not isinstance(payload, dict):
        raise BadRequest("payload must be a JSON object", "payload")
    if len(compact(payload, "payload").encode()) > MAX_PAYLOAD:
        raise BadRequest(f"payload is longer than {MAX_PAYLOAD} bytes as JSON, which is Google's limit", "payload")
    return payload


def _check_options(found: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in found.items() if name in OPTIONS}
    for name, value in given.items():
        if not OPTIONS[name].valid(value):
            raise BadRequest(f"{name} must be {OPTIONS[name].must}", name)
        if len(compact(value, name).encode()) > MAX_PAYLOAD:
            raise BadRequest(f"{name} is longer than {MAX_PAYLOAD} bytes as JSON", name)
    return given


READERS = {"application/x-www-form-urlencoded": _form_fields, "application/json": _json_fields}
FORM = "application/x-www-form-urlencoded"
LINES = "application/x-ndjson"  # many messages in one body, each a line of JSON


def media_type(content_type: str) -> str:
    """A Content-Type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def parse(content_type: str, body: bytes, max_tokens: int) -> Draft:
    """The Draft that a POST to /gcm/send asks for. Raises BadRequest: 415 for another content type, 413 for too many
    tokens.
    """
    reader = READERS.get(media_type(content_type))
    if reader is None:
        raise BadRequest("Content-Type must be " + " or ".join([*READERS, LINES]), "Content-Type", 415)
    if b"\0" in body:
        raise BadRequest("the body has a NUL byte")
    return _draft(reader(body, max_tokens), max_tokens)


def parse_lines(body: bytes, max_tokens: int) -> list[Draft | BadRequest]:
    """For each line of application/x-ndjson the Draft that it asks for, or the BadRequest that refuses it. `most` is
    how many tokens all lines may have together.
    """
    if b"\0" in body:
        raise BadRequest("the body has a NUL byte")
    if body.count(b"\n") > MAX_LINES:  # each costs memory and an answer, even an empty one
        raise BadRequest(f"more than {MAX_LINES} lines: send them in several calls", status=413)
    lines = body.removesuffix(b"\n").split(b"\n")
    # How deep is each line's own matter: what one leaves open is not the next one's.
    _check_structure(body.decode("latin-1"), "", max_tokens + MAX_VALUES + LINE_VALUES * len(lines), math.inf)
    drafts: list[Draft | BadRequest] = []
    left = max_tokens
    for line in lines:
        try:
            draft = _draft(_json_fields(line, left), left)
            drafts.append(draft)
            left -= len(draft.tokens)
        except BadRequest as problem:
            # As it is, its traceback holds this very list: memory that only the garbage collector frees.
            drafts.append(BadRequest(problem.error, problem.field, problem.status))
    return drafts


def _draft(found: dict[str, Any], max_tokens: int) -> Draft:
    upstream, template = found.get("upstream", ""), found.get("message")
    if not isinstance(upstream, str):
        raise BadRequest("upstream must be a text", "upstream")
    target, tokens = _check_target(found, max_tokens)
    if not (template is None or isinstance(template, dict)):
        raise BadRequest("message must be a JSON object", "message")
    return Draft(upstream, target, tokens, _check_payload(found), _check_options(found), template)


def accept(
    draft: Draft,
    *,
    job_id: int,
    upstream: str,
    message: str,
    now: float,
    max_age: float,
    key: IdempotencyKey | None = None,
) -> Job:
    """The Job of a draft that is accepted at `now`, with the message in its upstream's dialect."""
    life = min(max_age, max(draft.options.get("time_to_live", max_age), SHORTEST_LIFE))
    return Job(job_id, upstream, draft.target, draft.tokens, message, now, now + life, key)
