"""What the pretend GCM and FCM answer: a request and a ledger in, status and body out. No sockets.

The bodies are those that Google's services were seen to send, with their inconsistencies (details in either order, or
missing). It imports nothing from the dialects: otherwise the sandbox would share their mistakes. How a token begins
decides its fate: FATES.
"""

import base64
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gocm_lib.front.request import Request
from gocm_lib.tools import pretend_schema
from gocm_lib.tools.strain import Strain

PROJECT = "sandbox-project"
FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


class Answer(NamedTuple):
    """An answer: its status, body and headers."""

    status: int
    body: bytes
    content_type: str = "application/json; charset=UTF-8"
    headers: str = ""  # more of them, each line with its end


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


def _error(status: int, word: str, text: str, *details: dict[str, Any]) -> bytes:
    error: dict[str, Any] = {"code": status, "message": text, "status": word}
    if details:
        error["details"] = list(details)
    return json.dumps({"error": error}, indent=2).encode() + b"\n"


def _fcm(code: str) -> dict[str, Any]:
    return {"@type": FCM_ERROR, "errorCode": code}


def _field(field: str, text: str) -> dict[str, Any]:
    return {"@type": BAD_REQUEST, "fieldViolations": [{"field": field, "description": text}]}


def _refused(violations: list[pretend_schema.Violation], *more: dict[str, Any]) -> Answer:
    """The answer that names all that is wrong with a request."""
    places = [{"field": field, "description": text} if field else {"description": text} for field, text in violations]
    detail = {"@type": BAD_REQUEST, "fieldViolations": places}
    text = "\n".join(text for _, text in violations)
    return Answer(400, _error(400, "INVALID_ARGUMENT", text, detail, *more))


_BAD_TOKEN = "The registration token is not a valid FCM registration token"
_NO_SIGN_IN = (
    "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
    "authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project."
)
_HTML = "text/html; charset=UTF-8"

# FCM v1's answers by name; where several forms of one were seen, they take turns.
ANSWERS: dict[str, tuple[Answer, ...]] = {
    "unregistered": (
        Answer(404, _error(404, "NOT_FOUND", "Requested entity was not found.", _fcm("UNREGISTERED"))),
    ),
    "invalid_token": (
        Answer(400, _error(400, "INVALID_ARGUMENT", _BAD_TOKEN, _fcm("INVALID_ARGUMENT"),
                           _field("message.token", _BAD_TOKEN))),
        Answer(400, _error(400, "INVALID_ARGUMENT", "Request contains an invalid argument.",
                           _field("message.token", "Invalid registration token"), _fcm("INVALID_ARGUMENT"))),
        Answer(400, _error(400, "INVALID_ARGUMENT", _BAD_TOKEN, _fcm("INVALID_ARGUMENT"))),
    ),
    "too_big": (
        Answer(400, _error(400, "INVALID_ARGUMENT", "Message is too large. The maximum is 4K (4096 bytes).",
                           _fcm("INVALID_ARGUMENT"), {"@type": BAD_REQUEST})),
        Answer(400, _error(400, "INVALID_ARGUMENT", "Android message is too big", {"@type": BAD_REQUEST},
                           _fcm("INVALID_ARGUMENT"))),
        Answer(400, _error(400, "INVALID_ARGUMENT", "Request contains an invalid argument.")),
    ),
    "bad_value": (
        Answer(400, _error(400, "INVALID_ARGUMENT", "Invalid value at 'message.data[0].value' (TYPE_STRING), 12",
                           _field("message.data[0].value", "Invalid value at 'message.data[0].value', 12"))),
    ),
    "unknown_field": (
        Answer(400, _error(400, "INVALID_ARGUMENT", "Invalid JSON payload received. Unknown name at 'message': Cannot "
                           "find field.", _field("message", "Unknown name: Cannot find field."))),
    ),
    "reserved_key": (Answer(400, _error(400, "INVALID_ARGUMENT", "Invalid data payload key: from")),),
    "no_target": (
        Answer(400, _error(400, "INVALID_ARGUMENT", "Recipient of the message is not set.",
                           _field("message", "Recipient of the message is not set."), _fcm("INVALID_ARGUMENT"))),
    ),
    "sender_mismatch": (
        Answer(403, _error(403, "PERMISSION_DENIED", "SenderId mismatch", _fcm("SENDER_ID_MISMATCH"))),
    ),
    "permission_denied": (
        Answer(403, _error(403, "PERMISSION_DENIED", "Permission 'cloudmessaging.messages.create' denied on resource "
                           "'//cloudresourcemanager.googleapis.com/projects/other' (or it may not exist).")),
    ),
    "expired": (
        Answer(401, _error(401, "UNAUTHENTICATED", _NO_SIGN_IN, {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "ACCESS_TOKEN_EXPIRED",
            "domain": "googleapis.com", "metadata": {"service": "fcm.googleapis.com"}})),
    ),
    "third_party": (
        Answer(401, _error(401, "UNAUTHENTICATED", _NO_SIGN_IN, _fcm("THIRD_PARTY_AUTH_ERROR"), {
            "@type": "type.googleapis.com/google.firebase.fcm.v1.ApnsError", "statusCode": 403,
            "reason": "InvalidProviderToken"})),
    ),
    "quota_project": (
        Answer(429, _error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Send requests' and limit 'Send "
                           "requests per minute' of service 'fcm.googleapis.com' for consumer 'project_number:1'.", {
                               "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED",
                               "domain": "googleapis.com"})),
    ),
    "quota_retry_info": (
        Answer(429, _error(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", {
            "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.2s"})),
    ),
    "quota_device": (
        Answer(429, _error(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", _fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "device:1", "description": "Device message rate exceeded"}]})),
        Answer(429, _error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for device.", _fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "project:1", "description": "Message rate limit exceeded for device"}]})),
    ),
    "quota_topic": (
        Answer(429, _error(429, "RESOURCE_EXHAUSTED", "Topic quota exceeded.", _fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "project:1", "description": "Topic quota exceeded."}]})),
    ),
    "internal": (Answer(500, _error(500, "INTERNAL", "Internal error encountered.", _fcm("INTERNAL"))),),
    "unavailable": (
        Answer(503, _error(503, "UNAVAILABLE", "The service is currently unavailable.", _fcm("UNAVAILABLE"))),
    ),
    "bad_gateway": (Answer(502, b"<title>Error 502</title>Please try again in 30 seconds.", _HTML),),
    "not_found_page": (Answer(404, b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>", _HTML),),
    "not_found_json": (Answer(404, _error(404, "NOT_FOUND", "Requested entity was not found.")),),
}  # fmt: skip

_V1_PATH = re.compile(r"/v1/projects/([^/]+)/messages:send")
_KEY = re.compile(r"key=(?!bad)\S+")
_TARGETS = ("token", "fid", "topic", "condition")


class Mode:
    """How the pretend upstream behaves. POST /sandbox/mode sets every field."""

    FIELDS: dict[str, tuple[type, ...]] = {
        "latency": (int, float), "status": (int,), "retry_after": (int, str), "silent": (bool,), "close": (bool,),
        "answer": (str,), "revoke": (bool,), "token_life": (int,), "token_status": (int,), "errors": (dict,),
        "capacity": (int, float), "refusal": (str,), "device_quota": (int, float), "topic_quota": (int, float),
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


KINDS = {*ANSWERS, "silent", "close"}  # of errors that strike here and there


def mistake(name: str, value: Any) -> str:
    """What is wrong with a mode's field beyond its type; "": nothing."""
    match name:
        case "answer" | "refusal" if value not in ANSWERS and (value or name == "refusal"):
            return "known are " + ", ".join(ANSWERS)
        case "capacity" | "device_quota" | "topic_quota" if not 0 <= value <= 1e9:
            return "must be a number from 0 to 1000000000"
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


_FLAVOR = "Metadata-Flavor: Google\r\n"


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
    """The pretend services. `key` checks a signature of the generated service account, if there is one."""

    def __init__(self, mode: Mode, key: Any = None) -> None:
        self._key = key
        self._good_until: dict[str, float] = {}
        self._turn = itertools.count()
        self.reset(mode)

    def reset(self, mode: Mode) -> None:
        """Start afresh: nothing has arrived, no quota is used up. Access tokens stay valid."""
        self.mode = mode
        self.ledger = Ledger()
        self._strain = Strain()

    def answer(self, request: Request) -> tuple[float, Answer | None]:
        """The seconds to wait, then the answer. None: close without one; after infinity: never."""
        path = request.path
        if path == "/token":
            return 0.0, self._oauth(request)
        if path.startswith("/computeMetadata/v1/"):
            return 0.0, self._metadata(request)
        self.ledger.requests += 1
        self.ledger.seconds[int(time.time())] += 1
        sent = _V1_PATH.fullmatch(path)
        if request.method == "POST" and sent:
            return self._finish(*self._v1(request, sent[1]))
        if request.method == "POST" and path.endswith("/send"):
            return self._finish(*self._legacy(request))
        return self.mode.latency, ANSWERS["not_found_page"][0]

    def _finish(self, answer: Answer, targets: list[str], taken: list[str]) -> tuple[float, Answer | None]:
        """Apply the mode's failures to an answer, and put what is taken in the end into the ledger."""
        mode = self.mode
        delay = mode.latency
        if any(map(SLOW.match, targets)):
            delay += max(int(found[1]) for found in map(SLOW.match, targets) if found)
        if mode.silent:
            return float("inf"), None
        if mode.close:
            return mode.latency, None
        if mode.errors or mode.capacity:
            trouble = self._strain.strike(mode.errors, random.random())
            if trouble in ("silent", "close"):
                return (float("inf"), None) if trouble == "silent" else (mode.latency, None)
            if not trouble and mode.capacity:
                too_many = self._strain.overloads(len(targets) or 1, mode.capacity, time.monotonic())
                trouble = mode.refusal if too_many else ""
            if trouble:
                answer, taken = self._one(trouble), []
        retry_after = f"Retry-After: {mode.retry_after}\r\n" if mode.retry_after != "" else ""
        if mode.status != 200:
            return delay, Answer(mode.status, b"<TITLE>pretend failure</TITLE>", _HTML, retry_after)
        self.ledger.delivered.update(taken)
        return delay, answer if answer.status == 200 else answer._replace(headers=retry_after)

    # -------------------------------------------------------------------------------------------------- legacy GCM

    def _legacy(self, request: Request) -> tuple[Answer, list[str], list[str]]:
        if not _KEY.fullmatch(request.headers.get("authorization", "")):
            return Answer(401, b"<TITLE>Unauthorized</TITLE>", _HTML), [], []
        try:
            message = json.loads(request.body)
            single = message.get("to") or message.get("condition")
            tokens = [single] if single else message["registration_ids"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Answer(400, b"JSON_PARSING_ERROR", "text/plain"), [], []
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= 1000 or not all(isinstance(t, str) for t in tokens):
            return Answer(400, b"Number of messages on bulk exceeds maximum allowed (1000)", "text/plain"), [], []
        self.ledger.last = message
        kind = "topic" if str(message.get("to", "")).startswith("/topics/") else "token"
        results = [self._fate(kind, token) for token in tokens]
        taken = [token for token, result in zip(tokens, results) if "message_id" in result]
        if single:
            return Answer(200, json.dumps(results[0]).encode()), tokens, taken
        failures = sum("error" in result for result in results)
        body = {
            "multicast_id": self.ledger.requests,
            "success": len(results) - failures,
            "failure": failures,
            "canonical_ids": sum("registration_id" in result for result in results),
            "results": results,
        }
        return Answer(200, json.dumps(body).encode()), tokens, taken

    def _exhausts(self, kind: str, target: str) -> bool:
        quota = self.mode.topic_quota if kind == "topic" else self.mode.device_quota
        return bool(quota) and self._strain.exhausts(kind, target, quota, time.monotonic())

    def _fate(self, kind: str, token: str) -> dict[str, Any]:
        self.ledger.arrived[token] += 1
        if self._exhausts(kind, token):
            return {"error": "TopicsMessageRateExceeded" if kind == "topic" else "DeviceMessageRateExceeded"}
        sent = {"message_id": f"0:{self.ledger.requests}"}
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
            self._good_until.clear()
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._good_until.get(token, 0.0) < time.time():
            return self._one("expired"), [], []
        if project != PROJECT:
            return self._one("permission_denied"), [], []
        try:
            body = json.loads(request.body)
            found = pretend_schema.violations(body)
            message = dict(body.get("message") or {})
        except (ValueError, TypeError, AttributeError, RecursionError):
            return _refused([("", "Invalid JSON payload received. Unexpected token.")]), [], []
        if found:
            return _refused(found), [], []
        kinds = [name for name in _TARGETS if name in message]
        targets = [message.pop(name) for name in kinds]
        if len(targets) != 1 or not isinstance(targets[0], str) or not targets[0]:
            return self._one("no_target"), [], []
        [target] = targets
        self.ledger.last = body
        self.ledger.arrived[target] += 1
        if not self.mode.answer and (found := pretend_schema.what_it_means(message)):
            return _refused(found, _fcm("INVALID_ARGUMENT")), targets, []
        name = self.mode.answer or self._v1_fault(message, kinds[0]) or self._v1_fate(target)
        if not name and self._exhausts(kinds[0], target):
            name = "quota_topic" if kinds[0] == "topic" else "quota_device"
        if name:
            return self._one(name), targets, []
        identity = "fake_message_id" if body.get("validate_only") else f"0:{self.ledger.requests}"
        sent = Answer(200, json.dumps({"name": f"projects/{PROJECT}/messages/{identity}"}).encode())
        return sent, targets, [] if body.get("validate_only") else targets

    def _v1_fault(self, message: Mapping[str, Any], kind: str) -> str:
        data = message.get("data") or {}
        if any(key == "from" or key.startswith("google.") for key in data):
            return "reserved_key"
        parts = [*data.items(), *(message.get("notification") or {}).items()]
        size = sum(len(str(text).encode(errors="replace")) for pair in parts for text in pair)
        return "too_big" if size > (2048 if kind in ("topic", "condition") else 4096) else ""

    def _v1_fate(self, target: str) -> str:
        asked = find_fate(target)
        if asked is None:
            return ""
        fate, found = asked
        if fate.v1 == "*":
            return found[1] if found[1] in ANSWERS else "internal"
        flaky = fate.v1 == "unavailable" and self.ledger.arrived[target] > int(found[1])
        return "" if flaky else fate.v1

    def _one(self, name: str) -> Answer:
        forms = ANSWERS[name]
        return forms[next(self._turn) % len(forms)]

    # ------------------------------------------------------------------------------------------------ access tokens

    def _oauth(self, request: Request) -> Answer:
        """Google's token endpoint for a service account's signed assertion (RFC 7523)."""
        if self.mode.token_status != 200:
            return Answer(self.mode.token_status, b"<TITLE>pretend failure</TITLE>", _HTML)
        refusal = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
        found = re.search(rb"(?:^|&)assertion=([\w.%-]+)", request.body)
        if not found or self._key is None or not _is_signed(found[1].decode(), self._key):
            return Answer(400, json.dumps(refusal).encode())
        return self._give_token()

    def _metadata(self, request: Request) -> Answer:
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(403, b"Missing Metadata-Flavor:Google header.", "text/plain")
        if self.mode.token_status != 200:
            return Answer(self.mode.token_status, b"pretend failure", "text/plain")
        if request.path.endswith("/project/project-id"):
            return Answer(200, PROJECT.encode(), "application/text", _FLAVOR)
        if request.path.endswith("/token"):
            return self._give_token()._replace(headers=_FLAVOR)
        return Answer(404, b"not found", "text/plain")

    def _give_token(self) -> Answer:
        self.ledger.tokens_given += 1
        token = f"pretend-{self.ledger.tokens_given}"
        self._good_until[token] = time.time() + self.mode.token_life
        body = {"access_token": token, "expires_in": self.mode.token_life, "token_type": "Bearer"}
        return Answer(200, json.dumps(body).encode())


def _is_signed(assertion: str, key: Any) -> bool:
    """Whether the service account's key has signed this JWT (RS256), for Google, and it is valid now."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    try:
        head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in assertion.split("."))
        key.verify(signature, assertion.rpartition(".")[0].encode(), padding.PKCS1v15(), hashes.SHA256())
        said = json.loads(claims)
        now = time.time()
        return bool(
            json.loads(head)["alg"] == "RS256"
            and said["aud"] == "https://oauth2.googleapis.com/token"
            and said["iat"] - 60 <= now <= said["exp"] <= said["iat"] + 3600
        )
    except (ValueError, KeyError, TypeError, InvalidSignature):
        return False
