"""The pretend upstream as a server: to try everything with, with no Google account and no key.

One thread, one event loop, so that it keeps up with thousands of requests a second. What it answers is decided in
`pretend`; here are the connections, and the URLs by which its behaviour is set and its ledger read:

    POST any path ending in /send               as legacy GCM, in JSON and in text; /notification: its device groups
    POST /iid/v1:batchAdd, :batchRemove         who is in a topic; .../topicSubscriptions as FCM v1 has it
    POST /v1/projects/PROJECT/messages:send     as FCM v1
    POST /token, GET /computeMetadata/v1/...    as Google's token endpoint and metadata server
    GET  /sandbox/received                      the ledger: {"requests", "peak", "arrived": {token: times}, ...}
    GET  /sandbox/counts                        the same without the tokens, only how many
    GET  /sandbox/messages                      the last messages, each whole; ?wait=S&count=N until they have come
    POST /sandbox/mode                          {"latency": 0.2, "status": 503, "retry_after": 5, ...}
    POST /sandbox/reset                         empty the ledger, back to normal
"""

import datetime
import heapq
import json
import os
import selectors
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

from gocm_lib.config.settings import Exit, Fatal, SandboxSettings, Settings, is_loopback
from gocm_lib.front import auth, google, google_files, response
from gocm_lib.front.request import MAX_HEAD, Request
from gocm_lib.message import assertion
from gocm_lib.message.assertion import Account, read_account
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.process import child, log, resources
from gocm_lib.tools import account
from gocm_lib.tools.lines import Ending, Http1, Http2, speaks_http2
from gocm_lib.tools.pretend import Ledger, Mode, Pretender, mistake
from gocm_lib.tools.pretend_answers import ANSWERS, PROJECT, Answer
from gocm_lib.tools.received import Asked, Watch, asked, soonest
from gocm_lib.tools.tunnel import Tunnels, tunnels

BUSY = 16  # answers that are owed; with more they are given, and requests taken, every
GATHER = 0.002  # seconds, not each by itself: it is to be tried against, not to take the CPU from what is tried
TICK = 1.0  # seconds between two looks at what time does to connections
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
CONNECT = b"CONNECT "


class Door(NamedTuple):
    """Where connections come in, and by what they are served; None: without TLS."""

    listener: socket.socket
    tls: ssl.SSLContext | None = None

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port


class Lead(NamedTuple):
    """What becomes of those who take us for their proxy: `tls` serves Google's names. Other hosts are reached by
    `tunnels`, if there are any, or `refused` is told the host.
    """

    tls: ssl.SSLContext
    tunnels: Tunnels | None = None
    refused: Callable[[str], object] = str


class _Peer:
    """A connection: its socket, and what it speaks, once that is known."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.line: Http1 | Http2 | None = None
        self.first = b""  # what came before that was known
        self.waiting = 0  # requests taken and not yet answered
        self.writes = False  # it waits for room in the socket
        self.closed = False


class Sandbox:
    """The pretend upstream on one listening socket."""

    def __init__(self, doors: Sequence[Door], pretender: Pretender, lead: Lead | None = None, host: str = "") -> None:
        """`lead`: who asks to be led somewhere (CONNECT) is served by it. `host`: the name, beside addresses and
        localhost, under which it may be called to change its behaviour.
        """
        self.normal = pretender.mode.latency
        self.pretender = pretender
        self._lead = lead
        self._policy = auth.Policy(names=frozenset([host.lower()]))
        self._selector = selectors.DefaultSelector()
        for door in doors:
            door.listener.setblocking(False)
            self._selector.register(door.listener, READ, door)
        self._later: list[tuple[float, int, _Peer, int, Ending]] = []  # answers in the order they fall due
        self._dirty: dict[_Peer, None] = {}  # who is to be written to in this turn
        self._streaming: dict[_Peer, Http2] = {}  # those that time does something to
        self._watches: list[Watch] = []
        self._ticked = 0.0
        self._count = 0

    @property
    def ledger(self) -> Ledger:
        return self.pretender.ledger

    def answer(self, request: Request) -> tuple[float, Ending | Asked]:
        """The seconds to wait, then what becomes of the request; or for what messages it waits."""
        if request.path.startswith("/sandbox/"):
            return 0.0, self._control(request)
        return self.pretender.answer(request)

    def _answer(self, request: Request) -> tuple[float, Ending | Asked]:
        """The same, whatever is in the request: one that we cannot cope with must not end the others' tests."""
        try:
            return self.answer(request)
        except Exception:
            log.logger.exception("the sandbox has no answer to a %s", request.method)  # its path may hold a token
            return 0.0, ANSWERS["internal"][0]

    def _control(self, request: Request) -> Answer | Asked:
        what = (request.method, request.path)
        try:
            # As the server itself does: no page that somebody looks at may set or read any of this.
            auth.check(request.headers, self._policy, local=False, public=True)
        except BadRequest as problem:
            return Answer(problem.status, response.error(problem))
        if what == ("GET", "/sandbox/received"):
            return Answer(200, self.ledger.as_json())
        if what == ("GET", "/sandbox/counts"):
            return Answer(200, self.ledger.counts())
        if what == ("GET", "/sandbox/messages"):
            try:
                wanted = asked(request.query)
                return wanted if wanted.wait else Answer(200, self.pretender.received.page(wanted))
            except BadRequest as problem:
                return Answer(400, response.error(problem))
        if what == ("POST", "/sandbox/reset"):
            self.pretender.reset(Mode(self.normal))
            return Answer(200, b"ok\n", "text/plain")
        if what == ("POST", "/sandbox/mode"):
            try:
                change(self.pretender.mode, json.loads(request.body))
            except (BadRequest, ValueError, RecursionError) as problem:
                return Answer(400, response.error(BadRequest(str(problem), getattr(problem, "field", ""))))
            return Answer(200, b"ok\n", "text/plain")
        return Answer(404, b"known are /sandbox/received, /counts, /messages, /mode and /reset\n", "text/plain")

    # ---------------------------------------------------------------------------------------------- the event loop

    def hear(self, source: Connection, heard: Callable[[], None]) -> None:
        """From now on call `heard` whenever there is something to read at a source."""
        self._selector.register(source, READ, heard)

    def run(self) -> NoReturn:
        while True:
            if len(self._later) > BUSY:
                time.sleep(GATHER)
            for key, events in self._selector.select(self._patience()):
                if isinstance(key.data, Door):
                    self._accept(key.data)
                elif not isinstance(key.data, _Peer):
                    key.data()
                elif not key.data.closed:
                    self._on_ready(key.data, events)
            self._on_time(time.monotonic())
            for peer in self._dirty:
                self._flush(peer)
            self._dirty.clear()

    def _on_time(self, now: float) -> None:
        """Do what is due."""
        while self._later and self._later[0][0] <= now:
            _, _, peer, number, fate = heapq.heappop(self._later)
            self._deliver(peer, number, fate)
        if self._watches:
            self._look(now)
        if now > self._ticked + TICK:
            self._tick(now)

    def _patience(self) -> float | None:
        now = time.monotonic()
        first = min(self._later[0][0] if self._later else float("inf"), soonest(self._watches))
        if self._streaming:
            first = min(first, self._ticked + TICK)
        return max(0.0, first - now) if first < float("inf") else None

    def _look(self, now: float) -> None:
        """Answer those whose messages have come, or whose time is up."""
        over = [each for each in self._watches if each.is_over(self.pretender.received, now)]
        self._watches = [each for each in self._watches if each not in over]
        for watch in over:
            watch.answer()

    def _tell(self, peer: _Peer, number: int, wanted: Asked) -> None:
        if peer.line and not peer.closed:
            peer.line.settle(number, Answer(200, self.pretender.received.page(wanted)))
            self._dirty[peer] = None

    def _tick(self, now: float) -> None:
        self._ticked = now
        for peer, line in self._streaming.items():
            line.tick(now)
            self._dirty[peer] = None

    def _accept(self, door: Door) -> None:
        for _ in range(64):
            try:
                sock, _address = door.listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors left: the connection stays in the backlog, and asking at once would spin
                time.sleep(0.01)
                return
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if door.tls:
                    sock = self._wrap(sock, door.tls)
            except OSError:  # it is gone already
                sock.close()
                continue
            self.ledger.connections += 1
            self._selector.register(sock, READ, _Peer(sock))

    def _wrap(self, sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        """A connection that speaks TLS from now on. Raises OSError."""
        context.set_alpn_protocols(["h2", "http/1.1"] if self.pretender.mode.http2 else ["http/1.1"])
        return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def _on_ready(self, peer: _Peer, events: int) -> None:
        try:
            if events & WRITE:
                self._dirty[peer] = None
            while events & READ:
                data = peer.sock.recv(64 * 1024)
                if not data:
                    return self._close(peer)
                self._receive(peer, data)
                if peer.closed or not isinstance(peer.sock, ssl.SSLSocket):
                    return None
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._selector.modify(peer.sock, READ | WRITE, peer)
            peer.writes = True
        except OSError:
            self._close(peer)

    def _receive(self, peer: _Peer, data: bytes) -> None:
        now = time.monotonic()
        if peer.line is None:
            data = peer.first = peer.first + data
            if self._lead and not isinstance(peer.sock, ssl.SSLSocket) and CONNECT.startswith(data[: len(CONNECT)]):
                self._lead_on(peer, data, self._lead)
                return
            speaks = speaks_http2(data) if self.pretender.mode.http2 else False
            if isinstance(peer.sock, ssl.SSLSocket):
                speaks = peer.sock.selected_alpn_protocol() == "h2"
            if speaks is None:
                return
            mode = self.pretender.mode
            peer.line, peer.first = Http1(), b""
            if speaks:
                peer.line = self._streaming[peer] = Http2(now, mode.streams, mode.window)
        for number, request in peer.line.receive(data, now):
            if not peer.line.awaits(number):  # those before it have ended the connection
                continue
            delay, fate = self._answer(request)
            if isinstance(fate, Asked):
                self._watches.append(Watch(fate, partial(self._tell, peer, number, fate), now))
                continue
            peer.waiting += 1
            self.ledger.in_flight += 1
            self.ledger.peak = max(self.ledger.peak, self.ledger.in_flight)
            if delay == 0.0:
                self._deliver(peer, number, fate)
            else:
                self._count += 1
                heapq.heappush(self._later, (now + delay, self._count, peer, number, fate))
        self._dirty[peer] = None

    def _lead_on(self, peer: _Peer, data: bytes, lead: Lead) -> None:
        """A client of a proxy asks to be led somewhere: to one of Google's names, for which we answer ourselves, or to
        another host.
        """
        head, end, more = data.partition(b"\r\n\r\n")
        try:
            if not end and len(data) <= MAX_HEAD:
                return
            host, port = google.asked_for(head)
            if more:  # it speaks before it knows that anybody listens
                raise BadRequest("wait for the answer to CONNECT")
            if not (google.is_ours(host, port) or lead.tunnels):
                lead.refused(host)
                raise google.elsewhere("; --pass lets other hosts through")
        except BadRequest as problem:
            peer.line = Http1()
            # Of an answer to CONNECT many programs show the first line alone.
            reason = "Only Google is here (--pass)" if problem.status == 403 else "Bad Request"
            peer.line.settle(0, Answer(problem.status, response.error(problem), reason=reason))
            peer.line.over = True
            self._dirty[peer] = None
            return
        peer.first = b""
        self._selector.unregister(peer.sock)
        if lead.tunnels and not google.is_ours(host, port):
            peer.closed = True
            lead.tunnels.lead(peer.sock, host, port)
            return
        try:
            peer.sock.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            peer.sock = self._wrap(peer.sock, lead.tls)
        except (OSError, ValueError):  # it is gone already
            peer.closed = True
            peer.sock.close()
            return
        self._selector.register(peer.sock, READ, peer)

    def _deliver(self, peer: _Peer, number: int, fate: Ending) -> None:
        if peer.closed or fate == "silent":
            return
        assert peer.line
        peer.waiting -= 1
        self.ledger.in_flight -= 1
        mode = self.pretender.mode
        peer.line.settle(number, fate, mode.goaway if fate == "goaway" else mode.reset)
        self._dirty[peer] = None

    def _flush(self, peer: _Peer) -> None:
        """Write to a peer what there is for it, and close it when it is over."""
        if peer.closed or peer.line is None:
            return None
        out = peer.line.out
        try:
            while out:
                del out[: peer.sock.send(out)]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError:
            return self._close(peer)
        if peer.line.over and not out:
            return self._close(peer)
        if peer.writes != bool(out):
            peer.writes = bool(out)
            self._selector.modify(peer.sock, READ | WRITE if out else READ, peer)
        return None

    def _close(self, peer: _Peer) -> None:
        peer.closed = True
        self._streaming.pop(peer, None)
        self.ledger.in_flight -= peer.waiting
        self._selector.unregister(peer.sock)
        peer.sock.close()


def change(mode: Mode, fields: Any) -> None:
    """Set fields of a mode. Raises BadRequest for an unknown field, or a value of the wrong type."""
    if not isinstance(fields, dict):
        raise BadRequest("must be a JSON object")
    for name, value in fields.items():
        kinds = Mode.FIELDS.get(name)
        if kinds is None:
            raise BadRequest("known are " + ", ".join(Mode.FIELDS), name[:64])
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadRequest("must be of type " + kinds[-1].__name__, name)
        if problem := mistake(name, value):
            raise BadRequest(problem, name)
    for name, value in fields.items():
        setattr(mode, name, value)


def point_at(settings: Settings, port: int) -> Settings:
    """The server's settings, changed to send to the sandbox at a port. Its metadata server gives the access tokens,
    unless there is a --credentials file; a missing one is made.
    """
    here = f"127.0.0.1:{port}"
    urls = {"gcm": f"http://{here}/gcm/send", "fcm": f"http://{here}"}
    named = {
        name: replace(
            each,
            url=urls[each.dialect],
            apikey="sandbox" if each.dialect == "gcm" else "",
            apikey_file="",
            credentials="",
            token_command="",
            metadata=each.dialect == "fcm",
            project=(each.project or PROJECT) if each.dialect == "fcm" else "",
        )
        for name, each in settings.upstream.items()
    }
    settings = replace(settings, gcm_url=urls["gcm"], fcm_url=urls["fcm"], apikey="sandbox", upstream=named)
    if settings.credentials:
        if not os.path.exists(settings.credentials):
            write_credentials(settings.credentials, port)
        return settings
    return replace(settings, token_command="", fcm_metadata=True, metadata_host=here, fcm_project=PROJECT)


def write_credentials(path: str, port: int, scheme: str = "http", host: str = "127.0.0.1") -> None:
    """Write a service account's file for the sandbox at an address, in Google's form. Raises Fatal."""
    account.write(path, PROJECT, "sandbox", f"{scheme}://{host}:{port}/token")


def account_of(path: str) -> Account | None:
    """The account of a service account's file; None: there is no file."""
    try:
        with open(path) as file:
            return read_account(json.load(file))
    except (ImportError, OSError, ValueError, KeyError, TypeError):
        return None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def main(settings: Settings, listener: socket.socket, control: Connection) -> None:
    """The sandbox as a child of the server's supervisor."""
    child.enter("sandbox", settings)
    control.send(("ready", None))
    Sandbox([Door(listener)], Pretender(Mode(0.0), account_of(settings.credentials), any_project=True)).run()


def command(settings: SandboxSettings) -> NoReturn:
    """`gocm sandbox`: the sandbox alone, until SIGTERM or SIGINT. Raises Fatal when it cannot run."""
    resources.raise_file_limit()
    resources.collect_seldom()
    if not (is_loopback(settings.host) or settings.no_auth):
        raise Fatal(
            f"--host {settings.host} can be reached by other machines, and they may change what the sandbox does: "
            "listen on 127.0.0.1, or say --no-auth if a firewall guards it"
        )
    if settings.google and settings.tls_cert:
        raise Fatal("--google serves TLS by certificates of its own: leave --tls-cert out")
    if settings.pass_ and not settings.google:
        raise Fatal("--pass is for programs that are led here by --google")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    lead = None
    if settings.google:
        doors, lead = take_place(settings.google, settings.host, settings.port, settings.tls_port, settings.pass_)
    else:
        doors = [Door(_listen(settings.host, settings.port), _own_tls(settings))]
    port = doors[0].port
    if settings.write_credentials and not os.path.exists(settings.write_credentials):
        write_credentials(settings.write_credentials, *_address(settings, port))
    log.logger.info("sandbox listens on %s port %d", *doors[0].listener.getsockname()[:2])
    if lead:
        log.logger.info("it answers in Google's place, for any account and project, by TLS on port %d", doors[1].port)
        print(_WHAT_TO_DO.format(folder=settings.google, port=port, tls_port=doors[1].port), flush=True)
    anybody = settings.any_token or bool(lead)
    account = account_of(settings.write_credentials)
    Sandbox(doors, Pretender(Mode(settings.latency), account, anybody, bool(lead)), lead, settings.host).run()


def take_place(folder: str, host: str, port: int, tls_port: int, passes: bool) -> tuple[list[Door], Lead]:
    """Listen in Google's place: first for those who are to be led, then by TLS. What programs need for it is in the
    folder then. With `passes` other hosts may be reached. Raises Fatal.
    """
    tls = google.serve_as(folder, datetime.datetime.now(datetime.UTC))
    doors = [Door(_listen(host, port)), Door(_listen(host, tls_port), tls)]
    google_files.write(folder, doors[0].port, doors[1].port, os.environ)
    if not os.path.exists(path := os.path.join(folder, "account.json")):
        account.write(path, PROJECT, "sandbox", assertion.AUDIENCES[0])
    found = tunnels(os.environ, f"127.0.0.1:{doors[0].port}") if passes else None
    return doors, Lead(tls, found)


_WHAT_TO_DO = """\
programs are led here by variables:  . {folder}/env
or a single command, without these:  gocm sandbox exec -- COMMAND
or by name, Google's being ours:     port {tls_port} with TLS, which {folder}/ca.pem vouches for
what they have sent:                 curl http://127.0.0.1:{port}/sandbox/messages
everything else about it:            gocm help google"""


def _own_tls(settings: SandboxSettings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        tls.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise Fatal(f"--tls-cert {settings.tls_cert} cannot be used: {error}") from None
    return tls


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise Fatal(f"cannot listen on {host} port {port}: {error.strerror or error}", Exit.ADDRESS) from None


def _address(settings: SandboxSettings, port: int) -> tuple[int, str, str]:
    """The port, the scheme and the name under which this machine's programs reach the sandbox."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return port, "https" if settings.tls_cert else "http", f"[{host}]" if ":" in host else host


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(Exit.OK)
