"""The client's end of a connection: requests in, bytes out; bytes in, answers out. Pure; all times are monotonic.

Promises that each request ends once, as an Answer or as Lost; that Lost says whether the server may have looked at it;
that no request is begun unless all of it can be sent; and that neither a broken nor a hostile server costs more than
the limits named here.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from gocm_lib.http2 import frames
from gocm_lib.http2.frames import Code, ConnectionFault, Frame
from gocm_lib.http2.hpack import Field, plain
from gocm_lib.http2.peer import UNSENT, Peer, malformed_names

MOST_STREAMS = 100  # at once. FCM takes no more; over that it ends the connection, and all on it are in doubt
MOST_BODY = 1024 * 1024  # bytes of an answer
MOST_INTERIM = 16  # 1xx before the real answer
LAST_STREAM = 2**31 - 1
SILENCE, PING_LIMIT = 5.0, 5.0  # seconds of silence, with streams open, until a PING; and until it must be answered
RETIRE = 55 * 60.0  # seconds; Google ends a connection after an hour, and that would be in the middle of something
MOST_RESETS = 20  # of ours while nothing comes: servers ration resets
SMALL = 8192  # bytes of a body that a request may have, mostly: with a smaller window there is no room
# Ours: no table that the server would have to keep, no pushes, no huge heads.
SETTINGS = {frames.HEADER_TABLE_SIZE: 0, frames.ENABLE_PUSH: 0, frames.MAX_HEADER_LIST_SIZE: 16_384}
OUR_FAULT = {Code.PROTOCOL_ERROR, Code.FLOW_CONTROL_ERROR, Code.FRAME_SIZE_ERROR, Code.COMPRESSION_ERROR}


class Again(Enum):
    """Whether a lost request may be sent again without counting as an attempt."""

    NO = 0  # the server may have taken it
    ONCE = 1  # it may have, but most likely has not
    FREELY = 2  # it has not looked at it


class Answer(NamedTuple):
    """What the server answered to the request `key`."""

    key: Any
    status: int
    headers: Mapping[str, str]
    body: bytes


class Lost(NamedTuple):
    """The request `key` gets no answer any more; `cause` is a word of outcome.RETRIES. With `old` the server wants it
    by HTTP/1.1.
    """

    key: Any
    reason: str
    again: Again
    cause: str = "connection"
    old: bool = False


Event = Answer | Lost
_WORD = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


@dataclass(slots=True)
class _Stream:
    key: Any
    delta: int  # of its window to the initial one
    status: int = 0
    interim: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


class Client:
    """One server's connection. Send `out` whenever there is something in it; close once it is `over` and sent."""

    def __init__(self, now: float) -> None:
        self._peer = Peer(SETTINGS, now)
        self._peer.out[:0] = frames.PREFACE
        self._open: dict[int, _Stream] = {}
        self._ids: dict[Any, int] = {}  # of keys
        self._next = 1
        self._limit = MOST_STREAMS  # lowered when the server refuses streams,
        self._limited_at = now  # and raised by one a second
        self._born = now
        self._read_at = now  # when something came last
        self._opened_at = now  # when a stream was begun last
        self._pinged_at: float | None = None
        self._resets = 0  # of ours since something came
        self._unheard = True  # nothing has come since none was open
        self._going = False  # the server has said GOAWAY, or we are to retire
        self._said = ""  # with what words
        self.goaways: list[tuple[int, str]] = []  # code and text of those that nobody has asked for yet
        self.refusals = 0  # streams that were refused
        self.over = False

    @property
    def out(self) -> bytearray:
        """What is to be sent."""
        return self._peer.out

    @property
    def greeted(self) -> bool:
        """Whether the server has told its settings."""
        return self._peer.greeted

    @property
    def open(self) -> int:
        """How many requests are open."""
        return len(self._open)

    @property
    def leaves(self) -> bool:
        """Whether no request will be begun any more."""
        return self._going or self.over

    @property
    def streams(self) -> int:
        """How many requests it takes at once."""
        return min(self._limit, self._peer.streams)

    def room(self) -> int:
        """How many requests could be begun now, if they were small."""
        if self._going or self.over or len(self._peer.out) >= UNSENT or self._peer.window < SMALL:
            return 0
        return max(0, self.streams - len(self._open))

    def takes(self, size: int) -> bool:
        """Whether a request with a body of this many bytes can be begun, so that no part of it is left to send."""
        return self.room() > 0 and size <= min(self._peer.window, self._peer.initial, self._peer.largest)

    @property
    def narrow(self) -> int:
        """How many bytes a body may have, whatever room is made."""
        return min(self._peer.initial, self._peer.largest)

    def request(self, key: Any, fields: Sequence[Field], body: bytes, now: float) -> None:
        """Begin a request that it `takes`. `fields` are without the content-length."""
        stream = self._next
        self._next += 2
        if self._next > LAST_STREAM:
            self._going = True
        block = self._peer.encoder.encode(fields) + _content_length(len(body))
        self._peer.out += frames.headers(stream, block, 0) + frames.frame(frames.DATA, frames.END_STREAM, stream, body)
        self._peer.window -= len(body)
        self._open[stream] = _Stream(key, -len(body))
        self._ids[key] = stream
        self._opened_at = now

    def cancel(self, key: Any, now: float) -> None:
        """The answer to a request is not awaited any more."""
        stream = self._ids.pop(key)
        del self._open[stream]
        self._resets += 1
        self._peer.out += frames.word(frames.RST_STREAM, stream, Code.CANCEL)
        if self._resets > MOST_RESETS:
            self._going = True

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What `data` brings to an end."""
        found: list[Event] = []
        self._read_at, self._pinged_at, self._resets = now, None, 0
        if self.over:
            return found
        try:
            for frame in self._peer.reader.feed(data):
                event = self._take(frame, now)
                if isinstance(event, list):
                    found += event
                elif event is not None:
                    found.append(event)
        except ConnectionFault as fault:
            found += self.fail(fault)
        self._unheard = not self._open
        if self._going and self._unheard:
            self.over = True
        return found

    def fail(self, fault: ConnectionFault) -> list[Event]:
        """The server breaks the rules: tell it, and end. Only the stream where it happened is counted."""
        self._peer.out += frames.goaway(0, fault.code, str(fault))
        self.over = True
        reason = f"broken HTTP/2: {fault}"
        lost: list[Event] = [
            Lost(known.key, reason, Again.NO if stream == fault.stream else Again.ONCE, "odd_answer")
            for stream, known in self._open.items()
        ]
        self._forget_all()
        return lost

    def end(self, reason: str, cause: str = "connection") -> list[Event]:
        """The connection has ended, in these words."""
        self.over = True
        if self._said:
            reason = f"{reason} after GOAWAY {self._said}"
        lost: list[Event] = [
            # Kept open, and closed just as we wrote: the requests were most likely not looked at.
            Lost(known.key, reason, Again.ONCE if self._unheard else Again.NO, cause)
            for known in self._open.values()
        ]
        self._forget_all()
        return lost

    def tick(self, now: float) -> list[Event]:
        """Time has passed: ask whether the server is there, or give it up."""
        if self._limit < MOST_STREAMS and now >= self._limited_at + 1:
            self._limit, self._limited_at = self._limit + 1, now
        if now - self._born > RETIRE:
            self._going = True
        try:
            self._peer.check(now)
        except ConnectionFault as fault:
            return self.fail(fault)
        if not self._open:
            self.over = self.over or self._going
            return []
        if self._pinged_at is not None:
            return self.end("no answer to a PING", "timeout") if now - self._pinged_at > PING_LIMIT else []
        if now - max(self._read_at, self._opened_at) > SILENCE:
            self._peer.out += frames.frame(frames.PING, 0, 0, b"\0" * 8)
            self._pinged_at = now
        return []

    def next_moment(self) -> float:
        """When `tick` has something to do, unless something comes before."""
        if self._pinged_at is not None:
            return self._pinged_at + PING_LIMIT
        return max(self._read_at, self._opened_at) + SILENCE if self._open else self._born + RETIRE

    def _forget_all(self) -> None:
        self._open.clear()
        self._ids.clear()

    # ------------------------------------------------------------------------------------------------------ what comes

    def _take(self, frame: Frame, now: float) -> Event | list[Event] | None:
        kind, _, stream, payload, _ = frame
        if not self._peer.greeted and (kind != frames.SETTINGS or frame.flags & frames.ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is no SETTINGS")
        if stream and kind < frames.CONTINUATION and kind != frames.PRIORITY:
            if stream >= self._next or not stream & 1 or kind == frames.PUSH_PROMISE:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame on a stream that was not begun")
            return self._of_stream(frame, self._open.get(stream), now)
        if kind == frames.GOAWAY:
            return self._go(frames.read_word(payload), frames.read_code(payload, 4), payload[8:])
        if kind == frames.SETTINGS and (frames.ENABLE_PUSH, 1) in frames.read_settings(payload):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a server cannot ask for pushes")
        self._peer.control(frame, lambda: [known.delta for known in self._open.values()], now)
        return None

    def _of_stream(self, frame: Frame, known: _Stream | None, now: float) -> Event | None:
        kind, flags, stream, payload, size = frame
        if kind == frames.HEADERS:
            fields = self._peer.decode(payload, stream)  # of a stream that is over, too: the table must stay right
            if known is None:
                self._peer.spend(now)
                return None
            return self._headers(stream, known, fields, bool(flags & frames.END_STREAM))
        if kind == frames.DATA:
            self._peer.took(size)
            if known is None or not payload:
                self._peer.spend(now)
            return self._data(stream, known, payload, bool(flags & frames.END_STREAM)) if known else None
        if kind == frames.RST_STREAM:
            return self._was_reset(stream, known, frames.read_code(payload), now)
        return self._widen(stream, known, frames.read_word(payload), now)

    def _headers(self, stream: int, known: _Stream, fields: tuple[Field, ...] | None, ends: bool) -> Event | None:
        if fields is None:
            return self._drop(stream, known, "answer's head too long", Code.CANCEL)
        if known.status:  # trailers
            if not ends or malformed_names(fields) or any(name.startswith(":") for name, _ in fields):
                return self._drop(stream, known, "malformed trailers")
            return self._whole(stream, known)
        status, headers = _read_head(fields)
        if not status:
            return self._drop(stream, known, "malformed answer")
        if status < 200:
            known.interim += 1
            if ends or status == 101 or known.interim > MOST_INTERIM:
                return self._drop(stream, known, "unexpected interim answer")
            return None
        known.status, known.headers = status, headers
        return self._whole(stream, known) if ends else None

    def _data(self, stream: int, known: _Stream, payload: bytes, ends: bool) -> Event | None:
        if not known.status:
            return self._drop(stream, known, "malformed answer")
        known.body += payload
        if len(known.body) > MOST_BODY:
            return self._drop(stream, known, "answer too long", Code.CANCEL)
        return self._whole(stream, known) if ends else None

    def _whole(self, stream: int, known: _Stream) -> Event:
        length = known.headers.get("content-length")
        if length is not None and length != str(len(known.body)) and known.status not in (204, 304):
            return self._drop(stream, known, "answer has not the length it says")
        self._peer.budget.earn(8)
        self._over(stream, known)
        return Answer(known.key, known.status, known.headers, bytes(known.body))

    def _drop(self, stream: int, known: _Stream, reason: str, code: Code = Code.PROTOCOL_ERROR) -> Lost:
        """An answer that nobody can read ends its own stream only."""
        self._peer.out += frames.word(frames.RST_STREAM, stream, code)
        self._over(stream, known)
        return Lost(known.key, reason, Again.NO, "odd_answer")

    def _over(self, stream: int, known: _Stream) -> None:
        del self._open[stream]
        self._ids.pop(known.key, None)

    def _was_reset(self, stream: int, known: _Stream | None, code: int, now: float) -> Event | None:
        if known is None:  # nginx ends each answer so; for others it is the second word about the same
            self._peer.spend(now)
            return None
        self._over(stream, known)
        reason = f"reset: {frames.name(code)}"
        if code == Code.REFUSED_STREAM:
            self.refusals += 1
            self._limit, self._limited_at = max(1, len(self._open)), now
            return Lost(known.key, reason, Again.FREELY)
        if code == Code.HTTP_1_1_REQUIRED:
            return Lost(known.key, reason, Again.FREELY, old=True)
        return Lost(known.key, reason, Again.NO)

    def _widen(self, stream: int, known: _Stream | None, more: int, now: float) -> Event | None:
        self._peer.spend(now)
        if known is None:
            return None
        if not more:
            return self._drop(stream, known, "a window grows by nothing")
        known.delta += more
        if self._peer.initial + known.delta > frames.MOST_WINDOW:
            return self._drop(stream, known, "the window is too large", Code.FLOW_CONTROL_ERROR)
        return None

    def _go(self, last: int, code: int, words: bytes) -> list[Event]:
        """The server goes away. What is above `last` it has not looked at; the rest it may still answer."""
        # A word of the server's may stand in a log (Google's are such); a text of its own might quote what was sent.
        said = words.decode("ascii") if _WORD.fullmatch(words) else ""
        self._said = f"{frames.name(code)} {said}".strip()
        self._going = True
        self.goaways.append((code, self._said))
        above = [(stream, known) for stream, known in self._open.items() if stream > last]
        for stream, known in above:
            self._over(stream, known)
        return [Lost(known.key, f"GOAWAY {self._said}", Again.FREELY) for _, known in above]


@functools.lru_cache(maxsize=1024)
def _content_length(size: int) -> bytes:
    return plain("content-length", str(size))


@functools.lru_cache(maxsize=256)  # answers within a second mostly have the same head
def _read_head(fields: tuple[Field, ...]) -> tuple[int, Mapping[str, str]]:
    """The status of an answer, and its other fields; 0: it is malformed (RFC 9113 section 8.3.2)."""
    nothing: Mapping[str, str] = {}
    if not fields or fields[0][0] != ":status":
        return 0, nothing
    text = fields[0][1]
    if any(name.startswith(":") for name, _ in fields[1:]) or malformed_names(fields[1:]):
        return 0, nothing
    if not (len(text) == 3 and text.isascii() and text.isdigit() and "1" <= text[0] <= "5"):
        return 0, nothing
    return int(text), dict(fields[1:])
