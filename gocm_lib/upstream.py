"""Upstream: a dialect, a key and a PoolManager as one object, one per sender process.

Owns the connecting: urllib3 resolves, connects, verifies TLS; what it returns is made a non-blocking Channel.
Promises that a failure to connect says whether the network or our configuration is at fault, and that the key appears
in no text.
"""

import socket
import ssl
from collections.abc import Iterator
from types import ModuleType
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection

from gocm_lib import gcm
from gocm_lib.job import Slice
from gocm_lib.outcome import Outcome, Verdict
from gocm_lib.settings import Settings, SettingsError
from gocm_lib.wire import Channel, Response

CONNECT_TIMEOUT = 10.0  # seconds, TLS handshake included


class _DialMixin:
    """What a pool adds for us: a connection made at once, by the calling thread, instead of at the first request."""

    def dial(self) -> HTTPConnection:
        connection = self._new_conn()
        connection.timeout = CONNECT_TIMEOUT
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


class _HTTPPool(_DialMixin, urllib3.HTTPConnectionPool):
    pass


class _HTTPSPool(_DialMixin, urllib3.HTTPSConnectionPool):
    pass


class DialError(Exception):
    """No connection could be made: nothing was sent."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Upstream:
    """One upstream as a sender sees it. `requests` and `outcomes` are the dialect's; `dial` gives a Channel."""

    def __init__(self, dialect: ModuleType, url: str, authorization: str, *, ca_file: str, connections: int) -> None:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.dialect = dialect
        # The head but for the body's length. Accept-Encoding: we never decompress, so no answer can be a bomb.
        self._head = (
            f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {host}{port}\r\nAuthorization: {authorization}\r\n"
            "Content-Type: application/json\r\nAccept-Encoding: identity\r\nUser-Agent: GoCM\r\nContent-Length: "
        ).encode("ascii")
        context = _tls_context(ca_file) if parts.scheme == "https" else None
        manager = urllib3.PoolManager(num_pools=1, maxsize=connections, retries=False, ssl_context=context)
        # urllib3's documented place for pools of one's own.
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        self._pool = manager.connection_from_url(url)

    def requests(self, claimed: Slice) -> Iterator[tuple[Slice, bytes]]:
        """The slice cut into requests: each with the bytes to write."""
        for part, body in self.dialect.requests(claimed):
            yield part, b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def outcomes(self, part: Slice, response: Response, now: float) -> list[Outcome]:
        return self.dialect.outcomes(response.status, response.headers, response.body, len(part.tokens), now)

    def dial(self) -> Channel:
        """A connected Channel. Blocks for up to CONNECT_TIMEOUT for each of the host's addresses. Raises DialError."""
        try:
            return Channel(self._pool.dial())
        except (ssl.SSLCertVerificationError, urllib3.exceptions.SSLError) as error:
            raise DialError(Outcome(Verdict.UPSTREAM_CONFIG, f"TLS: {_reason(error)}")) from None
        except ssl.SSLError as error:
            raise DialError(Outcome(Verdict.UPSTREAM_CONFIG, f"TLS: {error.reason or 'handshake failed'}")) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise DialError(Outcome(Verdict.UNREACHABLE, _reason(error))) from None


def _reason(error: Exception) -> str:
    """A few words for the log: certificate problems in OpenSSL's words, everything else by its class."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, (urllib3.exceptions.ConnectTimeoutError, socket.timeout)):
        return "connecting timed out"
    if isinstance(error, (urllib3.exceptions.NameResolutionError, socket.gaierror)):
        return "host name not found"
    cause = error.__cause__
    return (cause or error).__class__.__name__


def _tls_context(ca_file: str) -> ssl.SSLContext:
    """Verification as ssl's default context does it, TLS 1.2 at least; there is no option to turn it off."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"--upstream-ca {ca_file} holds no usable PEM certificates: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def from_settings(settings: Settings) -> dict[str, Upstream]:
    """Every upstream that the settings name, by its name. Raises SettingsError where one cannot be made."""
    return {
        gcm.NAME: Upstream(
            gcm,
            settings.gcm_url,
            f"key={settings.apikey}",
            ca_file=settings.upstream_ca,
            connections=settings.connections,
        ),
    }
