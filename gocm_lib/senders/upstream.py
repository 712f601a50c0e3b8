"""Upstream: a dialect, a URL and a PoolManager in one object; each sender process has one for each upstream.

Owns the connecting: urllib3 resolves names, connects and verifies TLS; the result becomes a non-blocking Channel, which
speaks HTTP/2 if the upstream wants that. Promises that a failure to connect says whether the network or our
configuration is at fault.
"""

import functools
import os
import re
import socket
import ssl
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection

from gocm_lib.config import upstreams
from gocm_lib.config.proxy import Proxy, ways
from gocm_lib.config.settings import Settings, UpstreamSettings
from gocm_lib.message import fcm
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import Outcome, Verdict
from gocm_lib.process import deadline
from gocm_lib.senders import trust
from gocm_lib.senders.connection import Http1Channel, Request, RequestHead, Response
from gocm_lib.senders.streams import Channel, Http2Channel, NotHttp2

REFUSED_BY_PROXY = ("401", "403", "407")  # it refuses us; what else it says is that it cannot just now
CONNECT_TIMEOUT = 10.0  # seconds, TLS handshake included


def _connected(pool: urllib3.HTTPConnectionPool) -> HTTPConnection:
    """A new connection of a urllib3 pool. The calling thread connects it at once, not at the first request."""
    connection = pool._new_conn()
    assert isinstance(connection, HTTPConnection)
    connection.timeout = CONNECT_TIMEOUT
    try:
        if pool.proxy is None:
            connection.connect()
        else:
            with deadline.limit(CONNECT_TIMEOUT, lambda: connection.sock):
                pool._prepare_proxy(connection)  # CONNECT, and then TLS
    except BaseException:
        connection.close()
        raise
    return connection


class DialError(Exception):
    """No connection could be made: nothing was sent."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Upstream:
    """One upstream as a sender sees it. `requests` and `outcomes` come from the dialect; `dial` makes a Channel."""

    def __init__(
        self,
        dialect: ModuleType,
        url: str,
        *,
        name: str = "",
        ca_file: str = "",
        proxy: Proxy | None = None,
        http2: bool = False,
    ) -> None:
        """Its `name` is the dialect's unless given. `http2`: offer it, where TLS is spoken."""
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.dialect = dialect
        self.name = name or dialect.NAME
        self._path, self._authority = parts.path or "/", f"{host}{port}"
        self._proxy = proxy
        self._head = functools.lru_cache(maxsize=8)(self._make_head)
        secure = parts.scheme == "https"
        self.http2 = http2 and secure
        self._url = url
        # By whether HTTP/2 is offered.
        self._contexts = {False: trust.context(ca_file, "http/1.1") if secure else None}
        if self.http2:
            self._contexts[True] = trust.context(ca_file, "h2", "http/1.1")
        self._make_pool = functools.cache(self._new_pool)  # made when they are needed: many upstreams are idle

    def _new_pool(self, http2: bool) -> urllib3.HTTPConnectionPool:
        # It makes our connections, and keeps none: Places does.
        how: dict[str, Any] = {"num_pools": 1, "maxsize": 1, "retries": False, "ssl_context": self._contexts[http2]}
        manager = urllib3.PoolManager(**how)
        if self._proxy:
            manager = urllib3.ProxyManager(self._proxy.url, proxy_headers=self._proxy.headers, **how)
        return manager.connection_from_url(self._url)

    def _make_head(self, authorization: str) -> RequestHead:
        # Accept-Encoding: we never decompress, so no answer can be a bomb.
        common = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "GoCM"}
        common["authorization"] = authorization
        lines = [f"POST {self._path} HTTP/1.1", f"Host: {self._authority}"]
        lines += [f"{name.title()}: {value}" for name, value in common.items()]
        special = [(":method", "POST"), (":scheme", "https"), (":path", self._path), (":authority", self._authority)]
        return RequestHead("\r\n".join(lines).encode("ascii"), (*special, *common.items()))

    def count(self, claimed: Slice) -> int:
        """How many requests a slice is cut into."""
        each: int = self.dialect.TOKENS_PER_REQUEST
        return -(-claimed.size // each)

    def requests(self, claimed: Slice) -> Iterator[tuple[Slice, Request]]:
        """The slice cut into requests."""
        head = self._head(claimed.authorization)
        for part, body in self.dialect.requests(claimed):
            yield part, Request(head, body)

    def outcomes(self, part: Slice, response: Response, now: float) -> list[Outcome]:
        outcomes: list[Outcome] = self.dialect.outcomes(part, response.status, response.headers, response.body, now)
        return outcomes

    def dial(self, http2: bool = True) -> Channel:
        """A connected Channel, with `http2` one that speaks it if both of us want that. Blocks for up to
        CONNECT_TIMEOUT for each of the host's addresses. Raises DialError.
        """
        try:
            connection = _connected(self._make_pool(http2 and self.http2))
            if not (isinstance(connection.sock, ssl.SSLSocket) and connection.sock.selected_alpn_protocol() == "h2"):
                return Http1Channel(connection)
            try:
                return Http2Channel(connection, CONNECT_TIMEOUT)
            except BaseException:
                connection.close()
                raise
        except NotHttp2 as error:
            verdict = Verdict.UPSTREAM_CONFIG if error.config else Verdict.UNREACHABLE
            raise DialError(Outcome(verdict, f"HTTP/2: {error}")) from None
        except (ssl.SSLCertVerificationError, urllib3.exceptions.SSLError) as error:
            raise DialError(Outcome(Verdict.UPSTREAM_CONFIG, f"TLS: {_reason(error)}")) from None
        except ssl.SSLError as error:
            raise DialError(Outcome(Verdict.UPSTREAM_CONFIG, f"TLS: {error.reason or 'handshake failed'}")) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            outcome = _of_proxy(self._proxy, error) if self._proxy else Outcome(Verdict.UNREACHABLE, _reason(error))
            raise DialError(outcome) from None


def _of_proxy(proxy: Proxy, error: Exception) -> Outcome:
    """The error for a proxy that did not bring us to the upstream: whose fault that is."""
    # http.client has no class for it: "Tunnel connection failed: 407 Proxy Authentication Required".
    answer = re.search(r"Tunnel connection failed: (\d{3})", str(error))
    if not answer:
        return Outcome(Verdict.UNREACHABLE, f"proxy {proxy}: {_reason(error)}")
    verdict = Verdict.UPSTREAM_CONFIG if answer[1] in REFUSED_BY_PROXY else Verdict.UNREACHABLE
    return Outcome(verdict, f"proxy {proxy} answers {answer[1]}")


def _reason(error: Exception) -> str:
    """A few words for the log: certificate problems in OpenSSL's words, anything else by its class."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, (urllib3.exceptions.NameResolutionError, socket.gaierror)):
        return "host name not found"
    if isinstance(error, urllib3.exceptions.NewConnectionError):  # a subclass of the next, whatever its cause
        return (error.__cause__ or error).__class__.__name__
    if isinstance(error, (urllib3.exceptions.ConnectTimeoutError, TimeoutError)):
        return "connecting timed out"
    cause = error.__cause__
    return (cause or error).__class__.__name__


def from_settings(settings: Settings) -> dict[str, Upstream]:
    """Every upstream, by name. Raises Fatal when one cannot be made."""
    return {name: _made(name, found, settings) for name, found in upstreams.described(settings).items()}


def _made(name: str, found: UpstreamSettings, settings: Settings) -> Upstream:
    url, is_v1 = found.url, found.dialect == fcm.NAME
    if is_v1:
        url = f"{url.rstrip('/')}/v1/projects/{found.project}/messages:send"
    # A GCM request is too large for HTTP/2's windows, and carries a thousand tokens as it is.
    http2 = settings.http2 == "auto" and is_v1
    proxy = ways(found, os.environ).to(url)
    return Upstream(DIALECTS[found.dialect], url, name=name, ca_file=found.ca, proxy=proxy, http2=http2)
