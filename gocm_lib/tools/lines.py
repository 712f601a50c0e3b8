"""The connections of the sandbox, without their sockets: HTTP/1.1 and HTTP/2 with one face.

Both take bytes and give requests, each with a number; take what becomes of it, an Answer or one of FAILURES; and keep
in `out` what is to be sent. Pure; all times are monotonic.
"""

import functools

from gocm_lib.front.request import Reader, Request
from gocm_lib.http2 import frames
from gocm_lib.http2.frames import Code
from gocm_lib.http2.server import Incoming, Server
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.tools.pretend_answers import Answer

MAX_BODY = 16 * 1024 * 1024
# What may become of a request instead of an answer. The last three are of HTTP/2; over HTTP/1.1 each of them closes.
FAILURES = {
    "silent": "no answer ever comes",
    "close": "the connection is closed",
    "refuse": "its stream is refused, unlooked at",
    "reset": "its stream is reset",
    "goaway": "the connection ends with a GOAWAY, and this was not looked at",
}
Ending = Answer | str

Numbered = list[tuple[int, Request]]


class Http1:
    """A connection that speaks HTTP/1.1."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.over = False  # to be closed, once `out` is sent
        self._reader = Reader(MAX_BODY)

    def receive(self, data: bytes, now: float) -> Numbered:
        """The requests that `data` completes."""
        found = []
        try:
            self._reader.feed(data)
            while request := self._reader.next():
                found.append((0, request))
        except BadRequest as problem:
            self.settle(0, Answer(problem.status, problem.error.encode(), "text/plain"))
            self.over = True  # nobody knows where the next one would begin
        return found

    def awaits(self, number: int) -> bool:
        """Whether the client awaits an answer to a request."""
        return not self.over

    def settle(self, number: int, fate: Ending, code: int = 0) -> None:
        """What becomes of a request."""
        if isinstance(fate, Answer):
            self.out += (
                f"HTTP/1.1 {fate.status} {fate.reason}\r\nContent-Type: {fate.content_type}\r\n"
                f"Content-Length: {len(fate.body)}\r\n{fate.headers}\r\n"
            ).encode()
            self.out += fate.body
        elif fate != "silent":
            self.over = True


class Http2:
    """A connection that speaks HTTP/2, many requests at once."""

    def __init__(self, now: float, streams: int, window: int) -> None:
        self._server = Server(now, MAX_BODY, streams, window)
        self._closed = False

    @property
    def out(self) -> bytearray:
        """What is to be sent."""
        return self._server.out

    @property
    def over(self) -> bool:
        """Whether it is to be closed, once `out` is sent."""
        return self._closed or self._server.over

    def receive(self, data: bytes, now: float) -> Numbered:
        """The requests that `data` completes."""
        return [(each.stream, _request(each)) for each in self._server.receive(data, now)]

    def awaits(self, number: int) -> bool:
        """Whether the client awaits an answer to a request: it was told if it does not get one."""
        return self._server.awaits(number)

    def settle(self, number: int, fate: Ending, code: int = 0) -> None:
        """What becomes of a request. `code` is what its reset, or the GOAWAY, says."""
        if isinstance(fate, Answer):
            self._server.answer(number, fate.status, _fields(fate.content_type, fate.headers), fate.body)
        elif fate == "refuse":
            self._server.reset(number, Code.REFUSED_STREAM)
        elif fate == "reset":
            self._server.reset(number, code)
        elif fate == "goaway":
            self._server.leave(max(0, number - 2), code, "pretended")
        elif fate == "close":
            self._closed = True

    def tick(self, now: float) -> None:
        """Time has passed: a client that keeps nothing open is let go, as Google does."""
        self._server.tick(now)


def _request(incoming: Incoming) -> Request:
    path, _, query = incoming.path.partition("?")
    return Request(incoming.method, path, query, incoming.headers, incoming.body, True)


@functools.lru_cache(maxsize=256)
def _fields(content_type: str, headers: str) -> tuple[tuple[str, str], ...]:
    lines = [line.split(": ", 1) for line in headers.split("\r\n") if line]
    return ("content-type", content_type), *((name.lower(), value) for name, value in lines)


def speaks_http2(data: bytes) -> bool | None:
    """Whether these first bytes are those of HTTP/2; None: it takes more of them to know."""
    if data.startswith(frames.PREFACE):
        return True
    return None if frames.PREFACE.startswith(data) else False
