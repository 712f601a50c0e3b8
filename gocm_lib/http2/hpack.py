"""HPACK (RFC 7541): the header fields of HTTP/2 as bytes, and back. Pure.

Both ends of a connection keep a table of fields that they have met, and then name them by number. Promises that a
malformed block is an HpackError, after which the connection must end, for the tables are no longer the same; and that
the memory a block takes is bounded by its own size and by the limits of Decoder.
"""

from collections import deque
from collections.abc import Sequence

from gocm_lib.http2 import huffman

Field = tuple[str, str]  # name in lower case, and value; bytes beyond ASCII are as in latin-1
TABLE = 4096  # bytes of the table until the peers agree on less
OVERHEAD = 32  # bytes that a field counts beside its text (section 4.1)
MOST_FIELDS, MOST_BYTES = 200, 64 * 1024  # of a block, decoded
LARGEST = 1 << 24  # an integer in a block is below this

STATIC: tuple[Field, ...] = (
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    *((":status", status) for status in ("200", "204", "206", "304", "400", "404", "500")),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    *((name, "") for name in ("accept-language", "accept-ranges", "accept", "access-control-allow-origin", "age")),
    *((name, "") for name in ("allow", "authorization", "cache-control", "content-disposition", "content-encoding")),
    *((name, "") for name in ("content-language", "content-length", "content-location", "content-range")),
    *((name, "") for name in ("content-type", "cookie", "date", "etag", "expect", "expires", "from", "host")),
    *((name, "") for name in ("if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since")),
    *((name, "") for name in ("last-modified", "link", "location", "max-forwards", "proxy-authenticate")),
    *((name, "") for name in ("proxy-authorization", "range", "referer", "refresh", "retry-after", "server")),
    *((name, "") for name in ("set-cookie", "strict-transport-security", "transfer-encoding", "user-agent", "vary")),
    *((name, "") for name in ("via", "www-authenticate")),
)
_FIRST_DYNAMIC = len(STATIC) + 1
_BY_FIELD = {field: number for number, field in reversed(list(enumerate(STATIC, 1)))}
_BY_NAME = {name: number for number, (name, _) in reversed(list(enumerate(STATIC, 1)))}

# How a field begins: the bits that say what it is, and how many are left for the number.
_INDEXED, _INDEXED_BITS = 0x80, 7
_ADDED, _ADDED_BITS = 0x40, 6  # a literal that goes into the table
_RESIZED, _RESIZED_BITS = 0x20, 5
_NEVER, _PLAIN, _LITERAL_BITS = 0x10, 0x00, 4  # literals that do not; `never`: and must not where it is passed on to
_HUFFMAN = 0x80


class HpackError(Exception):
    """A block is malformed. str() says how; it quotes nothing."""


def size(field: Field) -> int:
    """What a field counts for in a table and in a limit."""
    return len(field[0]) + len(field[1]) + OVERHEAD


class _Table:
    """Fields, the newest first, of `most` bytes together at most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.fields: deque[Field] = deque()
        self._used = 0

    def add(self, field: Field) -> None:
        """Put a field in; older ones give way, and one that is larger than the table leaves it empty."""
        self.fields.appendleft(field)
        self._used += size(field)
        self.shrink()

    def shrink(self) -> None:
        """Let fields go until what is left fits."""
        while self._used > self.most:
            self._used -= size(self.fields.pop())


# ------------------------------------------------------------------------------------------------------------ decoding


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """The integer that begins in the last `bits` bits of a byte (section 5.1), and where it ends."""
    mask = (1 << bits) - 1
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in (0, 7, 14, 21):
        if at == len(block):
            raise HpackError("an integer is cut off")
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= LARGEST:
                break
            return value, at
    raise HpackError("an integer is too large")


def _text(block: bytes, at: int) -> tuple[str, int]:
    """The text that begins here (section 5.2), and where it ends."""
    if at >= len(block):
        raise HpackError("a field is cut off")
    packed = block[at] & _HUFFMAN
    length, at = _integer(block, at, 7)
    raw = block[at : at + length]
    if len(raw) < length:
        raise HpackError("a text is cut off")
    if packed:
        found = huffman.decode(raw)
        if found is None:
            raise HpackError("a text is no Huffman code")
        raw = found
    return raw.decode("latin-1"), at + length


class Decoder:
    """Decodes the blocks of one connection, in the order in which they came."""

    def __init__(self, limit: int = TABLE) -> None:
        """`limit`: how large a table the peer may use."""
        self._limit = limit
        self._table = _Table(limit)
        self._known: dict[bytes, tuple[Field, ...]] = {}  # blocks that neither need the table nor change it

    def decode(self, block: bytes) -> tuple[Field, ...] | None:
        """The fields of a block; None when they exceed the limits, though the table is what it must be. Raises
        HpackError.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        fields: list[Field] = []
        at = used = count = 0
        alone = True
        while at < len(block):
            first = block[at]
            if not first & _INDEXED and first & 0xE0 == _RESIZED:
                if used:
                    raise HpackError("the table is resized within a block")
                at, alone = self._resize(block, at), False
                continue
            field, at, static = self._field(block, at)
            alone = alone and static
            used += size(field)
            count += 1
            if count > 2 * MOST_FIELDS:  # going on for the table's sake would cost as much as thousands of requests
                raise HpackError("too many fields")
            if used <= MOST_BYTES and len(fields) < MOST_FIELDS:
                fields.append(field)
            else:
                used = MOST_BYTES + 1
        if used > MOST_BYTES:
            return None
        if alone:
            if len(self._known) > 64:
                self._known.clear()
            self._known[block] = tuple(fields)
        return tuple(fields)

    def _field(self, block: bytes, at: int) -> tuple[Field, int, bool]:
        """The field that begins here, where it ends, and whether it has nothing to do with the table."""
        first = block[at]
        if first & _INDEXED:
            number, at = _integer(block, at, _INDEXED_BITS)
            return self._numbered(number), at, number < _FIRST_DYNAMIC
        added = first & _ADDED
        number, at = _integer(block, at, _ADDED_BITS if added else _LITERAL_BITS)
        if number:
            name = self._numbered(number)[0]
        else:
            name, at = _text(block, at)
        value, at = _text(block, at)
        field = name, value
        if added:
            self._table.add(field)
        return field, at, not added and number < _FIRST_DYNAMIC

    def _numbered(self, number: int) -> Field:
        if 0 < number < _FIRST_DYNAMIC:
            return STATIC[number - 1]
        if 0 <= number - _FIRST_DYNAMIC < len(self._table.fields):
            return self._table.fields[number - _FIRST_DYNAMIC]
        raise HpackError("a field of the table is named that it does not have")

    def _resize(self, block: bytes, at: int) -> int:
        most, at = _integer(block, at, _RESIZED_BITS)
        if most > self._limit:
            raise HpackError("the table would be larger than allowed")
        self._table.most = most
        self._table.shrink()
        return at


# ------------------------------------------------------------------------------------------------------------ encoding


def integer(value: int, bits: int, flags: int) -> bytes:
    """An integer in the last `bits` bits of a byte that begins with `flags`, and as many bytes more as it needs."""
    mask = (1 << bits) - 1
    if value < mask:
        return bytes([flags | value])
    value -= mask
    found = bytearray([flags | mask])
    while value > 0x7F:
        found.append(0x80 | value & 0x7F)
        value >>= 7
    found.append(value)
    return bytes(found)


def text(value: str) -> bytes:
    """A text, packed where that makes it shorter."""
    plain = value.encode("latin-1")
    packed = huffman.encode(plain)
    if len(packed) < len(plain):
        return integer(len(packed), 7, _HUFFMAN) + packed
    return integer(len(plain), 7, 0) + plain


def plain(name: str, value: str) -> bytes:
    """A field that leaves the table as it is: it may stand in any block."""
    return _literal(_BY_NAME.get(name, 0), name, value, _PLAIN, _LITERAL_BITS)


def _literal(number: int, name: str, value: str, flags: int, bits: int) -> bytes:
    return integer(number, bits, flags) + (b"" if number else text(name)) + text(value)


class Encoder:
    """Encodes what is the same in many blocks of one connection: it goes into the table once."""

    def __init__(self) -> None:
        self._table = _Table(TABLE)
        self._resized: list[int] = []  # what the peer has to be told at the beginning of the next block
        self._encoded: tuple[Sequence[Field], bytes] = (), b""  # what was asked for last, and what it is now

    def limit(self, most: int) -> None:
        """The peer allows a table of this size. (More than TABLE is not used.)"""
        most = min(most, TABLE)
        if most == self._table.most and not self._resized:
            return
        # Told twice if it went down and up again: what was lost on the way down is lost (section 4.2).
        lowest = min([most, *self._resized])
        self._resized = [most] if lowest == most else [lowest, most]
        self._table.most = most if lowest == most else lowest
        self._table.shrink()
        self._table.most = most
        self._encoded = (), b""

    def encode(self, fields: Sequence[Field]) -> bytes:
        """The block with these fields."""
        if fields is self._encoded[0]:
            return self._encoded[1]
        resized = b"".join([integer(most, _RESIZED_BITS, _RESIZED) for most in self._resized])
        self._resized = []
        before = self._table.fields.copy()
        block = resized + b"".join(map(self._field, fields))
        # If it has put nothing in, the same will be the same the next time.
        self._encoded = (fields, block) if before == self._table.fields and not resized else ((), b"")
        return block

    def _field(self, field: Field) -> bytes:
        if number := _BY_FIELD.get(field) or self._number(field):
            return integer(number, _INDEXED_BITS, _INDEXED)
        named = _BY_NAME.get(field[0], 0)
        if size(field) > self._table.most:
            # A credential, mostly, for which the peer has no room: nobody on the way may keep it, either.
            return _literal(named, *field, _NEVER, _LITERAL_BITS)
        self._table.add(field)
        return _literal(named, *field, _ADDED, _ADDED_BITS)

    def _number(self, field: Field) -> int:
        try:
            return _FIRST_DYNAMIC + self._table.fields.index(field)
        except ValueError:
            return 0
