"""Who may ask: tokens, the names that a server may be called by, and pages of other sites in a browser. Pure, except
for reading the file of tokens.

A web page can make a visitor's browser post forms to any address, this machine's included, and can read the answers of
a server that it reaches by a name of its own (DNS rebinding). So a request that a browser sends for another site is
refused, and so is a name that the operator has not allowed. Secrets are compared in constant time and never shown.
"""

import base64
import binascii
import datetime
import functools
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from gocm_lib.config.settings import NAME, Fatal, Settings
from gocm_lib.message.bad_request import BadRequest

SHORTEST = 16  # characters of a token: shorter ones can be guessed
LONGEST = 4096
MOST_ALIKE = 6  # different characters: with fewer a token can be guessed, however long it is
LARGEST = 1 << 20  # characters in the file


# What a token may be bounded to. Each route needs one of these, "" none in particular.
RIGHTS = {
    "send": "send messages to tokens",
    "topics": "send to topics and conditions, which may reach everybody",
    "read": "the report, messages, failed tokens and the status page",
    "lists": "read and clear the lists of tokens to replace and to delete",
    "manage": "cancel, replay, discard and release",
    "metrics": "/metrics, so that Prometheus holds a token that can do nothing else",
}
WORDS = ("name=", "may=", "until=", "upstream=", "rate=")  # that may come after a token
FOR_ALL = {"metrics"}  # rights that a token of some upstreams has only if it is given them: they show all of them
NAME_OF_TOKEN = "[A-Za-z0-9._-]{1,64}"
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_RATE = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)/([sm])")


class Grant(NamedTuple):
    """What a token is good for: the SHA-256 of it, whose it is ("": nobody said), which RIGHTS it has, until when
    (seconds since 1970), for which upstreams (none: for all), and how many tokens a second it may send to (0: any).
    """

    digest: bytes
    name: str = ""
    may: frozenset[str] = frozenset(RIGHTS)
    until: float = float("inf")
    upstreams: tuple[str, ...] = ()
    rate: float = 0.0

    def sees(self, upstream: str) -> bool:
        """Whether it is for this upstream."""
        return not self.upstreams or upstream in self.upstreams


EVERYBODY = Grant(b"")  # what is good for those who need no token


class Policy(NamedTuple):
    """What a request needs. `grants`: of each valid token; empty when no token is needed. `names`: the host names that
    clients may use; None: any.
    """

    grants: tuple[Grant, ...] = ()
    names: frozenset[str] | None = None


def read_policy(settings: Settings) -> Policy:
    """The Policy for these settings. Raises Fatal when the file of tokens is malformed."""
    path = settings.auth_token_file
    grants = tuple(grant for _, grant in _read(path)) if path else ()
    if grants and not settings.allowed_hosts:
        return Policy(grants)
    # A page that was led here by a name of its own has no token; where none is asked for, only the name tells.
    return Policy(grants, frozenset(settings.allowed_hosts) | {host.lower() for host in settings.host})


def first_token(path: str) -> str:
    """The first token in a file, for a client of the server. Raises Fatal."""
    for token, _ in _read(path):
        if token:
            return token
    raise Fatal(f"--auth-token-file {path} has hashes only: a client needs a token", topic="security")


def check_name(path: str, grant: Grant) -> None:
    """Raise ValueError when the file has tokens of the same name for other upstreams. Raises Fatal."""
    if any(known.name == grant.name and known.upstreams != grant.upstreams for _, known in _read(path)):
        raise ValueError(f"the name {grant.name} is there with other upstreams: take another name")


def _read(path: str) -> list[tuple[str, Grant]]:
    """The tokens of a file ("" where it has a hash only), and what they are good for. Raises Fatal."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file.read(LARGEST).splitlines()]
            if file.read(1):
                raise Fatal(f"--auth-token-file {path} is longer than {LARGEST} characters", topic="security")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Fatal(f"--auth-token-file {path} cannot be read: {reason}", topic="security") from None
    found: list[tuple[str, Grant]] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        try:
            token, grant = read_line(line)
            if any(hmac.compare_digest(grant.digest, known.digest) for _, known in found):
                raise ValueError("this token is on a line before")
            if grant.name and any(k.name == grant.name and k.upstreams != grant.upstreams for _, k in found):
                # Its Idempotency-Keys would be the other's.
                raise ValueError(f"the name {grant.name} is on a line before with other upstreams: take another name")
            found.append((token, grant))
        except ValueError as error:
            raise Fatal(f"--auth-token-file {path}, line {number}: {error}", topic="security") from None
    if not found:
        raise Fatal(f"--auth-token-file {path} has no token: put one on each line", topic="security")
    return found


def read_line(line: str) -> tuple[str, Grant]:
    """A line of the file: TOKEN, or sha256: and its hash, then some of WORDS. Raises ValueError, in which the token is
    not.
    """
    token, *words = line.split()
    if token.startswith(WORDS):
        raise ValueError("the token is missing: it comes first")
    if token.lower().startswith("sha256:"):
        if not re.fullmatch("sha256:[0-9a-fA-F]{64}", token):
            raise ValueError("after sha256: come 64 hexadecimal digits, like those of: printf %s TOKEN | sha256sum")
        token, digest = "", bytes.fromhex(token.removeprefix("sha256:"))
    elif not re.fullmatch(r"[\x21-\x7e]+", token) or not SHORTEST <= len(token) <= LONGEST:
        raise ValueError(
            f"a token is {SHORTEST} or more printable ASCII characters without spaces, like those of: "
            "openssl rand -hex 32"
        )
    elif len(set(token)) < MOST_ALIKE:
        raise ValueError("the token can be guessed: make one by openssl rand -hex 32")
    else:
        digest = hashlib.sha256(token.encode()).digest()
    grant = Grant(digest)
    for word in words:
        name, _, value = word.partition("=")
        if not word.startswith(WORDS) or sum(each.startswith(f"{name}=") for each in words) > 1:
            raise ValueError(
                "after the token may be name=NAME, may=RIGHT,RIGHT, upstream=NAME,NAME, rate=NUMBER/s and "
                "until=YYYY-MM-DD, each once"
            )
        grant = _bounded(grant, name, value)
    if grant.upstreams and not any(word.startswith("may=") for word in words):
        grant = grant._replace(may=grant.may - FOR_ALL)
    return token, grant


def _bounded(grant: Grant, name: str, value: str) -> Grant:
    if name == "may":
        may = frozenset(value.split(","))
        if may - RIGHTS.keys():  # not shown: it may be the next token
            raise ValueError("may= has what is no right: there is " + ", ".join(RIGHTS))
        return grant._replace(may=may)
    if name == "upstream":
        names = value.split(",")
        if not all(re.fullmatch(NAME, each) for each in names):
            raise ValueError("upstream= has the names of upstreams, separated by commas")
        return grant._replace(upstreams=tuple(names))
    if name == "rate":
        if not (found := _RATE.fullmatch(value)) or not 0 < float(found[1]) <= 1e6:
            raise ValueError("rate= is how many tokens a second, or a minute, it may send to: 100/s, 30/m")
        return grant._replace(rate=float(found[1]) / (60 if found[2] == "m" else 1))
    if name == "name":
        if not re.fullmatch(NAME_OF_TOKEN, value):
            raise ValueError("a name is 1 to 64 letters, digits and ._-")
        return grant._replace(name=value)
    try:
        day = datetime.datetime.strptime(value if _DAY.fullmatch(value) else "", "%Y-%m-%d")
    except ValueError:
        raise ValueError("until=YYYY-MM-DD is the last day, in UTC, on which the token is good") from None
    return grant._replace(until=day.replace(tzinfo=datetime.UTC).timestamp() + 86400)


def check(
    headers: Mapping[str, str], policy: Policy, *, local: bool, public: bool, right: str = "", now: float = 0.0
) -> Grant:
    """Raise BadRequest when a request is not allowed: 421 for a host name that is not ours, 403 for a page of another
    site, 401 without a valid token, 403 when its token has not this right. `local`: it came by a UNIX socket. `public`:
    what it asks for needs no token. Returns what its token is good for.
    """
    if not local and policy.names is not None and not _is_ours(headers.get("host", ""), policy.names):
        raise BadRequest("this server is not called so: use its address, or --allowed-hosts", "host", 421)
    if _is_foreign(headers):
        raise BadRequest("pages of other sites may not ask here", "origin", 403)
    if not policy.grants or public:
        return EVERYBODY
    grant = _find(headers, policy, now)
    if right and right not in grant.may:
        raise BadRequest(f"this token may not do that: it needs may={right}", "authorization", 403)
    return grant


def check_upstream(grant: Grant, upstream: str) -> None:
    """Raise BadRequest (403) when a token is not for an upstream."""
    if not grant.sees(upstream):
        raise BadRequest(f"this token is not for upstream {upstream}", "upstream", 403)


def only_upstream(grant: Grant, asked: str, there: Collection[str]) -> str:
    """The upstream of which a token may see something that is `asked` for ("": it is of any): this one, which must be
    `there`, or the only one that the token is for; "": all. Raises BadRequest, for another's with 403.
    """
    if asked and asked not in there:
        raise BadRequest("there is " + ", ".join(there), "upstream")
    if asked or not grant.upstreams:
        if asked:
            check_upstream(grant, asked)
        return asked
    if len(grant.upstreams) > 1:
        raise BadRequest("this token is for some upstreams: say which one, upstream=NAME", "upstream", 403)
    return grant.upstreams[0]


def _find(headers: Mapping[str, str], policy: Policy, now: float) -> Grant:
    token = _token(headers.get("authorization", ""))
    if token is None:
        raise BadRequest("a token is needed: Authorization: Bearer TOKEN", "authorization", 401)
    digest = hashlib.sha256(token).digest()
    # All are compared, whichever fits.
    found = [grant for grant in policy.grants if hmac.compare_digest(digest, grant.digest)]
    if not found:
        raise BadRequest("this token is not known here", "authorization", 401)
    if now >= found[0].until:
        raise BadRequest("this token's time is over", "authorization", 401)
    return found[0]


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
