"""Every option, declared once: name, default, meaning, and how its text is read. And the exit codes.

Module values finds the texts (command line, environment, file). A Settings is frozen.
"""

import enum
import grp
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from gocm_lib.config import spool_address


class Exit(enum.IntEnum):
    """Exit codes: the number, what it means, and the topic of the help that says more. The numbers from 64 up are those
    of sysexits(3).
    """

    OK = 0, "clean stop, also by SIGTERM or SIGINT", ""
    FAILED = 1, "run-time failure; the last log line says which", ""
    USAGE = 2, "unknown command, option or argument", ""
    SENDER = 3, "a sender cannot start (bad CA file, bad credentials)", "credentials"
    SPOOL_DAMAGED = (
        65,
        "the spool is damaged, not GoCM's, or of a newer version; it is left untouched",
        "limits",
    )
    ADDRESS = 69, "the address or port cannot be listened on", "options"
    CRASHING = 70, "our own processes die again and again", "promise"
    SPOOL_UNWRITABLE = 73, "the spool, the log or another file cannot be created or written", "options"
    SPOOL_FAILED = (
        74,
        "writing the spool failed (the disk is broken); the next start goes on from what is on it",
        "limits",
    )
    SPOOL_IN_USE = 75, "another GoCM runs on this spool", "options"
    CONFIG = 78, "an option's value is wrong, or a needed one is missing", "options"

    meaning: str
    topic: str

    def __new__(cls, code: int, meaning: str, topic: str) -> "Exit":
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.topic = meaning, topic
        return member


class Fatal(Exception):
    """A command or a process cannot start, or cannot go on. str() is the one line to print, `code` the exit code,
    `topic` the one of the help that says more; "": the code's.
    """

    def __init__(self, reason: str, code: Exit = Exit.CONFIG, topic: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.topic = topic or code.topic


@contextmanager
def needs_psycopg() -> Iterator[None]:
    """Raise Fatal when an import in this block fails for want of psycopg: it is there only where somebody wants it."""
    try:
        yield
    except ImportError as error:
        if error.name != "psycopg":
            raise
        raise Fatal("a spool in PostgreSQL needs psycopg: pip install 'gocm[postgres]'") from None


# How the text of an option becomes its value. Each raises ValueError with the end of a sentence.


def text(value: str) -> str:
    return value


def flag(value: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if value.lower() not in known:
        raise ValueError("must be true or false")
    return known[value.lower()]


def number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    """A reader of texts of int or float between `low` and `high`, both included."""

    def read(value: str) -> Any:
        try:
            result = kind(value)
        except ValueError:
            result = None
        if result is None or not low <= result <= high:  # NaN fails the comparison too
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return result

    return read


def seconds(low: float, high: float) -> Callable[[str], float]:
    return number(low, high, float)


def secret(value: str) -> str:
    # It becomes part of a header line: a space or line break there would be another header.
    if not re.fullmatch(r"[\x21-\x7e]*", value):
        raise ValueError("must be printable ASCII without spaces")
    return value


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine only. Names other than localhost are not resolved: DNS could say anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def upstream_url(value: str) -> str:
    """An https URL, or http to this machine: the key must not cross a network in clear."""
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018  (reading it is what checks it)
    except ValueError:
        raise ValueError("is not a URL") from None
    if not re.fullmatch(r"[\x21-\x7e]+", value) or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL like https://host/path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must have no user, query or fragment")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError("must be https (http only to this machine: the key would cross the network in clear)")
    return value


def http_url(value: str) -> str:
    """An http or https URL, with a query if there is one. It is never logged, because it may hold a secret."""
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018  (reading it is what checks it)
    except ValueError:
        raise ValueError("is not a URL") from None
    if value and (
        not re.fullmatch(r"[\x21-\x7e]+", value) or parts.scheme not in ("http", "https") or not parts.hostname
    ):
        raise ValueError("must be a URL like https://host/path")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("must have no user and no fragment")
    return value


def project(value: str) -> str:
    """A Google Cloud project's id or number: it becomes part of a URL's path."""
    if value and not re.fullmatch(r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|[0-9]{6,20}", value):
        raise ValueError("must be a project id like my-project-1, or a project number")
    return value


def path(value: str) -> str:
    """The path of a file that exists or will be made. Module values has made it absolute."""
    return value


def spool_place(value: str) -> str:
    """The path of a spool, which may be there or not, or the address of one in PostgreSQL."""
    return spool_address.check(value, with_password=False) if spool_address.is_address(value) else path(value)


def node_name(value: str) -> str:
    if value and not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError("must be up to 63 letters, digits and . _ -")
    return value


def readable_file(value: str) -> str:
    if value and not os.access(value, os.R_OK):
        raise ValueError(f"cannot read the file {value}")
    if value and not os.path.isfile(value):
        # A pipe would hold whoever reads it, again at each SIGHUP, until somebody writes.
        raise ValueError(f"{value} is no regular file")
    return value


def server_place(value: str) -> str:
    """A server's URL, or the path of its UNIX socket."""
    return value if value.startswith("/") else upstream_url(value)


def secret_file(value: str) -> str:
    """A file that this process can read and other users cannot."""
    readable_file(value)
    if value and os.stat(value).st_size > LARGEST_SECRET:
        raise ValueError(f"{value} has more than {LARGEST_SECRET} bytes: it is no secret")
    if value and stat.S_IMODE(os.stat(value).st_mode) & 0o007:
        raise ValueError(f"{value} is a secret that everybody here may read or write: chmod 600 {value}")
    return value


def secret_file_to_be(value: str) -> str:
    """A secret_file, or a path where none exists yet: the sandbox makes one there."""
    return secret_file(value) if os.path.exists(value) else value


def one_of(*words: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}")
        return value

    return read


def socket_path(value: str) -> str:
    directory = os.path.dirname(os.path.abspath(value))
    if value and not os.path.isdir(directory):
        raise ValueError(f"cannot be made: there is no directory {directory}")
    if len(os.fsencode(os.path.abspath(value))) > 99:
        # 107 are sun_path of unix(7); it is made under a longer name (module listener).
        raise ValueError("is longer than the 99 bytes that a socket's path may have here")
    return value


def group(value: str) -> str:
    try:
        grp.getgrnam(value)
    except KeyError:
        if value:
            raise ValueError(f"{value}: there is no such group") from None
    return value


def hosts(value: str) -> tuple[str, ...]:
    """Addresses or names, separated by commas. An IPv6 address may stand in brackets, as in a URL."""
    names = [name.strip() for name in value.split(",")]
    return tuple(name[1:-1] if name.startswith("[") and name.endswith("]") else name for name in names)


def file_mode(value: str) -> int:
    """The mode of the socket, in octal: who may connect. Never everybody, because whoever can connect can send."""
    if not re.fullmatch("0?[0-7]{3}", value):
        raise ValueError("must be octal like 0660")
    if int(value, 8) & 0o007:
        raise ValueError(f"{value} lets everybody on this machine in: use --socket-group")
    return int(value, 8)


def address(value: str) -> str:
    """host:port of a collector, or an empty text."""
    host, colon, port = value.rpartition(":")
    if value and not (host and colon and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError("must be HOST:PORT")
    return value


def metric_prefix(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value):
        raise ValueError("must be words of letters, digits, _ and - with dots between")
    return value


def host_names(value: str) -> tuple[str, ...]:
    """Names, separated by commas; returned in lower case."""
    names = tuple(name.strip().lower() for name in value.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]", name):
            raise ValueError(f"{name!r} is no host name: give names without ports, with commas between")
    return names


LARGEST_SECRET = 1024 * 1024  # bytes of a file that holds one
NO_HOST = ("none",)  # of --host: a UNIX socket is enough
PATHS = (path, spool_place, readable_file, secret_file, secret_file_to_be, socket_path)


def option(
    default: Any,
    read: Callable[[str], Any],
    help: str,
    *,
    also: Sequence[str] = (),
    formerly: str = "",
    metavar: str = "",
    hidden: bool = False,
    live: bool = False,
    many: bool = False,
) -> Any:
    """A row of the table: a dataclass field whose metadata is what the command line, the configuration file and the
    help need. `help` up to a semicolon is what --help has room for. `formerly`: the field's old name, which still works
    everywhere but is not shown. `hidden`: the value is a secret. `live`: SIGHUP may change it. `many`: it may be given
    several times.
    """
    return field(
        default=default,
        metadata={
            "read": read,
            "help": help,
            "also": tuple(also),
            "formerly": formerly,
            "metavar": metavar,
            "hidden": hidden,
            "live": live,
            "many": many,
        },
    )


def rows(kind: Any) -> list[Field[Any]]:
    """The options of a kind, or of an instance of it: those fields that a text may give."""
    return [row for row in fields(kind) if "read" in row.metadata]


NAME = "[a-z0-9][a-z0-9_-]{0,30}"  # of an upstream: it is a label of metrics and a word of URLs


def upstream_name(value: str) -> str:
    if value and not re.fullmatch(NAME, value):
        raise ValueError("must be the name of an upstream: up to 31 of a-z 0-9 _ -")
    return value


@dataclass(frozen=True)
class UpstreamSettings:
    """The options of a table `[upstream.NAME]` in the configuration file; and what the server's own options say of the
    upstreams `fcm` and `gcm`.
    """

    dialect: str = option(
        "fcm", one_of("fcm", "gcm"), "protocol that it speaks; fcm: FCM HTTP v1, gcm: the legacy one", metavar="fcm|gcm"
    )
    credentials: str = option("", secret_file_to_be, "file with Google credentials; as --credentials", metavar="FILE")
    token_command: str = option("", text, "command that prints an access token", metavar="COMMAND")
    metadata: bool = option(False, flag, "take access tokens from Google's metadata server")
    project: str = option("", project, "Firebase project id; if the credentials do not name it", metavar="ID")
    apikey_file: str = option("", secret_file, "file that holds the API key; of dialect gcm", metavar="FILE")
    apikey: str = option("", secret, "the API key itself; better give apikey-file", metavar="KEY", hidden=True)
    url: str = option("", upstream_url, "where to post; default --fcm-url or --gcm-url", metavar="URL")
    rate: int = option(
        -1, number(0, 10**8), "messages per minute; 0: no limit; default --fcm-rate, of dialect gcm 0", metavar="N"
    )
    ca: str = option("", readable_file, "PEM file of authorities to trust; default --upstream-ca", metavar="FILE")
    proxy: str = option("", text, "HTTP proxy to it; default --proxy", metavar="URL")
    proxy_auth_file: str = option(
        "", secret_file, "file with `user:password` for its proxy; default --proxy-auth-file", metavar="FILE"
    )


@dataclass(frozen=True)
class Settings:
    """The server's options. The field's name gives the flag `--name-with-dashes`, the variable GOCM_NAME, and the key
    in the configuration file.
    """

    config: str = option("", path, "configuration file in TOML; it has options by name: `port = 5601`", metavar="FILE")
    # By name, from the configuration file only; module upstreams has all there are.
    upstream: Mapping[str, UpstreamSettings] = field(default_factory=dict, metadata={"live": True})
    default_upstream: str = option(
        "",
        upstream_name,
        "upstream of messages that name none; default fcm, gcm, or the first of the configuration file",
        metavar="NAME",
        live=True,
    )
    apikey: str = option(
        "",
        secret,
        "API key of the GCM upstream; better give it with --apikey-file",
        also=("-apikey",),
        metavar="KEY",
        hidden=True,
        live=True,
    )
    apikey_file: str = option("", secret_file, "file that holds the API key", metavar="FILE", live=True)
    host: tuple[str, ...] = option(
        ("127.0.0.1",),
        hosts,
        "address to listen on; `::` for all IPv4 and IPv6 addresses, `none` for a --socket only; may be repeated",
        also=("-host", "--ipaddress", "-ipaddress"),
        metavar="ADDRESS",
        many=True,
    )
    port: int = option(
        5601, number(0, 65535), "TCP port to listen on; 0 picks a free one", also=("-port",), metavar="PORT"
    )
    socket: str = option("", socket_path, "path of a UNIX socket to listen on as well", metavar="PATH")
    socket_mode: int = option(
        0o660, file_mode, "file mode of --socket; in octal, as in chmod(1): it says who may connect", metavar="MODE"
    )
    socket_group: str = option("", group, "group that owns the --socket", metavar="GROUP")
    auth_token_file: str = option(
        "",
        secret_file,
        "file with auth tokens, one per line; a client must send one (`Authorization: Bearer`, or as the password)",
        metavar="FILE",
        live=True,
    )
    no_auth: bool = option(
        False, flag, "allow an open --host without auth tokens; other machines can send then, and read reports"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        host_names,
        "host names that clients may use for this server; beside addresses and localhost; needed "
        "without --auth-token-file where clients use a name: it keeps out web pages that use a name "
        "of their own",
        metavar="NAMES",
        live=True,
    )
    tls_cert: str = option("", readable_file, "PEM certificate chain: serve https with it", metavar="FILE", live=True)
    tls_key: str = option("", secret_file, "PEM private key of the --tls-cert", metavar="FILE", live=True)
    tls_client_ca: str = option(
        "",
        readable_file,
        "PEM file of authorities for clients; only those with a certificate that one of them signed are served",
        metavar="FILE",
        live=True,
    )
    door_google: str = option(
        "",
        path,
        "answer under Google's names, for its SDKs; DIR gets what they need for that; needs gocm[fcm]",
        metavar="DIR",
    )
    door_google_port: int = option(5603, number(0, 65535), "TCP port of --door-google", metavar="PORT")
    logto: str = option("", path, "file to log to, instead of stderr", also=("-logto",), metavar="FILE")
    log_level: str = option(
        "info",
        one_of("debug", "info", "warning", "error"),
        "least severity that is logged; debug, info, warning or error",
        metavar="LEVEL",
        live=True,
    )
    log_format: str = option(
        "auto",
        one_of("auto", "text", "json", "journal"),
        "form of log lines; text, json, journal (priorities, no times), or auto: journal when stderr "
        "is the journal, else text",
        metavar="FORMAT",
    )
    access_log: bool = option(False, flag, "log a line for each HTTP request", live=True)
    graphite: str = option(
        "",
        address,
        "Graphite server to send figures to; plaintext, by TCP; the figures are those of /metrics",
        metavar="HOST:PORT",
    )
    statsd: str = option(
        "", address, "StatsD server to send figures to; by UDP; the figures are those of /metrics", metavar="HOST:PORT"
    )
    metrics_prefix: str = option(
        "gocm", metric_prefix, "prefix of names of figures; in Graphite and StatsD", metavar="WORDS"
    )
    metrics_interval: float = option(
        10.0, seconds(0.1, 3600), "seconds between sendings of figures; to Graphite and StatsD", metavar="S"
    )
    feedback_url: str = option(
        "",
        http_url,
        "URL to POST unregistered tokens to; and replaced ones; they leave their lists; hidden, it may hold a secret",
        metavar="URL",
        hidden=True,
    )
    feedback_url_file: str = option("", secret_file, "file that holds the --feedback-url", metavar="FILE")
    feedback_plain: bool = option(
        False, flag, "allow http to another machine for --feedback-url; tokens cross the network in clear"
    )
    feedback_secret_file: str = option(
        "", secret_file, "file with the secret that signs what is POSTed; to --feedback-url", metavar="FILE"
    )
    spool: str = option(
        "",
        spool_place,
        "file that keeps accepted messages, or `:memory:`; default gocm.db (with --sandbox: "
        "sandbox.db) in $STATE_DIRECTORY, else in ~/.local/state/gocm. Or postgresql://USER@HOST/DATABASE, which "
        "several nodes share",
        metavar="PATH",
    )
    spool_file: str = option(
        "", secret_file, "file that holds the URL of the spool; in PostgreSQL, with its password", metavar="FILE"
    )
    spool_durable: str = option(
        "disk",
        one_of("disk", "standby"),
        "where a message is before it is answered; disk: on the spool server's, standby: on another machine's as well",
        metavar="disk|standby",
    )
    node: str = option(
        "", node_name, "name of this node; among those that share a spool; default the host's name", metavar="NAME"
    )
    senders: int = option(0, number(0, 64), "number of sender processes; 0 means one per core, at most 4", metavar="N")
    connections: int = option(
        2048,
        number(1, 10000),
        "requests that a sender has in flight; to each upstream",
        metavar="N",
    )
    http2: str = option(
        "auto",
        one_of("auto", "off"),
        "auto: speak HTTP/2 to FCM, if it agrees; off: only HTTP/1.1",
        metavar="auto|off",
    )
    gcm_url: str = option(
        "https://android.googleapis.com/gcm/send", upstream_url, "GCM URL; to post messages to", metavar="URL"
    )
    credentials: str = option(
        "",
        secret_file_to_be,
        "file with Google credentials for FCM v1; a service account's, or any that google-auth reads; needs gocm[fcm]",
        metavar="FILE",
        live=True,
    )
    token_command: str = option(
        "", text, "command that prints an access token for FCM v1", metavar="COMMAND", live=True
    )
    fcm_metadata: bool = option(
        False, flag, "take access tokens from Google's metadata server; for FCM v1, on a machine of Google's cloud"
    )
    metadata_host: str = option("metadata.google.internal", text, "Google's metadata host", metavar="HOST")
    fcm_project: str = option("", project, "Firebase project id; if the credentials do not name it", metavar="ID")
    fcm_url: str = option("https://fcm.googleapis.com", upstream_url, "base URL of FCM v1", metavar="URL")
    fcm_rate: int = option(
        600000, number(0, 10**8), "FCM messages per minute; Google's quota for the project; 0: no limit", metavar="N"
    )
    upstream_ca: str = option(
        "",
        readable_file,
        "PEM file of authorities to trust; instead of the system's, for upstreams and token servers",
        metavar="FILE",
    )
    proxy: str = option(
        "",
        text,
        "HTTP proxy to upstreams, http://HOST:PORT; also to token servers and the webhook; default "
        "$HTTPS_PROXY or $ALL_PROXY; `none` ignores those; $NO_PROXY makes exceptions",
        metavar="URL",
    )
    proxy_auth_file: str = option("", secret_file, "file with `user:password` for the --proxy", metavar="FILE")
    upstream_timeout: float = option(
        20.0, seconds(0.1, 600), "seconds that an upstream may take to answer", metavar="S"
    )
    retry_base: float = option(
        10.0,
        seconds(0.01, 3600),
        "longest first back-off in seconds; a random share of it is taken; doubled with each further retry",
        metavar="S",
    )
    retry_cap: float = option(
        600.0,
        seconds(0.01, 86400),
        "longest back-off in seconds; before its random share is taken",
        metavar="S",
    )
    max_attempts: int = option(
        5,
        number(1, 100),
        "attempts until a token has failed; trouble that everybody has does not count",
        metavar="N",
    )
    max_age: float = option(86400.0, seconds(1, 2419200), "seconds until an unsent message has failed", metavar="S")
    max_pending: int = option(
        1000000, number(1, 10**9), "how many tokens may wait to be sent; more are refused with 503", metavar="N"
    )
    max_spool: int = option(
        4 * 1024**3,
        number(1 << 20, 1 << 50),
        "bytes that the spool may hold; beyond that messages are refused with 507",
        metavar="BYTES",
    )
    min_free_disk: int = option(
        64 * 1024**2,
        number(0, 1 << 50),
        "bytes to leave free on the spool's disk; with less, messages are refused with 507",
        metavar="BYTES",
    )
    failed_age: float = option(
        604800.0, seconds(1, 10**9), "seconds to keep failed tokens for replay", formerly="dead_age", metavar="S"
    )
    max_failed: int = option(
        100000,
        number(0, 10**9),
        "how many failed tokens to keep for replay; the oldest are dropped first",
        formerly="max_dead",
        metavar="N",
    )
    keep_jobs: float = option(
        86400.0,
        seconds(0, 10**9),
        "seconds to remember a finished message; what became of it, for GET /gcm/jobs/ID",
        metavar="S",
    )
    max_kept: int = option(
        1000000,
        number(0, 10**9),
        "tokens of finished messages to remember; those that ended first are forgotten first",
        metavar="N",
    )
    max_keys: int = option(
        2_000_000,
        number(1000, 10**9),
        "how many Idempotency-Keys to remember; for a day; the oldest are forgotten first",
        metavar="N",
    )
    max_report: int = option(
        1000000,
        number(1, 10**9),
        "entries that each list may have; of tokens: canonical, notregistered and invalid; more are dropped",
        metavar="N",
    )
    hold_waves: bool = option(
        False, flag, "hold unregistered tokens of a wave back; until gocm feedback release or discard"
    )
    max_tokens: int = option(100000, number(1, 10**6), "tokens that a call may have", metavar="N", live=True)
    max_body: int = option(
        4 * 1024 * 1024,
        number(1024, 1 << 30),
        "bytes that a request's body may have",
        metavar="BYTES",
        live=True,
    )
    max_connections: int = option(10_000, number(1, 100000), "client connections to serve at once", metavar="N")
    head_timeout: float = option(
        5.0,
        seconds(0.1, 300),
        "seconds for the head of a request; its body gets as much, and a second per 16 KiB",
        metavar="S",
        live=True,
    )
    legacy_wait: float = option(
        3.0,
        seconds(0, 30),
        "seconds to wait for results at /fcm/send; what has none by then counts as sent",
        metavar="S",
        live=True,
    )
    idle_timeout: float = option(
        # More than the 60 s of most load balancers: they are to close first, or a request meets our close.
        75.0,
        seconds(0.1, 3600),
        "seconds to keep an idle connection; answers say so (`Keep-Alive`)",
        metavar="S",
        live=True,
    )
    drain: float = option(25.0, seconds(0, 600), "seconds for requests in flight at a stop", metavar="S")
    sandbox: bool = option(False, flag, "run a pretend FCM and GCM, and send to it; no key, no Google")
    sandbox_port: int = option(
        5602, number(0, 65535), "TCP port of the pretend FCM and GCM; 0 picks a free one", metavar="PORT"
    )


@dataclass(frozen=True)
class PretendSettings:
    """The options that `gocm sandbox` and `gocm sandbox exec` share."""

    latency: float = option(0.0, seconds(0, 60), "seconds to wait before each answer", metavar="S")
    pass_: bool = option(
        False, flag, "lead programs to other hosts than Google's too, by the proxy that is set, if any; else 403"
    )


@dataclass(frozen=True)
class ExecSettings(PretendSettings):
    """The options of `gocm sandbox exec`."""

    received: str = option("", text, "file to keep all messages in, a line of JSON for each", metavar="FILE")


@dataclass(frozen=True)
class SandboxSettings(PretendSettings):
    """The options of `gocm sandbox`, the pretend upstream on its own."""

    host: str = option("127.0.0.1", text, "address to listen on", metavar="ADDRESS")
    port: int = option(5602, number(0, 65535), "TCP port to listen on; 0 picks a free one", metavar="PORT")
    no_auth: bool = option(
        False, flag, "allow a --host that other machines can reach: they can change what the sandbox does"
    )
    write_credentials: str = option(
        "", text, "file for FCM's --credentials to make for this sandbox, or to use if it exists", metavar="FILE"
    )
    any_token: bool = option(
        False, flag, "take any access token; for what cannot be told where the sandbox's token endpoint is"
    )
    tls_cert: str = option("", readable_file, "PEM certificate chain: play Google by https", metavar="FILE")
    tls_key: str = option("", readable_file, "PEM private key of that certificate", metavar="FILE")
    google: str = option(
        "", text, "play Google by its names, by proxy and by TLS; writes what programs need into DIR", metavar="DIR"
    )
    tls_port: int = option(
        0,
        number(0, 65535),
        "TCP port on which --google serves TLS under those names; 0 picks a free one",
        metavar="PORT",
    )


@dataclass(frozen=True)
class BenchSettings:
    """The options of `gocm bench`."""

    scenarios: str = option("", text, "scenarios to run, separated by commas; default all", metavar="NAMES")
    messages: int = option(
        0, number(0, 10**7), "tokens to send in each scenario; 0: as many as give a good figure", metavar="N"
    )
    senders: int = option(2, number(1, 64), "sender processes of the server", metavar="N")
    latency: float = option(0.2, seconds(0, 60), "seconds that the pretend upstream takes to answer", metavar="S")
    plain: bool = option(False, flag, "use http, not https, between server and upstream")
    directory: str = option("", text, "directory for the spool, on the disk that is to be measured", metavar="DIR")
    spool: str = option(
        "", spool_place, "a spool in PostgreSQL to measure with; one for nothing else", metavar="postgresql://..."
    )
    json: bool = option(False, flag, "print JSON instead of a table")


@dataclass(frozen=True)
class SpoolSettings:
    """The options of `gocm spool`."""

    spool: str = option(
        "", spool_place, "URL of a spool in PostgreSQL; without a password", metavar="postgresql://USER@HOST/DATABASE"
    )
    spool_file: str = option("", secret_file, "file that holds the URL; with a password", metavar="FILE")
    spool_durable: str = option(
        "disk",
        one_of("disk", "standby"),
        "where a message is before it is answered; disk: on the spool server's, standby: on another machine's as well",
        metavar="disk|standby",
    )
    grant: str = option("", text, "role that is to use the spool, but not own it; for init", metavar="ROLE")


@dataclass(frozen=True)
class MoveSettings:
    """The options of `gocm spool move`: none, but --help."""


@dataclass(frozen=True)
class BundleSettings:
    """The options of `gocm bundle`."""

    output: str = option("gocm.pyz", text, "file to write", also=("-o",), metavar="FILE")


@dataclass(frozen=True)
class ClientSettings:
    """The options shared by all commands that call a running server."""

    to: str = option(
        "http://127.0.0.1:5601", server_place, "the server's URL, or the path of its UNIX socket", metavar="URL"
    )
    auth_token_file: str = option("", secret_file, "file whose first auth token is sent to the server", metavar="FILE")
    ca: str = option("", readable_file, "PEM file of authorities to trust instead of the system's", metavar="FILE")


@dataclass(frozen=True)
class PingSettings(Settings):
    """The options of `gocm ping`: those of the server that it asks, or where that is."""

    to: str = option("", server_place, "the server's URL, or the path of its UNIX socket", metavar="URL")
    ca: str = option("", readable_file, "PEM file of authorities to trust instead of the system's", metavar="FILE")


@dataclass(frozen=True)
class HelpSettings:
    """The options of `gocm help`."""

    man: bool = option(False, flag, "print all topics as one manual page, for man -l")


@dataclass(frozen=True)
class CompletionSettings:
    """`gocm completion` has no options."""


@dataclass(frozen=True)
class FailedSettings(ClientSettings):
    """The options of `gocm failed`."""

    job: str = option("", text, "only tokens of the message with this id (X-GoCM-Job)", metavar="ID")
    reason: str = option(
        "", text, "only tokens that failed for this reason: attempts, expired or killed_senders", metavar="WORD"
    )
    upstream: str = option("", text, "only tokens of this upstream", metavar="NAME")
    by: str = option("", text, "only tokens that were sent with the auth token of this name", metavar="NAME")
    older: int = option(0, number(0, 10**9), "only tokens that failed at least this many seconds ago", metavar="S")
    all: bool = option(False, flag, "replay or discard all failed tokens")
    json: bool = option(False, flag, "list lines of JSON instead of a table")


@dataclass(frozen=True)
class CancelSettings(ClientSettings):
    """The options of `gocm cancel`."""

    tag: str = option("", text, "all messages with this tag, instead of those with these ids", metavar="TAG")


@dataclass(frozen=True)
class TokenSettings:
    """The options of `gocm token`."""

    may: str = option("", text, "what it may do: rights separated by commas; default all", metavar="RIGHTS")
    upstream: str = option("", text, "upstreams that it is for, separated by commas; default all", metavar="NAMES")
    rate: str = option("", text, "how many tokens it may send to; 100/s or 30/m", metavar="N/s")
    until: str = option("", text, "the last day on which it is good; YYYY-MM-DD, in UTC", metavar="DAY")
    file: str = option("", text, "file of tokens to add its hash to", metavar="FILE")
    write_credentials: str = option(
        "", text, "account file to make, for Google's SDKs that send to this server; needs gocm[fcm]", metavar="FILE"
    )
    project: str = option("", project, "project in that file: that of the upstream", metavar="ID")
    to: str = option("http://127.0.0.1:5601", upstream_url, "URL of this server in that file", metavar="URL")


@dataclass(frozen=True)
class SendSettings(ClientSettings):
    """The options of `gocm send`."""

    file: str = option("", text, "file with more tokens, one per line, or CSV; - is stdin", metavar="FILE")
    column: str = option(
        "", text, "column of --file that has the tokens, if it is CSV; default `token` in *.csv", metavar="NAME"
    )
    data: tuple[str, ...] = option(
        (), text, "a field of the payload and its text; may be repeated", metavar="NAME=VALUE", many=True
    )
    payload: str = option("", text, "file with the payload, a JSON object; --data overrides its fields", metavar="FILE")
    field: tuple[str, ...] = option(
        (), text, "another field of the message, like priority=high; may be repeated", metavar="NAME=VALUE", many=True
    )
    batch: int = option(1000, number(1, 100000), "how many tokens to put into one message", metavar="N")
    run: str = option("", text, "name of an interrupted run to go on with; default a new name", metavar="NAME")
    json: bool = option(False, flag, "print a line of JSON for each message")


@dataclass(frozen=True)
class WatchSettings(ClientSettings):
    """The options of `gocm watch`."""

    interval: float = option(2.0, seconds(0.2, 3600), "seconds between two looks at the server", metavar="S")
    once: bool = option(False, flag, "print one line and exit")


# The server's options as --help and the help show them: what they are about, and their fields.
GROUPS = {
    "configuration and log": ("config", "logto", "log_level", "log_format", "access_log"),
    "listen, and who may send": (
        *("host", "port", "socket", "socket_mode", "socket_group", "tls_cert", "tls_key"),
        *("auth_token_file", "no_auth", "allowed_hosts", "tls_client_ca"),
        *("door_google", "door_google_port"),
    ),
    "upstreams": (
        *("credentials", "token_command", "fcm_metadata", "metadata_host", "fcm_project", "fcm_url"),
        *("apikey_file", "apikey", "gcm_url", "upstream_ca", "proxy", "proxy_auth_file", "default_upstream"),
        *("sandbox", "sandbox_port"),
    ),
    "sending": (
        *("senders", "connections", "http2", "fcm_rate", "upstream_timeout", "retry_base", "retry_cap", "max_attempts"),
        *("max_age", "drain"),
    ),
    "limits, and how much is kept": (
        *("max_pending", "max_spool", "min_free_disk", "max_tokens", "max_body", "max_connections"),
        *("head_timeout", "idle_timeout", "legacy_wait"),
        *("spool", "spool_file", "spool_durable", "node"),
        *("failed_age", "max_failed", "keep_jobs", "max_kept", "max_keys", "max_report"),
    ),
    "figures and reports": (
        *("graphite", "statsd", "metrics_prefix", "metrics_interval"),
        *("feedback_url", "feedback_url_file", "feedback_secret_file", "feedback_plain", "hold_waves"),
    ),
}


def as_flag(name: str) -> str:
    """A field's name as it is written on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")  # Python has no field `pass`


def as_variable(name: str) -> str:
    """A field's name as an environment variable."""
    return "GOCM_" + name.rstrip("_").upper()


def option_flag(row: Field[Any]) -> str:
    return as_flag(row.name)


def spellings(row: Field[Any]) -> list[str]:
    """The names by which an option may be given: its own, then its old one if it has one."""
    return [row.name, *filter(None, [row.metadata["formerly"]])]


def show(row: Field[Any], value: Any) -> str:
    """An option's value as its reader would accept it: for help and print-config."""
    if row.metadata["read"] is file_mode:
        return f"{value:04o}"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
