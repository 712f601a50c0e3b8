"""What is asked for and what is answered: the route table and its thin handlers.

Promises that `ok` is answered only when the job is on disk, and that nothing but 200 means that a message was taken.
How requests come and answers go is module server's.
"""

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from gocm_lib.config.settings import Settings
from gocm_lib.front import auth, openapi, response
from gocm_lib.front.gate import Asker
from gocm_lib.front.intake import Intake
from gocm_lib.front.request import Request
from gocm_lib.message import idempotency, job
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import BadRequest, Draft, Job, Once
from gocm_lib.monitoring import dashboard, health, metrics
from gocm_lib.monitoring.collector import Expiry, Figures, Vitals
from gocm_lib.monitoring.trend import Trend
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import BEFORE_ALL, STATES, Conflict, Entry, Known, Past, Place, Refused, Status, Which

LARGEST_PAGE = 10_000  # entries that may be asked for
LARGEST_ANSWER = 50_000  # entries in an answer when no number is asked for; who asks again gets the next
PARSED_AT_ONCE = 8192  # bytes of a body that is parsed beside others
LAST = 1 << 62  # no entry has a higher number
SMALL_FORM = 4096  # bytes: what our own short forms may have
SMALL_PAGE = 100  # tokens in a page of what became of them when no number is asked for
KEPT_FAILURES = ("attempts", "expired", "killed_senders")  # of outcome.FAILURES, those after which a token is kept
# Two headers: of one with both, browsers understand neither, and never ask for the password.
CHALLENGE = ('Bearer realm="gocm"', 'Basic realm="gocm"')


Read = TypeVar("Read")


class Response(NamedTuple):
    """`written`, if given, is called once: with whether the whole response was handed to the network. `audit`: what
    was done that somebody may want to know of later, to be logged with who asked for it.
    """

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: dict[str, str | Sequence[str]] = {}
    written: Callable[[bool], None] | None = None
    audit: str = ""


def refusal(problem: BadRequest) -> Response:
    """The answer to a client's mistake."""
    headers: dict[str, str | Sequence[str]] = {"Allow": problem.allow} if problem.allow else {}
    if problem.status == 503:
        headers["Retry-After"] = "1"
    if problem.status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    return Response(problem.status, response.error(problem), headers=headers)


def unavailable(reason: str, status: int = 503, retry_after: int = 1) -> Response:
    """503 or 507: what was asked is not done, or not all of it; come again after so many seconds."""
    return Response(status, response.error(BadRequest(reason)), headers={"Retry-After": str(retry_after)})


class Service:
    """What the handlers work on, and the handlers. Methods named in ROUTES take a Request and return a Response."""

    def __init__(
        self,
        settings: Settings,
        upstreams: Sequence[str],
        intake: Intake,
        client: Client,
        probing: Client,
        expiry: Expiry,
        vitals: Vitals,
        trend: Trend,
    ) -> None:
        """`client` for those who ask, `probing` for those who only look, so that neither waits for the other. Raises
        Fatal when the file of auth tokens is no good.
        """
        self.upstreams = tuple(upstreams)  # the first is the default
        self.intake = intake
        self.client = client
        self.probing = probing
        self._parsing, self._looking, self._paging = threading.Lock(), threading.Lock(), threading.Lock()
        self._seen: tuple[float, Figures | None] = 0.0, None  # the last look, and when it began
        self.expiry = expiry
        self.vitals = vitals
        self.trend = trend
        self.draining = False
        self._readers = {"canonical": threading.Lock(), "notregistered": threading.Lock()}
        vitals.expect(route.path for route in ROUTES)
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """Go by these settings from now on. Raises Fatal, and goes on as before, when they are no good."""
        self.policy = auth.read_policy(settings)
        self.settings = settings

    def admit(self, method: str, path: str, headers: Mapping[str, str], asker: Asker) -> "Route":
        """The route of a request that may be made. Raises BadRequest."""
        route = find_route(method, path)
        auth.check(headers, self.policy, local=asker.is_local, public=route.public)
        return route

    def answer(self, request: Request, route: "Route") -> Response:
        """The response to a request that was admitted to this route."""
        try:
            return route.handler(self, request)
        except BadRequest as problem:
            return refusal(problem)
        except StateUnavailable as problem:
            return unavailable(f"try again: {problem}")
        except Exception:
            log.logger.exception("%s %s failed", request.method, request.path)
            return refusal(BadRequest("internal error; the log says more", status=500))

    def send(self, request: Request) -> Response:
        """POST /gcm/send: keep a message for its tokens, then answer."""
        if self.draining:
            return unavailable("stopping: send it again in a moment")
        if request.query:
            raise BadRequest("nothing is read from the query string: put it into the body")
        share = self.settings.max_pending // len(self.upstreams)
        most = min(self.settings.max_tokens, share)  # what could never be taken is a 413, no 503
        content_type = request.headers.get("content-type", "")
        once = idempotency.read(request.headers.get("idempotency-key"), request.body)
        if job.media_type(content_type) == job.LINES:
            if once:
                raise BadRequest("a key is for one message: send lines without it", "idempotency-key")
            return self._send_lines(self._read(request, lambda: list(self._lines(request.body, most))))
        accepted = self._read(request, lambda: self._accept(job.parse(content_type, request.body, most), once))
        match self.intake.submit([accepted]).get(accepted.id):
            case Refused() as refused:
                return unavailable(refused.reason, refused.status, refused.retry_after)
            case Conflict():
                raise BadRequest("this key was used for another message: take a new one", "idempotency-key", 422)
            case Known() as known:
                return _taken(known.job, {"Idempotency-Replayed": "true"})
        return _taken(accepted.id, {}, _to_many([accepted]))

    def _read(self, request: Request, parse: Callable[[], Read]) -> Read:
        """What a body asks for. But for small ones one at a time: they become ten times as large, and only one can be
        parsed at a time anyhow. A hundred threads that do so keep all others from the interpreter.
        """
        if len(request.body) <= PARSED_AT_ONCE:
            return parse()
        with self._parsing:
            return parse()

    def _accept(self, draft: Draft, once: Once | None = None) -> Job:
        """The job that a draft becomes, if it can be sent."""
        name = draft.upstream or self.upstreams[0]
        if name not in self.upstreams:
            raise BadRequest("no such upstream here; there is " + ", ".join(self.upstreams), "upstream")
        return job.accept(
            draft,
            job_id=self.intake.mint(),
            upstream=name,
            message=DIALECTS[name].message(draft),
            now=time.time(),
            max_age=self.settings.max_age,
            once=once,
        )

    def _lines(self, body: bytes, most: int) -> Iterator[Job | BadRequest]:
        for draft in job.parse_lines(body, most):
            try:
                yield draft if isinstance(draft, BadRequest) else self._accept(draft)
            except BadRequest as problem:
                yield problem

    def _send_lines(self, given: Sequence[Job | BadRequest]) -> Response:
        """Keep all good ones of many messages, in one commit; the answer says of each what became of it. Its status is
        200 when at least one was kept, else that of the first.
        """
        jobs = [line for line in given if isinstance(line, Job)]
        refused = self.intake.submit(jobs) if jobs else {}
        lines: list[Job | BadRequest | Refused] = []
        for line in given:
            # Known and Conflict are said of keys, which lines have none of.
            why = refused.get(line.id) if isinstance(line, Job) else None
            lines.append(why if isinstance(why, Refused) else line)
        first = lines[0]
        status = 200 if any(isinstance(line, Job) for line in lines) or isinstance(first, Job) else first.status
        waits = [line.retry_after for line in lines if isinstance(line, Refused)]
        headers: dict[str, str | Sequence[str]] = {"Retry-After": str(max(waits))} if waits else {}
        audit = _to_many([line for line in lines if isinstance(line, Job)])
        return Response(status, b"".join(map(response.line, lines)), job.LINES, headers, audit=audit)

    def report(self, request: Request) -> Response:
        """GET /gcm/report: the counters."""
        return Response(200, response.report(self.client.snapshot()))

    def canonical(self, request: Request) -> Response:
        """GET /gcm/report/canonical: tokens to replace."""
        return self._list("canonical", response.canonical, request)

    def notregistered(self, request: Request) -> Response:
        """GET /gcm/report/notregistered: tokens to delete."""
        return self._list("notregistered", response.notregistered, request)

    def _list(self, which: str, page: Callable[[Any], bytes], request: Request) -> Response:
        query = _query(request.query, {"peek", "ack", "limit"})
        limit = _number(query, "limit", 1, LARGEST_PAGE)
        if query.get("peek", "1") != "1":
            raise BadRequest("peek takes no value but 1", "peek")
        if "ack" in query and "peek" in query:
            raise BadRequest("give peek or ack, not both", "ack")
        ack = _number(query, "ack", 0, LAST)
        looks = "peek" in query or request.method == "HEAD"
        if not (looks or ack == 0):
            auth.check_clearing(request.headers)
        if ack is None and not looks:
            return self._hand_out(which, page, limit or LARGEST_ANSWER)
        audit = "" if looks else self._acknowledge(which, ack or 0)
        with self._one_page():
            entries = self.client.page(which, ack or 0, limit or (LARGEST_ANSWER if ack is None else LARGEST_PAGE))
            body = page(entries)
        return Response(200, body, headers=_cursor(entries, ack or 0), audit=audit)

    @contextlib.contextmanager
    def _one_page(self) -> Iterator[None]:
        """Make one page of a list at a time: until its bytes are counted (gate.Budget) it takes memory unbounded."""
        if not self._paging.acquire(timeout=self.client.limit):
            raise StateUnavailable("others read lists")
        try:
            yield
        finally:
            self._paging.release()

    def _acknowledge(self, which: str, ack: int) -> str:
        """Take entries up to a cursor off a list; what is to be said of it ("": nothing). Raises BadRequest."""
        if not self.client.forget(which, ack):
            raise BadRequest("no such cursor was ever given here: begin with ack=0", "ack")
        return f"cleared {which} up to {ack}" if ack else ""

    def ack_canonical(self, request: Request) -> Response:
        """POST /gcm/report/canonical/ack: take entries that were read off the list."""
        return self._ack("canonical", request)

    def ack_notregistered(self, request: Request) -> Response:
        """POST /gcm/report/notregistered/ack: the same."""
        return self._ack("notregistered", request)

    def _ack(self, which: str, request: Request) -> Response:
        ack = _number(_form(request, {"ack"}, "ack=12"), "ack", 0, LAST)
        if ack is None:
            raise BadRequest("say up to where: the GoCM-Cursor of what you have read", "ack")
        audit = self._acknowledge(which, ack)
        return Response(200, json.dumps({"acknowledged": ack}).encode() + b"\n", audit=audit)

    def _hand_out(self, which: str, page: Callable[[Any], bytes], limit: int) -> Response:
        """A list as the original gives it: read and cleared at once. We clear what was in the answer, after it was
        written; until then the next reader waits, so that no entry is given to two.
        """
        turn = self._readers[which]
        if not turn.acquire(timeout=self.client.limit):
            return unavailable("another reader of this list is not done yet")
        try:
            with self._one_page():
                entries = self.client.page(which, 0, limit)
                body = page(entries)
        except BaseException:
            turn.release()
            raise

        count, last = len(entries), entries[-1][0] if entries else 0  # not they: a slow reader would keep them

        def written(whole: bool) -> None:
            try:
                if whole and last:
                    self.client.forget(which, last)
            except StateUnavailable as error:
                log.logger.warning("%d entries of %s will be given again: %s", count, which, error)
            finally:
                turn.release()

        audit = f"took {len(entries)} entries off {which}" if entries else ""
        return Response(200, body, written=written, audit=audit)

    def status(self, request: Request) -> Response:
        """GET /gcm/jobs/{id}: what became of a message, and of each of its tokens, in pages."""
        query = _query(request.query, {"limit", "after", "state"})
        job_id = job.parse_id(request.path.removeprefix("/gcm/jobs/"))
        state = query.get("state", "")
        if "state" in query and state not in STATES:
            raise BadRequest("a token is " + ", ".join(STATES), "state")
        after, limit = _number(query, "after", 0, 10**9), _number(query, "limit", 1, LARGEST_PAGE) or SMALL_PAGE
        with self._one_page():
            found = self.client.status(job_id, state, -1 if after is None else after, limit)
            body = response.status(found) if isinstance(found, Status) else b""
        if found is None:
            raise BadRequest("no such message", "job", status=404)
        if isinstance(found, Past):
            raise BadRequest("what became of messages so old is not kept: --keep-jobs, --max-kept", "job", status=410)
        return Response(200, body)

    def failed(self, request: Request) -> Response:
        """GET /gcm/failed: a page of tokens that were set aside as failed."""
        query = _query(request.query, {"limit", "after", "job", "reason", "upstream", "older"})
        after = re.fullmatch(r"([0-3][0-9a-f]{15})\.([0-9]{1,9})", query.get("after", "0" * 16 + ".0"))
        if not after:  # ids are below 1 << 62: SQLite's integers end at 1 << 63
            raise BadRequest("after must be the `next` of the page before", "after")
        place = Place(int(after[1], 16), int(after[2])) if "after" in query else BEFORE_ALL
        limit = _number(query, "limit", 1, LARGEST_PAGE) or SMALL_PAGE
        which = _which(query)
        with self._one_page():
            body = response.failed(self.client.failed(which, place, limit))
        return Response(200, body)

    def replay(self, request: Request) -> Response:
        """POST /gcm/failed/replay: send failed tokens again, as if they were new."""
        if self.draining:
            return unavailable("stopping: send it again in a moment")
        return self._deal(request, "replayed", lambda which: self.client.replay(which, time.time()))

    def discard(self, request: Request) -> Response:
        """POST /gcm/failed/discard: forget failed tokens."""
        return self._deal(request, "discarded", self.client.discard)

    def _deal(self, request: Request, what: str, some: Callable[[Which], int]) -> Response:
        """Do something to all failed tokens that are asked for, some at a time; those that fail meanwhile are left."""
        fields = _form(request, {"all", "job", "reason", "upstream", "older"}, "all=1")
        asked = ", ".join(f"{name}={value}" for name, value in fields.items())
        if not fields or fields.get("all", "1") != "1" or ("all" in fields and len(fields) > 1):
            raise BadRequest("say which: job, reason, upstream, older, or all=1", "all")
        which, count = _which(fields), 0
        try:
            while done := some(which):
                count += done
            left = bool(self.client.failed(which, BEFORE_ALL, 1))
        except StateUnavailable:
            reason = f"{count} {what}, perhaps more, and then the count was lost: ask again for those left"
            return unavailable(reason)._replace(audit=f"{what} {count} failed tokens or more ({asked})")
        if not count and not left:
            raise BadRequest("no failed token is so", status=404)
        if not count:
            return unavailable("there is no room for any: --max-pending")
        return Response(200, response.done(what, count, left), audit=f"{what} {count} failed tokens ({asked})")

    def openapi(self, request: Request) -> Response:
        """GET /openapi.json: all of this, for machines."""
        return Response(200, _OPENAPI)

    def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus's text format."""
        figures = self._look()
        return Response(200, metrics.prometheus(figures), metrics.CONTENT_TYPE)

    def livez(self, request: Request) -> Response:
        """GET /livez: whether every part moves."""
        stuck = health.stuck(self.vitals.pulses.copy(), time.monotonic())
        return _health([f"{name} stands still" for name in stuck])

    def readyz(self, request: Request) -> Response:
        """GET /readyz: whether messages can be taken and sent. An upstream that is paused is only told."""
        return _health(*self._condition(self._look()))

    def _look(self) -> Figures:
        """All figures. However many ask, one looks at a time; who waited takes what was begun after he came."""
        came = time.monotonic()
        with self._looking:
            began, figures = self._seen
            if figures is None or began < came:
                began = time.monotonic()
                figures = self.vitals.figures(self.probing, self.expiry)
                self._seen = began, figures
        return figures

    def _condition(self, figures: Figures) -> tuple[list[str], list[str]]:
        """Why messages cannot be taken and sent, and what else somebody may want to know."""
        snapshot = figures.snapshot
        without = [name for name, expires_at in figures.token_expiry.items() if expires_at is None]
        able = health.Abilities(
            stopping=self.draining,
            state_answers=snapshot is not None,
            not_kept=self.intake.why_not(),
            refusing=snapshot.refusing if snapshot else "",
            senders=figures.senders,
            without_token=without,
            upstreams=len(self.upstreams),
        )
        paused = snapshot.pause_reasons if snapshot else {}
        reasons, notes = health.unready(able), [f"upstream {name} is paused: {why}" for name, why in paused.items()]
        if len(without) < able.upstreams:  # else it is a reason
            notes += [f"upstream {name} has no access token" for name in without]
        return reasons, notes

    def status_page(self, request: Request) -> Response:
        """GET /status: the page that shows /api/status."""
        return Response(
            200, response.STATUS, "text/html; charset=utf-8", {"Content-Security-Policy": response.STATUS_POLICY}
        )

    def status_figures(self, request: Request) -> Response:
        """GET /api/status: what the page shows."""
        figures = self._look()
        shown = dashboard.status(figures, self.trend.samples(), *self._condition(figures), self.settings.sandbox)
        return Response(200, json.dumps(shown).encode() + b"\n")


def _taken(job_id: int, headers: Mapping[str, str], audit: str = "") -> Response:
    """The answer to a message that is on disk, as the original gives it."""
    name = job.format_id(job_id)
    told: dict[str, str | Sequence[str]] = {"X-GoCM-Job": name, "Location": f"/gcm/jobs/{name}", **headers}
    return Response(200, b"ok\n", "text/html", told, audit=audit)


def _to_many(jobs: Sequence[Job]) -> str:
    """What is to be said of messages that may reach everybody: those to topics and conditions."""
    sent = [each for each in jobs if each.target in ("topic", "condition")]
    if not sent:
        return ""
    last = f"{sent[-1].target} {sent[-1].tokens[0]!r} as {job.format_id(sent[-1].id)}"
    return (
        f"sent to {last}"
        if len(sent) == 1
        else f"sent {len(sent)} messages to topics and conditions, the last to {last}"
    )


def _health(reasons: Sequence[str], notes: Sequence[str] = ()) -> Response:
    return Response(503 if reasons else 200, response.health(reasons, notes))


class Route(NamedTuple):
    """`public`: it is answered without a token, for probes that have none. `most`: bytes that its body may have, where
    that is less than for any.
    """

    method: str
    path: str
    handler: Callable[[Service, Request], Response]
    meaning: str
    public: bool = False
    most: int = 1 << 30


# README's table is checked against this one. HEAD is answered wherever GET is, and never clears anything.
ROUTES = (
    Route("POST", "/gcm/send", Service.send, "keep a message and send it to its tokens"),
    Route("GET", "/gcm/report", Service.report, "the counters"),
    Route("GET", "/gcm/report/canonical", Service.canonical, "tokens that were replaced; clears what it gives"),
    Route("GET", "/gcm/report/notregistered", Service.notregistered, "tokens to delete; clears what it gives"),
    Route(
        "POST",
        "/gcm/report/canonical/ack",
        Service.ack_canonical,
        "take entries that were read off that list",
        most=SMALL_FORM,
    ),
    Route(
        "POST",
        "/gcm/report/notregistered/ack",
        Service.ack_notregistered,
        "the same for tokens to delete",
        most=SMALL_FORM,
    ),
    Route("GET", "/gcm/jobs/{id}", Service.status, "what became of a message, and of each of its tokens"),
    Route("GET", "/gcm/failed", Service.failed, "tokens that were set aside as failed, and why"),
    Route(
        "POST", "/gcm/failed/replay", Service.replay, "send failed tokens again, as if they were new", most=SMALL_FORM
    ),
    Route("POST", "/gcm/failed/discard", Service.discard, "forget failed tokens", most=SMALL_FORM),
    Route("GET", "/status", Service.status_page, "a page for people: what goes on, and what to do"),
    Route("GET", "/", Service.status_page, "the same"),
    Route("GET", "/api/status", Service.status_figures, "what that page shows"),
    Route("GET", "/openapi.json", Service.openapi, "this API, as OpenAPI 3.1 describes it"),
    Route("GET", "/metrics", Service.metrics, "all figures, for Prometheus"),
    Route("GET", "/livez", Service.livez, "200 while every part moves, else 503: restart it", public=True),
    Route("GET", "/readyz", Service.readyz, "200 while messages can be taken and sent, else 503 and why", public=True),
    Route("GET", "/healthz", Service.livez, "the same as `/livez`", public=True),
)
_OPENAPI = json.dumps(openapi.document(ROUTES)).encode() + b"\n"
_BY_PATH: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    _BY_PATH.setdefault(_route.path, {})[_route.method] = _route
# The original's own README asks for the report with a slash at its end.
_BY_PATH["/gcm/report/"] = _BY_PATH["/gcm/report"]


# Where 503 is an answer, not a refusal.
PROBES = frozenset(route.path for route in ROUTES if route.public)


def _template(path: str) -> str:
    """A path as it is in ROUTES: what takes the place of {id} is looked at by its handler."""
    return "/gcm/jobs/{id}" if path.startswith("/gcm/jobs/") else path


def counted_as(path: str) -> str:
    """The path of ROUTES as which a request for this one is counted."""
    methods = _BY_PATH.get(_template(path))
    return next(iter(methods.values())).path if methods else "other"


def is_ours(path: str) -> bool:
    """Whether a path is one of ours in every character: another may hold anything, a token too."""
    return path in _BY_PATH or bool(re.fullmatch("/gcm/jobs/[0-9a-f]{16}", path))


def find_route(method: str, path: str) -> Route:
    """The route of a request. Raises BadRequest with 404 for an unknown path, 405 for a wrong method."""
    methods = _BY_PATH.get(_template(path))
    if methods is None:
        raise BadRequest("no such path; see README for the routes", status=404)
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allow = ", ".join(methods) + (", HEAD" if "GET" in methods else "")
        raise BadRequest(f"use {allow} here", status=405, allow=allow)
    return route


def _form(request: Request, known: set[str], example: str) -> dict[str, str]:
    """The fields of a form of ours. Raises BadRequest."""
    if job.media_type(request.headers.get("content-type", "")) != job.FORM:
        raise BadRequest(f"send a form: curl -d {example}", "content-type", 415)
    if request.query:
        raise BadRequest("nothing is read from the query string: put it into the body")
    return _query(request.body.decode("latin-1"), known)


def _cursor(entries: Sequence[Entry], before: int) -> dict[str, str | Sequence[str]]:
    """Up to where a page of a list goes: its last entry's number."""
    return {"GoCM-Cursor": str(entries[-1][0] if entries else before)}


def _query(text: str, known: set[str]) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=8, errors="strict")
    except ValueError:
        raise BadRequest("malformed query string") from None
    for name, _ in pairs:
        if name not in known:
            raise BadRequest("unknown query parameter; known are " + ", ".join(sorted(known)), name[:64])
    if len(dict(pairs)) != len(pairs):
        raise BadRequest("a query parameter is given twice")
    return dict(pairs)


def _which(fields: dict[str, str]) -> Which:
    """The failed tokens that are asked for; `older` is in seconds. Raises BadRequest."""
    reason, upstream = fields.get("reason", ""), fields.get("upstream", "")
    if "reason" in fields and reason not in KEPT_FAILURES:
        raise BadRequest("what is kept failed for " + ", ".join(KEPT_FAILURES), "reason")
    if "upstream" in fields and upstream not in DIALECTS:
        raise BadRequest("there is " + ", ".join(DIALECTS), "upstream")
    older = _number(fields, "older", 0, 10**9)
    # All of them, also such as failed later than it is now: the clock may have been set back.
    before = math.inf if older is None else time.time() - older
    return Which(job.parse_id(fields["job"]) if "job" in fields else 0, reason, upstream, before)


def _number(query: dict[str, str], name: str, low: int, high: int) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch("[0-9]{1,19}", query[name]) or not low <= int(query[name]) <= high:
        raise BadRequest(f"{name} must be a number from {low} to {high}", name)
    return int(query[name])
