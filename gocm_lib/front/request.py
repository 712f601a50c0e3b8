"""Reading one HTTP/1.x request strictly: head, limits, framing. Pure: bytes in, requests out.

Replaces http.server's parser, which accepts what RFC 9112 forbids: bare line feeds, two lengths, a Transfer-Encoding
that it then ignores, headers after a broken line silently dropped. Each of these allows smuggling a request past a
proxy in front of us. Promises that a request is returned only when every byte of it was unambiguous. Anything else is a
BadRequest, after which the connection must be closed, because nobody knows where the next request would begin.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from gocm_lib.front.auth import EVERYBODY, Grant
from gocm_lib.front.chunked import Chunks
from gocm_lib.message.bad_request import BadRequest

MAX_HEAD = 16 * 1024
MAX_HEADERS = 64

# Anchored and without nested repetition, so that matching is linear in the length of the line.
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]+) (HTTP/1\.[01])\Z")
_VERSION_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/[0-9.]+\Z")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\Z")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?\Z")
_ABSOLUTE = re.compile(r"http://([^/?#@]+)(/[^#]*)?\Z")

# Headers whose meaning a repetition would make ambiguous. Repeated others are joined with commas, as RFC 9110 has it.
_ONCE = frozenset({"host", "content-length", "content-type", "transfer-encoding", "authorization", "expect"})


class Request(NamedTuple):
    """A complete request. Header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    keep_alive: bool
    grant: Grant = EVERYBODY  # what the token is good for that it was admitted with


class Head(NamedTuple):
    """The head of a request whose body has not come completely; `length` is the body's, 0 while nobody knows it
    because it is `chunked`.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    length: int  # of the body
    chunked: bool
    keep_alive: bool
    expects_continue: bool


@functools.lru_cache(maxsize=256)  # a client's requests mostly have the same head, byte for byte
def parse_head(raw: bytes) -> Head:
    """The Head in these bytes, which lack the final empty line. Raises BadRequest with the status to answer."""
    lines = raw.split(b"\r\n")
    match = _REQUEST_LINE.match(lines[0])
    if not match:
        if _VERSION_LINE.match(lines[0]):
            raise BadRequest("only HTTP/1.0 and HTTP/1.1 are spoken here", status=505)
        raise BadRequest("malformed request line")
    if len(lines) - 1 > MAX_HEADERS:
        raise BadRequest(f"more than {MAX_HEADERS} headers", status=431)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        found = _HEADER.match(line)
        if not found:
            raise BadRequest("malformed header line")
        name, value = found[1].decode("ascii").lower(), found[2].rstrip(b" \t").decode("latin-1")
        if name in headers:
            if name in _ONCE:
                raise BadRequest(f"{name} is given twice", name)
            value = headers[name] + ", " + value
        headers[name] = value
    method, modern = match[1].decode("ascii"), match[3] == b"HTTP/1.1"
    target = _check_host(match[2].decode("ascii"), headers, modern)
    path, _, query = target.partition("?")
    chunked = _is_chunked(headers, modern)
    length = 0 if chunked else _check_length(method, headers)
    connection = {part.strip().lower() for part in headers.get("connection", "").split(",")}
    keep_alive = "close" not in connection and (modern or "keep-alive" in connection)
    expects_continue = _check_expect(headers, modern) and (chunked or length > 0)
    return Head(method, path, query, headers, length, chunked, keep_alive, expects_continue)


def _check_host(target: str, headers: dict[str, str], modern: bool) -> str:
    """Check target and Host; returns the target in origin-form (RFC 9112 section 3.2)."""
    if modern and "host" not in headers:
        raise BadRequest("HTTP/1.1 needs a Host header", "host")
    if not _HOST.match(headers.get("host", "")):
        raise BadRequest("malformed Host header", "host")
    if target.startswith("/"):
        if "#" in target:
            raise BadRequest("malformed request target")
        return target
    absolute = _ABSOLUTE.match(target)
    if not absolute or not _HOST.match(absolute[1]):
        raise BadRequest("the request target must be a path")
    headers["host"] = absolute[1]  # RFC 9112, 3.2.2: Host counts for nothing then
    return absolute[2] or "/"


def _is_chunked(headers: Mapping[str, str], modern: bool) -> bool:
    """Whether the body comes in chunks (RFC 9112 sections 6.1 and 6.3)."""
    coding = headers.get("transfer-encoding")
    if coding is None:
        return False
    if "content-length" in headers or not modern:
        raise BadRequest("Transfer-Encoding with Content-Length, or in HTTP/1.0", "transfer-encoding")
    if coding.lower() != "chunked":
        raise BadRequest("no Transfer-Encoding but chunked is understood", "transfer-encoding", 501)
    return True


def _check_length(method: str, headers: Mapping[str, str]) -> int:
    """The length of a body that is not chunked (RFC 9112 section 6.2)."""
    declared = headers.get("content-length")
    if declared is None:
        if method in ("POST", "PUT", "PATCH"):
            raise BadRequest("Content-Length is missing, and Transfer-Encoding: chunked, too", "content-length", 411)
        return 0
    if not re.fullmatch("[0-9]{1,10}", declared):
        raise BadRequest("malformed Content-Length", "content-length")
    return int(declared)


def _check_expect(headers: Mapping[str, str], modern: bool) -> bool:
    expect = headers.get("expect")
    if expect is None or not modern:  # RFC 9110 section 10.1.1: in HTTP/1.0 it is to be ignored
        return False
    if expect.lower() != "100-continue":
        raise BadRequest("only 100-continue can be expected", "expect", 417)
    return True


def check_no_body(request: "Head | Request") -> None:
    """Raise BadRequest for a GET or HEAD that announces a body: it means nothing there (RFC 9110 section 9.3.1), and
    what is between us and the client may take it for the next request.
    """
    if request.method in ("GET", "HEAD"):
        length = request.headers.get("content-length", "0").strip("0")
        if length or "transfer-encoding" in request.headers:
            raise BadRequest(f"a {request.method} request must have no body", "content-length")


class Reader:
    """Reads requests one after the other from the pieces that a connection gives."""

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.head: Head | None = None  # of the request being read, once it is whole
        self._chunks: Chunks | None = None  # its body, if that is chunked
        self._buffer = bytearray()
        self._scanned = 0

    @property
    def idle(self) -> bool:
        """Whether no byte of the next request has come."""
        return self.head is None and not self._buffer

    @property
    def size(self) -> int:
        """How many bytes have come that were not returned yet."""
        return len(self._buffer) + (len(self._chunks.body) if self._chunks else 0)

    def take_at_most(self, size: int) -> None:
        """A body of more than `size` bytes will not be taken; known only once it is admitted."""
        if self._chunks:
            self._chunks.most = min(self._chunks.most, size)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Request | None:
        """The next request, once it is complete. Raises BadRequest as soon as it is known to be bad."""
        if self.head is None and not self._next_head():
            return None
        head = self.head
        assert head is not None
        if self._chunks:
            if not self._chunks.decode(self._buffer):
                return None
            body = bytes(self._chunks.body)
            self._chunks = None
        elif len(self._buffer) < head.length:
            return None
        else:
            body = bytes(self._buffer[: head.length])
            del self._buffer[: head.length]
        self.head = None
        return Request(head.method, head.path, head.query, head.headers, body, head.keep_alive)

    def awaits_continue(self) -> bool:
        """Whether the client waits for 100 Continue before it sends the body. True once for each request."""
        if self.head is None or not self.head.expects_continue:
            return False
        self.head = self.head._replace(expects_continue=False)
        return not self._buffer

    def _next_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0 and len(self._buffer) <= MAX_HEAD:
            self._scanned = len(self._buffer)
            return False
        if not 0 <= end <= MAX_HEAD:
            raise BadRequest(f"the head is longer than {MAX_HEAD} bytes", status=431)
        self._scanned = 0
        raw = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        self.head = parse_head(raw)
        if self.head.length > self.max_body:  # only now: its path says in which form it is refused
            error = f"the body is longer than {self.max_body} bytes: send it in several calls"
            raise BadRequest(error, "content-length", 413)
        self._chunks = Chunks(self.max_body) if self.head.chunked else None
        return True
