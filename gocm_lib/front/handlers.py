"""What each route answers: the handlers.

Promises that `ok` is answered only when the job is on disk, and that nothing but 200 means that a message was taken.
Module server reads requests and writes answers; module routes says which handler answers what.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from gocm_lib.config.settings import Settings
from gocm_lib.front import auth, query, response
from gocm_lib.front.gate import Asker
from gocm_lib.front.intake import Intake
from gocm_lib.front.lists import Lists
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, refusal, unavailable
from gocm_lib.message import idempotency, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Draft, IdempotencyKey, Job
from gocm_lib.monitoring import dashboard, health, metrics
from gocm_lib.monitoring.collector import Collector, Expiry, Figures
from gocm_lib.monitoring.trend import Trend
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import BEFORE_ALL, STATES, Conflict, Known, Past, Place, Refused, Status, Which

PARSED_AT_ONCE = 8192  # bytes of a body that is parsed beside others
SMALL_PAGE = 100  # tokens in a page of what became of them when no number is asked for


Read = TypeVar("Read")


class Handlers:
    """The handlers, and what they work on. Those named in routes.ROUTES take a Request and return a Response."""

    def __init__(
        self,
        settings: Settings,
        upstreams: Sequence[str],
        intake: Intake,
        client: Client,
        probing: Client,
        expiry: Expiry,
        collector: Collector,
        trend: Trend,
    ) -> None:
        """`client` is for requests that change or read much, `probing` for quick looks, so that neither waits for the
        other. Raises Fatal when the file of auth tokens is unusable.
        """
        self.upstreams = tuple(upstreams)  # the first is the default
        self.intake = intake
        self.client = client
        self.probing = probing
        self.lists = Lists(client)
        self._parsing, self._looking = threading.Lock(), threading.Lock()
        self._seen: tuple[float, Figures | None] = 0.0, None  # the last look, and when it began
        self.expiry = expiry
        self.collector = collector
        self.trend = trend
        self.draining = False
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """Apply these settings from now on. Raises Fatal, and keeps the old ones, when they cannot be used."""
        self.policy = auth.read_policy(settings)
        self.settings = settings

    def admit(self, headers: Mapping[str, str], asker: Asker, public: bool) -> None:
        """Raise BadRequest when a client may not ask for what is, or is not, `public`."""
        auth.check(headers, self.policy, local=asker.is_local, public=public)

    def answer(self, request: Request, handler: Callable[["Handlers", Request], Response]) -> Response:
        """This handler's answer to an admitted request. Raises nothing."""
        try:
            return handler(self, request)
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
        if request.headers.get("content-encoding", "identity") != "identity":
            raise BadRequest("the body must not be compressed: send it as it is", "content-encoding", 415)
        content_type = request.headers.get("content-type", "")
        key = idempotency.read(request.headers.get("idempotency-key"), request.body)
        if job.media_type(content_type) == job.LINES:
            if key:
                raise BadRequest("a key is for one message: send lines without it", "idempotency-key")
            return self._send_lines(self._read(request, lambda: list(self._lines(request.body, most))))
        accepted = self._read(request, lambda: self._accept(job.parse(content_type, request.body, most), key))
        match self.intake.submit([accepted])[0]:
            case Refused() as refused:
                return unavailable(refused.reason, refused.status, refused.retry_after)
            case Conflict():
                raise BadRequest("this key was used for another message: take a new one", "idempotency-key", 422)
            case Known() as known:
                return _taken(accepted, known.job, request, {"Idempotency-Replayed": "true"})
            case kept:
                return _taken(kept, kept.id, request, {}, _to_many([kept]))

    def _read(self, request: Request, parse: Callable[[], Read]) -> Read:
        """Parse a body. Large bodies are parsed one at a time: each grows tenfold, and only one can be parsed at a time
        anyhow. A hundred threads that tried would keep all others from the interpreter.
        """
        if len(request.body) <= PARSED_AT_ONCE:
            return parse()
        with self._parsing:
            return parse()

    def _accept(self, draft: Draft, key: IdempotencyKey | None = None) -> Job:
        """The job that a draft becomes. Raises BadRequest when it cannot be sent."""
        name = draft.upstream or self.upstreams[0]
        if name not in self.upstreams:
            raise BadRequest("no such upstream here; there is " + ", ".join(self.upstreams), "upstream")
        now = time.time()
        return job.accept(
            draft,
            upstream=name,
            message=DIALECTS[name].message(draft, now),
            now=now,
            max_age=self.settings.max_age,
            key=key,
        )

    def _lines(self, body: bytes, most: int) -> Iterator[Job | BadRequest]:
        for draft in job.parse_lines(body, most):
            try:
                yield draft if isinstance(draft, BadRequest) else self._accept(draft)
            except BadRequest as problem:
                yield problem

    def _send_lines(self, given: Sequence[Job | BadRequest]) -> Response:
        """Keep the good ones of many messages, in one commit. The answer tells for each what became of it. Its status
        is 200 when at least one was kept, else the status of the first.
        """
        jobs = [line for line in given if isinstance(line, Job)]
        kept = iter(self.intake.submit(jobs) if jobs else ())
        lines: list[Job | BadRequest | Refused] = []
        for line in given:
            what = next(kept) if isinstance(line, Job) else line
            assert not isinstance(what, (Known, Conflict)), "they are said of keys, which lines have none of"
            lines.append(what)
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
        return self.lists.read("canonical", response.canonical, request)

    def notregistered(self, request: Request) -> Response:
        """GET /gcm/report/notregistered: tokens to delete."""
        return self.lists.read("notregistered", response.notregistered, request, response.unregistered)

    def invalid(self, request: Request) -> Response:
        """GET /gcm/report/invalid: what is no token of ours."""
        return self.lists.read("invalid", response.invalid, request)

    def ack_canonical(self, request: Request) -> Response:
        """POST /gcm/report/canonical/ack: take entries that were read off the list."""
        return self.lists.confirm("canonical", request)

    def ack_notregistered(self, request: Request) -> Response:
        """POST /gcm/report/notregistered/ack: the same."""
        return self.lists.confirm("notregistered", request)

    def ack_invalid(self, request: Request) -> Response:
        """POST /gcm/report/invalid/ack: the same."""
        return self.lists.confirm("invalid", request)

    def release(self, request: Request) -> Response:
        """POST /gcm/feedback/release: put entries that were held back, for they came in a wave, into the list."""
        return self._deal_with_held(request, "released", self.client.release_held)

    def drop(self, request: Request) -> Response:
        """POST /gcm/feedback/discard: forget entries that were held back."""
        return self._deal_with_held(request, "discarded", self.client.discard_held)

    def _deal_with_held(self, request: Request, what: str, some: Callable[[], int]) -> Response:
        """Release or discard all entries that are held back, some at a time."""
        if query.form(request, {"all"}, "all=1").get("all") != "1":
            raise BadRequest("say all=1: all that are held back", "all")
        count, lost = _until_none_is_left(some)
        if lost:
            return _count_lost(what, count, "entries that were held back")
        audit = f"{what} {count} entries that were held back" if count else ""
        return Response(200, response.done(what, count), audit=audit)

    def status(self, request: Request) -> Response:
        """GET /gcm/jobs/{id}: what became of a message, and of each of its tokens, in pages."""
        fields = query.parse(request.query, {"limit", "after", "state"})
        job_id = job.parse_id(request.path.removeprefix("/gcm/jobs/"))
        state = fields.get("state", "")
        if "state" in fields and state not in STATES:
            raise BadRequest("a token is " + ", ".join(STATES), "state")
        after = query.number(fields, "after", 0, 10**9)
        limit = query.number(fields, "limit", 1, query.LARGEST_PAGE) or SMALL_PAGE
        with self.lists.one_page():
            found = self.client.status(job_id, state, -1 if after is None else after, limit)
            body = response.status(found) if isinstance(found, Status) else b""
        if found is None:
            raise BadRequest("no such message", "job", status=404)
        if isinstance(found, Past):
            raise BadRequest("what became of messages so old is not kept: --keep-jobs, --max-kept", "job", status=410)
        return Response(200, body)

    def failed(self, request: Request) -> Response:
        """GET /gcm/failed: a page of tokens that were set aside as failed."""
        fields = query.parse(request.query, {"limit", "after", "job", "reason", "upstream", "older"})
        after = re.fullmatch(r"([0-3][0-9a-f]{15})\.([0-9]{1,9})", fields.get("after", "0" * 16 + ".0"))
        if not after:  # ids are below 1 << 62: SQLite's integers end at 1 << 63
            raise BadRequest("after must be the `next` of the page before", "after")
        place = Place(int(after[1], 16), int(after[2])) if "after" in fields else BEFORE_ALL
        limit = query.number(fields, "limit", 1, query.LARGEST_PAGE) or SMALL_PAGE
        which = query.which(fields, time.time())
        with self.lists.one_page():
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
        """Replay or discard all failed tokens asked for, some at a time. Those that fail meanwhile are left."""
        fields = query.form(request, {"all", "job", "reason", "upstream", "older"}, "all=1")
        asked = ", ".join(f"{name}={value}" for name, value in fields.items())
        if not fields or fields.get("all", "1") != "1" or ("all" in fields and len(fields) > 1):
            raise BadRequest("say which: job, reason, upstream, older, or all=1", "all")
        which = query.which(fields, time.time())
        count, lost = _until_none_is_left(lambda: some(which))
        try:
            left = lost or bool(self.client.failed(which, BEFORE_ALL, 1))
        except StateUnavailable:
            lost = True
        if lost:
            return _count_lost(what, count, f"failed tokens ({asked})")
        if not count and not left:
            raise BadRequest("no failed token is so", status=404)
        if not count:
            return unavailable("there is no room for any: --max-pending")
        return Response(200, response.done(what, count, left), audit=f"{what} {count} failed tokens ({asked})")

    def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus's text format."""
        figures = self._look()
        return Response(200, metrics.prometheus(figures), metrics.CONTENT_TYPE)

    def livez(self, request: Request) -> Response:
        """GET /livez: whether every part moves."""
        stuck = health.stuck(self.collector.pulses.copy(), time.monotonic())
        return _health([f"{name} stands still" for name in stuck])

    def readyz(self, request: Request) -> Response:
        """GET /readyz: whether messages can be taken and sent. A paused upstream is only mentioned."""
        return _health(*self._condition(self._look()))

    def _look(self) -> Figures:
        """All figures. Only one thread at a time looks; those that waited share what was begun after they came."""
        came = time.monotonic()
        with self._looking:
            began, figures = self._seen
            if figures is None or began < came:
                began = time.monotonic()
                figures = self.collector.figures(self.probing, self.expiry)
                self._seen = began, figures
        return figures

    def _condition(self, figures: Figures) -> tuple[list[str], list[str]]:
        """The reasons why messages cannot be taken or sent, and notes for the operator."""
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
        waves = snapshot.waves if snapshot else {}
        notes += [
            f"upstream {name} calls far more tokens unregistered than usual: look before you delete" for name in waves
        ]
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


def _until_none_is_left(some: Callable[[], int]) -> tuple[int, bool]:
    """Deal with some at a time. Returns with how many, and whether the state process was lost meanwhile."""
    count = 0
    try:
        while done := some():
            count += done
    except StateUnavailable:
        return count, True
    return count, False


def _count_lost(what: str, count: int, of: str) -> Response:
    """The answer when it is not known with how many was dealt."""
    reason = f"{count} {what}, perhaps more, and then the count was lost: ask again for those left"
    return unavailable(reason)._replace(audit=f"{what} {count} or more {of}")


def _taken(kept: Job, job_id: int, request: Request, headers: Mapping[str, str], audit: str = "") -> Response:
    """The answer for a message that is on disk as job `job_id`: as the original gives it, or as JSON, for who wants
    that or must know what was left out.
    """
    name = job.format_id(job_id)
    told: dict[str, str | Sequence[str]] = {"X-GoCM-Job": name, "Location": f"/gcm/jobs/{name}", **headers}
    if kept.skipped or _wants_json(request.headers.get("accept", "")):
        return Response(200, json.dumps(response.accepted(kept, job_id)).encode() + b"\n", headers=told, audit=audit)
    return Response(200, b"ok\n", "text/html", told, audit=audit)


def _wants_json(accept: str) -> bool:
    """Whether a client takes JSON, and neither text nor anything: such cannot read `ok` (RFC 9110, section 12.5.1)."""
    accept = accept.lower()
    if "json" not in accept:  # as nearly always
        return False
    ranges = (part.partition(";") for part in accept.split(","))
    taken = {name.strip() for name, _, rest in ranges if not re.search(r"\bq=0(\.0*)?\s*(;|$)", rest)}
    return "application/json" in taken and not any(name.startswith(("text/", "*/")) for name in taken)


def _to_many(jobs: Sequence[Job]) -> str:
    """The audit text for messages that may reach everybody: those to topics and conditions."""
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
