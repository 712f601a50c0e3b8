"""The listening sockets, each a ThreadingHTTPServer, whose connections are served by one loop (module loop)."""

import http.server
import socket
import socketserver
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

from gocm_lib.front.connection import CROWDED, ClientConnection
from gocm_lib.front.gate import Asker, Gate
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.led import LedWire
from gocm_lib.front.listener import Listener
from gocm_lib.front.render import render, request_id
from gocm_lib.front.response import unavailable
from gocm_lib.front.served import Watcher
from gocm_lib.front.wire import Wire

MAPPED = "::ffff:"  # before an IPv4 address on a socket of both families (RFC 4291, 2.5.5.2)
LAST_WORDS = 0.5  # seconds that a new connection may take to say something, once we are stopping


class _Newcomer:
    """The line of a place that was not served yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def close(self) -> None:
        self._sock.close()

    def has_unread(self) -> bool:
        return False


class Server(http.server.ThreadingHTTPServer):
    """One listener. The threads that http.server would give to connections are given to work instead (module workers):
    a thread that waits for a client costs memory, and a turn of the interpreter lock for each thing that it hears.
    """

    def __init__(
        self, listener: Listener, handlers: Handlers, gate: Gate, tls: ssl.SSLContext | None, google: bool = False
    ) -> None:
        """`tls` may be replaced later, for new connections. With `google` they come under Google's name."""
        socketserver.BaseServer.__init__(self, listener.host, socketserver.BaseRequestHandler)
        self.socket = listener.sock
        self.listener = listener
        self.part = f"accept on {listener}"
        self.handlers = handlers
        self.gate = gate
        self.tls = tls
        self.google = google
        self.watcher: Watcher | None = None  # who serves its connections

    def process_request(self, request: Any, client_address: object) -> None:
        """Give a new connection to the loop, or turn it away."""
        assert self.watcher
        request.setblocking(False)
        peer = client_address[0].removeprefix(MAPPED) if isinstance(client_address, tuple) else ""
        place = self.gate.take(peer, _Newcomer(request), time.monotonic())
        if place is None:
            self._turn_away(request)
            return
        try:
            made = LedWire(request, self.tls) if self.google and self.tls else Wire(request, self.tls, not peer)
            connection = ClientConnection(made, place, self.watcher, Asker(peer, by_google=self.google))
        except OSError:  # it is gone already
            self.gate.leave(place)
            self.shutdown_request(request)
            return
        place.line = connection
        self.watcher.adopt(connection)

    def _turn_away(self, request: socket.socket) -> None:
        """Answer 503, without waiting for the client, which may be one of thousands."""
        self.handlers.collector.answered("other", 503, 0.0, True)
        try:
            if not self.tls:
                request.send(render(unavailable(CROWDED), request_id(None), 0, False))
            request.shutdown(socket.SHUT_WR)
            request.recv(65536)
        except OSError:
            pass
        self.shutdown_request(request)


def stop(servers: Sequence[Server], stop_accepting: Callable[[], None], patience: float) -> None:
    """Accept no more connections. Returns when no request is in work, after `patience` seconds at most. What was
    accepted before is answered: its client cannot know that it came late.
    """
    if not servers:
        return
    gate, handlers = servers[0].gate, servers[0].handlers
    gate.closing = True
    stop_accepting()
    began = time.monotonic()
    while (now := time.monotonic()) < began + patience:
        if not any([each.is_busy(now < began + LAST_WORDS) for each in gate.all()]):
            break
        time.sleep(0.01)
    handlers.draining = True
