"""The pretend upstream: a legacy GCM to try everything with, with no Google account and no key.

One thread, one event loop, so that it keeps up with thousands of requests a second. A token asks for its fate by how
it begins (FATES below); the server's latency and failures are set while it runs. It keeps a ledger of every token that
arrived, which is what the tests of "never lost" read. It imports nothing from the dialects: it would share their
mistakes.

    POST any path ending in /send    as GCM: Authorization: key=..., {"registration_ids": [...], "data": {...}}
    GET  /sandbox/received           the ledger: {"requests", "connections", "peak", "arrived": {token: times}, ...}
    POST /sandbox/mode               {"latency": 0.2, "status": 503, "retry_after": 5, "silent": true, "close": true}
    POST /sandbox/reset              empty the ledger, back to normal
"""

import heapq
import json
import re
import selectors
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from gocm_lib import child, log
from gocm_lib.job import BadRequest
from gocm_lib.request import Reader, Request
from gocm_lib.settings import Exit, SandboxSettings, Settings, SettingsError

MAX_BODY = 16 * 1024 * 1024
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Mode:
    """How the pretend upstream behaves as a whole; every field can be set by POST /sandbox/mode."""

    FIELDS: dict[str, tuple[type, ...]] = {
        "latency": (int, float),
        "status": (int,),
        "retry_after": (int, str),
        "silent": (bool,),
        "close": (bool,),
    }

    def __init__(self, latency: float) -> None:
        self.latency: float = latency  # seconds before each answer
        self.status = 200  # other than 200: the status of every answer
        self.retry_after: int | str = ""  # with a status other than 200
        self.silent = False  # take requests, never answer
        self.close = False  # take requests, close without an answer

    def change(self, fields: dict[str, Any]) -> None:
        """Set the given fields. Raises BadRequest on an unknown one or a value of the wrong type."""
        for name, value in fields.items():
            kinds = self.FIELDS.get(name)
            if kinds is None:
                raise BadRequest("known are " + ", ".join(self.FIELDS), name[:64])
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise BadRequest("must be of type " + kinds[-1].__name__, name)
        for name, value in fields.items():
            setattr(self, name, value)


# How a token begins -> what becomes of it. `times` is how often it has arrived, this time included.
FATES: tuple[tuple[re.Pattern, Callable[[re.Match, int], dict], str], ...] = (
    (re.compile(r"gone-"), lambda found, times: {"error": "NotRegistered"}, "dead: NotRegistered"),
    (
        re.compile(r"canonical-(.*)"),
        lambda found, times: {"registration_id": "new-" + found[1]},
        "delivered, and replaced: `canonical-X` by `new-X`",
    ),
    (
        re.compile(r"flaky-(\d+)-"),
        lambda found, times: {"error": "Unavailable"} if times <= int(found[1]) else {},
        "`flaky-2-X`: Unavailable twice, then delivered",
    ),
    (re.compile(r"quota-"), lambda found, times: {"error": "DeviceMessageRateExceeded"}, "too many to this device"),
    (re.compile(r"invalid-"), lambda found, times: {"error": "InvalidRegistration"}, "rejected: InvalidRegistration"),
    (re.compile(r"mismatch-"), lambda found, times: {"error": "MismatchSenderId"}, "rejected: MismatchSenderId"),
    (re.compile(r"error-([A-Za-z]+)"), lambda found, times: {"error": found[1]}, "`error-WORD`: that error word"),
)
SLOW = re.compile(r"slow-(\d+)-")  # `slow-5-X`: answered 5 seconds later than the others


class Ledger:
    """What arrived, and what was taken."""

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self.in_flight = 0
        self.peak = 0
        self.arrived: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.last: Any = None  # the last Message

    def as_json(self) -> bytes:
        fields = ("requests", "connections", "in_flight", "peak", "arrived", "delivered", "last")
        return json.dumps({name: getattr(self, name) for name in fields}).encode() + b"\n"


def render(status: int, body: bytes, content_type: str = "application/json", extra: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status} Pretend\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    ).encode() + body


class _Peer:
    """A connection: its socket, what it sent, what it is owed."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = Reader(MAX_BODY)
        self.unsent = b""
        self.waiting = 0  # requests taken and not yet answered
        self.closed = False


class Sandbox:
    def __init__(self, listener: socket.socket, mode: Mode, tls: ssl.SSLContext | None = None) -> None:
        self.normal = mode.latency
        self.mode = mode
        self.ledger = Ledger()
        self._tls = tls
        self._listener = listener
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, READ)
        self._later: list[tuple[float, int, _Peer, bytes | None]] = []  # answers in the order they fall due
        self._count = 0

    # ------------------------------------------------------------------------------------------------- pretend GCM

    def answer(self, request: Request) -> tuple[float, bytes | None]:
        """Seconds to wait and the answer then, None for closing without one; inf for never."""
        if request.path.startswith("/sandbox/"):
            return 0.0, self._control(request)
        self.ledger.requests += 1
        mode = self.mode
        if not request.path.endswith("/send") or request.method != "POST":
            return mode.latency, render(404, b"<TITLE>Not Found</TITLE>", "text/html")
        if not re.fullmatch(r"key=(?!bad)\S+", request.headers.get("authorization", "")):
            return mode.latency, render(401, b"<TITLE>Unauthorized</TITLE>", "text/html")
        try:
            message = json.loads(request.body)
            tokens = message["registration_ids"]
        except (ValueError, KeyError, TypeError):
            return mode.latency, render(400, b"JSON_PARSING_ERROR", "text/plain")
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= 1000 or not all(isinstance(t, str) for t in tokens):
            return mode.latency, render(400, b"Number of messages on bulk exceeds maximum allowed (1000)", "text/plain")
        return self._multicast(message, tokens)

    def _multicast(self, message: Any, tokens: list[str]) -> tuple[float, bytes | None]:
        self.ledger.last = message
        mode, ledger = self.mode, self.ledger
        results, delay = [], mode.latency
        for token in tokens:
            ledger.arrived[token] += 1
            slow = SLOW.match(token)
            if slow:
                delay = max(delay, mode.latency + int(slow[1]))
            results.append(self._fate(token))
        if mode.silent:
            return float("inf"), None
        if mode.close:
            return mode.latency, None
        if mode.status != 200:
            extra = f"Retry-After: {mode.retry_after}\r\n" if mode.retry_after != "" else ""
            return delay, render(mode.status, b"<TITLE>pretend failure</TITLE>", "text/html", extra)
        for token, result in zip(tokens, results):
            if "message_id" in result:
                ledger.delivered[token] += 1
        failures = sum("error" in result for result in results)
        return delay, render(
            200,
            json.dumps(
                {
                    "multicast_id": ledger.requests,
                    "success": len(results) - failures,
                    "failure": failures,
                    "canonical_ids": sum("registration_id" in result for result in results),
                    "results": results,
                }
            ).encode(),
        )

    def _fate(self, token: str) -> dict:
        for pattern, fate, _ in FATES:
            found = pattern.match(token)
            if found:
                told = fate(found, self.ledger.arrived[token])
                return told if "error" in told else {"message_id": f"0:{self.ledger.requests}", **told}
        return {"message_id": f"0:{self.ledger.requests}"}

    def _control(self, request: Request) -> bytes:
        what = (request.method, request.path)
        if what == ("GET", "/sandbox/received"):
            return render(200, self.ledger.as_json())
        if what == ("POST", "/sandbox/reset"):
            self.ledger, self.mode = Ledger(), Mode(self.normal)
            return render(200, b"ok\n", "text/plain")
        if what == ("POST", "/sandbox/mode"):
            try:
                fields = json.loads(request.body)
                if not isinstance(fields, dict):
                    raise BadRequest("must be a JSON object")
                self.mode.change(fields)
            except (BadRequest, ValueError) as problem:
                return render(400, json.dumps({"error": str(problem), "field": getattr(problem, "field", "")}).encode())
            return render(200, b"ok\n", "text/plain")
        return render(404, b"known are /sandbox/received, /sandbox/mode and /sandbox/reset\n", "text/plain")

    # ---------------------------------------------------------------------------------------------- the event loop

    def run(self) -> NoReturn:
        while True:
            wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
            for key, events in self._selector.select(wait):
                if key.data is None:
                    self._accept()
                elif not key.data.closed:
                    self._on_ready(key.data, events)
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                _, _, peer, answer = heapq.heappop(self._later)
                self._deliver(peer, answer)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self.ledger.connections += 1
            self._selector.register(sock, READ, _Peer(sock))

    def _on_ready(self, peer: _Peer, events: int) -> None:
        try:
            if events & WRITE:
                self._write(peer)
            while events & READ:
                data = peer.sock.recv(256 * 1024)
                if not data:
                    return self._close(peer)
                peer.reader.feed(data)
                while request := peer.reader.next():
                    self._schedule(peer, *self.answer(request))
                if not self._tls:
                    return None
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._selector.modify(peer.sock, READ | WRITE, peer)
        except BadRequest as problem:
            self._schedule(peer, 0.0, render(problem.status, problem.error.encode(), "text/plain"))
        except OSError:
            self._close(peer)

    def _schedule(self, peer: _Peer, delay: float, answer: bytes | None) -> None:
        peer.waiting += 1
        self.ledger.in_flight += 1
        self.ledger.peak = max(self.ledger.peak, self.ledger.in_flight)
        if delay == 0.0:
            self._deliver(peer, answer)
        elif delay != float("inf"):
            self._count += 1
            heapq.heappush(self._later, (time.monotonic() + delay, self._count, peer, answer))

    def _deliver(self, peer: _Peer, answer: bytes | None) -> None:
        if peer.closed:
            return None
        peer.waiting -= 1
        self.ledger.in_flight -= 1
        if answer is None:
            return self._close(peer)
        peer.unsent += answer
        try:
            self._write(peer)
        except OSError:
            self._close(peer)

    def _write(self, peer: _Peer) -> None:
        while peer.unsent:
            try:
                peer.unsent = peer.unsent[peer.sock.send(peer.unsent) :]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._selector.modify(peer.sock, READ | WRITE, peer)
                return
        if self._selector.get_key(peer.sock).events & WRITE:
            self._selector.modify(peer.sock, READ, peer)

    def _close(self, peer: _Peer) -> None:
        peer.closed = True
        self.ledger.in_flight -= peer.waiting
        self._selector.unregister(peer.sock)
        peer.sock.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def main(settings: Settings, listener: socket.socket, control: Connection) -> None:
    """The sandbox as a child of the server's supervisor."""
    child.enter("sandbox", settings.log_level, settings.logto)
    control.send(("ready", None))
    Sandbox(listener, Mode(0.0)).run()


def command(settings: SandboxSettings) -> NoReturn:
    """`gocm sandbox`: the sandbox alone, until SIGTERM or SIGINT. Raises SettingsError when it cannot be."""
    tls = None
    if settings.tls_cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            tls.load_cert_chain(settings.tls_cert, settings.tls_key or None)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"--tls-cert {settings.tls_cert} cannot be used: {error}") from None
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(f"cannot listen on {settings.host} port {settings.port}: {reason}", Exit.ADDRESS) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    log.logger.info("sandbox listens on %s port %d", *listener.getsockname()[:2])
    Sandbox(listener, Mode(settings.latency), tls).run()


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(Exit.OK)
