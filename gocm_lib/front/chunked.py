"""A body in chunks, decoded strictly (RFC 9112 section 7.1). Pure: bytes in, the body out.

Whoever sends what it does not know the length of yet (curl -T -, streams of Node, Java and .NET) sends it so. Promises
that whatever is not exactly a chunk is a BadRequest: two readers of one body who disagree on its end are how requests
are smuggled. Extensions and trailers are skipped; how much of them there may be is bounded.
"""

import re

from gocm_lib.message.bad_request import BadRequest

LONGEST_LINE = 256  # bytes of a chunk's size and its extensions
LONGEST_TRAILERS = 4096  # bytes, all together
FREE_CHUNKS, BYTES_A_CHUNK = 4096, 16  # beyond so many, chunks must have so many bytes on average: each costs time
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
FIELD = "transfer-encoding"


class Chunks:
    """A body that comes in chunks. `most` is how many bytes it may have; `body` what has come of it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.body = bytearray()
        self._left = 0  # bytes of the chunk that have not come
        self._count = 0
        self._ends = False  # a chunk's data has come, but not the line end after it
        self._trailers = -1  # bytes of them so far; -1: the last chunk has not come

    def decode(self, buffer: bytearray) -> bool:
        """Take what there is of the body from the beginning of `buffer`. Returns whether it is complete. Raises
        BadRequest.
        """
        while True:
            if self._left and not self._take_data(buffer):
                return False
            if self._ends and not self._take_end(buffer):
                return False
            line = _line(buffer, LONGEST_LINE if self._trailers < 0 else LONGEST_TRAILERS)
            if line is None:
                return False
            if self._trailers < 0:
                self._begin(line)
            elif not line:
                return True
            else:
                self._skip(line)

    def _take_data(self, buffer: bytearray) -> bool:
        part = buffer[: self._left]
        del buffer[: len(part)]
        self.body += part
        self._left -= len(part)
        self._ends = not self._left
        return self._ends

    def _take_end(self, buffer: bytearray) -> bool:
        if not b"\r\n".startswith(bytes(buffer[:2])):
            raise BadRequest("a chunk is longer than it says", FIELD)
        if len(buffer) < 2:
            return False
        del buffer[:2]
        self._ends = False
        return True

    def _begin(self, line: bytes) -> None:
        found = _SIZE.fullmatch(line)
        if not found:
            raise BadRequest("malformed chunk", FIELD)
        size = int(found[1], 16)
        self._count += 1
        if self._count > FREE_CHUNKS + len(self.body) // BYTES_A_CHUNK:
            raise BadRequest("too many small chunks: gather what you send", FIELD)
        if len(self.body) + size > self.most:
            raise BadRequest(f"the body is longer than {self.most} bytes: send it in several calls", FIELD, 413)
        self._left = size
        if not size:
            self._trailers = 0

    def _skip(self, line: bytes) -> None:
        self._trailers += len(line)
        if not _TRAILER.fullmatch(line):
            raise BadRequest("malformed trailer", FIELD)
        if self._trailers > LONGEST_TRAILERS:
            raise BadRequest(f"trailers of more than {LONGEST_TRAILERS} bytes", FIELD, 431)


def _line(buffer: bytearray, longest: int) -> bytes | None:
    """The next line, taken from the buffer; None: it is not whole yet. Raises BadRequest."""
    end = buffer.find(b"\r\n", 0, longest + 2)
    if end < 0:
        if len(buffer) > longest:
            raise BadRequest("a line between chunks is too long", FIELD)
        return None
    line = bytes(buffer[:end])
    del buffer[: end + 2]
    return line
