"""The API in OpenAPI 3.0, for those who generate clients or look around: /openapi.json. Pure.

Written by hand, once for each route of routes.ROUTES; what a v1 message may have is from its own table. Tests compare
it with the routes, and the server with it, and make clients of it. For these it is in 3.0, which all generators read,
each answer has one shape, no schema is a union without a name, and every operation has a name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gocm_lib import __version__
from gocm_lib.help.topics import TOPICS
from gocm_lib.message import assertion, fcm, platforms, v1_schema
from gocm_lib.message.job import LISTS, MAX_TOKEN, MAX_TTL
from gocm_lib.message.outcome import FAILURES, INVALID, KEPT_FAILURES
from gocm_lib.state.contract import LISTS as LISTS_OF_REPORT
from gocm_lib.state.contract import STATES

Json = dict[str, Any]


class Described(Protocol):
    """A route to be described. `name`: of the operation. `public`: it needs no token."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def public(self) -> bool: ...


TEXT: Json = {"type": "string"}
COUNT: Json = {"type": "integer", "format": "int64", "minimum": 0}
TIME: Json = {"type": "number", "format": "double", "description": "seconds since 1970"}
FLAG: Json = {"type": "boolean"}
ID: Json = {
    "type": "string",
    "minLength": 16,
    "maxLength": 16,
    "pattern": "^([1-3][0-9a-f]*|0+[1-9a-f][0-9a-f]*)$",  # not all of them 0
    "description": "a message's id, as X-GoCM-Job has it",
}


def _word(*words: str) -> Json:
    return {"type": "string", "enum": list(words)}


def _object(required: Json, optional: Json | None = None, **more: Any) -> Json:
    found: Json = {"type": "object", "properties": required | (optional or {}), **more}
    return found | ({"required": list(required)} if required else {})


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _or_null(schema: Json) -> Json:
    return {**schema, "nullable": True}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


UPSTREAM = _ref("Upstream")
KEPT = _word(*KEPT_FAILURES)
ANYTHING: Json = {"type": "object", "additionalProperties": True}
DEVICE: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_TOKEN,
    "pattern": r"^[!#-&*+./0-9:<-Z^_a-z|~-]+$",
    "description": "what Firebase gave the device",
}
PRINTABLE: Json = {"type": "string", "minLength": 1, "maxLength": 1024, "pattern": "^[ -~]+$"}
FIELDS: Json = {
    "collapse_key": PRINTABLE,
    "time_to_live": {"type": "integer", "minimum": 0, "maximum": MAX_TTL, "description": "seconds"},
    "priority": _word("normal", "high"),
    "restricted_package_name": PRINTABLE,
    "content_available": FLAG,
    "mutable_content": FLAG,
    "dry_run": FLAG,
    "tag": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$", "description": "to find it, or to cancel it, by"},
    "send_at": {"type": "string", "format": "date-time", "description": "up to 30 days ahead"},
    "express": {**FLAG, "description": "before all that is not, with at most half of the pace"},
    "notification": _ref("LegacyNotification"),
}
_TOPIC = "'[a-zA-Z0-9_.~%-]{1,900}' in topics"
# What a message may be for: the field, and its values. A list may be longer than here: --max-tokens.
TARGETS: Json = {
    "tokens": {**_list(DEVICE), "minItems": 1},
    "fid": {**_list(DEVICE), "minItems": 1},
    "topic": {"type": "string", "pattern": "^[a-zA-Z0-9_.~%-]{1,900}$"},
    "condition": {"type": "string", "pattern": rf"^{_TOPIC}( (&&|\|\|) {_TOPIC}){{0,4}}$"},
}


def _pushes() -> Json:
    """For each target two schemas, which no value fits both of: a message by its payload, and a whole one for FCM."""
    found: Json = {}
    for name, values in TARGETS.items():
        skips = {"skip_invalid": FLAG} if name in LISTS else {}
        upstream = _ref("FcmUpstream") if name == "fid" else UPSTREAM
        known = {"additionalProperties": False}
        title = name.capitalize()
        found[f"{title}Push"] = _object(
            {name: values, "payload": ANYTHING}, {**skips, "upstream": upstream, **FIELDS}, **known
        )
        found[f"{title}Message"] = _object(
            {name: values, "message": _ref("Message")}, {**skips, "upstream": _ref("FcmUpstream"), **FIELDS}, **known
        )
    return found


def _kind(kind: str) -> Json:
    """The schema for a kind of v1_schema."""
    if kind in v1_schema.SCHEMA:
        return _ref(kind)
    if kind.startswith("[]"):
        return _list(_kind(kind[2:]))
    if kind in v1_schema.ENUMS:
        return _word(*v1_schema.ENUMS[kind])
    found: Json = _KINDS[kind]
    return found


def _field(kind: str) -> Json:
    """The same as a field, which null leaves open."""
    return _or_null({"allOf": [_kind(kind)]} if kind in v1_schema.SCHEMA else _kind(kind))


_KINDS: Json = {
    "text": TEXT,
    "boolean": FLAG,
    "integer": {"type": "integer", "format": "int32", "minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    "share": {"type": "number", "format": "double", "minimum": 0, "maximum": 1},
    "headers": {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^[^\x00-\x1f\x7f]*$"}},
    "apple": {"type": "object", "properties": {"aps": ANYTHING}, "required": ["aps"], "additionalProperties": True},
    "duration": {"type": "string", "pattern": r"^[0-9]{1,11}(\.[0-9]{1,9})?s$"},
    "life": {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,9})?s$"},
    "time": {"type": "string", "format": "date-time"},
    "rgb": {"type": "string", "pattern": "^(#[0-9a-fA-F]{6})?$"},
    "label": {"type": "string", "pattern": "^[a-zA-Z0-9_.~%-]{0,50}$"},
    "link": {"type": "string", "pattern": "^(https://.+)?$"},
    "object": ANYTHING,
    "texts": {"type": "object", "additionalProperties": TEXT},
}
NEWER = "android_v2"  # not described: FCM takes it beside nothing that means `android`


def _message() -> Json:
    """The types of a whole v1 message, from their table."""
    reached, left = set(), ["Message"]
    while left:
        name = left.pop()
        reached.add(name)
        kinds = [kind.removeprefix("[]") for field, kind in v1_schema.SCHEMA[name].items() if field != NEWER]
        left += [kind for kind in kinds if kind in v1_schema.SCHEMA and kind not in reached]
    return {name: _type(name) for name in sorted(reached)}


def _type(name: str) -> Json:
    needed = v1_schema.REQUIRED.get(name, ())
    fields = {field: kind for field, kind in v1_schema.SCHEMA[name].items() if field not in (NEWER, "name")}
    return _object(
        {field: _kind(kind) for field, kind in fields.items() if field in needed},
        {field: _field(kind) for field, kind in fields.items() if field not in needed},
        additionalProperties=False,
    )


def _notification() -> Json:
    """The legacy API's notification, as platforms has it."""
    special = {
        "badge": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
        "color": _KINDS["rgb"],
        "body_loc_args": _list(TEXT),
        "title_loc_args": _list(TEXT),
    }
    return _object({}, {name: special.get(name, TEXT) for name in platforms.NOTIFICATION}, additionalProperties=False)


CURSOR_NUMBER: Json = {"type": "integer", "format": "int64", "minimum": 0, "maximum": 1 << 62}
OLDER: Json = {"type": "integer", "minimum": 0, "maximum": 10**9, "description": "seconds"}
PROJECT: Json = {"type": "string", "pattern": "^[a-z][a-z0-9-]{4,29}$"}
BY: Json = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$", "description": "whose token it was sent with"}
_PUSHES = _pushes()
SCHEMAS: Json = {
    "Error": _object(
        {"error": {**TEXT, "description": "what is wrong, and what to do"}, "field": TEXT},
        description="Every refusal. `field` is the one at fault, or empty.",
    ),
    "Push": {"oneOf": [_ref(name) for name in _PUSHES], "description": "what to send, to whom"},
    **_PUSHES,
    "LegacyNotification": _notification(),
    **_message(),
    "Accepted": _object(
        {"job": ID, "upstream": UPSTREAM, "tokens": COUNT, "skipped": _list(_ref("Skipped"))},
        description="A message that is on disk, and will be sent.",
    ),
    "Skipped": _object(
        {"n": COUNT, "error": TEXT}, description="What was left out of a list of tokens: its place from 0, and why."
    ),
    "Report": _object(dict.fromkeys(("attempts", "failures", "pending", "canonicals", "notregistered"), COUNT)),
    "Canonical": _object(
        {"canonical_replacements": _or_null(_list(_ref("Replacement")))},
    ),
    "Replacement": _object({"original": TEXT, "canonical": TEXT}),
    "NotRegistered": _object(
        {"tokens": _or_null(_list(TEXT))},
        {"wave": FLAG, "in_wave": _list(TEXT)},
        description="With peek, where far more tokens than usual became unregistered: `wave`, and those that came so.",
    ),
    "Invalid": _object({"tokens": _or_null(_list(_ref("InvalidToken")))}),
    "InvalidToken": _object({"token": TEXT, "reason": _word(*INVALID)}),
    "Result": _object(
        {"n": COUNT, "token": TEXT, "state": _word(*STATES), "attempts": COUNT},
        {"message_id": TEXT, "reason": TEXT, "detail": TEXT, "next_due": TIME, "canonical": TEXT, "ended_at": TIME},
        description="`reason`: why a token failed, one of " + ", ".join(FAILURES) + "; or why it is tried again",
    ),
    "Job": _object(
        {
            "job": ID,
            "upstream": UPSTREAM,
            "target": _word("token", "fid", "topic", "condition"),
            "accepted_at": TIME,
            "expires_at": TIME,
            "ended_at": _or_null(TIME),
            "tokens": COUNT,
            "states": _ref("States"),
            "results": _list(_ref("Result")),
            "next": _or_null({**COUNT, "description": "the next page's `after`"}),
        },
        {
            "replayed_at": TIME,
            "by": BY,
            "tag": TEXT,
            "send_at": TIME,
            "paused": {**TEXT, "description": "why the upstream is not sent to"},
            "skipped": _list(_ref("Skipped")),
            "forgotten": {**COUNT, "description": "tokens whose time is over; what is left failed"},
        },
    ),
    "Jobs": _object(
        {"jobs": _list(_ref("Summary")), "next": _or_null({**TEXT, "description": "the next page's `after`"})}
    ),
    "Summary": _object(
        {
            "job": ID,
            "upstream": UPSTREAM,
            "accepted_at": TIME,
            **dict.fromkeys(("tokens", "pending", "delivered", "failed", "cancelled"), COUNT),
        },
        {"by": BY, "tag": TEXT, "send_at": TIME},
    ),
    "Tag": _object({"tag": FIELDS["tag"]}, additionalProperties=False),
    "CancelledTagged": _object(
        {"tag": TEXT, **dict.fromkeys(("jobs", "cancelled", "in_air", "elsewhere"), COUNT)},
        description="How many messages, how many of their tokens were cancelled and are on their way; and how many of "
        "the messages another node has, which will do it.",
    ),
    "Held": _object({"upstream": TEXT, "held": FLAG}),
    "States": _object(dict.fromkeys(STATES, COUNT)),
    "FailedToken": _object(
        {"job": ID, "n": COUNT, "token": TEXT, "upstream": UPSTREAM, "reason": KEPT, "detail": TEXT}
        | {"attempts": COUNT, "failed_at": TIME}
    ),
    "Failed": _object(
        {
            "failed": _list(_ref("FailedToken")),
            "next": _or_null({**TEXT, "description": "the next page's `after`"}),
        }
    ),
    "LegacyPush": _object({}, {"registration_ids": _or_null({**_list(TEXT), "maxItems": 1000})}),
    "LegacyAnswer": _object(
        dict.fromkeys(("multicast_id", "success", "failure", "canonical_ids"), COUNT)
        | {"results": _list(_ref("LegacyResult"))}
    ),
    "LegacyResult": _object({}, {"message_id": TEXT, "registration_id": TEXT, "error": TEXT}),
    "V1Push": _object({"message": ANYTHING}, {"validate_only": FLAG}),
    "V1Answer": _object({"name": TEXT}),
    "V1Error": _object(
        {"error": _object({"code": COUNT, "message": TEXT, "status": TEXT}, {"details": _list(ANYTHING)})}
    ),
    "V1Assertion": _object({"grant_type": _word(assertion.GRANT), "assertion": TEXT}),
    "V1Token": _object({"access_token": TEXT, "expires_in": COUNT, "token_type": TEXT}),
    "V1NoToken": _object({"error": TEXT, "error_description": TEXT}),
    "Cancelled": _object(
        {"job": ID, "cancelled": _or_null(COUNT), "in_air": _or_null(COUNT)},
        description="How many tokens were cancelled, and how many are on their way; null: another node does it.",
    ),
    "Replayed": _object({"replayed": COUNT, "left": FLAG}),
    "Discarded": _object({"discarded": COUNT, "left": FLAG}),
    "Acknowledged": _object({"acknowledged": COUNT}),
    "Ack": _object({"ack": CURSOR_NUMBER}, {"upstream": UPSTREAM}, additionalProperties=False),
    "Which": _object(
        {},
        {"job": ID, "reason": KEPT, "upstream": UPSTREAM, "older": OLDER, "by": BY},
        additionalProperties=False,
        minProperties=1,
        description="The failed tokens that all of these are true of. For all of them: `older` 0, or `all=1` alone.",
    ),
    "All": _object({"all": _word("1")}, additionalProperties=False),
    "Released": _object({"released": COUNT}),
    "DiscardedHeld": _object({"discarded": COUNT}),
    "Health": _object({"status": _word("ok", "degraded", "failing")}, {"reasons": _list(TEXT), "notes": _list(TEXT)}),
    "Figures": _object(
        {
            "version": TEXT,
            "now": TIME,
            "started_at": TIME,
            "status": _word("ok", "degraded", "failing"),
            "sentence": TEXT,
            "sandbox": FLAG,
            "sent_per_second": {"type": "number"},
            "senders": ANYTHING,
            "upstreams": _list(ANYTHING),
            "trend": ANYTHING,
            "pending": _or_null(ANYTHING),
            "totals": _or_null(ANYTHING),
            "nodes": _or_null(_list(ANYTHING)),
            "failed": _or_null(COUNT),
            "failures": _or_null(_list(ANYTHING)),
            "lists": _or_null(ANYTHING),
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
    _query("peek", _word("1"), "clear nothing; confirm what was read by a POST of the answer's GoCM-Cursor"),
    _query("upstream", UPSTREAM, "only those of this upstream"),
]
FAILED_QUERY = [
    LIMIT,
    _query("after", {"type": "string", "pattern": r"^[0-3][0-9a-f]{15}\.[0-9]{1,9}$"}, "the `next` of the page before"),
    _query("job", ID, "only those of this message"),
    _query("reason", KEPT, "only those that failed for this"),
    _query("upstream", UPSTREAM, "only those of this upstream"),
    _query("older", OLDER, "only those that failed so many seconds ago"),
    _query("by", BY, "only those that were sent with the token of this name"),
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


CURSOR = {"GoCM-Cursor": "with peek: what to confirm next"}
AGAIN = "Retry-After"
SENT = {
    "X-GoCM-Job": "the message's id",
    "Location": "where to look it up",
    "Idempotency-Replayed": "true: it was known",
}
# What is wrong with a request, by status; every route can answer these
COMMON = {
    "400": _no("malformed"),
    "403": _no("a browser asks for another site's page, or would clear a list by GET; or this token may not do that"),
    "408": _no("it did not come in time"),
    "411": _no("the body has no length, and comes in pieces in no way that is understood"),
    "413": _no("the body is too large"),
    "421": _no("this server is not called so"),
    "431": _no("the head is too large"),
    "500": _no("our mistake; the log says more"),
    "503": _no("not now: busy, stopping, or no room", AGAIN),
}
V1_ERRORS = {
    "400": "malformed, or the message is bad",
    "401": "a token is needed",
    "403": "no such project for this token; or the device registered with another",
    "404": "the token is unregistered",
    "408": "it did not come in time",
    "409": "the Idempotency-Key was used for another message",
    "429": "the token's rate is used up",
    "500": "it failed",
    "503": "not now",
}
UNKNOWN = {"401": _no("a token is needed", "WWW-Authenticate")}
NO_CURSOR = _no("no such cursor was ever given")
TYPED = {"415": _no("another Content-Type is needed")}

# By method and path: what the route takes and answers, beside what is in ROUTES and COMMON.
OPERATIONS: dict[tuple[str, str], Json] = {
    ("POST", "/gcm/send"): {
        # No parameters: with two bodies under one key it is a mistake, and with `wait` the answer is another one; no
        # schema that generators understand can say either.
        "description": "With a header `Idempotency-Key` of your own the same key and body is one message for 24 hours; "
        "the same key with another body is a 422. With `?wait=S` (1 to 30 seconds) the answer is a Job, as "
        "/gcm/jobs/{id} has it: 200 once the message has ended, 202 after so many seconds.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("Push")},
            },
        },
        "responses": {
            "200": {
                "description": "it is on disk, and will be sent. Who does not send `Accept: application/json`, or "
                "takes text or anything, too, gets `ok` and a newline, as text",
                "content": {"application/json": {"schema": _ref("Accepted")}},
                "headers": {name: {"schema": TEXT, "description": text} for name, text in SENT.items()},
            },
            "422": _no("the key was used for another message"),
            "429": _no("the token's rate is used up", AGAIN),
            "507": _no("there is no room on the disk", AGAIN),
            **TYPED,
        },
    },
    ("POST", "/fcm/send"): {
        "description": "For clients of Google's legacy protocol: all of its fields are taken, and its plain-text form. "
        "A token whose result is not known after three seconds counts as sent: it is kept, and will be.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("LegacyPush")}}},
        "responses": {
            "200": _answer(_ref("LegacyAnswer")),
            "400": {
                "description": "malformed, in a text of Google's",
                "content": {"text/plain": {"schema": TEXT}, "application/json": {"schema": _ref("Error")}},
            },
            "429": _no("the token's rate is used up", AGAIN),
            "422": {"description": "the Idempotency-Key was used", "content": {"text/plain": {"schema": TEXT}}},
            "507": _no("there is no room on the disk", AGAIN),
        },
    },
    ("POST", "/v1/projects/{project}/messages:send"): {
        "description": "For Google's SDKs: what projects.messages.send takes, and its errors. A message whose result "
        "is not known after three seconds counts as sent: it is kept, and will be.",
        "parameters": [{"name": "project", "in": "path", "required": True, "schema": PROJECT}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("V1Push")}}},
        "responses": {
            "200": _answer(_ref("V1Answer")),
            **{
                status: {"description": text, "content": {"application/json": {"schema": _ref("V1Error")}}}
                for status, text in V1_ERRORS.items()
            },
        },
    },
    ("POST", "/token"): {
        "requestBody": {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": _ref("V1Assertion")}},
        },
        "responses": {
            "200": _answer(_ref("V1Token")),
            "400": {"description": "no such grant", "content": {"application/json": {"schema": _ref("V1NoToken")}}},
            "401": {"description": "not of ours", "content": {"application/json": {"schema": _ref("V1NoToken")}}},
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
    ("GET", "/gcm/report/invalid"): {
        "parameters": LIST,
        "responses": {"200": _answer(_ref("Invalid"), **CURSOR)},
    },
    **{
        ("POST", f"/gcm/feedback/{what}"): {
            "requestBody": {
                "required": True,
                "content": {"application/x-www-form-urlencoded": {"schema": _ref("All")}},
            },
            "responses": {"200": _answer(_ref(done)), **TYPED},
        }
        for what, done in (("release", "Released"), ("discard", "DiscardedHeld"))
    },
    **{
        ("POST", f"/gcm/report/{which}/ack"): {
            "requestBody": {
                "required": True,
                "content": {"application/x-www-form-urlencoded": {"schema": _ref("Ack")}},
            },
            "responses": {"200": _answer(_ref("Acknowledged")), "404": NO_CURSOR, **TYPED},
        }
        for which in LISTS_OF_REPORT
    },
    ("GET", "/gcm/jobs"): {
        # `scheduled` is not described, for it is instead of the tag.
        "description": "With `?scheduled=1` instead of a tag: those that wait for their `send_at`.",
        "parameters": [
            {**_query("tag", FIELDS["tag"], "messages with this tag"), "required": True},
            _query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "how many messages at most"),
            _query("after", ID, "the `next` of the page before"),
        ],
        "responses": {"200": _answer(_ref("Jobs"))},
    },
    ("POST", "/gcm/jobs/cancel"): {
        "requestBody": {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": _ref("Tag")}},
        },
        "responses": {"200": _answer(_ref("CancelledTagged")), **TYPED},
    },
    **{
        ("POST", f"/gcm/upstreams/{{name}}/{what}"): {
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": UPSTREAM}],
            "responses": {"200": _answer(_ref("Held")), "404": _no("there is no such upstream"), **TYPED},
        }
        for what in ("hold", "resume")
    },
    ("GET", "/gcm/jobs/{id}"): {
        # Not described as a parameter, for it takes no other beside it.
        "description": "With `?wait=S` alone (1 to 30 seconds) the answer comes when the message has ended, at latest "
        "after so many seconds.",
        "parameters": [
            {"name": "id", "in": "path", "required": True, "schema": ID},
            LIMIT,
            _query("after", {"type": "integer", "minimum": 0, "maximum": 10**9}, "the `next` of the page before"),
            _query("state", _word(*STATES), "only tokens in this state"),
        ],
        "responses": {
            "200": _answer(_ref("Job")),
            "404": _no("there is no such message"),
            "410": _no("its time is over: nothing is known of it any more"),
        },
    },
    ("DELETE", "/gcm/jobs/{id}"): {
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": ID}],
        "responses": {
            "200": _answer(_ref("Cancelled")),
            "202": {**_answer(_ref("Cancelled")), "description": "another node has it, and will do so within seconds"},
            "404": _no("there is no such message"),
            "410": _no("its time is over: nothing is known of it any more"),
        },
    },
    ("GET", "/gcm/failed"): {
        "parameters": FAILED_QUERY,
        "responses": {"200": _answer(_ref("Failed"))},
    },
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
        "parameters": [{"name": "topic", "in": "path", "required": True, "schema": _word(*TOPICS)}],
        "responses": {"200": _answer(TEXT, media="text/html"), "404": _no("no such topic")},
    },
    ("GET", "/openapi.json"): {"responses": {"200": _answer(ANYTHING)}},
    ("GET", "/metrics"): {"responses": {"200": _answer(TEXT, media="text/plain")}},
    **{
        ("GET", path): {"responses": {"200": _answer(_ref("Health")), "503": _answer(_ref("Health"), "it is not")}}
        for path in ("/livez", "/readyz", "/healthz")
    },
}


def document(routes: Sequence[Described], upstreams: Mapping[str, str]) -> Json:
    """The whole document for these routes, of a server with these upstreams, each with its dialect."""
    of_fcm = [name for name, dialect in upstreams.items() if dialect == fcm.NAME]
    named = {"Upstream": _word(*upstreams), "FcmUpstream": _word(*(of_fcm or [fcm.NAME]))}
    paths: Json = {}
    for route in routes:
        operation = OPERATIONS[route.method, route.path]
        responses = COMMON | ({} if route.public else UNKNOWN) | operation["responses"]
        described = {
            "operationId": route.name,
            "summary": route.meaning,
            **operation,
            "responses": dict(sorted(responses.items())),
        }
        if route.public:
            described["security"] = []
        paths.setdefault(route.path, {})[route.method.lower()] = described
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "GoCM",
            "version": __version__,
            "description": "Takes push notifications over HTTP, answers at once, delivers them to Google.",
            "license": {"name": "MIT"},
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS | named,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "the token as the password"},
            },
        },
    }
