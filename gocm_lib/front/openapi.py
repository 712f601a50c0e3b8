"""The API in OpenAPI 3.1, for those who generate clients or look around: /openapi.json. Pure.

Written by hand, once for each route of routes.ROUTES. Tests compare it with the routes, and the server with it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from gocm_lib import __version__
from gocm_lib.help.topics import TOPICS
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.idempotency import LONGEST
from gocm_lib.message.job import MAX_LINES, MAX_TOKEN, MAX_TTL
from gocm_lib.message.outcome import FAILURES
from gocm_lib.state.contract import STATES

Json = dict[str, Any]


class Described(Protocol):
    """A route to be described. `public`: it needs no token."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def public(self) -> bool: ...


TEXT: Json = {"type": "string"}
COUNT: Json = {"type": "integer", "minimum": 0}
TIME: Json = {"type": "number", "description": "seconds since 1970"}
FLAG: Json = {"type": "boolean"}
ID: Json = {"type": "string", "pattern": "^[0-3][0-9a-f]{15}$", "description": "a message's id, as X-GoCM-Job has it"}
UPSTREAM: Json = {"enum": list(DIALECTS)}
KEPT: Json = {"enum": ["attempts", "expired", "killed_senders"]}


def _object(required: Json, optional: Json | None = None, **more: Any) -> Json:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required), **more}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


DEVICE: Json = {"type": "string", "minLength": 1, "maxLength": MAX_TOKEN, "pattern": r"^[^\s\x00-\x1f\x7f]+$"}
SHORT: Json = {"type": "string", "minLength": 1, "maxLength": 1024}
OPTIONS: Json = {
    "upstream": UPSTREAM,
    "collapse_key": SHORT,
    "time_to_live": {"type": "integer", "minimum": 0, "maximum": MAX_TTL, "description": "seconds"},
    "priority": {"enum": ["normal", "high"]},
    "restricted_package_name": SHORT,
    "content_available": FLAG,
    "mutable_content": FLAG,
    "dry_run": FLAG,
    "notification": {"type": "object"},
    "message": {"type": "object", "description": "a whole FCM v1 message; the other fields fill what it leaves open"},
}
TARGETS: Json = {
    "tokens": {**_list(DEVICE), "minItems": 1},
    "fid": {"anyOf": [DEVICE, {**_list(DEVICE), "minItems": 1}]},
    "topic": {"type": "string", "pattern": "^[a-zA-Z0-9_.~%-]{1,900}$"},
    "condition": {"type": "string", "minLength": 1, "maxLength": MAX_TOKEN},
}
FORM_PAYLOAD: Json = {"type": "string", "contentMediaType": "application/json"}

SCHEMAS: Json = {
    "Error": _object(
        {"error": {**TEXT, "description": "what is wrong, and what to do"}, "field": TEXT},
        description="Every refusal. `field` is the one at fault, or empty.",
    ),
    "Push": _object(
        {},
        {"payload": {"type": "object"}, **TARGETS, **OPTIONS},
        additionalProperties=False,
        oneOf=[{"required": [name]} for name in TARGETS],
        anyOf=[{"required": ["payload"]}, {"required": ["message"]}],
    ),
    "Report": _object(dict.fromkeys(("attempts", "failures", "pending", "canonicals", "notregistered"), COUNT)),
    "Canonical": _object(
        {"canonical_replacements": _or_null(_list(_object({"original": TEXT, "canonical": TEXT})))},
    ),
    "NotRegistered": _object({"tokens": _or_null(_list(TEXT))}),
    "Result": _object(
        {"n": COUNT, "token": TEXT, "state": {"enum": list(STATES)}, "attempts": COUNT},
        {"reason": TEXT, "detail": TEXT, "next_due": TIME, "canonical": TEXT, "ended_at": TIME},
        description="`reason`: why a token failed, one of " + ", ".join(FAILURES) + "; or why it is tried again",
    ),
    "Job": _object(
        {
            "job": ID,
            "upstream": UPSTREAM,
            "target": {"enum": ["token", "fid", "topic", "condition"]},
            "accepted_at": TIME,
            "expires_at": TIME,
            "ended_at": _or_null(TIME),
            "tokens": COUNT,
            "states": _object(dict.fromkeys(STATES, COUNT)),
            "results": _list(_ref("Result")),
            "next": _or_null({**COUNT, "description": "the next page's `after`"}),
        },
        {
            "replayed_at": TIME,
            "paused": {**TEXT, "description": "why the upstream is not sent to"},
            "forgotten": {**COUNT, "description": "tokens whose time is over; what is left failed"},
        },
    ),
    "Failed": _object(
        {
            "failed": _list(
                _object(
                    {"job": ID, "n": COUNT, "token": TEXT, "upstream": UPSTREAM, "reason": KEPT, "detail": TEXT}
                    | {"attempts": COUNT, "failed_at": TIME}
                )
            ),
            "next": _or_null({**TEXT, "description": "the next page's `after`"}),
        }
    ),
    "Replayed": _object({"replayed": COUNT, "left": FLAG}),
    "Discarded": _object({"discarded": COUNT, "left": FLAG}),
    "Acknowledged": _object({"acknowledged": COUNT}),
    "Ack": _object({"ack": COUNT}, additionalProperties=False),
    "Which": _object(
        {},
        {"all": {"const": "1"}, "job": ID, "reason": KEPT, "upstream": UPSTREAM, "older": COUNT},
        additionalProperties=False,
        minProperties=1,
    ),
    "Health": _object(
        {"status": {"enum": ["ok", "degraded", "failing"]}}, {"reasons": _list(TEXT), "notes": _list(TEXT)}
    ),
    "Figures": _object(
        {
            "version": TEXT,
            "now": TIME,
            "started_at": TIME,
            "status": {"enum": ["ok", "degraded", "failing"]},
            "sentence": TEXT,
            "sandbox": FLAG,
            "sent_per_second": {"type": "number"},
            "senders": _object({"ready": COUNT, "died": COUNT}),
            "upstreams": _list({"type": "object"}),
            "trend": _object({"seconds": {"type": "number"}, "points": _list({"type": "object"})}),
            "pending": _or_null({"type": "object"}),
            "totals": _or_null({"type": "object"}),
            "failed": _or_null(COUNT),
            "failures": _or_null(_list({"type": "object"})),
            "lists": _or_null({"type": "object"}),
        },
        additionalProperties=False,
        description="What the status page shows. What only the state process knows is null while it is away.",
    ),
}


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": description}


LIMIT = _query("limit", {"type": "integer", "minimum": 1, "maximum": 10_000}, "how many entries at most")
LIST = [
    LIMIT,
    _query("peek", {"const": 1}, "clear nothing"),
    _query("ack", {"type": "integer", "minimum": 0, "maximum": 1 << 62}, "entries up to this cursor are confirmed"),
]
FAILED_QUERY = [
    LIMIT,
    _query("after", {"type": "string", "pattern": r"^[0-3][0-9a-f]{15}\.[0-9]{1,9}$"}, "the `next` of the page before"),
    _query("job", ID, "only those of this message"),
    _query("reason", KEPT, "only those that failed for this"),
    _query("upstream", UPSTREAM, "only those of this upstream"),
    _query("older", {"type": "integer", "minimum": 0, "maximum": 10**9}, "only those that failed so many seconds ago"),
]


def _answer(schema: Json, description: str = "", media: str = "application/json", **headers: str) -> Json:
    described = {name: {"schema": TEXT, "description": text} for name, text in headers.items()}
    return {"description": description or "so it is", "content": {media: {"schema": schema}}, "headers": described}


def _no(description: str, header: str = "") -> Json:
    headers = {header: {"schema": TEXT}} if header else {}
    return {
        "description": description,
        "content": {"application/json": {"schema": _ref("Error")}},
        "headers": headers,
    }


CURSOR = {"GoCM-Cursor": "with ack or peek: what to confirm next"}
AGAIN = "Retry-After"
SENT = {
    "X-GoCM-Job": "the message's id",
    "Location": "where to look it up",
    "Idempotency-Replayed": "true: it was known",
}
# What is wrong with a request, by status; every route can answer these
COMMON = {
    "400": _no("malformed"),
    "403": _no("a browser asks for another site's page, or would clear a list by GET"),
    "408": _no("it did not come in time"),
    "411": _no("the body has no length, but comes in pieces"),
    "413": _no("the body is too large"),
    "421": _no("this server is not called so"),
    "431": _no("the head is too large"),
    "500": _no("our mistake; the log says more"),
    "503": _no("not now: busy, stopping, or no room", AGAIN),
}
UNKNOWN = {"401": _no("a token is needed", "WWW-Authenticate")}
TYPED = {"415": _no("another Content-Type is needed")}

_PUSH_FORM = _object(
    {},
    {"payload": FORM_PAYLOAD}
    | {"tokens": {**_list(DEVICE), "minItems": 1}, "fid": {**_list(DEVICE), "minItems": 1}}
    | {name: TARGETS[name] for name in ("topic", "condition")}
    | OPTIONS
    | {"notification": FORM_PAYLOAD, "message": FORM_PAYLOAD},
    additionalProperties=False,
    oneOf=[{"required": [name]} for name in TARGETS],
    anyOf=[{"required": ["payload"]}, {"required": ["message"]}],
)

# By method and path: what the route takes and answers, beside what is in ROUTES and COMMON.
OPERATIONS: dict[tuple[str, str], Json] = {
    ("POST", "/gcm/send"): {
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "schema": {"type": "string", "pattern": "^[!#-~][!-~]*$", "maxLength": LONGEST},
                "description": "the same key and body is one message for 24 hours",
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("Push")},
                "application/x-www-form-urlencoded": {"schema": _PUSH_FORM},
                "application/x-ndjson": {
                    "schema": {"type": "string", "description": f"up to {MAX_LINES} lines, each a Push"}
                },
            },
        },
        "responses": {
            "200": {
                "description": "it is on disk, and will be sent",
                "content": {"text/html": {"schema": {"const": "ok\n"}}, "application/x-ndjson": {"schema": TEXT}},
                "headers": {name: {"schema": TEXT, "description": text} for name, text in SENT.items()},
            },
            "422": _no("the key was used for another message"),
            "507": _no("there is no room on the disk", AGAIN),
            **TYPED,
        },
    },
    ("GET", "/gcm/report"): {"responses": {"200": _answer(_ref("Report"))}},
    ("GET", "/gcm/report/canonical"): {
        "parameters": LIST,
        "responses": {"200": _answer(_ref("Canonical"), **CURSOR)},
    },
    ("GET", "/gcm/report/notregistered"): {
        "parameters": LIST,
        "responses": {"200": _answer(_ref("NotRegistered"), **CURSOR)},
    },
    **{
        ("POST", f"/gcm/report/{which}/ack"): {
            "requestBody": {
                "required": True,
                "content": {"application/x-www-form-urlencoded": {"schema": _ref("Ack")}},
            },
            "responses": {"200": _answer(_ref("Acknowledged")), **TYPED},
        }
        for which in ("canonical", "notregistered")
    },
    ("GET", "/gcm/jobs/{id}"): {
        "parameters": [
            {"name": "id", "in": "path", "required": True, "schema": ID},
            LIMIT,
            _query("after", {"type": "integer", "minimum": 0, "maximum": 10**9}, "the `next` of the page before"),
            _query("state", {"enum": list(STATES)}, "only tokens in this state"),
        ],
        "responses": {
            "200": _answer(_ref("Job")),
            "404": _no("there is no such message"),
            "410": _no("its time is over: nothing is known of it any more"),
        },
    },
    ("GET", "/gcm/failed"): {"parameters": FAILED_QUERY, "responses": {"200": _answer(_ref("Failed"))}},
    **{
        ("POST", f"/gcm/failed/{what}"): {
            "requestBody": {
                "required": True,
                "content": {"application/x-www-form-urlencoded": {"schema": _ref("Which")}},
            },
            "responses": {"200": _answer(_ref(done)), "404": _no("no failed token is so"), **TYPED},
        }
        for what, done in (("replay", "Replayed"), ("discard", "Discarded"))
    },
    ("GET", "/status"): {"responses": {"200": _answer(TEXT, media="text/html")}},
    ("GET", "/"): {"responses": {"200": _answer(TEXT, media="text/html")}},
    ("GET", "/api/status"): {"responses": {"200": _answer(_ref("Figures"))}},
    ("GET", "/help"): {"responses": {"200": _answer(TEXT, media="text/html")}},
    ("GET", "/help/{topic}"): {
        "parameters": [{"name": "topic", "in": "path", "required": True, "schema": {"enum": list(TOPICS)}}],
        "responses": {"200": _answer(TEXT, media="text/html"), "404": _no("no such topic")},
    },
    ("GET", "/openapi.json"): {"responses": {"200": _answer({"type": "object"})}},
    ("GET", "/metrics"): {"responses": {"200": _answer(TEXT, media="text/plain")}},
    **{
        ("GET", path): {"responses": {"200": _answer(_ref("Health")), "503": _answer(_ref("Health"), "it is not")}}
        for path in ("/livez", "/readyz", "/healthz")
    },
}


def document(routes: Sequence[Described]) -> Json:
    """The whole document for these routes."""
    paths: Json = {}
    for route in routes:
        operation = OPERATIONS[route.method, route.path]
        responses = COMMON | ({} if route.public else UNKNOWN) | operation["responses"]
        described = {"summary": route.meaning, **operation, "responses": dict(sorted(responses.items()))}
        if route.public:
            described["security"] = []
        paths.setdefault(route.path, {})[route.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "GoCM",
            "version": __version__,
            "description": "Takes push notifications over HTTP, answers at once, delivers them to Google.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "the token as the password"},
            },
        },
    }
