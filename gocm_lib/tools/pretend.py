"""What the pretend GCM and FCM answer: a request and a ledger in, status and body out. No sockets.

It imports nothing from the dialects: otherwise the sandbox would share their mistakes. How a token begins decides its
fate: FATES. The bodies are in pretend_answers, what is wrong with a message in pretend_schema; access tokens, topics
and device groups have modules of their own.
"""

import functools
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from gocm_lib.front.request import Request
from gocm_lib.message.assertion import AUDIENCES, Account
from gocm_lib.tools import pretend_schema, pretend_topics
from gocm_lib.tools.lines import FAILURES, Ending
from gocm_lib.tools.pretend_answers import ANSWERS, HTML, PROJECTS, Answer, fcm, refused
from gocm_lib.tools.pretend_groups import Groups
from gocm_lib.tools.pretend_tokens import Tokens
from gocm_lib.tools.pretend_topics import Topics
from gocm_lib.tools.received import V1_PATH, Received
from gocm_lib.tools.strain import Strain


class Fate(NamedTuple):
    """How a token begins, and what becomes of it: in legacy GCM (a function of the match and of how often the token
    arrived), in FCM v1 (the name of one of ANSWERS; "": sent), and in words.
    """

    pattern: re.Pattern[str]
    legacy: Callable[[re.Match[str], int], dict[str, Any]]
    v1: str
    meaning: str


FATES = (
    Fate(re.compile(r"gone-"), lambda m, n: {"error": "NotRegistered"}, "unregistered", "unregistered: it is reported"),
    Fate(
        re.compile(r"canonical-(.*)"),
        lambda m, n: {"registration_id": "new-" + m[1]},
        "",
        "delivered; with GCM also replaced, `canonical-X` by `new-X` (FCM v1 has no such thing)",
    ),
    Fate(
        re.compile(r"flaky-(\d{1,6})-"),
        lambda m, n: {"error": "Unavailable"} if n <= int(m[1]) else {},
        "unavailable",
        "`flaky-2-X`: refused as unavailable twice, then delivered",
    ),
    Fate(
        re.compile(r"quota-"),
        lambda m, n: {"error": "DeviceMessageRateExceeded"},
        "quota_device",
        "too many messages to this device",
    ),
    Fate(re.compile(r"invalid-"), lambda m, n: {"error": "InvalidRegistration"}, "invalid_token", "no valid token"),
    Fate(
        re.compile(r"mismatch-"),
        lambda m, n: {"error": "MismatchSenderId"},
        "sender_mismatch",
        "a token of another sender",
    ),
    Fate(
        re.compile(r"error-([A-Za-z_]+)(?:-|$)"),
        lambda m, n: {"error": m[1]},
        "*",
        "`error-WORD-X`: that error word of GCM, or that one of FCM's answers by name",
    ),
)
_ANY_FATE = re.compile("|".join(fate.pattern.pattern for fate in FATES))  # most tokens have none: one look tells
SLOW = re.compile(r"slow-(\d{1,3})-")  # `slow-5-X`: answered 5 seconds later than the others


def find_fate(token: str) -> tuple[Fate, re.Match[str]] | None:
    """The fate that a token asks for, and the match; None: it asks for none."""
    for fate in FATES if _ANY_FATE.match(token) else ():
        found = fate.pattern.match(token)
        if found:
            return fate, found
    return None


TOKEN_PATHS = {urlsplit(each).path for each in AUDIENCES}
_KEY = re.compile(r"key=(?!bad)\S+")
_TO_MANY = ("topic", "condition")
_TARGETS = ("token", "fid", "topic", "condition")


class Mode:
    """How the pretend upstream behaves. POST /sandbox/mode sets every field."""

    FIELDS: dict[str, tuple[type, ...]] = {
        "latency": (int, float), "status": (int,), "retry_after": (int, str), "silent": (bool,), "close": (bool,),
        "answer": (str,), "revoke": (bool,), "token_life": (int,), "token_status": (int,), "errors": (dict,),
        "capacity": (int, float), "refusal": (str,), "device_quota": (int, float), "topic_quota": (int, float),
        "http2": (bool,), "streams": (int,), "window": (int,), "goaway": (int,), "reset": (int,),
    }  # fmt: skip

    def __init__(self, latency: float) -> None:
        self.latency: float = latency  # seconds before each answer
        self.status = 200  # other than 200: the status of every answer
        self.retry_after: int | str = ""  # with a status other than 200, or an answer
        self.silent = False  # take requests, never answer
        self.close = False  # take requests, close without an answer
        self.answer = ""  # the name of one of ANSWERS, for every FCM message
        self.revoke = False  # set: every access token given so far is refused from now on
        self.token_life = 3600  # seconds that an access token is good
        self.token_status = 200  # other than 200: the status of the token endpoints
        self.errors: dict[str, float] = {}  # share, 0 to 1, of the requests that fare so: KINDS
        self.capacity: float = 0  # messages a second that are taken; more are refused; 0: no limit
        self.refusal = "unavailable"  # how they are: one of ANSWERS
        self.device_quota: float = 0  # messages a minute that a token is sent; more: quota_device; 0: no limit
        self.topic_quota: float = 0  # the same of a topic
        self.http2 = True  # is offered to new connections; those get
        self.streams = 100  # requests at once, as many as FCM allows, and
        self.window = 1 << 20  # bytes of a request's body that they may send unasked
        self.goaway = 0  # the code of a GOAWAY, and
        self.reset = 2  # that of a reset, where `errors` has such


KINDS = {*ANSWERS, *FAILURES}  # of errors that strike here and there


_NUMBERS = {
    **dict.fromkeys(("capacity", "device_quota", "topic_quota"), 10**9),
    **dict.fromkeys(("streams", "window", "goaway", "reset"), 2**31 - 1),
}


def mistake(name: str, value: Any) -> str:
    """What is wrong with a mode's field beyond its type; "": nothing."""
    if name in _NUMBERS and not 0 <= value <= _NUMBERS[name]:
        return f"must be a number from 0 to {_NUMBERS[name]}"
    match name:
        case "answer" | "refusal" if value not in ANSWERS and (value or name == "refusal"):
            return "known are " + ", ".join(ANSWERS)
        case "latency" if not 0 <= value <= 3600:  # NaN is not, either: nothing would ever fall due
            return "must be seconds from 0 to 3600"
        case "status" | "token_status" if not 200 <= value <= 599:
            return "must be a status from 200 to 599"
        case "token_life" if not -1e9 < value < 1e9:
            return "must be a sensible number of seconds"
        case "retry_after" if not re.fullmatch("[ -~]{0,64}", str(value)):  # it becomes part of a header's line
            return "must be seconds, or a date"
        case "errors":
            if not set(value) <= KINDS:
                return "known are " + ", ".join(sorted(KINDS))
            shares = list(value.values())
            if not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares) or sum(shares) > 1:
                return "must have shares from 0 to 1, of all together at most 1"
    return ""


class Ledger:
    """What arrived, and what was taken."""

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self.in_flight = 0
        self.peak = 0
        self.tokens_given = 0
        self.arrived: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.seconds: Counter[int] = Counter()  # messages in each second of the clock
        self.last: Any = None  # the last Message

    def as_json(self) -> bytes:
        return json.dumps(vars(self)).encode() + b"\n"

    def counts(self) -> bytes:
        """The ledger without tokens: for each table, how many different ones it has."""
        short = {name: len(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return json.dumps(short).encode() + b"\n"


class Pretender:
    """The pretend services. `account` may have access tokens; with `anybody` whatever is given as a token is one; it is
    good for `any_project`, or for those whose names begin as PROJECT does.
    """

    def __init__(
        self, mode: Mode, account: Account | None = None, anybody: bool = False, any_project: bool = False
    ) -> None:
        self._tokens = Tokens(account, anybody)
        self._any_project = any_project
        self._turn = itertools.count()
        self.received = Received()
        self.reset(mode)

    def reset(self, mode: Mode) -> None:
        """Start afresh: nothing has arrived, no quota is used up, topics are empty. Access tokens stay valid."""
        self.mode = mode
        self.ledger = Ledger()
        self.received.clear()
        self._strain = Strain()
        self._topics = Topics()
        self._groups = Groups()

    def answer(self, request: Request) -> tuple[float, Ending]:
        """The seconds to wait, then what becomes of the request."""
        path, mode = request.path, self.mode
        if path in TOKEN_PATHS or path.startswith("/computeMetadata/v1/"):
            give = self._tokens.oauth if path in TOKEN_PATHS else self._tokens.metadata
            answer = give(request, mode.token_life, mode.token_status)
            self.ledger.tokens_given += b'"access_token"' in answer.body
            return 0.0, answer
        self.ledger.requests += 1
        now = time.time()
        self.ledger.seconds[int(now)] += 1
        sent = V1_PATH.fullmatch(path)
        if request.method != "POST" or not (sent or path.endswith("/send")):
            return mode.latency, self._manage(request)
        answer, targets, taken = self._v1(request, sent[1]) if sent else self._legacy(request)
        delay, fate = self._finish(answer, targets, taken)
        self.received.add(now, request, targets, taken if fate is answer else [], fate)
        return delay, fate

    def _manage(self, request: Request) -> Answer:
        """The answer to what is about topics and device groups."""
        if request.path.endswith("/notification"):
            return self._groups.answer(request) if self._is_known(request) else self._one("expired")
        if not pretend_topics.is_about(request):
            return ANSWERS["not_found_page"][0]
        return pretend_topics.answer(self._topics, request) if self._is_known(request) else self._one("expired")

    def _is_known(self, request: Request) -> bool:
        authorization = request.headers.get("authorization", "")
        return _KEY.fullmatch(authorization) is not None or self._tokens.takes(authorization)

    def _finish(self, answer: Answer, targets: list[str], taken: list[str]) -> tuple[float, Ending]:
        """Apply the mode's failures to an answer, and put what is taken in the end into the ledger."""
        mode = self.mode
        delay = mode.latency
        if any(map(SLOW.match, targets)):
            delay += max(int(found[1]) for found in map(SLOW.match, targets) if found)
        if mode.silent:
            return 0.0, "silent"
        if mode.close:
            return mode.latency, "close"
        if mode.errors or mode.capacity:
            trouble = self._strain.strike(mode.errors, random.random())
            if trouble in FAILURES:
                return mode.latency if trouble in ("close", "reset") else 0.0, trouble
            if not trouble and mode.capacity:
                too_many = self._strain.overloads(len(targets) or 1, mode.capacity, time.monotonic())
                trouble = mode.refusal if too_many else ""
            if trouble:
                answer, taken = self._one(trouble), []
        retry_after = f"Retry-After: {mode.retry_after}\r\n" if mode.retry_after != "" else ""
        if mode.status != 200:
            return delay, Answer(mode.status, b"<TITLE>pretend failure</TITLE>", HTML, retry_after)
        self.ledger.delivered.update(taken)
        return delay, answer if answer.status == 200 else answer._replace(headers=retry_after)

    # -------------------------------------------------------------------------------------------------- legacy GCM

    def _legacy(self, request: Request) -> tuple[Answer, list[str], list[str]]:
        """The answer, whom the message was for, and who has got it."""
        if not _KEY.fullmatch(request.headers.get("authorization", "")):
            return Answer(401, b"<TITLE>Unauthorized</TITLE>", HTML), [], []
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return self._legacy_text(request)
        try:
            message = json.loads(request.body)
            to, condition = message.get("to"), message.get("condition")
            tokens = [to or condition] if to or condition else message["registration_ids"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Answer(400, b"JSON_PARSING_ERROR", "text/plain"), [], []
        if wrong := _wrong_type(message):
            return Answer(400, f"JSON_TYPE_ERROR: {wrong}".encode(), "text/plain"), [], []
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= 1000 or not all(isinstance(t, str) for t in tokens):
            return Answer(400, b"Number of messages on bulk exceeds maximum allowed (1000)", "text/plain"), [], []
        self.ledger.last = message
        if condition or tokens[0].startswith("/topics/"):
            return self._legacy_topic("condition" if condition else "topic", tokens)
        if (group := self._groups.members(to)) is not None:
            return self._legacy_group(group)
        return self._legacy_tokens(tokens)

    def _legacy_tokens(self, tokens: list[str]) -> tuple[Answer, list[str], list[str]]:
        results = [self._fate("token", token, place) for place, token in enumerate(tokens)]
        failures = sum("error" in result for result in results)
        body = {
            "multicast_id": self.ledger.requests,
            "success": len(results) - failures,
            "failure": failures,
            "canonical_ids": sum("registration_id" in result for result in results),
            "results": results,
        }
        taken = [token for token, result in zip(tokens, results) if "message_id" in result]
        return Answer(200, json.dumps(body).encode()), tokens, taken

    def _legacy_topic(self, kind: str, targets: list[str]) -> tuple[Answer, list[str], list[str]]:
        [target] = targets
        if kind == "condition" and not self._topics.understands(target):
            return Answer(400, b"Invalid condition expression provided.", "text/plain"), [], []
        result = self._fate(kind, target, 0)
        if "error" in result:
            return Answer(200, json.dumps(result).encode()), targets, []
        reached = self._topics.receivers(kind, target.removeprefix("/topics/"))
        return Answer(200, b'{"message_id":%d}' % self.ledger.requests), targets, targets + reached

    def _legacy_group(self, tokens: list[str]) -> tuple[Answer, list[str], list[str]]:
        results = [self._fate("token", token, place) for place, token in enumerate(tokens)]
        failed = [token for token, result in zip(tokens, results) if "error" in result]
        body: dict[str, Any] = {"success": len(tokens) - len(failed), "failure": len(failed)}
        if failed:
            body["failed_registration_ids"] = failed
        return Answer(200, json.dumps(body).encode()), tokens, [token for token in tokens if token not in failed]

    def _legacy_text(self, request: Request) -> tuple[Answer, list[str], list[str]]:
        """The form of before JSON: registration_id=...&data.NAME=..., answered in lines."""
        fields = dict(parse_qsl(request.body.decode(errors="replace"), keep_blank_values=True))
        self.ledger.last = fields
        token = fields.get("registration_id", "")
        if not token:
            return Answer(200, b"Error=MissingRegistration\n", "text/plain"), [], []
        result = self._fate("token", token, 0)
        if "error" in result:
            return Answer(200, f"Error={result['error']}\n".encode(), "text/plain"), [token], []
        lines = f"id={result['message_id']}\n"
        lines += f"registration_id={result['registration_id']}\n" if "registration_id" in result else ""
        return Answer(200, lines.encode(), "text/plain"), [token], [token]

    def _exhausts(self, kind: str, target: str) -> bool:
        quota = self.mode.topic_quota if kind == "topic" else self.mode.device_quota
        return bool(quota) and self._strain.exhausts(kind, target, quota, time.monotonic())

    def _fate(self, kind: str, token: str, place: int) -> dict[str, Any]:
        self.ledger.arrived[token] += 1
        if self._exhausts(kind, token):
            return {"error": "TopicsMessageRateExceeded" if kind == "topic" else "DeviceMessageRateExceeded"}
        sent = {"message_id": f"0:{self.ledger.requests}%{place}"}
        asked = find_fate(token)
        if asked is None:
            return sent
        fate, found = asked
        told = fate.legacy(found, self.ledger.arrived[token])
        return told if "error" in told else {**sent, **told}

    # ------------------------------------------------------------------------------------------------------ FCM v1

    def _v1(self, request: Request, project: str) -> tuple[Answer, list[str], list[str]]:
        """Check in Google's order: who asks, for which project, then the message."""
        if self.mode.revoke:
            self.mode.revoke = False
            self._tokens.revoke()
        if not self._tokens.takes(request.headers.get("authorization", "")):
            return self._one("expired"), [], []
        if not (self._any_project or project.startswith(PROJECTS)):
            return self._one("permission_denied"), [], []
        asked = _asked(request.body)
        if isinstance(asked, Answer):
            return asked, [], []
        if asked is None:
            return self._one("no_target"), [], []
        kind, target, body, meaning, fault = asked
        targets = [target]
        self.ledger.last = body
        self.ledger.arrived[target] += 1
        if not self.mode.answer and meaning:
            return refused(meaning, fcm("INVALID_ARGUMENT")), targets, []
        if name := self.mode.answer or fault or self._v1_fate(kind, target):
            return self._one(name), targets, []
        identity = "fake_message_id" if body.get("validate_only") else f"0:{self.ledger.requests}"
        sent = Answer(200, b'{"name": "projects/%b/messages/%b"}' % (project.encode(), identity.encode()))
        if body.get("validate_only"):
            return sent, targets, []
        return sent, targets, targets + (self._topics.receivers(kind, target) if kind in _TO_MANY else [])

    def _v1_fate(self, kind: str, target: str) -> str:
        if kind == "condition" and not self._topics.understands(target):
            return "bad_condition"
        if (asked := find_fate(target)) is not None:
            fate, found = asked
            if fate.v1 == "*":
                return found[1] if found[1] in ANSWERS else "internal"
            flaky = fate.v1 == "unavailable" and self.ledger.arrived[target] > int(found[1])
            if fate.v1 and not flaky:
                return fate.v1
        if self._exhausts(kind, target):
            return "quota_topic" if kind == "topic" else "quota_device"
        return ""

    def _one(self, name: str) -> Answer:
        forms = ANSWERS[name]
        return forms[next(self._turn) % len(forms)]


_TYPES = {
    **dict.fromkeys(("data", "notification"), (dict, "a JSON map")),
    **dict.fromkeys(("to", "condition", "collapse_key", "priority", "restricted_package_name"), (str, "a JSON string")),
    **dict.fromkeys(("dry_run", "content_available", "mutable_content", "delay_while_idle"), (bool, "a JSON boolean")),
    "time_to_live": (int, "a JSON number"),
    "registration_ids": (list, "a JSON array"),
}


def _wrong_type(message: Mapping[str, Any]) -> str:
    """What is wrong with a field of a legacy message; "": its type is right."""
    for name, (kind, must) in _TYPES.items():
        if name in message and not isinstance(message[name], kind):
            return f'Field "{name}" must be {must}: {message[name]}'
    return ""


def _bytes(fields: Mapping[str, Any]) -> int:
    """What Google counts of an object: names and values in UTF-8, what is no text as its JSON."""
    texts = [
        v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in fields.values()
    ]
    return len("".join([*fields, *texts]).encode(errors="replace"))


class _Asked(NamedTuple):
    """What a request to FCM v1 asks for: its target, its JSON, and what is wrong with the message in meaning or size
    (the name of one of ANSWERS; "": nothing).
    """

    kind: str
    target: str
    body: dict[str, Any]
    meaning: list[pretend_schema.Violation]
    fault: str


_NOBODY = random.randbytes(8).hex()  # a token that nobody has
_TOKEN = re.compile(rb'"token":\s?"([A-Za-z0-9_:-]{1,4096})"')


def _asked(body: bytes) -> _Asked | Answer | None:
    """What a request's body asks for; None: it names no target. Of a campaign's messages, which differ in their tokens
    only, the first is looked at.
    """
    before, *rest = _TOKEN.split(body)
    if len(rest) != 2:
        return _look_at(body)
    like = _look_at_like(before, rest[1])
    if not (isinstance(like, _Asked) and like.kind == "token" and like.target == _NOBODY):
        return _look_at(body)  # what looked like it was no target
    token = rest[0].decode("ascii")
    return like._replace(target=token, body={**like.body, "message": {**like.body["message"], "token": token}})


@functools.lru_cache(maxsize=64)
def _look_at_like(before: bytes, after: bytes) -> _Asked | Answer | None:
    return _look_at(b'%b"token":"%b"%b' % (before, _NOBODY.encode(), after))


def _look_at(raw: bytes) -> _Asked | Answer | None:
    body = _read(raw)
    if isinstance(body, Answer):
        return body
    message = dict(body.get("message") or {})
    kinds = [name for name in _TARGETS if name in message]
    targets = [message.pop(name) for name in kinds]
    if len(targets) != 1 or not isinstance(targets[0], str) or not targets[0]:
        return None
    return _Asked(kinds[0], targets[0], body, pretend_schema.what_it_means(message), v1_fault(message, kinds[0]))


def v1_fault(message: Mapping[str, Any], kind: str) -> str:
    """What is wrong with the data and the sizes of a message without its target: the name of one of ANSWERS, or ""."""
    data = message.get("data") or {}
    if any(key == "from" or key.startswith("google.") for key in data):
        return "reserved_key"
    sizes = [_bytes(data) + _bytes(message.get("notification") or {})]
    for platform in ("android", "apns", "webpush"):
        own = message.get(platform) or {}
        sizes += [_bytes(own.get(part) or {}) for part in ("data", "notification", "payload")]
    return "too_big" if max(sizes) > (2048 if kind in _TO_MANY else 4096) else ""


def _read(body: bytes) -> dict[str, Any] | Answer:
    """The JSON of a request to FCM v1, or the answer to one that is not of its schema."""
    try:
        found: dict[str, Any] = json.loads(body)
        wrong = pretend_schema.violations(found)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return refused([("", "Invalid JSON payload received. Unexpected token.")])
    return refused(wrong) if wrong else found
