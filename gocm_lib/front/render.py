"""An answer as bytes. Pure, but for the date."""

import functools
import itertools
import os
import re
import time
from email.utils import formatdate
from http import HTTPStatus

from gocm_lib.front.response import Response

# On every answer: what a browser may make of it, which is nothing, but for a page that says otherwise.
GUARD = ("Cross-Origin-Resource-Policy: same-origin", "Referrer-Policy: no-referrer", "X-Content-Type-Options: nosniff")
POLICY = "Content-Security-Policy"
NOTHING = f"{POLICY}: default-src 'none'; frame-ancestors 'none'"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_run = os.urandom(4).hex()  # tells the ids of one run from those of another
_numbers = itertools.count(1)
_GUARDED = "\r\n".join(GUARD)
_PHRASES = {each.value: each.phrase for each in HTTPStatus}  # others come from servers that we pass something on to


def request_id(given: str | None) -> str:
    """The id that the client gave its request, or a new one. It is in the answer and in the access log."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"{_run}-{next(_numbers):x}"


@functools.lru_cache(maxsize=64)
def _start(status: int, content_type: str, second: int) -> str:
    """The first lines of an answer, which are those of all its kind within a second."""
    phrase, date = _PHRASES.get(status, "Unknown"), formatdate(second, usegmt=True)
    return f"HTTP/1.1 {status} {phrase}\r\nServer: GoCM\r\nDate: {date}\r\nContent-Type: {content_type}"


_SHARED = tuple((name.lower(), value) for name, _, value in (line.partition(": ") for line in (*GUARD, NOTHING)))


def fields(response: Response, rid: str) -> tuple[tuple[tuple[str, str], ...], list[tuple[str, str]]]:
    """The headers of an answer in HTTP/2, but for its length: those that all of its kind have, and its own."""
    own = [("x-request-id", rid)]
    for name, values in response.headers.items():
        own += [(name.lower(), each) for each in ([values] if isinstance(values, str) else values)]
    return (("content-type", response.content_type), ("cache-control", "no-store"), *_SHARED), own


def render(response: Response, rid: str, kept_for: float, head_only: bool) -> bytes:
    """A response as bytes, head and body in one piece: in two, Nagle's algorithm and a delayed ACK cost 40 ms. The
    connection is kept for `kept_for` seconds; 0: it is closed.
    """
    status, body, content_type, more, *_ = response
    lines = [
        _start(status, content_type, int(time.time())),
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nX-Request-Id: {rid}",
        _GUARDED,
    ]
    if POLICY not in more:
        lines.append(NOTHING)
    for name, value in more.items():
        lines += [f"{name}: {value}"] if isinstance(value, str) else [f"{name}: {each}" for each in value]
    if kept_for:
        lines.append(f"Connection: keep-alive\r\nKeep-Alive: timeout={int(kept_for)}\r\n\r\n")
    else:
        lines.append("Connection: close\r\n\r\n")
    head = "\r\n".join(lines).encode("latin-1")
    return head if head_only else head + body
