"""Job: one message and the tokens it is for, parsed from a form or JSON, or refused with a reason. Pure.

Promises that whatever bytes arrive, the result is a Job that can be sent to every upstream, or a BadRequest that names
the field and what to do. Nothing is repaired by guessing.
"""

import contextlib
import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from gocm_lib.message import condition, forms
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.strict_json import MAX_VALUES, check_structure, compact, read_json

SMALL = 10  # tokens: a job with no more does not wait for larger ones
MAX_TOKEN = 4096  # bytes; today's are near 160, so this only stops nonsense
MAX_PAYLOAD = 4096  # bytes of names and values: Google's limit for data and notification together
MAX_TO_TOPIC = 2048  # the same, for a topic or condition
LINE_VALUES = 30  # of a line of many: what that leaves for each
MAX_LINES = 10_000  # in a body of many messages: one commit, which holds up everybody else's
MAX_TTL = 2_419_200  # seconds: four weeks, Google's limit
LONGEST_DELAY, LATE = 30 * 86400, 300  # seconds: how far ahead `send_at` may be, and how long over
SHORTEST_LIFE = 10.0  # seconds; time_to_live 0 means "now or never" to Google and must survive our queue


class Skip(NamedTuple):
    """Something in a list of tokens that is none and is left out: its place in the list, from 0, and what is wrong."""

    n: int
    why: str


class Draft(NamedTuple):
    """What a client asks for, checked but not accepted yet. `upstream` is "" when the client leaves it to us."""

    upstream: str
    target: str  # what the tokens are: one of TARGETS
    tokens: tuple[str, ...]
    payload: dict[str, Any] | None
    options: dict[str, Any]
    template: dict[str, Any] | None  # a whole FCM v1 message
    skipped: tuple[Skip, ...] = ()
    tag: str = ""
    send_at: float = 0.0  # seconds since 1970; 0: as soon as can be
    express: bool = False


class IdempotencyKey(NamedTuple):
    """What identifies a repeated request (module idempotency): the hashes of its key and of its body."""

    key: bytes
    body: bytes


class Job(NamedTuple):
    """An accepted message. `message` is the Message without its target, as compact JSON in its dialect. A job with a
    `key` is accepted only once. For the end of one that is `awaited` somebody waits. `by` is the name of the token that
    sent it ("": it has none). One that is to be sent later counts as `accepted_at` that time, from which it lives.
    """

    id: int
    upstream: str
    target: str
    tokens: tuple[str, ...]
    message: str
    accepted_at: float
    expires_at: float
    key: IdempotencyKey | None = None
    skipped: tuple[Skip, ...] = ()
    awaited: bool = False
    by: str = ""
    tag: str = ""
    send_at: float = 0.0
    express: bool = False

    @property
    def places(self) -> Iterable[int]:
        """The place of each token in the list that was given."""
        left_out = {skip.n for skip in self.skipped}
        whole = range(len(self.tokens) + len(left_out))
        return [place for place in whole if place not in left_out] if left_out else whole


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
    several jobs with the same message. Somebody waits for the end of those that are `awaited`.
    """

    upstream: str
    target: str
    message: str
    runs: list[Run]
    deaths: int = 0
    authorization: str = ""
    awaited: bool = False

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


NODE_BITS = 8  # of an id, for the number of the node that made it: 0 where the spool is a file
NODES = (1 << NODE_BITS) - 1  # how many a spool can have
FORMER = 1 << 56  # below it an id is of the time before that: microseconds alone


def next_id(last: int, now: float) -> int:
    """A new job id: microseconds since 1970 and the number of the node, which `last` has too. It is above `last`,
    whatever the clock says.
    """
    return max((last >> NODE_BITS) + 1, int(now * 1e6)) << NODE_BITS | last & NODES


def first_id(newest: int, node: int) -> int:
    """What `next_id` takes for the last id of a node, where the highest id of all is `newest`."""
    return (newest | NODES) ^ NODES ^ node


def job_time(job: int) -> float:
    """When a job was accepted, as its id has it (seconds since 1970)."""
    return (job if job < FORMER else job >> NODE_BITS) / 1e6


def parse_id(text: str) -> int:
    """The number of a job id in the form of `format_id`. Raises BadRequest."""
    if not re.fullmatch("[0-9a-f]{16}", text) or not 0 < int(text, 16) < 1 << 62:
        raise BadRequest("a job's id is the 16 digits of X-GoCM-Job", "job")
    return int(text, 16)


def format_id(job_id: int) -> str:
    """A job id as users see it: 16 hexadecimal digits, in the order of acceptance."""
    return f"{job_id:016x}"


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
    "content_available": Option(lambda value: isinstance(value, bool), "true or false", False),
    "mutable_content": Option(lambda value: isinstance(value, bool), "true or false", False),
    "dry_run": Option(lambda value: isinstance(value, bool), "true or false", False),
    "notification": Option(lambda value: isinstance(value, dict), "a JSON object", False),
}
# A message goes to one of these. The first two may be many: each is a row in the spool like a token.
TARGETS = {"tokens": "token", "fid": "fid", "topic": "topic", "condition": "condition"}
FIELDS = (*TARGETS, "skip_invalid", "payload", "upstream", "message", "tag", "send_at", "express", *OPTIONS)
_FIELDS = frozenset(FIELDS)
_TOPIC = re.compile("[a-zA-Z0-9_.~%-]{1,900}")
# What no registration token, installation id or topic has. Who sends such a thing means a list, or meant nothing.
_NO_TOKEN = re.compile(r"[\s\"'`\[\]{}(),;\\]|\A(?i:undefined|null|none|nil|nan)\Z")
# What every token of Firebase's looks like: one quick look says that there is nothing wrong with it.
_TOKEN = re.compile(f"[A-Za-z0-9_:-]{{20,{MAX_TOKEN}}}")
_TAG = re.compile("[A-Za-z0-9._:-]{1,64}")
# RFC 3339, section 5.6. A + in a form that is not encoded is a space.
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
LISTS = ("tokens", "fid")
_WISHES = frozenset(("tag", "send_at", "express"))
PLAIN = {
    "topic",
    "condition",
    "upstream",
    "tag",
    "send_at",
    *(name for name, option in OPTIONS.items() if option.plain),
}


# -------------------------------------------------------------------------------------------------------- reading


def _known(name: str) -> str:
    if name not in _FIELDS:
        near = get_close_matches(name[:64], FIELDS, 1)
        hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(FIELDS)
        raise BadRequest(f"unknown field; {hint}", name[:64])
    return name


def _form_fields(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a form, as JSON would have given them."""
    found: dict[str, Any] = {}
    for spelt, value in pairs:
        name = spelt
        if spelt.endswith("]"):
            given = found.get(spelt.partition("[")[0], ())
            name = forms.listed(spelt, len(given) if isinstance(given, list) else 0)
        _known(name)
        if name in LISTS:
            found.setdefault(name, []).append(value)
        elif name != spelt:
            raise BadRequest(f"{name} is no list", name)
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


def _check_target(found: dict[str, Any], max_tokens: int) -> tuple[str, tuple[str, ...], tuple[Skip, ...]]:
    """The target of the message: its kind, the tokens, ids, topic or condition, and what is none of these."""
    given = [name for name in TARGETS if name in found]
    if len(given) > 1:
        raise BadRequest(f"give {given[0]} or {given[1]}, not both", given[1])
    name = given[0] if given else "tokens"
    values = found.get(name)
    if name == "topic" and not (isinstance(values, str) and _TOPIC.fullmatch(values)):
        raise BadRequest("a topic is a name of letters, digits and -_.~%, without /topics/ before it", "topic")
    if name == "condition":
        if not isinstance(values, str):
            raise BadRequest("condition must be a text", "condition")
        condition.check(values)
    if name in ("topic", "condition") or (name == "fid" and isinstance(values, str)):
        values = [values]
    skips = found.get("skip_invalid", False)
    if not isinstance(skips, bool):
        raise BadRequest("skip_invalid must be true or false", "skip_invalid")
    return TARGETS[name], *_check_tokens(values, name, max_tokens, skips)


def _check_tokens(tokens: Any, field: str, max_tokens: int, skips: bool) -> tuple[tuple[str, ...], tuple[Skip, ...]]:
    """The tokens of a list, and what is none in it. Unless it `skips` that, or if all are none: raises BadRequest."""
    if not tokens:
        raise BadRequest("no tokens: give at least one device token", field)
    if not isinstance(tokens, list):
        raise BadRequest(f"{field} must be a list of texts", field)
    if len(tokens) > max_tokens:
        what_fits = f"more than {max_tokens} of them" if max_tokens else "no more fits into one call"
        raise BadRequest(f"{what_fits}: send them in several calls", field, 413)
    is_usual = _TOKEN.fullmatch
    wrong = [
        Skip(place, why)
        for place, token in enumerate(tokens)
        if not (isinstance(token, str) and is_usual(token)) and (why := _why_no_token(token, field))
    ]
    if wrong and not (skips and len(wrong) < len(tokens)):
        place, why = wrong[0]
        raise BadRequest(f"{'token' if field == 'tokens' else field} number {place + 1} {why}", field)
    left_out = {skip.n for skip in wrong}
    kept = [token for place, token in enumerate(tokens) if place not in left_out] if wrong else tokens
    return tuple(kept), tuple(wrong)


def _why_no_token(token: Any, field: str) -> str:
    """Why something in the list of a field is no token; "": it may be one."""
    if not isinstance(token, str):
        return "is not a text"
    if not token:
        return "is empty"
    if field != "condition" and (wrong := _NO_TOKEN.search(token)):
        return _what_it_means(wrong[0], field)
    # Not printable are control characters and halves of surrogate pairs, which JSON can write and UTF-8 cannot.
    if not token.isprintable():
        return "has a control character"
    if len(token) > MAX_TOKEN or len(token.encode()) > MAX_TOKEN:
        return f"is longer than {MAX_TOKEN} bytes"
    return ""


def _what_it_means(wrong: str, field: str) -> str:
    """What is wrong with a token that has this in it."""
    if wrong == " ":
        return "has a space: + stands for one in a form, send %2B"
    if len(wrong) > 1:
        return f"is the word {wrong}: some variable was empty"
    return f"has a {wrong} in it, which none has: give one {field}= for each, or a list in JSON"


def _check_payload(found: dict[str, Any]) -> dict[str, Any] | None:
    payload = found.get("payload")
    if payload is None:
        if "message" in found and "payload" not in found:
            return None
        raise BadRequest("payload is missing: give a JSON object", "payload")
    if not isinstance(payload, dict):
        raise BadRequest("payload must be a JSON object", "payload")
    return payload


class TooHeavy(BadRequest):
    """A message has more bytes than Google takes."""


def weigh(fields: Mapping[str, Any]) -> int:
    """The bytes of an object as Google counts them: its names and values in UTF-8, what is no text as its JSON. Raises
    BadRequest for what JSON cannot hold.
    """
    texts = [value if isinstance(value, str) else compact(value, "payload") for value in fields.values()]
    whole = "".join([*fields, *texts])
    try:
        return len(whole) if whole.isascii() else len(whole.encode())
    except UnicodeEncodeError:
        raise BadRequest("payload holds a character that JSON cannot carry", "payload") from None


def check_weight(size: int, target: str, place: str = "") -> None:
    """Raise BadRequest when data and notification, or what stands at a place of a v1 message, have more bytes than
    Google takes for that kind of target.
    """
    most = MAX_TO_TOPIC if target in ("topic", "condition") else MAX_PAYLOAD
    if size > most:
        what = f"{place} has" if place else "payload and notification have"
        raise TooHeavy(f"{what} {size} bytes; {most} is Google's limit", "message" if place else "payload")


def _check_options(found: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in found.items() if name in OPTIONS}
    for name, value in given.items():
        if not OPTIONS[name].valid(value):
            raise BadRequest(f"{name} must be {OPTIONS[name].must}", name)
    if "notification" in given:
        compact(given["notification"], "notification")
    return given


FORM = "application/x-www-form-urlencoded"
LINES = "application/x-ndjson"  # many messages in one body, each a line of JSON
TYPES = (FORM, "application/json", "multipart/form-data", LINES)
BOM = b"\xef\xbb\xbf"


def media_type(content_type: str) -> str:
    """A Content-Type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def parse(content_type: str, body: bytes, max_tokens: int) -> Draft:
    """The Draft that a POST to /gcm/send asks for. Raises BadRequest: 415 for another content type, 413 for too many
    tokens.
    """
    _check_bytes(body)
    match media_type(content_type):
        case "application/x-www-form-urlencoded":
            found = _form_fields(forms.urlencoded(body, max_tokens))
        case "multipart/form-data":
            found = _form_fields(forms.multipart(content_type, body, max_tokens))
        case "application/json":
            found = _json_fields(body, max_tokens)
        case _:
            raise BadRequest("Content-Type must be " + " or ".join(TYPES), "Content-Type", 415)
    return draft(found, max_tokens)


def _check_bytes(body: bytes) -> None:
    if b"\0" in body:
        raise BadRequest("the body has a NUL byte")
    if body.startswith(BOM):
        raise BadRequest("the body begins with a byte order mark (BOM): send it without")


def parse_lines(body: bytes, max_tokens: int) -> list[Draft | BadRequest]:
    """For each line of application/x-ndjson the Draft that it asks for, or the BadRequest that refuses it. `most` is
    how many tokens all lines may have together.
    """
    _check_bytes(body)
    if body.count(b"\n") > MAX_LINES:  # each costs memory and an answer, even an empty one
        raise BadRequest(f"more than {MAX_LINES} lines: send them in several calls", status=413)
    lines = body.removesuffix(b"\n").split(b"\n")
    # How deep is each line's own matter: what one leaves open is not the next one's.
    check_structure(body.decode("latin-1"), "", max_tokens + MAX_VALUES + LINE_VALUES * len(lines), math.inf)
    drafts: list[Draft | BadRequest] = []
    left = max_tokens
    for line in lines:
        try:
            found = draft(_json_fields(line, left), left)
            drafts.append(found)
            left -= len(found.tokens)
        except BadRequest as problem:
            # As it is, its traceback holds this very list: memory that only the garbage collector frees.
            drafts.append(BadRequest(problem.error, problem.field, problem.status))
    return drafts


def draft(found: dict[str, Any], max_tokens: int) -> Draft:
    """The Draft of a message's fields. Raises BadRequest."""
    upstream, template = found.get("upstream", ""), found.get("message")
    if not isinstance(upstream, str):
        raise BadRequest("upstream must be a text", "upstream")
    if "upstream" in found and not upstream:
        raise BadRequest("upstream is empty: leave it out for the default", "upstream")
    target, tokens, skipped = _check_target(found, max_tokens)
    if not (template is None or isinstance(template, dict)):
        raise BadRequest("message must be a JSON object", "message")
    payload, options = _check_payload(found), _check_options(found)
    weight = weigh(payload) if payload else 0
    if "notification" in options:
        weight += weigh(options["notification"])
    check_weight(weight, target)
    wishes = () if _WISHES.isdisjoint(found) else _check_wishes(found)
    return Draft(upstream, target, tokens, payload, options, template, skipped, *wishes)


def _check_wishes(found: dict[str, Any]) -> tuple[str, float, bool]:
    """The tag, when to send it, and whether before others."""
    tag, express = found.get("tag", ""), found.get("express", False)
    if "tag" in found:
        check_tag(tag)
    if not isinstance(express, bool):
        raise BadRequest("express must be true or false", "express")
    return tag, _time(found["send_at"]) if "send_at" in found else 0.0, express


def check_tag(tag: Any) -> None:
    """Raise BadRequest when this is no tag."""
    if not (isinstance(tag, str) and _TAG.fullmatch(tag)):
        raise BadRequest("a tag is 1 to 64 letters, digits and ._:-", "tag")


def _time(text: Any) -> float:
    """A time of RFC 3339, as seconds since 1970."""
    if isinstance(text, str) and _TIME.fullmatch(text):
        with contextlib.suppress(ValueError):
            return max(1.0, datetime.datetime.fromisoformat(text.upper()).timestamp())
    raise BadRequest("send_at must be a time like 2026-12-24T18:00:00Z, with its zone", "send_at")


def accept(
    draft: Draft,
    *,
    upstream: str,
    message: str,
    now: float,
    max_age: float,
    key: IdempotencyKey | None = None,
    by: str = "",
) -> Job:
    """The Job of a draft that is accepted at `now`, with the message in its upstream's dialect, from the owner of the
    token of this name. It gets its id when it is kept. Raises BadRequest when it is to be sent at an odd time.
    """
    send_at, born = 0.0, now
    if draft.send_at:
        if not now - LATE <= draft.send_at <= now + LONGEST_DELAY:
            when = "over" if draft.send_at < now else f"more than {LONGEST_DELAY // 86400} days from now"
            raise BadRequest(f"send_at is {when}", "send_at")
        if draft.send_at > now:
            send_at = born = draft.send_at
    life = min(max_age, max(draft.options.get("time_to_live", max_age), SHORTEST_LIFE))
    return Job(
        0,
        upstream,
        draft.target,
        draft.tokens,
        message,
        born,
        born + life,
        key,
        draft.skipped,
        False,
        by,
        draft.tag,
        send_at,
        draft.express,
    )
