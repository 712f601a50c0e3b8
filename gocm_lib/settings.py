"""Every option once: its name, default, meaning and how its text is read.

Owns the command line, the GOCM_ environment variables and the exit codes. Promises a frozen Settings, or one
SettingsError whose text names the option, where the value came from and what to do.
"""

import argparse
import enum
import ipaddress
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import urllib3

from gocm_lib import __version__


class Exit(enum.IntEnum):
    """Exit codes; the numbers from 64 up are those of sysexits(3). README's table is checked against this one."""

    OK = 0, "clean stop, also by SIGTERM or SIGINT"
    FAILED = 1, "run-time failure; the last log line says which"
    USAGE = 2, "unknown option or argument"
    SENDER = 3, "a sender cannot start (bad CA file, bad credentials)"
    SPOOL_DAMAGED = 65, "the spool is damaged, or not a GoCM spool, or from a newer GoCM; it is left untouched"
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


class SettingsError(Exception):
    """The operator's mistake: str() is the one line to print, `code` the exit code."""

    def __init__(self, message: str, code: Exit = Exit.CONFIG) -> None:
        super().__init__(message)
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
    if parts.username or parts.query or parts.fragment:
        raise ValueError("must have no user, query or fragment")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError("must be https (http only to this machine: the key would cross the network in clear)")
    return value


def project(value: str) -> str:
    """A Google Cloud project's id or number: it becomes part of a URL's path."""
    if value and not re.fullmatch(r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|[0-9]{6,20}", value):
        raise ValueError("must be a project id like my-project-1, or a project number")
    return value


def readable_file(value: str) -> str:
    if value and not os.access(value, os.R_OK):
        raise ValueError(f"cannot read the file {value}")
    return value


def log_level(value: str) -> str:
    if value not in ("debug", "info", "warning", "error"):
        raise ValueError("must be debug, info, warning or error")
    return value


def option(default: Any, read: Callable[[str], Any], help: str, *, also: Sequence[str] = (), metavar: str = "") -> Any:
    """A row of the table: a dataclass field whose metadata is what the command line and README need."""
    return field(default=default, metadata={"read": read, "help": help, "also": tuple(also), "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """The server's options. The field is the name; `--name-with-dashes` and GOCM_NAME follow from it."""

    apikey: str = option(
        "", secret, "API key of the GCM-compatible upstream; needed unless --sandbox", also=("-apikey",), metavar="KEY"
    )
    host: str = option(
        "127.0.0.1", text, "address to listen on", also=("-host", "--ipaddress", "-ipaddress"), metavar="ADDRESS"
    )
    port: int = option(
        5601, number(0, 65535), "TCP port to listen on; 0 takes a free one", also=("-port",), metavar="PORT"
    )
    logto: str = option("", text, "file to log to instead of stderr", also=("-logto",), metavar="FILE")
    log_level: str = option("info", log_level, "debug, info, warning or error", metavar="LEVEL")
    no_auth: bool = option(False, flag, "allow a --host that other machines can reach: they can send and read reports")
    spool: str = option(
        "",
        text,
        "file that keeps accepted messages, or `:memory:`; default gocm.db (with --sandbox sandbox.db) in "
        "$STATE_DIRECTORY, else in ~/.local/state/gocm",
        metavar="PATH",
    )
    senders: int = option(0, number(0, 64), "sender processes; 0 means one per core, at most 4", metavar="N")
    connections: int = option(
        1024, number(1, 10000), "upstream connections, so requests in flight, per sender", metavar="N"
    )
    apikey_file: str = option("", readable_file, "file that holds the API key: not shown by ps", metavar="FILE")
    gcm_url: str = option(
        "https://android.googleapis.com/gcm/send", upstream_url, "where GCM messages are posted", metavar="URL"
    )
    credentials: str = option(
        "",
        text,
        "Google credentials for FCM v1: a service account's file, or any that google-auth reads; needs gocm[fcm]",
        metavar="FILE",
    )
    token_command: str = option("", text, "command that prints an access token for FCM v1", metavar="COMMAND")
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
    upstream_timeout: float = option(20.0, seconds(0.1, 600), "seconds an upstream may take to answer", metavar="S")
    retry_base: float = option(
        10.0,
        seconds(0.01, 3600),
        "seconds: the first retry comes after a random part of this, the next after a part of its double, and so on",
        metavar="S",
    )
    retry_cap: float = option(600.0, seconds(0.01, 86400), "seconds: where that doubling ends", metavar="S")
    max_attempts: int = option(5, number(1, 100), "attempts for a token before it is set aside as failed", metavar="N")
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
    max_report: int = option(
        1000000, number(1, 10**9), "entries that each of the two token lists may have; more are dropped", metavar="N"
    )
    max_tokens: int = option(100000, number(1, 10**6), "tokens in a call", metavar="N")
    max_body: int = option(4 * 1024 * 1024, number(1024, 1 << 30), "bytes a request's body may have", metavar="BYTES")
    max_connections: int = option(512, number(1, 100000), "client connections served at once", metavar="N")
    head_timeout: float = option(
        5.0,
        seconds(0.1, 300),
        "seconds a client may take to send a request's head; its body gets this and a second for each 16 KiB",
        metavar="S",
    )
    idle_timeout: float = option(60.0, seconds(0.1, 3600), "seconds an idle client connection is kept", metavar="S")
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


AnySettings = TypeVar("AnySettings", Settings, SandboxSettings, BenchSettings)


def option_flag(row: Field) -> str:
    return "--" + row.name.replace("_", "-")


def option_variable(row: Field) -> str:
    return "GOCM_" + row.name.upper()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)", Exit.USAGE)


def show(default: Any) -> str:
    """A default as help and README write it."""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _parser(kind: type, program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Takes push notifications over HTTP, answers at once, delivers them to Google.",
    )
    version = f"gocm {__version__} (python {platform.python_version()}, urllib3 {urllib3.__version__})"
    parser.add_argument("--version", action="version", version=version)
    for row in fields(kind):
        # Python's argparse takes one-dash long names as they stand, so Go's spelling needs no second parser.
        names = (option_flag(row), *row.metadata["also"])
        help_text = row.metadata["help"].replace("%", "%%")
        if row.metadata["read"] is flag:
            parser.add_argument(*names, dest=row.name, action="store_const", const="true", help=help_text)
        else:
            shown = f" (default {show(row.default)})" if row.default != "" else ""
            parser.add_argument(*names, dest=row.name, metavar=row.metadata["metavar"], help=help_text + shown)
    return parser


def parse(
    kind: type[AnySettings], argv: Sequence[str], environ: Mapping[str, str], program: str = "gocm"
) -> AnySettings:
    """Settings of the given kind from the command line, then GOCM_ variables, then defaults.

    Raises SettingsError (exit 2 for the command line's form, 78 for a value). `--help` and `--version` print and
    raise SystemExit(0), as argparse does.
    """
    given = vars(_parser(kind, program).parse_args(list(argv)))
    values = {}
    for row in fields(kind):
        if row.name in given:
            source, value = option_flag(row), given[row.name]
        elif option_variable(row) in environ:
            source, value = option_variable(row), environ[option_variable(row)]
        else:
            continue
        try:
            values[row.name] = row.metadata["read"](value)
        except ValueError as error:
            raise SettingsError(f"{source} {error}") from None
    return kind(**values)


def default_spool(environ: Mapping[str, str], sandbox: bool) -> str:
    """systemd's StateDirectory= when we have one, else the place XDG gives to state that must outlive a restart. The
    sandbox has its own: what waits for Google must not be delivered to a pretend one, nor the other way.
    """
    if environ.get("STATE_DIRECTORY"):
        directory = Path(environ["STATE_DIRECTORY"].split(":")[0])
    else:
        directory = Path(environ.get("HOME") or os.path.expanduser("~")) / ".local/state/gocm"
    return str(directory / ("sandbox.db" if sandbox else "gocm.db"))


def _read_key(path: str, source: str) -> str:
    try:
        return secret(Path(path).read_text().strip())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{source} {path} cannot be used: {getattr(error, 'strerror', None) or error}") from None


def complete(given: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with what follows from others and from where systemd and Google's tools keep things.

    An API key comes from --apikey, --apikey-file or systemd's credential `apikey`; Google credentials from
    --credentials, systemd's credential `fcm.json` or GOOGLE_APPLICATION_CREDENTIALS. Raises SettingsError.
    """
    kept = environ.get("CREDENTIALS_DIRECTORY", "")
    apikey, credentials = given.apikey, given.credentials
    if not apikey and given.apikey_file:
        apikey = _read_key(given.apikey_file, "--apikey-file")
    elif not apikey and kept and os.path.exists(os.path.join(kept, "apikey")):
        apikey = _read_key(os.path.join(kept, "apikey"), "the credential")
    if not (credentials or given.token_command or given.fcm_metadata or given.sandbox):
        beside = os.path.join(kept, "fcm.json")
        credentials = beside if kept and os.path.exists(beside) else environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    return replace(
        given,
        apikey=apikey,
        credentials=credentials,
        spool=given.spool or default_spool(environ, given.sandbox),
        senders=given.senders or min(4, os.cpu_count() or 1),
    )


def check(settings: Settings) -> None:
    """Raise SettingsError where options that are right alone are wrong together."""
    sources = {
        "--credentials": settings.credentials,
        "--token-command": settings.token_command,
        "--fcm-metadata": settings.fcm_metadata,
    }
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise SettingsError(f"{given[0]} and {given[1]} both give access tokens for FCM: choose one")
    if not settings.apikey and not settings.sandbox and not given:
        raise SettingsError(
            "--apikey is missing, and so is --credentials: give a key for GCM or credentials for FCM, "
            "or --sandbox to try GoCM without Google"
        )
    if settings.token_command and not settings.fcm_project:
        raise SettingsError("--fcm-project is missing: a token command does not name the project")
    if not is_loopback(settings.host) and not settings.no_auth:
        raise SettingsError(
            f"--host {settings.host} can be reached by other machines and GoCM has no password yet: "
            "listen on 127.0.0.1, or say --no-auth if a firewall guards it"
        )
