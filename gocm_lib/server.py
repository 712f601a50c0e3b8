"""The HTTP front: the route table, thin handlers, the connections of clients.

A thread serves a connection: it reads a request strictly (module request), finds its route, lets the handler make a
Response, writes it in one piece. Promises:

* `ok` is written only after the job is on disk.
* A client that is slow, silent or broken costs one thread and a bounded time, never more.
* Nothing but 200 means that a message was taken.
"""

import errno
import functools
import http.server
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl

from gocm_lib import cpu, job, log, pages
from gocm_lib.client import Client, StateUnavailable
from gocm_lib.intake import Intake
from gocm_lib.job import BadRequest, Draft, Job
from gocm_lib.limits import Refused
from gocm_lib.request import Reader, Request
from gocm_lib.settings import Settings
from gocm_lib.upstream import DIALECTS

BODY_RATE = 16 * 1024  # bytes a second: a body may take the head's time and as long as this rate needs
LINGER = 1.0  # seconds for which the rest of a refused request is read, so that the refusal is not lost in a reset
LARGEST_PAGE = 10_000  # entries that may be asked for
LARGEST_ANSWER = 50_000  # entries in an answer when no number is asked for; who asks again gets the next
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Response(NamedTuple):
    """`written`, if given, is called once: with whether the whole response was handed to the network."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: dict[str, str] = {}
    written: Callable[[bool], None] | None = None


def refusal(problem: BadRequest) -> Response:
    return Response(problem.status, pages.error(problem), headers={"Allow": problem.allow} if problem.allow else {})


def unavailable(reason: str, status: int = 503, retry_after: int = 1) -> Response:
    """503 or 507: nothing was taken; come again after so many seconds."""
    return Response(status, pages.error(BadRequest(reason)), headers={"Retry-After": str(retry_after)})


class Service:
    """What the handlers work on, and the handlers. Methods named in ROUTES take a Request and return a Response."""

    def __init__(self, settings: Settings, upstreams: Sequence[str], intake: Intake, client: Client) -> None:
        self.settings = settings
        self.upstreams = tuple(upstreams)  # the first is the default
        self.intake = intake
        self.client = client
        self.draining = False
        self.rejected: Counter[int] = Counter()  # by status; nothing else counts a request that was not taken
        self._readers = {"canonical": threading.Lock(), "notregistered": threading.Lock()}

    def send(self, request: Request) -> Response:
        """POST /gcm/send: keep a message for its tokens, then answer."""
        if self.draining:
            return unavailable("stopping: send it again in a moment")
        if request.query:
            raise BadRequest("nothing is read from the query string: put it into the body")
        most = min(self.settings.max_tokens, self.settings.max_pending)  # what could never be taken is a 413, no 503
        content_type = request.headers.get("content-type", "")
        if job.media_type(content_type) == job.LINES:
            return self._send_lines(job.parse_lines(request.body, most))
        accepted = self._accept(job.parse(content_type, request.body, most))
        if refused := self.intake.submit([accepted]).get(accepted.id):
            return unavailable(refused.reason, refused.status, refused.retry_after)
        return Response(200, b"ok\n", "text/html", {"X-GoCM-Job": job.format_id(accepted.id)})

    def _accept(self, draft: Draft) -> Job:
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
        )

    def _send_lines(self, drafts: Sequence[Draft | BadRequest]) -> Response:
        """Keep all good ones of many messages, in one commit; the answer says of each what became of it. Its status is
        200 when at least one was kept, else that of the first.
        """
        lines: list[Job | BadRequest | Refused] = []
        for draft in drafts:
            try:
                lines.append(draft if isinstance(draft, BadRequest) else self._accept(draft))
            except BadRequest as problem:
                lines.append(problem)
        jobs = [line for line in lines if isinstance(line, Job)]
        refused = self.intake.submit(jobs) if jobs else {}
        lines = [refused.get(line.id, line) if isinstance(line, Job) else line for line in lines]
        kept = any(isinstance(line, Job) for line in lines)
        status = 200 if kept else lines[0].status
        waits = [line.retry_after for line in lines if isinstance(line, Refused)]
        headers = {"Retry-After": str(max(waits))} if waits else {}
        return Response(status, b"".join(map(pages.line, lines)), job.LINES, headers)

    def report(self, request: Request) -> Response:
        """GET /gcm/report: the counters."""
        return Response(200, pages.report(self.client.snapshot()))

    def canonical(self, request: Request) -> Response:
        """GET /gcm/report/canonical: tokens to replace."""
        return self._list("canonical", pages.canonical, request)

    def notregistered(self, request: Request) -> Response:
        """GET /gcm/report/notregistered: tokens to delete."""
        return self._list("notregistered", pages.notregistered, request)

    def _list(self, which: str, page: Callable[[list], bytes], request: Request) -> Response:
        query = _query(request.query, {"peek", "ack", "limit"})
        limit = _number(query, "limit", 1, LARGEST_PAGE)
        if query.get("peek", "1") != "1":
            raise BadRequest("peek takes no value but 1", "peek")
        if "ack" in query and "peek" in query:
            raise BadRequest("give peek or ack, not both", "ack")
        ack = _number(query, "ack", 0, 1 << 62)
        if ack is not None:
            if request.method != "HEAD":
                self.client.forget(which, ack)
            entries = self.client.page(which, ack, limit or LARGEST_PAGE)
            return Response(200, page(entries), headers={"GoCM-Cursor": str(entries[-1][0] if entries else ack)})
        if "peek" in query or request.method == "HEAD":
            return Response(200, page(self.client.page(which, 0, limit or LARGEST_ANSWER)))
        return self._hand_out(which, page, limit or LARGEST_ANSWER)

    def _hand_out(self, which: str, page: Callable[[list], bytes], limit: int) -> Response:
        """A list as the original gives it: read and cleared at once. We clear what was in the answer, after it was
        written; until then the next reader waits, so that no entry is given to two.
        """
        turn = self._readers[which]
        if not turn.acquire(timeout=self.client.limit):
            return unavailable("another reader of this list is not done yet")
        try:
            entries = self.client.page(which, 0, limit)
            body = page(entries)
        except BaseException:
            turn.release()
            raise

        def written(whole: bool) -> None:
            try:
                if whole and entries:
                    self.client.forget(which, entries[-1][0])
            except StateUnavailable as error:
                log.logger.warning("%d entries of %s will be given again: %s", len(entries), which, error)
            finally:
                turn.release()

        return Response(200, body, written=written)


class Route(NamedTuple):
    method: str
    path: str
    handler: Callable[[Service, Request], Response]
    meaning: str


# README's table is checked against this one. HEAD is answered wherever GET is, and never clears anything.
ROUTES = (
    Route("POST", "/gcm/send", Service.send, "keep a message and send it to its tokens"),
    Route("GET", "/gcm/report", Service.report, "the counters"),
    Route("GET", "/gcm/report/canonical", Service.canonical, "tokens that were replaced; clears what it gives"),
    Route("GET", "/gcm/report/notregistered", Service.notregistered, "tokens to delete; clears what it gives"),
)
_BY_PATH: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    _BY_PATH.setdefault(_route.path, {})[_route.method] = _route
# The original's own README asks for the report with a slash at its end.
_BY_PATH["/gcm/report/"] = _BY_PATH["/gcm/report"]


def find_route(method: str, path: str) -> Route:
    """The route of a request. Raises BadRequest with 404 for an unknown path, 405 for a wrong method."""
    methods = _BY_PATH.get(path)
    if methods is None:
        raise BadRequest("no such path; see README for the routes", status=404)
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allow = ", ".join(methods) + (", HEAD" if "GET" in methods else "")
        raise BadRequest(f"use {allow} here", status=405, allow=allow)
    return route


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


def _number(query: dict[str, str], name: str, low: int, high: int) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch("[0-9]{1,19}", query[name]) or not low <= int(query[name]) <= high:
        raise BadRequest(f"{name} must be a number from {low} to {high}", name)
    return int(query[name])


@functools.lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def render(response: Response, keep_alive: bool, head_only: bool) -> bytes:
    """A response as bytes, head and body in one piece: in two, Nagle's algorithm and a delayed ACK cost 40 ms."""
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        "Server: GoCM",
        f"Date: {_date(int(time.time()))}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
    ]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    lines.append("Connection: keep-alive" if keep_alive else "Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if head_only else head + response.body


class _Late(Exception):
    """The client did not send in time."""


class ClientConnection(socketserver.BaseRequestHandler):
    """One client's connection, from its first request to its close."""

    server: "Server"
    request: socket.socket

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.service = self.server.service
        self.reader = Reader(self.service.settings.max_body)
        self.patience = 0.0  # as the kernel was last told
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.service.settings.head_timeout))

    def handle(self) -> None:
        try:
            while self._serve_one():
                pass
        except OSError:
            pass  # the client is gone

    def _serve_one(self) -> bool:
        """Read and answer one request; whether the connection goes on."""
        try:
            request = self._read()
        except BadRequest as problem:
            return self._refuse(problem)
        except _Late:
            return self._refuse(BadRequest("the request did not come in time", status=408))
        if request is None:
            return False
        self.server.in_work.add(self)
        try:
            response = self._respond(request)
            keep_alive = request.keep_alive and not self.service.draining
            self._write(response, keep_alive, request.method == "HEAD")
        finally:
            self.server.in_work.discard(self)
        return keep_alive

    def _respond(self, request: Request) -> Response:
        try:
            response = find_route(request.method, request.path).handler(self.service, request)
        except BadRequest as problem:
            response = refusal(problem)
        except StateUnavailable as problem:
            response = unavailable(f"try again: {problem}")
        except Exception:
            log.logger.exception("%s %s failed", request.method, request.path)
            response = refusal(BadRequest("internal error; the log says more", status=500))
        if response.status >= 400:
            self.service.rejected[response.status] += 1
        return response

    def _write(self, response: Response, keep_alive: bool, head_only: bool) -> None:
        whole = False
        try:
            self._send(render(response, keep_alive, head_only))
            whole = True
        finally:
            if response.written:
                response.written(whole)

    def _refuse(self, problem: BadRequest) -> bool:
        """Answer a request that could not be read to its end, and close so that the client gets to see it."""
        self.service.rejected[problem.status] += 1
        self._write(refusal(problem), False, False)
        self._linger()
        return False

    def _linger(self) -> None:
        # Closing a socket with unread data resets the connection, and the reset can overtake the answer.
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while self._receive(deadline - time.monotonic()):
            pass

    # --------------------------------------------------------------------------------------------- reading in time

    def _read(self) -> Request | None:
        """The next request; None when the client has closed or stayed idle. Raises BadRequest, _Late."""
        settings = self.service.settings
        request = self.reader.next()  # pipelined: it may be here already
        began: float | None = None
        while request is None:
            if self.reader.idle:
                patience = settings.idle_timeout
            else:
                began = began or time.monotonic()
                length = self.reader.head.length if self.reader.head else 0
                patience = began + settings.head_timeout + length / BODY_RATE - time.monotonic()
                if self.reader.head and self.reader.awaits_continue():
                    # What needs no body to be refused is refused before the client is told to send it.
                    find_route(self.reader.head.method, self.reader.head.path)
                    self._send(CONTINUE)
            data = self._receive(patience)
            if data is None and not self.reader.idle:
                raise _Late
            if not data:
                return None
            self.reader.feed(data)
            request = self.reader.next()
        return request

    def _receive(self, patience: float) -> bytes | None:
        """What the client sends next; b"" at its end, None when nothing came in time."""
        if patience <= 0:
            return None
        if patience != self.patience:
            # The kernel's time limit on a blocking socket: Python's own would add a poll() to each recv, and with it
            # another hand-over of the interpreter lock.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(patience))
            self.patience = patience
        try:
            return self.request.recv(65536)
        except BlockingIOError:
            return None

    def _send(self, data: bytes) -> None:
        """Write all, or raise OSError when the client does not take it in time."""
        view = memoryview(data)
        deadline = time.monotonic() + self.service.settings.head_timeout + len(data) / BODY_RATE
        while True:
            sent = self.request.send(view)
            if sent == len(view):
                return
            view = view[sent:]
            if time.monotonic() > deadline:
                raise TimeoutError("the client does not read")


def _timeval(seconds: float) -> bytes:
    """A time limit as SO_RCVTIMEO and SO_SNDTIMEO take it; never 0, which would mean no limit."""
    return struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))


class Server(http.server.ThreadingHTTPServer):
    """The listener: bounded connections, each in a thread of its own."""

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, host: str, port: int) -> None:
        """Bind and listen; connections wait in the backlog until `start`. Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.in_work: set[ClientConnection] = set()  # those whose request is being answered
        super().__init__((host, port), ClientConnection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the host name up in the DNS

    def start(self, service: Service) -> None:
        """Serve, in a thread of its own."""
        self.service = service
        self._slots = threading.BoundedSemaphore(service.settings.max_connections)
        threading.Thread(target=self._accept_all, name="accept", daemon=True).start()

    def _accept_all(self) -> None:
        cpu.stay()
        self.serve_forever()

    def stop(self, patience: float) -> None:
        """Accept no connection more; return when no request is in work, after `patience` seconds at most."""
        self.service.draining = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + patience
        while self.in_work and time.monotonic() < deadline:
            time.sleep(0.01)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self._turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._slots.release()
            self._turn_away(request)

    def process_request_thread(self, request: socket.socket, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def _turn_away(self, request: socket.socket) -> None:
        """503 without a thread: what can be done without waiting for the client, which may be one of thousands."""
        self.service.rejected[503] += 1
        try:
            request.setblocking(False)
            request.send(render(unavailable("too many connections"), False, False))
            request.shutdown(socket.SHUT_WR)
            request.recv(65536)
        except OSError:
            pass
        self.shutdown_request(request)

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # the connection stays in the backlog, and asking at once would spin
            raise

    def handle_error(self, request: object, client_address: object) -> None:
        log.logger.exception("a connection failed")
