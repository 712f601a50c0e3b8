"""Every option once: its name, default, meaning and how its text is read. And the exit codes.

Where the texts come from (command line, environment, file) is module values' matter. A Settings is frozen.
"""

import enum
import grp
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from typing import Any
from urllib.parse import urlsplit


class Exit(enum.IntEnum):
    """Exit codes; the numbers from 64 up are those of sysexits(3). README's table is checked against this one."""

    OK = 0, "clean stop, also by SIGTERM or SIGINT"
    FAILED = 1, "run-time failure; the last log line says which"
    USAGE = 2, "unknown option or argument"
    SENDER = 3, "a sender cannot start (bad CA file, bad credentials)"
    SPOOL_DAMAGED = (
        65,
        "the spool is damaged, not GoCM's, or of another version (let that one empty it first); it is left untouched",
    )
    ADDRESS = 69, "the address or port cannot be listened on"
    CRASHING = 70, "our own processes die again and again"
    SPOOL_UNWRITABLE = 73, "the spool or log file cannot be created or written"
    SPOOL_FAILED = 74, "writing the spool failed (the disk is broken); the next start goes on from what is on it"
    SPOOL_IN_USE = 75, "another GoCM runs on this spool"
    CONFIG = 78, "an option's value is wrong, or a needed one is missing"

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "Exit":
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


class Fatal(Exception):
    """A command or a process cannot start, or cannot go on: str() is the one line to print, `code` the exit code."""

    def __init__(self, reason: str, code: Exit = Exit.CONFIG) -> None:
        super().__init__(reason)
        self.code = code


# How the text of an option becomes its value. Each raises ValueError with the end of a sentence.


def text(value: str) -> str:
    return value


def flag(value: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if value.lower() not in known:
        raise ValueError("must be true or false")
    return known[value.lower()]


def number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    """A reader of int or float texts between `low` and `high`, both allowed."""

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
    """Whether `host` names this machine only. Names other than localhost are not looked up: DNS could say anything."""
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
    """An http or https URL, with a query if it likes. Not logged: it may hold a secret."""
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
    """Where a file is or will be. One that is given from where we are is found from elsewhere, too (module values)."""
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
    """A file that we can read and others on this machine cannot."""
    readable_file(value)
    if value and os.stat(value).st_size > LARGEST_SECRET:
        raise ValueError(f"{value} has more than {LARGEST_SECRET} bytes: it is no secret")
    if value and stat.S_IMODE(os.stat(value).st_mode) & 0o007:
        raise ValueError(f"{value} is a secret that everybody here may read or write: chmod o= {value}")
    return value


def secret_file_to_be(value: str) -> str:
    """The same, if it is there: the sandbox makes one that is not."""
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
    """Addresses or names with commas between; an IPv6 address may have the brackets that it has in a URL."""
    names = [name.strip() for name in value.split(",")]
    return tuple(name[1:-1] if name.startswith("[") and name.endswith("]") else name for name in names)


def file_mode(value: str) -> int:
    """Who may connect, in octal. Never everybody: whoever can open the socket can send."""
    if not re.fullmatch("0?[0-7]{3}", value):
        raise ValueError("must be octal like 0660")
    if int(value, 8) & 0o007:
        raise ValueError(f"{value} lets everybody on this machine in: use --socket-group")
    return int(value, 8)


def address(value: str) -> str:
    """host:port of something to send to, or nothing."""
    host, colon, port = value.rpartition(":")
    if value and not (host and colon and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError("must be HOST:PORT")
    return value


def metric_prefix(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value):
        raise ValueError("must be words of letters, digits, _ and - with dots between")
    return value


def host_names(value: str) -> tuple[str, ...]:
    """Names with commas between, in lower case."""
    names = tuple(name.strip().lower() for name in value.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]", name):
            raise ValueError(f"{name!r} is no host name: give names without ports, with commas between")
    return names


LARGEST_SECRET = 1024 * 1024  # bytes of a file that holds one
NO_HOST = ("none",)  # of --host: a UNIX socket is enough
PATHS = (path, readable_file, secret_file, secret_file_to_be, socket_path)


def option(
    default: Any,
    read: Callable[[str], Any],
    help: str,
    *,
    also: Sequence[str] = (),
    metavar: str = "",
    hidden: bool = False,
    live: bool = False,
    many: bool = False,
) -> Any:
    """A row of the table: a dataclass field whose metadata is what the command line, the configuration file and README
    need. `hidden`: its value is a secret. `live`: SIGHUP may change it. `many`: it may be given several times.
    """
    return field(
        default=default,
        metadata={
            "read": read,
            "help": help,
            "also": tuple(also),
            "metavar": metavar,
            "hidden": hidden,
            "live": live,
            "many": many,
        },
    )


@dataclass(frozen=True)
class Settings:
    """The server's options. The field is the name; `--name-with-dashes`, GOCM_NAME and the key in the configuration
    file follow from it.
    """

    config: str = option("", path, "file with options, in TOML: `port = 5601`", metavar="FILE")
    apikey: str = option(
        "",
        secret,
        "API key of the GCM-compatible upstream; rather give it by --apikey-file",
        also=("-apikey",),
        metavar="KEY",
        hidden=True,
        live=True,
    )
    apikey_file: str = option("", secret_file, "file that holds the API key", metavar="FILE", live=True)
    host: tuple[str, ...] = option(
        ("127.0.0.1",),
        hosts,
        "address to listen on, :: for all of both families, or `none` for a --socket only; may be repeated",
        also=("-host", "--ipaddress", "-ipaddress"),
        metavar="ADDRESS",
        many=True,
    )
    port: int = option(
        5601, number(0, 65535), "TCP port to listen on; 0 takes a free one", also=("-port",), metavar="PORT"
    )
    socket: str = option("", socket_path, "UNIX socket to listen on, too", metavar="PATH")
    socket_mode: int = option(0o660, file_mode, "who may connect to it, as chmod(1) has it", metavar="MODE")
    socket_group: str = option("", group, "the group that it belongs to", metavar="GROUP")
    auth_token_file: str = option(
        "",
        secret_file,
        "file with the tokens, one a line, of which a client must give one (`Authorization: Bearer`, or as a password)",
        metavar="FILE",
        live=True,
    )
    no_auth: bool = option(False, flag, "allow a --host that other machines can reach: they can send and read reports")
    allowed_hosts: tuple[str, ...] = option(
        (),
        host_names,
        "names by which clients may call this server, beside addresses and localhost; needed without --auth-token-file "
        "where clients use a name, so that no web page can be led here by its own",
        metavar="NAMES",
        live=True,
    )
    tls_cert: str = option("", readable_file, "PEM certificate chain: serve https", metavar="FILE", live=True)
    tls_key: str = option("", secret_file, "PEM private key of --tls-cert", metavar="FILE", live=True)
    tls_client_ca: str = option(
        "",
        readable_file,
        "PEM file of authorities: only clients with a certificate of theirs are spoken to",
        metavar="FILE",
        live=True,
    )
    logto: str = option("", path, "file to log to instead of stderr", also=("-logto",), metavar="FILE")
    log_level: str = option(
        "info",
        one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        metavar="LEVEL",
        live=True,
    )
    log_format: str = option(
        "auto",
        one_of("auto", "text", "json", "journal"),
        "text, json, journal (no times, with priorities), or auto: journal where stderr is the journal, else text",
        metavar="FORMAT",
    )
    access_log: bool = option(False, flag, "log a line for each request", live=True)
    graphite: str = option(
        "", address, "send the figures of /metrics to Graphite there (plaintext, TCP)", metavar="HOST:PORT"
    )
    statsd: str = option("", address, "send them to StatsD there (UDP)", metavar="HOST:PORT")
    metrics_prefix: str = option(
        "gocm", metric_prefix, "what their names begin with in Graphite and StatsD", metavar="WORDS"
    )
    metrics_interval: float = option(10.0, seconds(0.1, 3600), "seconds between two such sendings", metavar="S")
    feedback_url: str = option(
        "",
        http_url,
        "where dead and replaced tokens are POSTed as they come, and leave their lists; hidden: it may hold a secret",
        metavar="URL",
        hidden=True,
    )
    feedback_url_file: str = option("", secret_file, "file that holds that URL", metavar="FILE")
    feedback_plain: bool = option(False, flag, "allow a --feedback-url of another machine that is not https")
    feedback_secret_file: str = option(
        "", secret_file, "file with the secret that signs those requests", metavar="FILE"
    )
    spool: str = option(
        "",
        path,
        "file that keeps accepted messages, or `:memory:`; default gocm.db (with --sandbox sandbox.db) in "
        "$STATE_DIRECTORY, else in ~/.local/state/gocm",
        metavar="PATH",
    )
    senders: int = option(0, number(0, 64), "sender processes; 0 means one per core, at most 4", metavar="N")
    connections: int = option(
        1024, number(1, 10000), "upstream connections, so requests in flight, per sender", metavar="N"
    )
    gcm_url: str = option(
        "https://android.googleapis.com/gcm/send", upstream_url, "where GCM messages are posted", metavar="URL"
    )
    credentials: str = option(
        "",
        secret_file_to_be,
        "Google credentials for FCM v1: a service account's file, or any that google-auth reads; needs gocm[fcm]",
        metavar="FILE",
        live=True,
    )
    token_command: str = option(
        "", text, "command that prints an access token for FCM v1", metavar="COMMAND", live=True
    )
    fcm_metadata: bool = option(False, flag, "take FCM access tokens from Google's metadata server")
    metadata_host: str = option("metadata.google.internal", text, "that server", metavar="HOST")
    fcm_project: str = option("", project, "Firebase project id, where the credentials do not name it", metavar="ID")
    fcm_url: str = option("https://fcm.googleapis.com", upstream_url, "where FCM v1 messages are posted", metavar="URL")
    fcm_rate: int = option(
        600000, number(0, 10**8), "FCM messages a minute, Google's quota for the project; 0: no limit", metavar="N"
    )
    upstream_ca: str = option(
        "", readable_file, "PEM file of the authorities to trust instead of the system's", metavar="FILE"
    )
    proxy: str = option(
        "",
        text,
        "HTTP proxy by which upstreams, token servers and the webhook are reached, http://HOST:PORT; default "
        "$HTTPS_PROXY or $ALL_PROXY; `none`: not those, either; $NO_PROXY makes exceptions",
        metavar="URL",
    )
    proxy_auth_file: str = option("", secret_file, "file with `user:password` for it", metavar="FILE")
    upstream_timeout: float = option(20.0, seconds(0.1, 600), "seconds an upstream may take to answer", metavar="S")
    retry_base: float = option(
        10.0,
        seconds(0.01, 3600),
        "seconds: the first retry comes after a random part of this, the next after a part of its double, and so on",
        metavar="S",
    )
    retry_cap: float = option(600.0, seconds(0.01, 86400), "seconds: where that doubling ends", metavar="S")
    max_attempts: int = option(
        5, number(1, 100), "attempts that are its own trouble before a token is set aside as failed", metavar="N"
    )
    max_age: float = option(
        86400.0, seconds(1, 2419200), "seconds until an unsent message is set aside as failed", metavar="S"
    )
    max_pending: int = option(
        1000000, number(1, 10**9), "tokens that may wait to be sent; more are refused with 503", metavar="N"
    )
    max_spool: int = option(
        4 * 1024**3, number(1 << 20, 1 << 50), "bytes the spool may hold; at that, 507", metavar="BYTES"
    )
    min_free_disk: int = option(
        64 * 1024**2, number(0, 1 << 50), "bytes to leave free on the spool's disk; with less, 507", metavar="BYTES"
    )
    dead_age: float = option(
        604800.0, seconds(1, 10**9), "seconds for which tokens that were set aside as failed are kept", metavar="S"
    )
    max_dead: int = option(100000, number(0, 10**9), "of those, how many; the oldest go first", metavar="N")
    keep_jobs: float = option(
        86400.0,
        seconds(0, 10**9),
        "seconds for which can be looked up what became of a message after its end",
        metavar="S",
    )
    max_kept: int = option(
        1000000,
        number(0, 10**9),
        "of the tokens of such messages, how many; those that ended first go first",
        metavar="N",
    )
    max_keys: int = option(
        2_000_000,
        number(1000, 10**9),
        "Idempotency-Keys that are remembered, for a day; the oldest go first",
        metavar="N",
    )
    max_report: int = option(
        1000000, number(1, 10**9), "entries that each of the two token lists may have; more are dropped", metavar="N"
    )
    max_tokens: int = option(100000, number(1, 10**6), "tokens in a call", metavar="N", live=True)
    max_body: int = option(
        4 * 1024 * 1024, number(1024, 1 << 30), "bytes a request's body may have", metavar="BYTES", live=True
    )
    max_connections: int = option(512, number(1, 100000), "client connections served at once", metavar="N")
    head_timeout: float = option(
        5.0,
        seconds(0.1, 300),
        "seconds a client may take to send a request's head; its body gets this and a second for each 16 KiB",
        metavar="S",
        live=True,
    )
    idle_timeout: float = option(
        # More than the 60 s of most load balancers: they are to close first, or a request meets our close.
        75.0,
        seconds(0.1, 3600),
        "seconds an idle client connection is kept; answers say so (`Keep-Alive`)",
        metavar="S",
        live=True,
    )
    drain: float = option(25.0, seconds(0, 600), "seconds that requests in flight may take when stopping", metavar="S")
    sandbox: bool = option(False, flag, "run a pretend FCM and GCM beside the server and send there: no key, no Google")
    sandbox_port: int = option(
        5602, number(0, 65535), "TCP port of the pretend FCM and GCM; 0 takes a free one", metavar="PORT"
    )


@dataclass(frozen=True)
class SandboxSettings:
    """The options of `gocm sandbox`, the pretend upstream on its own."""

    host: str = option("127.0.0.1", text, "address to listen on", metavar="ADDRESS")
    port: int = option(5602, number(0, 65535), "TCP port to listen on; 0 takes a free one", metavar="PORT")
    no_auth: bool = option(False, flag, "allow a --host that other machines can reach: they can change what it does")
    latency: float = option(0.0, seconds(0, 60), "seconds before each answer", metavar="S")
    write_credentials: str = option(
        "", text, "make this service account's file for FCM's --credentials, or use it if it is there", metavar="FILE"
    )
    tls_cert: str = option("", readable_file, "PEM certificate chain: serve https", metavar="FILE")
    tls_key: str = option("", readable_file, "PEM private key of --tls-cert", metavar="FILE")


@dataclass(frozen=True)
class BenchSettings:
    """The options of `gocm bench`."""

    scenarios: str = option("", text, "which to run, with commas between; default all", metavar="NAMES")
    messages: int = option(
        0, number(0, 10**7), "tokens to send in each scenario; 0: as many as make a good figure", metavar="N"
    )
    senders: int = option(2, number(1, 64), "sender processes of the server", metavar="N")
    latency: float = option(0.2, seconds(0, 60), "seconds that the pretend upstream takes to answer", metavar="S")
    plain: bool = option(False, flag, "the upstream speaks http, not https")
    directory: str = option("", text, "where to put the spool: on the disk that is to be measured", metavar="DIR")
    json: bool = option(False, flag, "print JSON instead of a table")


@dataclass(frozen=True)
class BundleSettings:
    """The options of `gocm bundle`."""

    output: str = option("gocm.pyz", text, "the file to write", also=("-o",), metavar="FILE")


@dataclass(frozen=True)
class ClientSettings:
    """The options that all commands have which speak to a running server."""

    to: str = option(
        "http://127.0.0.1:5601", server_place, "the server: its URL, or the path of its socket", metavar="URL"
    )
    auth_token_file: str = option("", secret_file, "file whose first token is given to it", metavar="FILE")
    ca: str = option("", readable_file, "PEM file of the authorities to trust instead of the system's", metavar="FILE")


@dataclass(frozen=True)
class FailedSettings(ClientSettings):
    """The options of `gocm failed`."""

    job: str = option("", text, "only those of the message with this id (X-GoCM-Job)", metavar="ID")
    reason: str = option(
        "", text, "only those that failed for this: attempts, expired or killed_senders", metavar="WORD"
    )
    upstream: str = option("", text, "only those of this upstream", metavar="NAME")
    older: int = option(0, number(0, 10**9), "only those that failed so many seconds ago", metavar="S")
    all: bool = option(False, flag, "replay or discard all")
    json: bool = option(False, flag, "list as lines of JSON instead of a table")


@dataclass(frozen=True)
class SendSettings(ClientSettings):
    """The options of `gocm send`."""

    file: str = option("", text, "file with more tokens, one a line, or CSV; - is stdin", metavar="FILE")
    column: str = option("", text, "the file is CSV, and this its column of tokens; in *.csv `token`", metavar="NAME")
    data: tuple[str, ...] = option((), text, "a text of the payload; may be repeated", metavar="NAME=VALUE", many=True)
    payload: str = option("", text, "file with the payload, a JSON object; --data is laid over it", metavar="FILE")
    field: tuple[str, ...] = option(
        (), text, "what else is sent, like priority=high; may be repeated", metavar="NAME=VALUE", many=True
    )
    batch: int = option(1000, number(1, 100000), "tokens in a message", metavar="N")
    run: str = option("", text, "name of the run that is to go on; default a new one", metavar="NAME")
    json: bool = option(False, flag, "print a line of JSON for each message")


@dataclass(frozen=True)
class WatchSettings(ClientSettings):
    """The options of `gocm watch`."""

    interval: float = option(2.0, seconds(0.2, 3600), "seconds between two looks", metavar="S")
    once: bool = option(False, flag, "print one line and end")


def option_flag(row: Field[Any]) -> str:
    return "--" + row.name.replace("_", "-")


def option_variable(row: Field[Any]) -> str:
    return "GOCM_" + row.name.upper()


def show(row: Field[Any], value: Any) -> str:
    """An option's value as its reader would take it: for help, README and print-config."""
    if row.metadata["read"] is file_mode:
        return f"{value:04o}"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
