"""The table of routes: which handler answers which request, who may ask, and how large its body may be."""

import functools
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from gocm_lib.front import holds, jobs, openapi, pages, v1
from gocm_lib.front.handlers import Answer, Handlers
from gocm_lib.front.query import SMALL_FORM
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response
from gocm_lib.help.topics import TOPICS
from gocm_lib.message.bad_request import BadRequest


class Route(NamedTuple):
    """A row of the table. `name`: what clients that are made of /openapi.json call it. `public`: answered without a
    token, for probes that have none. `most`: how many bytes its body may have, where that is less than the general
    limit. `waits`: its handler may wait for something, so that it is not called in the front's loop; `outward`: for
    somebody else's server. `right`: which of auth.RIGHTS a token must have, "" any.
    """

    method: str
    path: str
    name: str
    handler: Callable[[Handlers, Request], Answer]
    meaning: str
    public: bool = False
    most: int = 1 << 30
    waits: bool = True
    right: str = ""
    outward: bool = False


def _openapi(handlers: Handlers, request: Request) -> Response:
    """GET /openapi.json: this table, for machines."""
    return Response(200, _document(tuple(handlers.reach.dialects.items())))


@functools.lru_cache(maxsize=2)
def _document(upstreams: tuple[tuple[str, str], ...]) -> bytes:
    return json.dumps(openapi.document(ROUTES, dict(upstreams))).encode() + b"\n"


# HEAD is answered wherever GET is, and never clears anything.
ROUTES = (
    Route(
        "POST",
        "/gcm/send",
        "send",
        Handlers.send,
        "keep a message and send it to its tokens",
        waits=False,
        right="send",
    ),
    Route(
        "POST",
        "/fcm/send",
        "legacySend",
        Handlers.legacy,
        "the same in Google's legacy protocol",
        waits=False,
        right="send",
    ),
    Route(
        "POST",
        "/v1/projects/{project}/messages:send",
        "v1Send",
        v1.send,
        "the same as FCM HTTP v1 has it, for its SDKs",
        waits=False,
        right="send",
    ),
    Route(
        "POST",
        v1.TOKEN,
        "v1Token",
        v1.token,
        "an access token for these, with an account file of ours",
        public=True,
        most=v1.LARGEST_ASSERTION,
        waits=False,
    ),
    Route("GET", "/gcm/report", "report", Handlers.report, "the counters", right="read"),
    Route(
        "GET",
        "/gcm/report/canonical",
        "canonical",
        Handlers.canonical,
        "tokens that were replaced; clears what it gives",
        right="lists",
    ),
    Route(
        "GET",
        "/gcm/report/notregistered",
        "notregistered",
        Handlers.notregistered,
        "tokens to delete; clears what it gives",
        right="lists",
    ),
    Route(
        "POST",
        "/gcm/report/canonical/ack",
        "ackCanonical",
        Handlers.ack_canonical,
        "take entries that were read off that list",
        most=SMALL_FORM,
        right="lists",
    ),
    Route(
        "POST",
        "/gcm/report/notregistered/ack",
        "ackNotregistered",
        Handlers.ack_notregistered,
        "the same for tokens to delete",
        most=SMALL_FORM,
        right="lists",
    ),
    Route(
        "GET",
        "/gcm/report/invalid",
        "invalid",
        Handlers.invalid,
        "what is no token of ours, and why; clears what it gives",
        right="lists",
    ),
    Route(
        "POST",
        "/gcm/report/invalid/ack",
        "ackInvalid",
        Handlers.ack_invalid,
        "the same for what is no token of ours",
        most=SMALL_FORM,
        right="lists",
    ),
    Route(
        "POST",
        "/gcm/feedback/release",
        "releaseHeld",
        Handlers.release,
        "put unregistered tokens that --hold-waves holds back into their list",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "POST",
        "/gcm/feedback/discard",
        "discardHeld",
        Handlers.drop,
        "forget those that are held back",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "GET",
        "/gcm/jobs",
        "jobs",
        jobs.listed,
        "messages with a tag, or those that wait for their time",
        right="read",
    ),
    Route(
        "POST",
        "/gcm/jobs/cancel",
        "cancelTagged",
        jobs.cancel_tagged,
        "end all messages with a tag, but for what is on its way",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "POST",
        "/gcm/upstreams/{name}/hold",
        "hold",
        holds.hold,
        "send nothing to an upstream; until it is resumed",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "POST",
        "/gcm/upstreams/{name}/resume",
        "resume",
        holds.resume,
        "send to it again",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "GET",
        "/gcm/jobs/{id}",
        "job",
        jobs.status,
        "what became of a message, and of each of its tokens",
        right="read",
    ),
    Route(
        "DELETE",
        "/gcm/jobs/{id}",
        "cancel",
        jobs.cancel,
        "end all of a message that is not on its way",
        right="manage",
    ),
    Route(
        "GET", "/gcm/failed", "failed", Handlers.failed, "tokens that were set aside as failed, and why", right="read"
    ),
    Route(
        "POST",
        "/gcm/failed/replay",
        "replay",
        Handlers.replay,
        "send failed tokens again, as if they were new",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "POST",
        "/gcm/failed/discard",
        "discard",
        Handlers.discard,
        "forget failed tokens",
        most=SMALL_FORM,
        right="manage",
    ),
    Route(
        "GET",
        "/status",
        "statusPage",
        Handlers.status_page,
        "a page for people: what goes on, and what to do",
        right="read",
    ),
    Route("GET", "/", "startPage", Handlers.status_page, "the same", right="read"),
    Route("GET", "/api/status", "figures", Handlers.status_figures, "what that page shows", right="read"),
    Route("GET", "/help", "help", pages.help_index, "the topics of the help", public=True),
    Route("GET", "/help/{topic}", "helpTopic", pages.help_topic, "one of them, as `gocm help` shows it", public=True),
    Route("GET", "/openapi.json", "openapi", _openapi, "this API, as OpenAPI 3.0 describes it"),
    Route("GET", "/metrics", "metrics", Handlers.metrics, "all figures, for Prometheus", right="metrics"),
    Route("GET", "/livez", "livez", Handlers.livez, "200 while every part moves, else 503: restart it", public=True),
    Route(
        "GET",
        "/readyz",
        "readyz",
        Handlers.readyz,
        "200 while messages can be taken and sent, else 503 and why",
        public=True,
    ),
    Route("GET", "/healthz", "healthz", Handlers.livez, "the same as `/livez`", public=True),
)
_BY_PATH: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    _BY_PATH.setdefault(_route.path, {})[_route.method] = _route
# The original's own README asks for the report with a slash at its end.
_BY_PATH["/gcm/report/"] = _BY_PATH["/gcm/report"]


# Where 503 is an answer, not a refusal.
PROBES = frozenset(route.path for route in ROUTES if route.handler in (Handlers.livez, Handlers.readyz))


def _template(path: str) -> str:
    """A path as ROUTES has it. Its handler looks at what stands in the place of {id} or {topic}."""
    if path in _BY_PATH:
        return path
    if path.startswith("/gcm/jobs/"):
        return "/gcm/jobs/{id}"
    if v1.PATH.fullmatch(path):
        return "/v1/projects/{project}/messages:send"
    if holds.PATH.fullmatch(path):
        return f"/gcm/upstreams/{{name}}/{path.rpartition('/')[2]}"
    return "/help/{topic}" if path.startswith("/help/") else path


@functools.lru_cache(maxsize=64)  # clients ask for few
def counted_as(path: str) -> str:
    """The path of ROUTES under which a request for `path` is counted, or `other`."""
    methods = _BY_PATH.get(_template(path))
    return next(iter(methods.values())).path if methods else "other"


def is_ours(path: str) -> bool:
    """Whether a path is ours in every character. Any other path may hold anything, even a token."""
    return (
        path in _BY_PATH
        or bool(re.fullmatch("/gcm/jobs/[0-9a-f]{16}", path) or holds.PATH.fullmatch(path) or v1.PATH.fullmatch(path))
        or path.removeprefix("/help/") in TOPICS
    )


def find(method: str, path: str) -> Route:
    """The route of a request. Raises BadRequest with 404 for an unknown path, 405 for a wrong method."""
    methods = _BY_PATH.get(_template(path))
    if methods is None:
        raise BadRequest("no such path; see gocm help api", status=404)
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allow = ", ".join(methods) + (", HEAD" if "GET" in methods else "")
        raise BadRequest(f"use {allow} here", status=405, allow=allow)
    return route
