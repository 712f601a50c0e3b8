"""One request of our own to somebody else's server: the webhook, and what the door passes on to Google."""

import http.client
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from gocm_lib.config.proxy import Proxy
from gocm_lib.process import deadline

CONNECT, PATIENCE = 5.0, 20.0  # seconds to be connected, and for the answer from then on
LONGEST = 1024 * 1024  # bytes of a body that is read


class Answer(NamedTuple):
    """An answer; `body` is empty unless it was asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def exchange(
    method: str,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    proxy: Proxy | None = None,
    *,
    tls: ssl.SSLContext | None = None,
    reads: bool = False,
) -> Answer:
    """Make a request, by a proxy if there is one. No redirect is followed; the answer's body is read if it is wanted,
    and is then at most LONGEST bytes. Raises OSError, HTTPException or ValueError after twice PATIENCE seconds at the
    latest, however the other side delays.
    """
    parts = urlsplit(url)
    place = (proxy.host, proxy.port) if proxy else (parts.hostname or "", parts.port)
    connection = (
        http.client.HTTPSConnection(*place, timeout=CONNECT, context=tls)
        if parts.scheme == "https"
        else http.client.HTTPConnection(*place, timeout=CONNECT)
    )
    if proxy:
        connection.set_tunnel(parts.hostname or "", parts.port or 443, proxy.headers)
    try:
        with deadline.limit(PATIENCE, lambda: connection.sock):  # a proxy may keep us waiting, too
            connection.connect()
        sock = connection.sock
        sock.settimeout(PATIENCE)
        with deadline.limit(PATIENCE, lambda: sock):
            connection.request(method, urlunsplit(("", "", parts.path or "/", parts.query, "")), body, dict(headers))
            answer = connection.getresponse()
            said = answer.read(LONGEST + 1) if reads else b""
        if len(said) > LONGEST:
            raise ValueError("the answer is too long")
        return Answer(answer.status, dict(answer.headers), said)
    finally:
        connection.close()
