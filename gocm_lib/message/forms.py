"""The fields of a form, as a browser, curl or a web stack sends it. Pure.

Reads application/x-www-form-urlencoded, and multipart/form-data with text in its parts (RFC 7578). A list is a name
given several times, or as PHP, jQuery, axios and qs write it: `tokens[]`, or `tokens[0]`, `tokens[1]`.
"""

import binascii
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from gocm_lib.message.bad_request import BadRequest

OTHER_FIELDS = 16  # in a form, beside its tokens: more than there are
LONGEST_PART_HEAD = 1024  # bytes
_BROKEN = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_INDEXED = re.compile(r"([a-z_]+)\[([0-9]{0,6})\]")
_BOUNDARY = re.compile(
    r"""boundary=(?:"([^"]{1,70})"|([!#$%&'*+.^_`|~0-9A-Za-z/:=?,()-]{1,70}))\s*(?:;|\Z)""", re.IGNORECASE
)
_NAME = re.compile(rb"""form-data\s*;(?:.*;)?\s*name="([^"\\\r\n]*)"(?:\s*;.*)?""", re.IGNORECASE)


def urlencoded(body: bytes, max_tokens: int) -> Iterator[tuple[str, str]]:
    """The names and values of application/x-www-form-urlencoded. Raises BadRequest."""
    if body.count(b"&") >= max_tokens + OTHER_FIELDS:
        raise BadRequest(f"more than {max_tokens + OTHER_FIELDS} fields", status=413)
    for pair in body.split(b"&"):
        if pair:
            raw_name, _, raw_value = pair.partition(b"=")
            name = _unquote(raw_name, "")
            yield name, _unquote(raw_value, name[:64])


def multipart(content_type: str, body: bytes, max_tokens: int) -> Iterator[tuple[str, str]]:
    """The names and values of multipart/form-data. Raises BadRequest."""
    found = _BOUNDARY.search(content_type)
    if not found:
        raise BadRequest("multipart/form-data needs a boundary", "Content-Type")
    mark = b"\r\n--" + (found[1] or found[2]).encode("latin-1")
    # With a line end before it the first boundary is like the others.
    first, *parts = (b"\r\n" + body).split(mark, max_tokens + OTHER_FIELDS + 1)
    if len(parts) > max_tokens + OTHER_FIELDS:
        raise BadRequest(f"more than {max_tokens + OTHER_FIELDS} fields", status=413)
    if first.strip() or not parts or parts[-1].rstrip(b" \t\r\n") != b"--":
        raise BadRequest("the body is not whole: it does not end with its boundary")
    for part in parts[:-1]:
        yield _part(part)


def _part(part: bytes) -> tuple[str, str]:
    """The name and the text of a part, which begins after its boundary."""
    padding, _, rest = part.partition(b"\r\n")
    head, end, value = (b"\r\n" + rest).partition(b"\r\n\r\n")
    if padding.strip(b" \t") or not end or len(head) > LONGEST_PART_HEAD:
        raise BadRequest("malformed part of the form")
    headers = dict(line.lower().partition(b":")[::2] for line in head.split(b"\r\n") if line)
    spelt = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")), b"")
    found = _NAME.fullmatch(spelt.partition(b":")[2].strip())
    if not found:
        raise BadRequest('a part of the form has no name: Content-Disposition: form-data; name="..."')
    name = _text(found[1], "")
    if headers.get(b"content-transfer-encoding", b"8bit").strip() not in (b"7bit", b"8bit", b"binary"):
        raise BadRequest("is encoded in a way that is not understood here", name[:64])
    charset = re.search(rb"charset=\"?([\w-]+)", headers.get(b"content-type", b""))
    if charset and charset[1] not in (b"utf-8", b"us-ascii"):
        raise BadRequest("must be UTF-8", name[:64])
    return name, _text(value, name[:64])


def listed(name: str, before: int) -> str:
    """The field that a name means: itself, or of `tokens[]` and `tokens[3]`, where three were given `before`, tokens.
    Raises BadRequest where the number is another.
    """
    found = _INDEXED.fullmatch(name)
    if not found:
        return name
    if found[2] and int(found[2]) != before:
        raise BadRequest(f"{found[1]}[{before}] was to come: give them in order", found[1])
    return found[1]


def _unquote(raw: bytes, field: str) -> str:
    if b"+" in raw:
        raw = raw.replace(b"+", b" ")
    if b"%" in raw:
        if _BROKEN.search(raw):
            raise BadRequest("broken percent-encoding: % must be followed by two hexadecimal digits", field)
        raw = _percent_decoded(raw)
    return _text(raw, field)


_AS_QUOTED = bytes.maketrans(b"%", b"=")


def _percent_decoded(raw: bytes) -> bytes:
    """The bytes behind percent-encoding in which each % is followed by two hexadecimal digits."""
    if b"=" in raw:
        return unquote_to_bytes(raw)
    # Quoted-printable is the same with another sign, but for soft line breaks, which such digits exclude; and its
    # decoder is written in C: a tenth of the time.
    return binascii.a2b_qp(raw.translate(_AS_QUOTED))


def _text(raw: bytes, field: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadRequest("not valid UTF-8", field) from None
