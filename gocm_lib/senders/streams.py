"""HTTP/2 on the non-blocking socket of a connected urllib3 connection: up to a hundred exchanges at once.

Module http2.client knows the protocol; this is the socket below it. Promises the same as Http1Channel, and that of a
request which never reached the socket is said that it may be sent again freely.
"""

import contextlib
import socket
import time
from collections import deque
from typing import Any

from urllib3.connection import HTTPConnection

from gocm_lib.http2.client import Again, Answer, Client, Event
from gocm_lib.http2.peer import UNSENT
from gocm_lib.senders.connection import (
    BLOCKED,
    PIECE,
    Ended,
    Http1Channel,
    Request,
    Response,
    WireError,
    unblocked,
    word,
)

READS = 64  # pieces that are read in a row: others wait, too


class NotHttp2(Exception):
    """The server has agreed to speak HTTP/2, and does not. `config`: what it says is something else entirely."""

    def __init__(self, reason: str, config: bool) -> None:
        super().__init__(reason)
        self.config = config


class Http2Channel:
    """A connection whose server has told its settings. Its face is that of Http1Channel."""

    protocol = "h2"
    turned_away = False

    def __init__(self, connection: HTTPConnection, limit: float) -> None:
        """Greet the server: it is not to be told of a request before it has said how many it takes. Blocks for up to
        `limit` seconds. Raises NotHttp2, OSError.
        """
        assert connection.sock is not None
        self.connection = connection
        self.client = Client(time.monotonic())
        self._sent = 0  # bytes so far
        self._begun: deque[tuple[int, Any]] = deque()  # keys, and after how many bytes each begins; the oldest first
        self._broken = False
        self._greet(connection.sock, time.monotonic() + limit)
        self.sock = unblocked(connection)
        # What the loop is too busy to notice, the kernel does: a peer that takes nothing for this long is gone.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)

    def _greet(self, sock: socket.socket, deadline: float) -> None:
        while not self.client.greeted:
            try:
                sock.sendall(self.client.out)
                self.client.out.clear()
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(PIECE)
            except TimeoutError:
                raise
            except OSError as error:  # of TLS, too, which would look like a failed handshake
                raise NotHttp2(f"no settings came: {word(error)}", config=False) from None
            if not data:
                raise NotHttp2("the connection was closed before any settings came", config=False)
            self.client.receive(data, time.monotonic())
            if self.client.over:
                raise NotHttp2("it speaks no HTTP/2, though it said so", config=True)
        with contextlib.suppress(OSError):  # which the first request will find
            sock.sendall(self.client.out)  # its settings are acknowledged at once, whatever comes of the connection
            self.client.out.clear()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def open(self) -> int:
        """How many exchanges are under way."""
        return self.client.open

    @property
    def unsent(self) -> bool:
        """Whether there is something to write."""
        return bool(self.client.out)

    @property
    def over(self) -> bool:
        """Whether it is to be closed."""
        return self._broken or self.client.over

    def takes(self, size: int) -> bool:
        """Whether an exchange with a body of `size` bytes can be begun."""
        return self.client.takes(size)

    def begin(self, key: Any, request: Request, now: float) -> None:
        """Begin an exchange that the client takes; `write` sends it."""
        self._begun.append((self._sent + len(self.client.out), key))
        self.client.request(key, request.head.fields, request.body, now)

    def write(self) -> list[Ended]:
        """Write what the socket takes now."""
        out = self.client.out
        try:
            while out:
                sent = self.sock.send(out)
                self._sent += sent
                del out[:sent]
        except BLOCKED:
            pass
        except OSError as error:
            return self._fail(f"write failed: {word(error)}")
        if not out:
            self._begun.clear()
        return []

    def read(self, now: float) -> list[Ended]:
        """Read what has arrived."""
        found: list[Ended] = []
        # A peer that makes us answer to its frames, and does not read that, is not read either.
        for _ in range(READS if len(self.client.out) < UNSENT else 0):
            try:
                data = self.sock.recv(PIECE)
            except BLOCKED:
                break
            except OSError as error:
                return found + self._fail(f"read failed: {word(error)}")
            if not data:
                return found + self._fail("connection closed")
            found += map(_ended, self.client.receive(data, now))
            if self.client.over:
                break
        return found

    def _fail(self, reason: str) -> list[Ended]:
        self._broken = True
        unwritten = {key for start, key in self._begun if start >= self._sent}
        ended = [_ended(event) for event in self.client.end(reason)]
        for key, error in ended:
            if key in unwritten and isinstance(error, WireError):
                error.again = Again.FREELY
        return ended

    def give_up(self, key: Any, error: WireError, now: float) -> list[Ended]:
        """The answer to an exchange is not awaited any more."""
        self.client.cancel(key, now)
        return [(key, error)]

    def tick(self, now: float) -> list[Ended]:
        """Time has passed: ask whether the server is there, or give it up."""
        return [_ended(event) for event in self.client.tick(now)]

    def close(self) -> None:
        """Say what is still to be said, if the socket takes it, and close."""
        try:
            self.sock.send(self.client.out)
        except (*BLOCKED, OSError):
            pass
        self.connection.close()


def _ended(event: Event) -> Ended:
    if isinstance(event, Answer):
        return event.key, Response(event.status, event.headers, event.body, True)
    return event.key, WireError(event.reason, False, event.cause, event.again, event.old)


Channel = Http1Channel | Http2Channel
