"""Which proxy leads to a URL. Pure, except for reading the file with the proxy's password.

`--proxy` counts, else the usual variables: https_proxy, then all_proxy, lower case first, as in curl. NO_PROXY makes
exceptions to all of them. Only https URLs go through a proxy, because GoCM asks for CONNECT: plain http stays on this
machine or in the house. This machine's own addresses never go through one.
"""

import base64
import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from gocm_lib.config.settings import Fatal, Settings, UpstreamSettings, is_loopback

VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
EXCEPTIONS = ("no_proxy", "NO_PROXY")
NONE = "none"  # of --proxy: not even that of the environment


class Proxy(NamedTuple):
    """An HTTP proxy. `authorization` is the value of a Proxy-Authorization header, "" if the proxy needs none."""

    host: str
    port: int
    authorization: str

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The proxy's URL, without the password."""
        return f"http://{self}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a CONNECT request."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


class Ways:
    """How every other server is reached: through a proxy, or directly."""

    def __init__(self, proxy: Proxy | None, exceptions: str, named_by: str) -> None:
        self._proxy = proxy
        self._exceptions = exceptions
        self._named_by = named_by

    def to(self, url: str) -> Proxy | None:
        """The proxy for a URL; None: connect directly."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not self._proxy or parts.scheme != "https" or is_loopback(host):
            return None
        return None if is_exception(self._exceptions, host, parts.port or 443) else self._proxy

    def __str__(self) -> str:
        if not self._proxy:
            return "no proxy"
        known = " with a password" if self._proxy.authorization else ""
        return f"proxy {self._proxy}{known}, by {self._named_by}"


DIRECTLY = Ways(None, "", "")


def ways(settings: Settings | UpstreamSettings, environ: Mapping[str, str]) -> Ways:
    """The Ways that these settings and variables describe. Raises Fatal."""
    if settings.proxy == NONE:
        return DIRECTLY
    named_by, url = "--proxy", settings.proxy
    if not url:
        named_by, url = next(((name, environ[name]) for name in VARIABLES if environ.get(name)), ("", ""))
    if not url:
        return DIRECTLY
    exceptions = next((environ[name] for name in EXCEPTIONS if environ.get(name)), "")
    return Ways(parse(url, named_by, settings.proxy_auth_file), exceptions, named_by)


def parse(url: str, named_by: str, auth_file: str) -> Proxy:
    """The Proxy at a URL; user and password come from the URL or from a file. Raises Fatal, which shows neither."""
    parts = urlsplit(url if "://" in url else f"http://{url}")  # as curl takes it
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme != "http":
        how = "TLS" if parts.scheme == "https" else parts.scheme
        raise Fatal(
            f"{named_by}: a proxy that is spoken to by {how} is not supported: give one by http://", topic="install"
        )
    if not host or not re.fullmatch(r"[\x21-\x7e]+", url) or parts.path not in ("", "/") or parts.query:
        raise Fatal(f"{named_by} must be a URL like http://proxy.example.org:3128", topic="install")
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if "@" in parts.netloc else ""
    if named_by == "--proxy" and user:
        raise Fatal(
            "--proxy has a password in it, which ps and others would show: give --proxy-auth-file", topic="install"
        )
    if auth_file:
        user = _read(auth_file)
    encoded = base64.b64encode(user.encode()).decode()
    return Proxy(host, port, f"Basic {encoded}" if user else "")


def _read(path: str) -> str:
    try:
        with open(path) as file:
            user = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Fatal(f"--proxy-auth-file {path} cannot be read: {type(error).__name__}", topic="install") from None
    if ":" not in user or not user.isprintable():
        raise Fatal(f"--proxy-auth-file {path} must hold one line: user:password", topic="install")
    return user


def is_exception(entries: str, host: str, port: int) -> bool:
    """Whether NO_PROXY names a host. Its entries are separated by commas or spaces. A name stands for itself and every
    name below it, with or without a leading dot or *. in front; an address for itself; a network for its addresses.
    Names are never resolved. * stands for every host. A port after an entry limits it to that port.
    """
    host = host.lower().rstrip(".")
    for entry in re.split(r"[\s,]+", entries.lower().strip()):
        name, wanted = _split_port(entry)
        if name and (not wanted or wanted == port) and _matches(name, host):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int]:
    found = re.fullmatch(r"\[(.*)\](?::(\d{1,5}))?", entry) or re.fullmatch(r"([^:]*):(\d{1,5})", entry)
    return (found[1], int(found[2] or 0)) if found else (entry, 0)


def _matches(name: str, host: str) -> bool:
    if name == "*":
        return True
    try:
        network = ipaddress.ip_network(name, strict=False)
    except ValueError:
        name = name.removeprefix("*").strip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False
