"""The server's end of a connection: bytes in, requests out; answers in, bytes out. Pure; all times are monotonic.

Promises that requests come whole and well-formed, that answers keep to the client's windows, and that a client who only
keeps us busy is sent away (CVE-2019-9511 to 9518, CVE-2023-44487, CVE-2025-8671).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gocm_lib.http2 import frames
from gocm_lib.http2.budget import Budget
from gocm_lib.http2.frames import Code, ConnectionFault, Frame
from gocm_lib.http2.hpack import Field, plain
from gocm_lib.http2.peer import Peer, malformed_names

GREET_LIMIT, IDLE_LIMIT = 10.0, 180.0  # seconds: until the client has said its preface, and without a stream
STUCK_LIMIT, STUCK_BYTES = 60.0, 1 << 20  # seconds, and bytes, that answers wait for a window
STREAM_WINDOW = 1 << 20  # bytes of a body that may come unasked
RESETS, RESETS_A_SECOND = 200, 33  # streams that end before their answer, by either side

_METHOD = re.compile("[A-Za-z0-9!#$%&'*+.^_`|~-]{1,32}")
_PATH = re.compile(r"[!-\"$-~]{1,16384}")  # a fragment is nobody's on the way (RFC 9113, 8.3.1)
_FIXED = {":method": "", ":scheme": "", ":path": "", ":authority": ""}


class Incoming(NamedTuple):
    """A request. Names of `headers` are in lower case; :authority is there as host."""

    stream: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class _Stream:
    head: Incoming
    length: int | None  # of the body, as announced
    most: int  # bytes of it that are taken
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False  # the request has come to its end
    delta: int = 0  # of its window to the initial one
    taken: int = 0  # bytes of its body for which no room was made yet
    unsent: bytes | None = None  # what is left of its answer


class Server:
    """One client's connection. Send `out` whenever there is something in it; close once it is `over` and sent."""

    def __init__(self, now: float, max_body: int, streams: int = 100, window: int = STREAM_WINDOW) -> None:
        """The client may have so many `streams` open, and send so many bytes of each unasked."""
        self._window = window
        given = {frames.MAX_CONCURRENT_STREAMS: streams, frames.INITIAL_WINDOW_SIZE: window}
        self._peer = Peer(given, now)
        self._streams = streams
        self._max_body = max_body
        self._open: dict[int, _Stream] = {}
        self._last = 0  # the highest stream that was begun
        self._begun: list[int] = []  # requests that have begun, and were not asked for
        self._preface = frames.PREFACE  # what has not come of it
        self._resets = Budget(RESETS, RESETS_A_SECOND, now)
        self._idle_since = self._stuck_since = now
        self._began = now
        self._covered: int | None = None  # by a GOAWAY: the highest stream that is still answered
        self.over = False

    @property
    def out(self) -> bytearray:
        """What is to be sent."""
        return self._peer.out

    @property
    def _leaving(self) -> bool:
        return self._covered is not None

    @property
    def open(self) -> int:
        """How many requests have not been answered."""
        return len(self._open)

    @property
    def held(self) -> int:
        """How many bytes of bodies that have not come whole are held."""
        return sum([len(each.body) for each in self._open.values()])

    @property
    def oldest_unfinished(self) -> int:
        """The first request that has not come whole; 0: there is none."""
        return next((stream for stream, each in self._open.items() if not each.whole), 0)

    def begun(self) -> list[tuple[Incoming, int]]:
        """The heads of requests that have begun to come since the last call, and the announced lengths of their bodies
        (0: none is). Who has no use for one answers it.
        """
        found = [(each.head, each.length or 0) for stream in self._begun if (each := self._open.get(stream))]
        self._begun.clear()
        return found

    def take_at_most(self, stream: int, most: int) -> None:
        """Of the body of a request no more than so many bytes are taken: then it is reset."""
        if stream in self._open:
            self._open[stream].most = min(most, self._max_body)

    def awaits(self, stream: int) -> bool:
        """Whether the client awaits an answer to a request that has come."""
        return stream in self._open

    def receive(self, data: bytes, now: float) -> list[Incoming]:
        """The requests that `data` completes."""
        found: list[Incoming] = []
        if self.over:
            return found
        try:
            if self._preface:
                data = self._greet(data)
            for frame in self._peer.reader.feed(data):
                request = self._take(frame, now)
                if request is not None:
                    found.append(request)
        except ConnectionFault as fault:
            self._end(fault.code, str(fault))
        self._idle_since = now
        return found

    def _greet(self, data: bytes) -> bytes:
        size = min(len(data), len(self._preface))
        if data[:size] != self._preface[:size]:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the preface is wrong")
        self._preface = self._preface[size:]
        return data[size:]

    def answer(self, stream: int, status: int, fields: Sequence[Field], body: bytes, own: Sequence[Field] = ()) -> None:
        """Answer a request; nothing happens when the client does not want it any more. `fields` are those that many
        answers have, `own` those of this one: the former are encoded once.
        """
        known = self._open.get(stream)
        if known is None or self.over:
            return
        block = _block(status, tuple(fields)) + _length(len(body)) + b"".join([plain(*each) for each in own])
        self.out.extend(frames.headers(stream, block, 0 if body else frames.END_STREAM))
        known.unsent = body
        if body:
            self._send(stream, known)
        else:
            self._close(stream)

    def reset(self, stream: int, code: int) -> None:
        """End a request without an answer."""
        if stream in self._open:
            self._open[stream].whole = True
            self._close(stream, code)

    def leave(self, last: int | None, code: int, reason: str) -> None:
        """Say GOAWAY: streams above `last` (None: those still to come) were not looked at. The others may go on."""
        last = self._covered = self._last if last is None else last
        self.out.extend(frames.goaway(last, code, reason))
        for stream in [stream for stream in self._open if stream > last]:
            del self._open[stream]
        self._stop_if_done()

    def tick(self, now: float) -> None:
        """Time has passed."""
        try:
            self._peer.check(now)
            if (self._preface or not self._peer.greeted) and now - self._began > GREET_LIMIT:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "no preface came")
            waits = sum(len(each.unsent) for each in self._open.values() if each.unsent)
            if not waits:
                self._stuck_since = now
            elif waits > STUCK_BYTES or now - self._stuck_since > STUCK_LIMIT:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "answers wait for a window")
        except ConnectionFault as fault:
            self._end(fault.code, str(fault))
        if not self._open and not self._leaving and now - self._idle_since > IDLE_LIMIT:
            self.leave(None, Code.NO_ERROR, "session_timed_out")

    def _end(self, code: Code, reason: str) -> None:
        if not self.over:
            self.out.extend(frames.goaway(self._last if self._covered is None else self._covered, code, reason))
        self.over = True
        self._open.clear()

    def _stop_if_done(self) -> None:
        if self._leaving and not self._open:
            self.over = True

    # ------------------------------------------------------------------------------------------------------ what comes

    def _take(self, frame: Frame, now: float) -> Incoming | None:
        kind, flags, stream, payload, _ = frame
        if not self._peer.greeted and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is no SETTINGS")
        if kind == frames.HEADERS:
            return self._headers(frame, now)
        if kind == frames.DATA:
            return self._data(frame, now)
        if kind == frames.PUSH_PROMISE:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a client cannot push")
        if kind == frames.PRIORITY and frames.read_word(payload) == stream:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a stream depends on itself")
        if stream and kind in (frames.RST_STREAM, frames.WINDOW_UPDATE):
            if stream > self._last:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a stream that was not begun is meant")
            if kind == frames.RST_STREAM:
                self._was_reset(stream, now)
            else:
                self._widen(stream, frames.read_word(payload), now)
            return None
        before = self._peer.initial
        self._peer.control(frame, lambda: [each.delta for each in self._open.values()], now)
        if self._peer.initial > before or kind == frames.WINDOW_UPDATE:
            self._send_more()
        return None

    def _headers(self, frame: Frame, now: float) -> Incoming | None:
        stream = frame.stream
        fields = self._peer.decode(frame.payload, stream)
        ends = bool(frame.flags & frames.END_STREAM)
        if stream in self._open:
            return self._trailers(stream, fields, ends, now)
        if not stream & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a client's streams are odd")
        if stream <= self._last:
            raise ConnectionFault(Code.STREAM_CLOSED, "a stream is begun that is over", stream)
        self._last = stream
        if self._leaving:
            return None  # it has been told that this is not looked at
        if len(self._open) >= self._streams:
            self._refuse(stream, Code.REFUSED_STREAM, now)
            return None
        head, length = _head(stream, fields or []) or (None, None)
        if head is None:
            self._refuse(stream, Code.PROTOCOL_ERROR, now)
            return None
        self._open[stream] = _Stream(head, length, self._max_body)
        self._peer.budget.earn(8)
        if not ends:
            self._begun.append(stream)
        return self._ended(stream, now) if ends else None

    def _trailers(self, stream: int, fields: Sequence[Field] | None, ends: bool, now: float) -> Incoming | None:
        if self._open[stream].whole:
            self._refuse(stream, Code.STREAM_CLOSED, now)
            return None
        if not ends or fields is None or malformed_names(fields) or any(name.startswith(":") for name, _ in fields):
            self._refuse(stream, Code.PROTOCOL_ERROR, now)
            return None
        return self._ended(stream, now)

    def _data(self, frame: Frame, now: float) -> Incoming | None:
        stream = frame.stream
        if stream > self._last or not stream & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "DATA on a stream that was not begun")
        self._peer.took(frame.size)
        known = self._open.get(stream)
        if known is None and self._leaving:
            return None
        if known is None or known.whole:
            self._refuse(stream, Code.STREAM_CLOSED, now)
            return None
        if not frame.payload:
            self._peer.spend(now)
        known.body += frame.payload
        known.taken += frame.size
        ends = frame.flags & frames.END_STREAM
        if len(known.body) > known.most or known.taken > self._window:
            self._refuse(stream, Code.FLOW_CONTROL_ERROR, now)
            return None
        if not ends and known.taken > self._window // 2:
            self.out.extend(frames.word(frames.WINDOW_UPDATE, stream, known.taken))
            known.taken = 0
        return self._ended(stream, now) if ends else None

    def _ended(self, stream: int, now: float) -> Incoming | None:
        known = self._open[stream]
        known.whole = True
        if known.length is not None and known.length != len(known.body):
            self._refuse(stream, Code.PROTOCOL_ERROR, now)
            return None
        body, known.body = bytes(known.body), bytearray()
        return known.head._replace(body=body)

    def _refuse(self, stream: int, code: Code, now: float) -> None:
        self._close(stream, code)
        self._count_reset(now)

    def _was_reset(self, stream: int, now: float) -> None:
        if self._open.pop(stream, None) is not None:
            self._stop_if_done()
        self._count_reset(now)

    def _count_reset(self, now: float) -> None:
        if not self._resets.spend(now):
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many resets")

    def _widen(self, stream: int, more: int, now: float) -> None:
        known = self._open.get(stream)
        self._peer.spend(now)
        if not more:
            self._refuse(stream, Code.PROTOCOL_ERROR, now)
        elif known is not None and self._peer.initial + known.delta + more > frames.MOST_WINDOW:
            self._refuse(stream, Code.FLOW_CONTROL_ERROR, now)
        elif known is not None:
            known.delta += more
            self._send(stream, known)

    # ------------------------------------------------------------------------------------------------------ what goes

    def _send_more(self) -> None:
        for stream, known in list(self._open.items()):
            self._send(stream, known)

    def _send(self, stream: int, known: _Stream) -> None:
        """Send of an answer what its windows let through."""
        while known.unsent:
            size = min(len(known.unsent), self._peer.window, self._peer.initial + known.delta, self._peer.largest)
            if size <= 0:
                return
            part, known.unsent = known.unsent[:size], known.unsent[size:]
            self._peer.window -= size
            known.delta -= size
            self._peer.budget.earn(2)  # the room that it makes for the next part is no trifle
            self.out.extend(frames.frame(frames.DATA, 0 if known.unsent else frames.END_STREAM, stream, part))
            if not known.unsent:
                self._close(stream)

    def _close(self, stream: int, code: int | None = None) -> None:
        known = self._open.pop(stream, None)
        if code is not None:
            self.out.extend(frames.word(frames.RST_STREAM, stream, code))
        elif known is not None and not known.whole:  # answered before all of it came: the rest is not wanted
            self.out.extend(frames.word(frames.RST_STREAM, stream, Code.NO_ERROR))
        self._stop_if_done()


@functools.lru_cache(maxsize=256)
def _block(status: int, fields: Sequence[Field]) -> bytes:
    """The head of an answer, which needs no table: answers are mostly alike, and so their heads are encoded once."""
    return b"".join([plain(":status", str(status)) if status != 200 else b"\x88", *[plain(*each) for each in fields]])


@functools.lru_cache(maxsize=1024)
def _length(size: int) -> bytes:
    return plain("content-length", str(size))


def _head(stream: int, fields: Sequence[Field]) -> tuple[Incoming, int | None] | None:
    """A request without its body, and how long that is to be; None: it is malformed (RFC 9113 section 8.1.1)."""
    special: dict[str, str] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name.startswith(":"):
            if name not in _FIXED or name in special:
                return None
            special[name] = value
        elif name in headers:
            # Cookies come in pieces (section 8.2.3); others are joined as anywhere in HTTP.
            headers[name] += ("; " if name == "cookie" else ", ") + value
        else:
            headers[name] = value
    # The SDK for Node sends "https:" as the scheme, with the colon; Google takes it.
    if malformed_names(fields) or not special.get(":scheme"):
        return None
    if not (_METHOD.fullmatch(special.get(":method", "")) and _PATH.fullmatch(special.get(":path", ""))):
        return None
    length = headers.get("content-length")
    if length is not None and not re.fullmatch("[0-9]{1,12}", length):
        return None
    if ":authority" in special:
        headers["host"] = special[":authority"]
    method, path = special[":method"], special[":path"]
    return Incoming(stream, method, path, headers, b""), int(length) if length is not None else None
