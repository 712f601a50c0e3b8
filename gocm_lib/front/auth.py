"""Who may ask: tokens, the names that a server may be called by, and pages of other sites in a browser. Pure, except
for reading the file of tokens.

A web page can make a visitor's browser post forms to any address, this machine's included, and can read the answers of
a server that it reaches by a name of its own (DNS rebinding). So a request that a browser sends for another site is
refused, and so is a name that the operator has not allowed. Secrets are compared in constant time and never shown.
"""

import base64
import binascii
import functools
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple

from gocm_lib.config.settings import Fatal, Settings
from gocm_lib.message.bad_request import BadRequest

SHORTEST = 16  # characters of a token: shorter ones can be guessed
LONGEST = 4096
LARGEST = 1 << 20  # characters in the file


class Policy(NamedTuple):
    """What a request needs. `digests`: SHA-256 of each valid token; empty when no token is needed. `names`: the host
    names that clients may use; None: any.
    """

    digests: tuple[bytes, ...] = ()
    names: frozenset[str] | None = None


def read_policy(settings: Settings) -> Policy:
    """The Policy for these settings. Raises Fatal when the file of tokens is malformed."""
    digests = _read_tokens(settings.auth_token_file) if settings.auth_token_file else ()
    if digests and not settings.allowed_hosts:
        return Policy(digests)
    # A page that was led here by a name of its own has no token; where none is asked for, only the name tells.
    return Policy(digests, frozenset(settings.allowed_hosts) | {host.lower() for host in settings.host})


def first_token(path: str) -> str:
    """The first token in a file, for a client of the server. Raises Fatal."""
    return _tokens(path)[0]


def _read_tokens(path: str) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(token.encode()).digest() for token in _tokens(path))


def _tokens(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file.read(LARGEST).splitlines()]
            if file.read(1):
                raise Fatal(f"--auth-token-file {path} is longer than {LARGEST} characters", topic="security")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Fatal(f"--auth-token-file {path} cannot be read: {reason}", topic="security") from None
    tokens = []
    for number, token in enumerate(lines, 1):
        if not token or token.startswith("#"):
            continue
        if not re.fullmatch(r"[\x21-\x7e]+", token) or not SHORTEST <= len(token) <= LONGEST:
            raise Fatal(
                f"--auth-token-file {path}, line {number}: a token is {SHORTEST} or more printable ASCII characters "
                "without spaces, like those of: openssl rand -hex 32",
                topic="security",
            )
        tokens.append(token)
    if not tokens:
        raise Fatal(f"--auth-token-file {path} has no token: put one on each line", topic="security")
    return tokens


def check(headers: Mapping[str, str], policy: Policy, *, local: bool, public: bool) -> None:
    """Raise BadRequest when a request is not allowed: 421 for a host name that is not ours, 403 for a page of another
    site, 401 without a valid token. `local`: it came by a UNIX socket. `public`: what it asks for needs no token.
    """
    if not local and policy.names is not None and not _is_ours(headers.get("host", ""), policy.names):
        raise BadRequest("this server is not called so: use its address, or --allowed-hosts", "host", 421)
    if _is_foreign(headers):
        raise BadRequest("pages of other sites may not ask here", "origin", 403)
    if policy.digests and not public:
        token = _token(headers.get("authorization", ""))
        if token is None:
            raise BadRequest("a token is needed: Authorization: Bearer TOKEN", "authorization", 401)
        digest = hashlib.sha256(token).digest()
        # All are compared, whichever fits.
        if not sum([hmac.compare_digest(digest, known) for known in policy.digests]):
            raise BadRequest("this token is not known here", "authorization", 401)


@functools.lru_cache(maxsize=64)  # clients call us by the same few names
def _is_ours(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names this server: an address, localhost, or one of the names. HTTP/1.0 may have none."""
    name = re.sub(r":[0-9]*\Z", "", host).lower().rstrip(".")
    if name in names or name in ("", "localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))  # no name that a page could have chosen
    except ValueError:
        return False
    return True


def _is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a browser sends this for a page of another site (www.w3.org/TR/fetch-metadata; "none" means that the user
    asked directly).
    """
    site = headers.get("sec-fetch-site", "none")
    if site != "none":
        return site != "same-origin"  # it knows by what name it came; a proxy between us may have changed that
    origin, host = headers.get("origin"), headers.get("host", "").lower()
    return origin is not None and not (host and origin.partition("://")[2].lower() == host)


# What browsers send with each request, and clients that are none do not.
_BROWSERS = ("sec-fetch-site", "sec-fetch-dest", "sec-ch-ua", "upgrade-insecure-requests", "referer")


def check_clearing(headers: Mapping[str, str]) -> None:
    """Raise BadRequest (403) for a GET that would clear a list, when a browser sends it without saying that our own
    page asks. A picture in any page is such a GET, and over plain http with a host name browsers do not say whose page
    it is.
    """
    agent = headers.get("user-agent", "")
    is_browser = agent.startswith("Mozilla/") and "PowerShell/" not in agent
    if headers.get("sec-fetch-site") != "same-origin" and (is_browser or any(name in headers for name in _BROWSERS)):
        raise BadRequest("a browser may look with ?peek=1; to clear, POST to .../ack, or use curl", "user-agent", 403)


def _token(authorization: str) -> bytes | None:
    """The token in a Bearer header, the password in a Basic one (RFC 6750, RFC 7617), or the key of Google's legacy
    protocol; None: there is none.
    """
    if authorization.startswith("key="):
        return authorization.removeprefix("key=").strip().encode("latin-1")
    scheme, _, rest = authorization.partition(" ")
    given = rest.strip().encode("latin-1")
    if scheme.lower() == "bearer" and given:
        return given
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None
