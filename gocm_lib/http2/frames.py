"""The frames of HTTP/2 (RFC 9113 sections 4 and 6): from bytes, each checked by itself, and to bytes. Pure.

What a frame means to a connection is the business of modules client and server. Promises that a frame which no peer may
send is a ConnectionFault before memory is spent on it, and that blocks of header fields come whole.
"""

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MOST = 16_384  # bytes in a frame: the least that all must take, and we take no more
WINDOW = 65_535  # bytes that may be sent before the peer makes room, at first
MOST_WINDOW = 2**31 - 1
MOST_CONTINUATIONS = 8
MOST_BLOCK = 64 * 1024  # bytes of a block of header fields, over all its frames
MOST_SETTINGS = 32  # in a frame

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)


class Code(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def name(code: int) -> str:
    """The code in words. A peer may send any number."""
    return Code(code).name if code in Code._value2member_map_ else f"code {code}"


class ConnectionFault(Exception):
    """The peer has broken the rules of the whole connection. str() is what it did; `code` is what it is told; `stream`
    is where it happened, 0 where that does not matter.
    """

    def __init__(self, code: Code, reason: str, stream: int = 0) -> None:
        super().__init__(reason)
        self.code = code
        self.stream = stream


class Frame(NamedTuple):
    """A frame. The payload of DATA has no padding, and `size` is what it counts in flow control; HEADERS have the whole
    block, without padding and priority.
    """

    kind: int
    flags: int
    stream: int
    payload: bytes
    size: int


_HEAD = struct.Struct(">IBI")  # three bytes of length and one of kind are read as one number
_SETTING = struct.Struct(">HI")
_WORD = struct.Struct(">I")
_FIXED = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}  # bytes of payload
_OF_A_STREAM = {DATA, HEADERS, PRIORITY, RST_STREAM, PUSH_PROMISE, CONTINUATION}
_OF_THE_CONNECTION = {SETTINGS, PING, GOAWAY}
_PLAIN = END_HEADERS | PADDED | WITH_PRIORITY


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame as bytes."""
    return _HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def headers(stream: int, block: bytes, flags: int) -> bytes:
    """A block of header fields as HEADERS, and as many CONTINUATIONs as it needs."""
    if len(block) <= MOST:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    parts = [block[at : at + MOST] for at in range(0, len(block), MOST)]
    found = [frame(HEADERS, flags, stream, parts[0])]
    found += [frame(CONTINUATION, 0, stream, part) for part in parts[1:-1]]
    found.append(frame(CONTINUATION, END_HEADERS, stream, parts[-1]))
    return b"".join(found)


def settings(given: Mapping[int, int]) -> bytes:
    """SETTINGS with these values."""
    return frame(SETTINGS, 0, 0, b"".join([_SETTING.pack(*each) for each in given.items()]))


def word(kind: int, stream: int, value: int) -> bytes:
    """RST_STREAM with a code, or WINDOW_UPDATE with an increment."""
    return frame(kind, 0, stream, _WORD.pack(value))


def goaway(last: int, code: int, reason: str) -> bytes:
    """GOAWAY: `last` is the highest stream that was looked at."""
    return frame(GOAWAY, 0, 0, _WORD.pack(last) + _WORD.pack(code) + reason.encode("ascii", "replace")[:200])


def read_word(payload: bytes, at: int = 0) -> int:
    """The number in four bytes, without their reserved bit."""
    value: int = _WORD.unpack_from(payload, at)[0]
    return value & 0x7FFFFFFF


def read_code(payload: bytes, at: int = 0) -> int:
    """The code in four bytes."""
    value: int = _WORD.unpack_from(payload, at)[0]
    return value


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """The values in a SETTINGS frame, in their order. Raises ConnectionFault for one that may not be."""
    found = list(_SETTING.iter_unpack(payload))
    for number, value in found:
        if number == ENABLE_PUSH and value > 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        if number == INITIAL_WINDOW_SIZE and value > MOST_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the initial window is too large")
        if number == MAX_FRAME_SIZE and not MOST <= value < 1 << 24:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the frame size is out of bounds")
    return found


class FrameReader:
    """Reads the frames of one direction of a connection from pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._block: bytearray | None = None  # of header fields, while it is not whole
        self._stream = self._flags = self._continuations = 0  # whose it is, and how it began

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes, and which may be sent. Raises ConnectionFault."""
        buffer = self._buffer
        buffer += data
        at, end = 0, len(buffer)
        try:
            while end - at >= 9:
                start, flags, stream = _HEAD.unpack_from(buffer, at)
                size, kind = start >> 8, start & 0xFF
                if size > MOST:
                    raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a frame is too long")
                if end - at < 9 + size:
                    break
                payload = bytes(buffer[at + 9 : at + 9 + size])
                at += 9 + size
                found = self._check(kind, flags, stream & 0x7FFFFFFF, payload)
                if found is not None:
                    yield found
        finally:
            del buffer[:at]

    def _check(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame | None:
        """The frame with this payload; None while its block goes on."""
        size = len(payload)
        if self._block is not None or kind == CONTINUATION:
            return self._continue(kind, flags, stream, payload)
        if stream and ((kind == DATA and not flags & PADDED) or (kind == HEADERS and flags & _PLAIN == END_HEADERS)):
            return Frame(kind, flags, stream, payload, size)  # as nearly always
        if kind in _OF_A_STREAM if not stream else kind in _OF_THE_CONNECTION:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame is on a stream where it may not be")
        if kind in (DATA, HEADERS):
            if flags & PADDED:
                payload = _unpadded(payload)
            if kind == DATA:
                return Frame(kind, flags, stream, payload, size)
            return self._begin(flags, stream, payload)
        _check_size(kind, flags, stream, size)
        return Frame(kind, flags, stream, payload, size)

    def _begin(self, flags: int, stream: int, payload: bytes) -> Frame | None:
        if flags & WITH_PRIORITY:
            if len(payload) < 5:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "HEADERS are cut off", stream)
            if read_word(payload) == stream:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a stream depends on itself", stream)
            payload = payload[5:]
        if flags & END_HEADERS:
            return Frame(HEADERS, flags, stream, payload, 0)
        self._block, self._stream, self._flags, self._continuations = bytearray(payload), stream, flags, 0
        return None

    def _continue(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame | None:
        if self._block is None or kind != CONTINUATION or stream != self._stream:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a block of header fields is interrupted, or goes on from none")
        self._continuations += 1
        self._block += payload
        if self._continuations > MOST_CONTINUATIONS or len(self._block) > MOST_BLOCK:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a block of header fields is too long")
        if not flags & END_HEADERS:
            return None
        whole, self._block = bytes(self._block), None
        return Frame(HEADERS, self._flags, stream, whole, 0)


def _check_size(kind: int, flags: int, stream: int, size: int) -> None:
    if kind in _FIXED and size != _FIXED[kind]:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a frame has the wrong length", stream)
    if kind == GOAWAY and size < 8:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a GOAWAY is cut off")
    if kind == SETTINGS and (size % 6 or (flags & ACK and size)):
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS have the wrong length")
    if kind == SETTINGS and size > 6 * MOST_SETTINGS:
        raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many SETTINGS")


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
