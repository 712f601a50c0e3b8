"""One HTTP/1.1 exchange at a time on a non-blocking connection: write a request, read the response piece by piece.

ResponseReader is pure (bytes in, response out). Http1Channel runs it on the socket of a connected urllib3 connection,
TLS or plain. urllib3's own request() would block a thread, and costs several times the CPU of the few lines here.
urllib3 still does what it does best: pools, connecting, TLS verification.

Promises that a response is returned once and whole or not at all, that no answer makes us hold more than MAX_BODY, and
that an error says whether the upstream had answered a single byte.
"""

import functools
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

from urllib3.connection import HTTPConnection

from gocm_lib.http2.client import Again
from gocm_lib.http2.hpack import Field

MAX_HEAD = 64 * 1024
MAX_BODY = 1024 * 1024  # an answer for 1,000 tokens has 100 KiB
MAX_CHUNKS = 4096  # of an answer: a MiB of single bytes would take two seconds
MAX_INTERIM = 16  # 1xx responses before the real one
PIECE = 16 * 1024  # bytes read at once: what a TLS record holds

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?\Z")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*)\Z")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\Z")


class WireError(Exception):
    """An exchange failed. str() is a short reason, `cause` a word of outcome.RETRIES for it. `silent`: not one byte of
    an answer had come. `again`: whether it may be repeated without counting as an attempt; with `old` by HTTP/1.1.
    """

    def __init__(
        self,
        reason: str,
        silent: bool = False,
        cause: str = "connection",
        again: Again = Again.NO,
        old: bool = False,
    ) -> None:
        super().__init__(reason)
        self.silent = silent
        self.cause = cause
        self.again = again
        self.old = old


class RequestHead(NamedTuple):
    """What all requests to an upstream with one credential have in common, in the form of each protocol, but for the
    length of the body.
    """

    lines: bytes
    fields: tuple[Field, ...]


class Request(NamedTuple):
    """A request for either protocol."""

    head: RequestHead
    body: bytes

    def http1(self) -> bytes:
        """The bytes of HTTP/1.1."""
        return b"%b\r\nContent-Length: %d\r\n\r\n%b" % (self.head.lines, len(self.body), self.body)


class Response(NamedTuple):
    """An upstream's answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case; of repeated headers the last
    body: bytes
    reusable: bool  # the connection may carry another exchange


Ended = tuple[Any, Response | WireError]  # the key of an exchange, and how it ended


class Head(NamedTuple):
    """The head of a response, and how its body ends: by length, by chunks, or with the connection."""

    status: int
    headers: Mapping[str, str]
    keep_alive: bool
    length: int | None
    chunked: bool


@functools.lru_cache(maxsize=64)  # an upstream's answers within a second mostly have the same head, byte for byte
def parse_head(raw: bytes) -> Head:
    """The Head in these bytes, which lack the final empty line. Raises WireError for anything malformed."""
    lines = raw.split(b"\r\n")
    match = _STATUS_LINE.match(lines[0])
    if not match:
        raise WireError("answer is not HTTP/1")
    status, modern = int(match[2]), match[1] == b"1"
    if status < 200:
        return Head(status, {}, modern, 0, False)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        header = _HEADER.match(line)
        if not header:
            raise WireError("answer has a malformed header")
        name, value = header[1].decode().lower(), header[2].rstrip(b" \t").decode("latin-1")
        if name in ("content-length", "transfer-encoding") and headers.get(name, value) != value:
            raise WireError(f"answer has two different {name} headers")
        headers[name] = value
    connection = {part.strip() for part in headers.get("connection", "").lower().split(",")}
    keep_alive = "close" not in connection and (modern or "keep-alive" in connection)
    length, chunked = _framing(status, headers)
    return Head(status, headers, keep_alive and (chunked or length is not None), length, chunked)


def _framing(status: int, headers: Mapping[str, str]) -> tuple[int | None, bool]:
    """The body's length (None: not given), and whether it is chunked, in the order of RFC 9112 section 6.3."""
    if status in (204, 304):
        return 0, False
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked" or "content-length" in headers:
            raise WireError("answer has an unknown transfer-encoding")
        return None, True
    length = headers.get("content-length")
    if length is None:
        return None, False
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise WireError("answer has a malformed content-length")
    if int(length) > MAX_BODY:
        raise WireError("answer too long")
    return int(length), False


class ResponseReader:
    """Reads one response (RFC 9112) from pieces of any size, and skips interim 1xx responses."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.interim = 0
        self.head: Head | None = None  # once it is whole
        self.chunks = bytearray()  # what chunks have given so far, when the body is chunked
        self.chunk_count = 0
        self.scanned = 0  # of the buffer, while looking for the head's end

    def feed(self, data: bytes) -> Response | None:
        """The response, once `data` completes it. Bytes after its end make the connection not reusable.

        Raises WireError when the bytes are not an HTTP/1 response, or exceed a limit.
        """
        self.buffer += data
        while self.head is None:
            if not self._read_head():
                return None
        if self.head.chunked:
            return self._read_chunks()
        if len(self.buffer) > MAX_BODY:
            raise WireError("answer too long")
        length = self.head.length
        if length is None or len(self.buffer) < length:
            return None
        return self._response(bytes(self.buffer[:length]), len(self.buffer) == length)

    def end(self) -> Response:
        """The response, if the end of the connection completes it. Raises WireError if not."""
        if self.head and self.head.length is None and not self.head.chunked:
            return self._response(bytes(self.buffer), False)
        raise WireError("connection closed", silent=not self.begun())

    def begun(self) -> bool:
        """Whether a single byte of an answer has come."""
        return bool(self.head or self.interim or self.buffer)

    def _response(self, body: bytes, at_end: bool) -> Response:
        assert self.head is not None
        return Response(self.head.status, self.head.headers, body, self.head.keep_alive and at_end)

    def _read_head(self) -> bool:
        """Take one head off the buffer; after an interim one there is still none. False when it is not complete."""
        end = self.buffer.find(b"\r\n\r\n", max(0, self.scanned - 3))
        if end < 0:
            self.scanned = len(self.buffer)
            if self.scanned > MAX_HEAD:
                raise WireError("answer's head too long")
            return False
        if end > MAX_HEAD:
            raise WireError("answer's head too long")
        head = parse_head(bytes(self.buffer[:end]))
        del self.buffer[: end + 4]
        self.scanned = 0
        if head.status >= 200:
            self.head = head
            return True
        self.interim += 1
        if head.status == 101 or self.interim > MAX_INTERIM:
            raise WireError("unexpected interim answer")
        return True

    def _read_chunks(self) -> Response | None:
        while True:
            end = self.buffer.find(b"\r\n")
            if end < 0 or end > 1024:
                if len(self.buffer) > 1024:
                    raise WireError("answer has a malformed chunk")
                return None
            match = _CHUNK_SIZE.match(bytes(self.buffer[:end]))
            if not match:
                raise WireError("answer has a malformed chunk")
            size = int(match[1], 16)
            if len(self.chunks) + size > MAX_BODY or self.chunk_count == MAX_CHUNKS:
                raise WireError("answer too long")
            if size == 0:
                return self._read_trailers(end)
            if len(self.buffer) < end + 2 + size + 2:
                return None
            if self.buffer[end + 2 + size : end + 4 + size] != b"\r\n":
                raise WireError("answer has a malformed chunk")
            self.chunks += self.buffer[end + 2 : end + 2 + size]
            self.chunk_count += 1
            del self.buffer[: end + 4 + size]

    def _read_trailers(self, end: int) -> Response | None:
        """The response, once the trailers after the last chunk are complete. Their fields are ignored."""
        if self.buffer[end + 2 : end + 4] == b"\r\n":
            stop = end + 4
        else:
            stop = self.buffer.find(b"\r\n\r\n", end) + 4
            if stop < 4:
                if len(self.buffer) > MAX_HEAD:
                    raise WireError("answer's trailers too long")
                return None
        return self._response(bytes(self.chunks), len(self.buffer) == stop)


class Http1Channel:
    """A connected urllib3 connection, made non-blocking, with at most one exchange on it. Each exchange ends once: with
    its key, and a Response or a WireError, in what `write`, `read` or `give_up` returns.
    """

    protocol = "http/1.1"

    def __init__(self, connection: HTTPConnection) -> None:
        self.sock = unblocked(connection)
        self.connection = connection
        self.exchanges = 0  # begun on this connection; more than one: it was kept alive
        self.over = False  # it is to be closed
        self.turned_away = False  # it was new, and the path, or the upstream, has closed it
        self._key: Any = None  # of the exchange that is under way
        self._unsent: memoryview | None = None
        self._reader: ResponseReader | None = None

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def open(self) -> int:
        """How many exchanges are under way."""
        return 1 if self._reader else 0

    @property
    def unsent(self) -> bool:
        """Whether the socket has not taken everything yet."""
        return self._unsent is not None

    def takes(self, size: int) -> bool:
        """Whether an exchange with a body of `size` bytes can be begun."""
        return not (self._reader or self.over)

    def begin(self, key: Any, request: Request, now: float) -> None:
        """Begin an exchange; `write` sends it."""
        self.exchanges += 1
        self._key, self._reader = key, ResponseReader()
        self._unsent = memoryview(request.http1())

    def write(self) -> list[Ended]:
        """Write what the socket takes now."""
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except BLOCKED:
                break
            except OSError as error:
                return self._fail(WireError(f"write failed: {word(error)}", silent=self._silent()))
            self._unsent = self._unsent[sent:] if sent < len(self._unsent) else None
        return []

    def read(self, now: float) -> list[Ended]:
        """Read what has arrived.

        Reads until the socket is empty, because TLS may hold decrypted bytes that no selector reports. On an idle
        connection this takes in TLS session tickets.
        """
        try:
            while True:
                data = self.sock.recv(PIECE)
                if self._reader is None:
                    raise WireError("closed while idle" if not data else "answer without a request", silent=True)
                response = self._reader.feed(data) if data else self._reader.end()
                if response is not None:
                    return self._end(response)
        except BLOCKED:
            return []
        except OSError as error:
            return self._fail(WireError(f"read failed: {word(error)}", silent=self._silent()))
        except WireError as error:
            return self._fail(error)

    def _end(self, response: Response) -> list[Ended]:
        # An answer that came before the request was written to its end leaves the rest unwritten.
        self.over = not response.reusable or self._unsent is not None
        self._reader = self._unsent = None
        return [(self._key, response)]

    def _fail(self, error: WireError) -> list[Ended]:
        self.over = True
        self.turned_away = error.silent and self.exchanges <= 1
        if self._reader is None:
            return []
        if error.silent and self.exchanges > 1:
            # Kept alive, then closed just as we wrote: an idle time-out at the other end, and the request was not
            # looked at.
            error.again = Again.ONCE
        self._reader = self._unsent = None
        return [(self._key, error)]

    def give_up(self, key: Any, error: WireError, now: float) -> list[Ended]:
        """The answer to an exchange is not awaited any more."""
        error.silent = self._silent()
        return self._fail(error)

    def tick(self, now: float) -> list[Ended]:
        """Time has passed, which is nothing to this kind of connection."""
        return []

    def close(self) -> None:
        self.connection.close()

    def _silent(self) -> bool:
        return self._reader is None or not self._reader.begun()


BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def unblocked(connection: HTTPConnection) -> socket.socket:
    """The socket of a connected urllib3 connection, for a loop."""
    sock = connection.sock
    assert sock is not None, "the connection must be connected"
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def word(error: OSError) -> str:
    """The class of an error; its text could quote what was sent."""
    return type(error).__name__
