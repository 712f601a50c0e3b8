"""What both ends of a connection keep of the other one: its settings, its window, its table, what it may still ask for.

Owns the bytes that are to be sent. Deals with the frames that concern no stream; modules client and server deal with
the others. Pure; all times are monotonic.
"""

from collections.abc import Callable, Iterable, Mapping

from gocm_lib.http2 import frames
from gocm_lib.http2.budget import Budget
from gocm_lib.http2.frames import Code, ConnectionFault, Frame, FrameReader
from gocm_lib.http2.hpack import Decoder, Encoder, Field, HpackError

STREAMS = 100  # requests at once, until the peer has said how many it takes
ROOM = 1 << 24  # bytes of DATA that the peer may send over all streams before we make room again
STOCK, A_SECOND = 1000, 50  # frames that bring nothing on: at once, and a second (Budget)
UNSENT = 64 * 1024  # bytes; a peer that does not read what we answer to its frames is not read, either
ACK_LIMIT = 10.0  # seconds in which our SETTINGS are acknowledged


class Peer:
    """The other end. `out` is what it is to be sent."""

    def __init__(self, settings: Mapping[int, int], now: float) -> None:
        """`settings` are ours: what it has to keep to."""
        self.out = bytearray(frames.settings(settings))
        self.out += frames.word(frames.WINDOW_UPDATE, 0, ROOM - frames.WINDOW)
        self.reader = FrameReader()
        self.encoder = Encoder()
        self.budget = Budget(STOCK, A_SECOND, now)
        self.streams = STREAMS  # that it takes at once
        self.initial = frames.WINDOW  # of a stream
        self.window = frames.WINDOW  # of the connection: bytes of DATA that it takes now
        self.largest = frames.MOST  # bytes of a frame that it takes
        self.greeted = False  # its SETTINGS have come
        self.pings = 0  # of ours that it has answered
        self._decoder = Decoder()
        self._taken = 0  # bytes of DATA for which no room was made yet
        self._ack_by: float | None = now + ACK_LIMIT

    def decode(self, block: bytes, stream: int) -> tuple[Field, ...] | None:
        """The fields of a block; None: too many. Raises ConnectionFault."""
        try:
            return self._decoder.decode(block)
        except HpackError as error:
            raise ConnectionFault(Code.COMPRESSION_ERROR, str(error), stream) from None

    def took(self, size: int) -> None:
        """Make room again for DATA that has come."""
        self._taken += size
        if self._taken > ROOM // 2:
            self.out += frames.word(frames.WINDOW_UPDATE, 0, self._taken)
            self._taken = 0

    def control(self, frame: Frame, deltas: Callable[[], Iterable[int]], now: float) -> None:
        """A frame that concerns no stream, or is of a kind that nobody knows. `deltas`: by how much the windows of the
        open streams differ from the initial one. Raises ConnectionFault.
        """
        kind = frame.kind
        if kind == frames.WINDOW_UPDATE:
            more = frames.read_word(frame.payload)
            if not more:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a window grows by nothing")
            self.window += more
            if self.window > frames.MOST_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the window is too large")
        elif kind == frames.SETTINGS and frame.flags & frames.ACK:
            self._ack_by = None
        elif kind == frames.SETTINGS:
            self._learn(frames.read_settings(frame.payload), deltas())
        elif kind == frames.PING and frame.flags & frames.ACK:
            self.pings += 1
        elif kind == frames.PING:
            self.out += frames.frame(frames.PING, frames.ACK, 0, frame.payload)
        self.spend(now)

    def spend(self, now: float) -> None:
        """Something came that brings nothing on. Raises ConnectionFault when it is too much of that."""
        if not self.budget.spend(now):
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing on")

    def _learn(self, given: Iterable[tuple[int, int]], deltas: Iterable[int]) -> None:
        for number, value in given:
            if number == frames.HEADER_TABLE_SIZE:
                self.encoder.limit(value)
            elif number == frames.MAX_CONCURRENT_STREAMS:
                self.streams = value
            elif number == frames.INITIAL_WINDOW_SIZE:
                if value + max(deltas, default=0) > frames.MOST_WINDOW:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "the window of a stream is too large")
                self.initial = value
            elif number == frames.MAX_FRAME_SIZE:
                self.largest = value
        self.greeted = True
        self.out += frames.frame(frames.SETTINGS, frames.ACK, 0)

    def check(self, now: float) -> None:
        """Raise ConnectionFault when the peer has let a time pass."""
        if self._ack_by is not None and now > self._ack_by:
            raise ConnectionFault(Code.SETTINGS_TIMEOUT, "our SETTINGS were not acknowledged")


def malformed_names(fields: Iterable[Field]) -> bool:
    """Whether a name is none of HTTP/2's (RFC 9113 section 8.2): in upper case, of the connection, or behind a field
    that must come after it.
    """
    plain = False
    for name, value in fields:
        if name.startswith(":"):
            if plain:
                return True
            continue
        plain = True
        if not name or name != name.lower() or name in _OF_A_CONNECTION or not name.isprintable() or " " in name:
            return True
        if name == "te" and value != "trailers":
            return True
        if any(character in value for character in "\r\n\0"):
            return True
    return False


_OF_A_CONNECTION = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
