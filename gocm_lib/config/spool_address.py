"""The address of a spool in PostgreSQL: a URL as PostgreSQL's own tools take it. Pure.

    postgresql://gocm@db.example.org/gocm      on the command line, without a password
    postgresql://gocm:secret@a,b/gocm          in a file (--spool-file), with one; of several hosts one is the primary

What a server elsewhere is asked by must be TLS that knows whom it speaks with: tokens and messages cross the network.
"""

import re
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

_HOST = r"(\[[0-9A-Fa-f:.%]+\]|[^:,@\[\]]*)(:[0-9]*)?"
_HOSTS = f"{_HOST}(,{_HOST})*"
SCHEMES = ("postgresql", "postgres")
LOCAL = ("", "localhost", "127.0.0.1", "::1")
# What an address gets that does not say otherwise. A link that goes down without a word is noticed within seconds, not
# after a quarter of an hour; and of several hosts the one that can be written to is found.
DEFAULTS = {
    "connect_timeout": "3",
    "tcp_user_timeout": "3000",
    "keepalives_idle": "2",
    "keepalives_interval": "1",
    "keepalives_count": "2",
    "target_session_attrs": "read-write",
}


def is_address(spool: str) -> bool:
    """Whether a spool is in PostgreSQL, and not a file."""
    return spool.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def check(url: str, with_password: bool) -> str:
    """The same URL. Raises ValueError when it is none, or when it has a password that everybody could see."""
    parts = urlsplit(url)
    query = _query(url)
    # What is in the wrong place of a URL is taken for a host or a port, and would be in the log as that.
    hosts = parts.netloc.rpartition("@")[2]
    if re.search("%(?![0-9A-Fa-f]{2})", url) or "@" in parts.path or not re.fullmatch(_HOSTS, unquote(hosts)):
        raise ValueError("is no URL: write % / @ : ? # in a password as %25 %2F %40 %3A %3F %23")
    if not is_address(url) or not parts.path.strip("/"):
        raise ValueError("must be a path, or postgresql://USER@HOST/DATABASE")
    if not with_password and (":" in _user(url) or {"password", "sslpassword"} & query.keys()):
        raise ValueError("has a password, which everybody here could see: put the URL into a file for --spool-file")
    mode = query.get("sslmode", "verify-full")
    if not is_local(url) and mode != "verify-full":
        raise ValueError(f"has sslmode={mode}, but a server elsewhere needs verify-full")
    return url


def is_local(url: str) -> bool:
    """Whether the server is on this machine."""
    query = _query(url)
    hosts = query.get("host") or urlsplit(url).netloc.rpartition("@")[2]
    return all(_name(each) in LOCAL or each.startswith("/") for each in unquote(hosts).split(","))


def shown(url: str) -> str:
    """The URL without its password and its parameters, for the log."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, f"{user.partition(':')[0]}{at}{hosts}", parts.path, "", ""))


def complete(url: str, node: str = "") -> str:
    """The URL with what it does not say: time limits, how TLS is checked, and who asks."""
    parts = urlsplit(url)
    defaults = {**DEFAULTS, "application_name": f"gocm {node}".strip()}
    if not is_local(url):
        defaults |= {"sslmode": "verify-full", "sslrootcert": "system"}
    query = {**defaults, **_query(url)}
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query, quote_via=quote), ""))


def _query(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def _user(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[0]


def _name(host: str) -> str:
    """A host without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") < 2 else host
