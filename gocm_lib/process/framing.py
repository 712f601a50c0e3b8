"""How multiprocessing frames messages on a pipe or a socket: their length in four bytes (or -1, and then the length in
eight) before each. For loops, which cannot wait for the rest of one as Connection does. Pure.
"""

import struct

_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_MOST_SHORT = 0x7FFFFFFF
START = _SHORT.size  # bytes that tell how many more there are


def framed(message: bytes) -> bytes:
    """A message as it is sent."""
    size = len(message)
    return (_SHORT.pack(size) if size <= _MOST_SHORT else _SHORT.pack(-1) + _LONG.pack(size)) + message


def size_of(start: bytes | bytearray) -> int:
    """How many bytes follow these first START ones; -1: START of them do not tell, eight more do."""
    size: int = _SHORT.unpack_from(start)[0]
    return size


def take(buffer: bytearray) -> bytes | None:
    """The first message in a buffer, taken off it; None: it is not whole."""
    start = START
    if len(buffer) < start:
        return None
    size = size_of(buffer)
    if size == -1:
        if len(buffer) < start + _LONG.size:
            return None
        [size] = _LONG.unpack_from(buffer, start)
        start += _LONG.size
    if len(buffer) < start + size:
        return None
    message = bytes(buffer[start : start + size])
    del buffer[: start + size]
    return message
