"""The connections of clients. Each has a thread that reads a request strictly and writes its answer in one piece.

Module handlers decides what is answered. Promises that a slow, silent or broken client costs one thread for a bounded
time, and never more, and that no secret and no query is in the access log.
"""

import contextlib
import errno
import functools
import http.server
import itertools
import os
import re
import select
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from gocm_lib.front import routes
from gocm_lib.front.gate import SMALL, Asker, Gate, Place
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.listener import Listener
from gocm_lib.front.request import Head, Reader, Request, check_no_body
from gocm_lib.front.response import Response, refusal, unavailable
from gocm_lib.front.routes import Route
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.process import cpu, log

STEP = 256 * 1024  # bytes of a large body for which room is taken at once
BODY_RATE = 16 * 1024  # bytes a second: a body may take the head's time and as long as this rate needs
MAPPED = "::ffff:"  # before an IPv4 address on a socket of both families (RFC 4291, 2.5.5.2)
LINGER = 1.0  # seconds for which the rest of a refused request is read, so that the refusal is not lost in a reset
LAST_WORDS = 0.5  # seconds that a new connection may take to say something, once we are stopping
TOO_MUCH = "too much is in work here: come again in a moment"
CROWDED = "too many connections: come again in a moment"
# On every answer: what a browser may make of it, which is nothing, but for a page that says otherwise.
GUARD = ("Cross-Origin-Resource-Policy: same-origin", "Referrer-Policy: no-referrer", "X-Content-Type-Options: nosniff")
POLICY = "Content-Security-Policy"
NOTHING = f"{POLICY}: default-src 'none'; frame-ancestors 'none'"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_run = os.urandom(4).hex()  # tells the ids of one run from those of another
_numbers = itertools.count(1)


def request_id(given: str | None) -> str:
    """The id that the client gave its request, or a new one. It is in the answer and in the access log."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"{_run}-{next(_numbers):x}"


@functools.lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def render(response: Response, rid: str, kept_for: float, head_only: bool) -> bytes:
    """A response as bytes, head and body in one piece: in two, Nagle's algorithm and a delayed ACK cost 40 ms. The
    connection is kept for `kept_for` seconds; 0: it is closed.
    """
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        "Server: GoCM",
        f"Date: {_date(int(time.time()))}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        f"X-Request-Id: {rid}",
    ]
    lines += GUARD
    if POLICY not in response.headers:
        lines.append(NOTHING)
    for name, value in response.headers.items():
        lines += [f"{name}: {value}"] if isinstance(value, str) else [f"{name}: {each}" for each in value]
    if kept_for:
        lines += ["Connection: keep-alive", f"Keep-Alive: timeout={int(kept_for)}"]
    else:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if head_only else head + response.body


class _Late(Exception):
    """The client did not send in time."""


class ClientConnection(socketserver.BaseRequestHandler):
    """A client's connection, from its first request to its close."""

    server: "Server"
    request: socket.socket

    def __init__(self, request: socket.socket, client_address: object, server: "Server", place: Place) -> None:
        self.place = place
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        self.handlers = self.server.handlers
        self.reader = Reader(self.handlers.settings.max_body)
        self.asker = Asker(self.place.peer)
        self.patience = 0.0  # as the kernel was last told
        self.held = 0  # bytes of the gate's budget that the request's body takes
        if not self.asker.is_local:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.handlers.settings.head_timeout))

    def handle(self) -> None:
        try:
            if self.server.tls:
                # Python's own time limits: a blocking SSLSocket would not tell us of the kernel's.
                self.request.settimeout(self.handlers.settings.head_timeout)
                # Not greeted yet, so that who waits for a greeting can be hung up: the socket from before cannot.
                self.request = self.server.tls.wrap_socket(
                    self.request, server_side=True, do_handshake_on_connect=False
                )
                self.place.line = _Line(self.request)
                if self.place not in self.server.gate.places:
                    return  # it was to be hung up meanwhile
                self.request.do_handshake()
            while self._serve_one():
                pass
        except OSError:
            pass  # the client is gone, or speaks no TLS

    def finish(self) -> None:
        if self.server.tls:
            self.request.close()  # the server would close the socket that this one has replaced

    def _serve_one(self) -> bool:
        """Read and answer one request. Returns whether the connection goes on."""
        try:
            return self._exchange()
        finally:
            if self.held:
                self.server.gate.bodies.give_back(self.held, self.asker.address)
                self.held = 0

    def _exchange(self) -> bool:
        try:
            found = self._read()
        except BadRequest as problem:
            return self._refuse(problem)
        except _Late:
            return self._refuse(BadRequest("the request did not come in time", status=408))
        if found is None:
            return False
        request, route = found
        began = time.monotonic()
        if not self.server.gate.begin(self.place):
            return False
        response = self._answer(request, route)
        # Not of a post: what was done is told in any case.
        large = len(response.body) if len(response.body) > SMALL and not request.body else 0
        taken = self.server.gate.answers.take(large, self.asker.address) if large else 0
        if taken is None:
            audit = response.audit
            if response.written:
                response.written(False)
                audit = ""  # nothing was taken off the list
            response, taken = unavailable(TOO_MUCH)._replace(audit=audit), 0
        # One guess of a token a connection: each costs as much as a connection does.
        goes_on = request.keep_alive and response.status != 401 and not self.place.probes_only
        keep_alive = goes_on and not self.server.gate.closing
        rid = request_id(request.headers.get("x-request-id"))
        try:
            self._write(response, rid, keep_alive, request.method == "HEAD")
        finally:
            if taken:
                self.server.gate.answers.give_back(taken, self.asker.address)
            self._note(request.method, request.path, response, rid, time.monotonic() - began)
        if response.audit:
            log.logger.info("audit: %s %s", self.asker, response.audit)
        self.place.served += 1
        self.place.busy = not self.reader.idle  # the next one may be here already
        self.place.since, self.place.working = time.monotonic(), False
        return keep_alive

    def _answer(self, request: Request, route: Route | None) -> Response:
        """The response to a request. `route` is set if it was admitted before its body came."""
        try:
            return self.handlers.answer(request, (route or self._admit(request)).handler)
        except BadRequest as problem:
            return refusal(problem)

    def _admit(self, head: Head | Request) -> Route:
        """The route of a request. Raises BadRequest when it may not be made."""
        route = routes.find(head.method, head.path)
        check_no_body(head)
        self.handlers.admit(head.headers, self.asker, route.public)
        if (head.length if isinstance(head, Head) else len(head.body)) > route.most:
            raise BadRequest(f"the body is longer than {route.most} bytes", "content-length", 413)
        if self.place.probes_only and not route.public:
            raise BadRequest(CROWDED, status=503)
        if not route.public:
            self.place.admitted = True
        self.reader.take_at_most(route.most)
        return route

    def _note(self, method: str, path: str, response: Response, rid: str, took: float) -> None:
        """Count an answered request, and log it if that is wanted: without its query, and without a path that is not
        ours, because both may hold tokens.
        """
        refused = response.status >= 400 and path not in routes.PROBES
        self.handlers.collector.answered(routes.counted_as(path), response.status, took, refused)
        if response.status == 401:
            self.server.gate.refused(self.place.peer)
        if self.handlers.settings.access_log:
            fields = {
                "request_id": rid,
                "client": str(self.asker),
                "method": method,
                "path": path if routes.is_ours(path) else log.token(path),
                "status": response.status,
                "bytes": len(response.body),
                "ms": round(took * 1000, 1),
            }
            if job := response.headers.get("X-GoCM-Job"):
                fields["job"] = job
            log.logger.info("access", extra={"fields": fields})

    def _write(self, response: Response, rid: str, keep_alive: bool, head_only: bool) -> None:
        whole = False
        try:
            kept_for = self._may_be_idle() if keep_alive else 0.0
            self._send(render(response, rid, kept_for, head_only))
            whole = True
        finally:
            if response.written:
                response.written(whole)

    def _refuse(self, problem: BadRequest) -> bool:
        """Answer a request that could not be read to its end, and close so that the client still sees the answer."""
        response, rid = refusal(problem), request_id(None)
        try:
            self._write(response, rid, False, False)
        finally:
            self._note("-", "-", response, rid, 0.0)
        self._linger()
        return False

    def _linger(self) -> None:
        # Closing a socket with unread data resets the connection, and the reset can overtake the answer.
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while self._receive(deadline - time.monotonic()):
            pass

    # --------------------------------------------------------------------------------------------- reading in time

    def _may_be_idle(self) -> float:
        """Seconds that the connection may be silent before its next request: few, unless it was admitted."""
        settings = self.handlers.settings
        return settings.idle_timeout if self.place.admitted else settings.head_timeout

    def _read(self) -> tuple[Request, Route | None] | None:
        """The next request, and its route if it was admitted before its body came. None: the client has closed or
        stayed idle. Raises BadRequest, _Late.
        """
        settings = self.handlers.settings
        if self.place.asks_on:
            # Asleep, but for its being hung up meanwhile.
            end = select.poll()
            end.register(self.request, 0)
            end.poll(self.server.gate.strangers_pause() * 1000)
        request = self.reader.next()  # pipelined: it may be here already
        began: float | None = None
        route: Route | None = None
        data: bytes | None = None
        while request is None:
            if self.reader.idle:
                # Mostly the same as the last time, so that the kernel need not be told; but empty lines gain no time.
                patience = self._may_be_idle() - (time.monotonic() - self.place.since if data else 0.0)
            else:
                began = began or (time.monotonic() if self.place.admitted else self.place.since)
                # A body has the time that what has come of it deserves.
                patience = began + settings.head_timeout + self.reader.size / BODY_RATE - time.monotonic()
                if self.reader.head and route is None:
                    # What needs no body to be refused is refused without it: who has no token costs no memory.
                    route = self._admit(self.reader.head)
                    if not self.server.gate.begin(self.place):
                        return None
                    if self.reader.awaits_continue():
                        self._send(CONTINUE)
            data = self._receive(patience)
            if data is None and not self.reader.idle:
                raise _Late
            if not data:
                return None
            self.place.busy = True
            self.reader.feed(data)
            if route:
                self._hold(self.reader.size)
            request = self.reader.next()
        return request, route

    def _hold(self, size: int) -> None:
        """Wait for room for what has come of a large body. Raises BadRequest when others hold all of it."""
        bodies = self.server.gate.bodies
        if size <= max(self.held, SMALL) or self.held >= bodies.largest:
            return
        more = bodies.take(min(max(size - self.held, STEP), bodies.largest - self.held), self.asker.address)
        if more is None:
            raise BadRequest(TOO_MUCH, status=503)
        self.held += more

    def _receive(self, patience: float) -> bytes | None:
        """What the client sends next; b"" at the end, None when nothing came in time."""
        if patience <= 0:
            return None
        if self.server.tls:
            self.request.settimeout(patience)
        elif patience != self.patience:
            # The kernel's time limit on a blocking socket: Python's own would add a poll() to each recv, and with it
            # another hand-over of the interpreter lock.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(patience))
            self.patience = patience
        try:
            return self.request.recv(65536)
        except (BlockingIOError, TimeoutError):
            return None

    def _send(self, data: bytes) -> None:
        """Write everything. Raises OSError when the client does not read it in time."""
        view = memoryview(data)
        if self.server.tls:
            self.request.settimeout(self.handlers.settings.head_timeout)
        # A TLS socket takes all that it is given within that time, or fails.
        piece = BODY_RATE if self.server.tls else len(data)
        deadline = time.monotonic() + self.handlers.settings.head_timeout + len(data) / BODY_RATE
        while True:
            sent = self.request.send(view[:piece])
            if sent == len(view):
                return
            view = view[sent:]
            if time.monotonic() > deadline:
                raise TimeoutError("the client does not read")


def _timeval(seconds: float) -> bytes:
    """A time limit for SO_RCVTIMEO and SO_SNDTIMEO; never 0, which would mean no limit."""
    return struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))


class _Line:
    """A client's connection, for threads other than its own."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def hang_up(self) -> None:
        """End it, whatever its thread is waiting for."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # of TLS too: no farewell that could take time

    def has_unread(self) -> bool:
        """Whether bytes have come that its thread has not read yet."""
        look = select.poll()
        try:
            look.register(self._sock, select.POLLIN)
            return bool(look.poll(0))
        except (OSError, ValueError):
            return False  # it is closed just now


class Server(http.server.ThreadingHTTPServer):
    """Serves one listener: a bounded number of connections, each in a thread of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: Listener, handlers: Handlers, gate: Gate, tls: ssl.SSLContext | None) -> None:
        """`tls` may be replaced later, for new connections."""
        socketserver.BaseServer.__init__(self, listener.host, ClientConnection)  # type: ignore[arg-type]  # one more argument
        self.socket = listener.sock
        self.listener = listener
        self.part = f"accept on {listener}"
        self.handlers = handlers
        self.gate = gate
        self.tls = tls

    def start(self) -> None:
        """Serve, in a thread of its own."""
        threading.Thread(target=self._accept_all, name="accept", daemon=True).start()

    def _accept_all(self) -> None:
        cpu.stay()
        self.serve_forever()

    def service_actions(self) -> None:
        """The accepting thread has gone round once more."""
        self.handlers.collector.move(self.part)

    def process_request(self, request: Any, client_address: object) -> None:
        peer = client_address[0].removeprefix(MAPPED) if isinstance(client_address, tuple) else ""
        place = self.gate.take(peer, _Line(request), time.monotonic())
        if place is None:
            self._turn_away(request)
            return
        try:
            arguments = (request, client_address, place)
            threading.Thread(target=self._serve, args=arguments, name="client", daemon=True).start()
        except RuntimeError:  # no thread can be started
            self.gate.leave(place)
            self._turn_away(request)

    def _serve(self, request: socket.socket, client_address: object, place: Place) -> None:
        try:
            ClientConnection(request, client_address, self, place)
        except Exception:
            log.logger.exception("a connection failed")
        finally:
            self.shutdown_request(request)
            self.gate.leave(place)

    def _turn_away(self, request: socket.socket) -> None:
        """Answer 503 without a thread, and without waiting for the client, which may be one of thousands."""
        self.handlers.collector.answered("other", 503, 0.0, True)
        try:
            request.setblocking(False)
            if not self.tls:
                request.send(render(unavailable(CROWDED), request_id(None), 0, False))
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
        log.logger.exception("a connection cannot be served")


def stop(servers: Sequence[Server], patience: float) -> None:
    """Accept no more connections. Returns when no request is in work, after `patience` seconds at most. What was
    accepted before is answered: its client cannot know that it came late.
    """
    if not servers:
        return
    gate, handlers = servers[0].gate, servers[0].handlers
    gate.closing = True
    closers = [threading.Thread(target=server.shutdown, daemon=True) for server in servers]
    for closer in closers:
        closer.start()
    for server, closer in zip(servers, closers):
        closer.join()
        server.listener.remove()
        server.server_close()
        handlers.collector.still(server.part)
    began = time.monotonic()
    while (now := time.monotonic()) < began + patience:
        if not any([each.is_busy(now < began + LAST_WORDS) for each in gate.all()]):
            break
        time.sleep(0.01)
    handlers.draining = True
