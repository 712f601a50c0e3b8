"""What each route answers: the handlers.

Promises that `ok` is answered only when the job is on disk, and that nothing but 200 means that a message was taken.
Module server reads requests and writes answers; module routes says which handler answers what.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from gocm_lib.config.settings import Settings
from gocm_lib.front import accounts, auth, door, posts, query, response
from gocm_lib.front.auth import EVERYBODY, Grant
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.gate import Asker
from gocm_lib.front.intake import Intake, Kept
from gocm_lib.front.lists import Lists
from gocm_lib.front.posts import Keep, Reach
from gocm_lib.front.rates import Rates
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, count_lost, refusal, unavailable
from gocm_lib.message import legacy
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Job
from gocm_lib.monitoring import dashboard, health, metrics
from gocm_lib.monitoring.collector import Collector, Expiry, Figures
from gocm_lib.monitoring.trend import Trend
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import BEFORE_ALL, SHOWN, Place, Snapshot, Which

TO_MANY = ("topic", "condition")
Answer = Response | Keep | Await  # what a handler gives
Authorization = Callable[[str], str]  # the header of an upstream's requests; "": there is none just now


class Handlers:
    """The handlers, and what they work on. Those named in routes.ROUTES take a Request and return a Response, or what
    is to happen before.
    """

    def __init__(
        self,
        settings: Settings,
        intake: Intake,
        client: Client,
        probing: Client,
        expiry: Expiry,
        collector: Collector,
        trend: Trend,
        authorization: Authorization,
    ) -> None:
        """`client` is for requests that change or read much, `probing` for quick looks, so that neither waits for the
        other. `authorization` gives the header with which an upstream is asked now. Raises Fatal when a file of tokens
        or accounts is unusable.
        """
        self.intake = intake
        self.client = client
        self.probing = probing
        self.lists = Lists(client, lambda: self.reach.known)
        self.rates = Rates()
        self._looking = threading.Lock()
        self._seen: tuple[float, Figures | None] = 0.0, None  # the last look, and when it began
        self.expiry = expiry
        self.collector = collector
        self.trend = trend
        self.authorization = authorization
        self.draining = False
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """Apply these settings from now on. Raises Fatal, and keeps the old ones, when they cannot be used."""
        policy, senders = auth.read_policy(settings), accounts.read(settings) if settings.door_google else {}
        self.policy, self.senders = policy, senders
        self.settings = settings
        self.reach = Reach.of(settings)

    def admit(self, headers: Mapping[str, str], asker: Asker, public: bool, right: str) -> Grant:
        """Raise BadRequest when a client may not ask for what is, or is not, `public`, and needs this right. Returns
        what its token is good for.
        """
        return auth.check(headers, self.policy, local=asker.is_local, public=public, right=right, now=time.time())

    def answer(self, request: Request, handler: Callable[["Handlers", Request], Answer]) -> Answer:
        """This handler's answer to an admitted request. Raises nothing."""
        try:
            return handler(self, request)
        except Exception as problem:
            return self._told(problem, request.path, request.path)

    def kept(self, keep: Keep, kept: Kept) -> Response | Await:
        """The answer once it is known what became of the jobs. Raises nothing."""
        try:
            if isinstance(kept, StateUnavailable):
                raise kept
            return keep.answer(kept)
        except Exception as problem:
            return self._told(problem, "what was kept")

    def ended(self, wanted: Await, found: Ending) -> Response:
        """The answer once it is known what became of a job. Raises nothing."""
        try:
            return wanted.answer(found)
        except Exception as problem:
            return self._told(problem, "what was awaited")

    @staticmethod
    def _told(problem: Exception, what: str, path: str = "") -> Response:
        """The answer for what went wrong, for who asked for this path."""
        if isinstance(problem, BadRequest):
            return refusal(problem, path)
        if isinstance(problem, StateUnavailable):
            return unavailable(f"try again: {problem}")
        log.logger.error("%s failed", what, exc_info=problem)
        return refusal(BadRequest("internal error; the log says more", status=500))

    def send(self, request: Request) -> Response | Keep:
        """POST /gcm/send: keep a message for its tokens, then answer."""
        if self.draining:
            return unavailable("stopping: send it again in a moment")
        if legacy.speaks(request.headers, request.body):
            return self.legacy(request)
        return self._allowed(request, posts.send(request, self.reach))

    def legacy(self, request: Request) -> Response | Keep:
        """POST /fcm/send: the same in Google's legacy protocol."""
        if self.draining:
            return unavailable("stopping: send it again in a moment")
        return self._allowed(request, door.send(request, self.reach, self.settings.legacy_wait))

    def _allowed(self, request: Request, what: Response | Keep) -> Response | Keep:
        """What is to be kept, if it reaches nobody whom the request's token may not reach, and not too fast. Raises
        BadRequest.
        """
        if request.grant is EVERYBODY or not isinstance(what, Keep):
            return what
        wait = self.too_fast(request.grant, what.jobs)
        return unavailable("this token's rate is used up", 429, wait) if wait else what

    def too_fast(self, grant: Grant, jobs: Sequence[Job]) -> int:
        """After how many seconds to come again with these jobs; 0: they may be kept. Raises BadRequest when this token
        may not send to so many.
        """
        if grant is EVERYBODY:
            return 0
        if "topics" not in grant.may and any(job.target in TO_MANY for job in jobs):
            raise BadRequest("this token may not do that: it needs may=topics", "authorization", 403)
        tokens = sum([len(job.tokens) for job in jobs])
        return self.rates.take(grant, tokens, self.collector.nodes, time.monotonic())

    def report(self, request: Request) -> Response:
        """GET /gcm/report: the counters."""
        return Response(200, response.report(self.client.snapshot(), request.grant.upstreams))

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
        if request.grant.upstreams:
            raise BadRequest("this token is for some upstreams, and that is about all", "authorization", 403)
        if query.form(request, {"all"}, "all=1").get("all") != "1":
            raise BadRequest("say all=1: all that are held back", "all")
        count, lost = _until_none_is_left(some)
        if lost:
            return count_lost(what, count, "entries that were held back")
        audit = f"{what} {count} entries that were held back" if count else ""
        return Response(200, response.done(what, count), audit=audit)

    def failed(self, request: Request) -> Response:
        """GET /gcm/failed: a page of tokens that were set aside as failed."""
        fields = query.parse(request.query, {"limit", "after", "job", "reason", "upstream", "older", "by"})
        after = re.fullmatch(r"([0-3][0-9a-f]{15})\.([0-9]{1,9})", fields.get("after", "0" * 16 + ".0"))
        if not after:  # ids are below 1 << 62: SQLite's integers end at 1 << 63
            raise BadRequest("after must be the `next` of the page before", "after")
        place = Place(int(after[1], 16), int(after[2])) if "after" in fields else BEFORE_ALL
        limit = query.number(fields, "limit", 1, query.LARGEST_PAGE) or SHOWN
        which = query.which(fields, request.grant, self.reach.known, time.time())
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
        fields = query.form(request, {"all", "job", "reason", "upstream", "older", "by"}, "all=1")
        asked = ", ".join(f"{name}={value}" for name, value in fields.items())
        if not fields or fields.get("all", "1") != "1" or ("all" in fields and len(fields) > 1):
            raise BadRequest("say which: job, reason, upstream, by, older, or all=1", "all")
        which = query.which(fields, request.grant, self.reach.known, time.time())
        count, lost = _until_none_is_left(lambda: some(which))
        try:
            left = lost or bool(self.client.failed(which, BEFORE_ALL, 1))
        except StateUnavailable:
            lost = True
        if lost:
            return count_lost(what, count, f"failed tokens ({asked})")
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
            upstreams=len(self.reach.dialects),
        )
        paused = snapshot.pause_reasons if snapshot else {}
        reasons, notes = health.unready(able), [f"upstream {name} is paused: {why}" for name, why in paused.items()]
        notes += _told_of_upstreams(snapshot, self.reach.dialects) if snapshot else []
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
        reasons, notes = self._condition(figures)
        samples = self.trend.samples()
        if request.grant.upstreams:
            figures, samples, notes = dashboard.of_upstreams(figures, request.grant.upstreams), [], []
        shown = dashboard.status(figures, samples, reasons, notes, self.settings.sandbox)
        return Response(200, json.dumps(shown).encode() + b"\n")


def _told_of_upstreams(snapshot: Snapshot, there: Collection[str]) -> list[str]:
    """Which upstreams somebody holds, and which are not there any more though they have messages."""
    held = [
        f"upstream {name} is held since {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(hold.since))}: resume it"
        for name, hold in snapshot.held_upstreams.items()
    ]
    gone = [
        f"upstream {name} is not there any more, and {count} tokens wait for it"
        for name, count in snapshot.waiting.items()
        if name not in there
    ]
    return held + gone


def _until_none_is_left(some: Callable[[], int]) -> tuple[int, bool]:
    """Deal with some at a time. Returns with how many, and whether the state process was lost meanwhile."""
    count = 0
    try:
        while done := some():
            count += done
    except StateUnavailable:
        return count, True
    return count, False


def _health(reasons: Sequence[str], notes: Sequence[str] = ()) -> Response:
    return Response(503 if reasons else 200, response.health(reasons, notes))
