"""From command line, GOCM_ variables and configuration file to Settings.

The command line is above the environment, that above the file, that above the defaults. Promises one Fatal
that names the option and where its value came from, and tells what to do.
"""

import argparse
import difflib
import os
import platform
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from gocm_lib import __version__
from gocm_lib.config.proxy import ways
from gocm_lib.config.settings import (
    NO_HOST,
    PATHS,
    Exit,
    Fatal,
    SandboxSettings,
    Settings,
    file_mode,
    flag,
    is_loopback,
    option_flag,
    option_variable,
    secret,
    show,
)

AnySettings = TypeVar("AnySettings")
WORDS = "*words"  # what argparse calls that which is no option; no field can be called so
COMMAND_LINE, ENVIRONMENT, FILE, DEFAULT = 3, 2, 1, 0  # how much a source counts


class Source(NamedTuple):
    """Where an option's value came from: how much that counts, and its name there."""

    rank: int
    name: str


class Given(NamedTuple, Generic[AnySettings]):
    """Settings, and where the value of each option that was given came from."""

    settings: AnySettings
    sources: Mapping[str, Source]
    words: tuple[str, ...] = ()  # of the command line that are no options

    def name(self, option: str) -> str:
        """An option as the operator gave it, for an error about it."""
        return self.sources[option].name if option in self.sources else "--" + option.replace("_", "-")

    def rank(self, option: str) -> int:
        return self.sources[option].rank if option in self.sources else DEFAULT


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


# ------------------------------------------------------------------------------------------------------ three sources


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL)
        if unknown:
            word = unknown[1].partition("=")[0]
            message = f"unknown option or argument {word[:64]}" + _nearest(word, self._option_string_actions)
        raise Fatal(f"{message} (see {self.prog} --help)", Exit.USAGE)


class _Version(argparse.Action):
    """Says what runs here. Loading urllib3 would take as long as all else together: its metadata has the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata

        python, urllib3 = platform.python_version(), importlib.metadata.version("urllib3")
        print(f"gocm {__version__} (python {python}, urllib3 {urllib3})")
        parser.exit()


def _parser(kind: type, program: str, description: str, words: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    for row in fields(kind):
        # Python's argparse takes one-dash long names as they stand, so Go's spelling needs no second parser.
        names = (option_flag(row), *row.metadata["also"])
        help_text = row.metadata["help"].replace("%", "%%")
        if row.metadata["many"]:
            parser.add_argument(*names, dest=row.name, metavar=row.metadata["metavar"], action="append", help=help_text)
        elif row.metadata["read"] is flag:
            parser.add_argument(*names, dest=row.name, action="store_const", const="true", help=help_text)
        else:
            shown = f" (default {show(row, row.default)})" if row.default not in ("", ()) else ""
            parser.add_argument(*names, dest=row.name, metavar=row.metadata["metavar"], help=help_text + shown)
    if words:
        parser.add_argument(WORDS, metavar=words, nargs="*", default=[])
    return parser


def _from_file(path: str, kind: type) -> dict[str, tuple[Sequence[str], Source]]:
    """The options in a TOML file, as texts. Raises Fatal."""
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise Fatal(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal(f"--config {path} is not TOML: {error}") from None
    known = {row.name: row for row in fields(kind) if row.name != "config"}
    texts: dict[str, tuple[Sequence[str], Source]] = {}
    for key, value in found.items():
        name, where = key.replace("-", "_"), f"{key} in {path}"
        if name not in known:
            raise Fatal(f"{where[:200]!r} is no option{_nearest(name, known)}")
        if name in texts:
            raise Fatal(f"{where} is given twice")
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if not isinstance(value, (str, int, float)):
            raise Fatal(f"{where} must be a text, a number, true or false")
        texts[name] = [str(value).lower() if isinstance(value, bool) else str(value)], Source(FILE, where)
        if known[name].metadata["hidden"] and os.stat(path).st_mode & 0o007:
            raise Fatal(f"{where} is a secret, and everybody here may read that file: chmod o= {path}")
    return texts


def parse(
    kind: type[AnySettings],
    argv: Sequence[str],
    environ: Mapping[str, str],
    program: str = "gocm",
    description: str = "",
    words: str = "",
    home: str = "",
) -> Given[AnySettings]:
    """Settings of the given kind from the command line, then GOCM_ variables, then the file that `config` names, then
    defaults. `words`: what may be on the command line beside them, as --help names it; "": nothing. `home`: from where
    paths are given; "": from where we are.

    Raises Fatal (exit 2 for the command line's form, 78 for a value). `--help` and `--version` print and
    raise SystemExit(0), as argparse does.
    """
    parser = _parser(kind, program, description, words)
    argv = list(argv)
    end = argv.index("--") if words and "--" in argv else len(argv)
    argv, rest = argv[:end], argv[end + 1 :]  # argparse forgets what -- means when options and words mix
    found = vars(parser.parse_intermixed_args(argv) if words else parser.parse_args(argv))
    texts: dict[str, tuple[Sequence[str], Source]] = {}  # one, or several of an option that may be repeated
    rows = {row.name: row for row in fields(kind)}  # type: ignore[arg-type]  # each kind is a dataclass
    for row in rows.values():
        if row.name in found:
            given = found[row.name] if row.metadata["many"] else [found[row.name]]
            texts[row.name] = given, Source(COMMAND_LINE, option_flag(row))
        elif option_variable(row) in environ and not _is_kubernetes(option_variable(row), environ):
            texts[row.name] = [environ[option_variable(row)]], Source(ENVIRONMENT, option_variable(row))
    if "config" in texts and (file := texts["config"][0][0]):
        texts = _from_file(os.path.join(home, file), kind) | texts
    values: dict[str, Any] = {}
    for name, (given, source) in texts.items():
        found_values = [_read(rows[name], text, source, home) for text in given]
        values[name] = _together(found_values) if rows[name].metadata["many"] else found_values[0]
    sources = {name: source for name, (_, source) in texts.items()}
    return Given(kind(**values), sources, (*found.get(WORDS, ()), *rest))


def _read(row: Field[Any], text: str, source: Source, home: str) -> Any:
    """The value of an option's text. Raises Fatal."""
    if "\0" in text:
        raise Fatal(f"{source.name} has a NUL character in it")
    read = row.metadata["read"]
    if read in PATHS and text not in ("", ":memory:"):
        # Without `..`: the folder before it may be gone tomorrow.
        text = os.path.normpath(os.path.join(home, text))
    try:
        return read(text)
    except ValueError as error:
        raise Fatal(f"{source.name} {error}") from None


def _together(values: Iterable[Any]) -> tuple[Any, ...]:
    """What an option is worth that was given several times, each time with one value or with several."""
    return tuple(part for value in values for part in (value if isinstance(value, tuple) else (value,)))


def _is_kubernetes(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a variable is one of those that Kubernetes gives to all for each service; one may be named gocm."""
    return bool(re.match("GOCM_(SERVICE_|PORT_[0-9])", name)) or (name == "GOCM_PORT" and "://" in environ[name])


def check_variables(environ: Mapping[str, str], kinds: Iterable[type]) -> None:
    """Raise Fatal for a GOCM_ variable that is no option's: a misspelt one would silently not work."""
    known = {option_variable(row) for kind in kinds for row in fields(kind)}
    for name in environ:
        if name.startswith("GOCM_") and name not in known and not _is_kubernetes(name, environ):
            raise Fatal(f"{name[:64]} is no option's variable{_nearest(name, known)}")


# -------------------------------------------------------------------------------------------- what follows from others


def default_spool(environ: Mapping[str, str], sandbox: bool) -> str:
    """systemd's StateDirectory= when we have one, else the place XDG gives to state that must outlive a restart. The
    sandbox has its own: what waits for Google must not be delivered to a pretend one, nor the other way.
    """
    if environ.get("STATE_DIRECTORY"):
        directory = Path(environ["STATE_DIRECTORY"].split(":")[0])
    else:
        directory = Path(environ.get("HOME") or os.path.expanduser("~")) / ".local/state/gocm"
    return str(directory / ("sandbox.db" if sandbox else "gocm.db"))


def _credential(environ: Mapping[str, str], name: str) -> str:
    """The path of a credential that systemd has given us (LoadCredential=), "" when it has not."""
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    path = os.path.join(directory, name)
    return path if directory and os.path.exists(path) else ""


def read_key(path: str, source: str) -> str:
    """The API key in a file that `source` names. Raises Fatal."""
    return _read_secret(path, source, secret, "the API key")


def _read_secret(path: str, source: str, read: Callable[[str], str], what: str) -> str:
    try:
        found = read(Path(path).read_text().strip())
    except (OSError, ValueError) as error:
        raise Fatal(f"{source} {path} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise Fatal(f"{source} {path} is empty: put {what} into it")
    return found


def _secret_of(given: Given[Settings], environ: Mapping[str, str], name: str, what: str) -> tuple[str, str]:
    """A secret by the source that counts most, the option, that with `-file`, then systemd's credential of its name,
    and that source's name. `what` it is, in words.
    """
    read = next(row for row in fields(Settings) if row.name == name).metadata["read"]
    value, path = getattr(given.settings, name), getattr(given.settings, f"{name}_file")
    direct, by_file = given.rank(name), given.rank(f"{name}_file")
    if value and path and direct == by_file:
        raise Fatal(f"{given.name(name)} and {given.name(f'{name}_file')} both give {what}: choose one")
    if path and by_file >= direct:
        return _read_secret(path, given.name(f"{name}_file"), read, what), given.name(f"{name}_file")
    if value:
        return value, given.name(name)
    kept = _credential(environ, name.replace("_", "-"))
    return (_read_secret(kept, "the credential", read, what), "systemd's credential") if kept else ("", "")


def _complete(given: Given[Settings], environ: Mapping[str, str], home: str) -> Given[Settings]:
    """The same with what follows from others and from where systemd and Google's tools keep things: an API key, auth
    tokens, TLS files, the webhook's secret, the proxy's user and Google credentials may be systemd's credentials
    `apikey`, `auth-tokens`, `tls-cert`, `tls-key`, `feedback-secret`, `proxy-auth` and `fcm.json`, the last also
    GOOGLE_APPLICATION_CREDENTIALS.
    """
    settings = given.settings
    values: dict[str, Any] = {}
    sources = dict(given.sources)

    def fill(name: str, value: Any, source: str) -> None:
        if value:
            values[name], sources[name] = value, Source(given.rank(name), source)

    fill("apikey", *_secret_of(given, environ, "apikey", "the key"))
    fill("feedback_url", *_secret_of(given, environ, "feedback_url", "the URL"))
    if not (settings.credentials or settings.token_command or settings.fcm_metadata or settings.sandbox):
        if named := environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            fill("credentials", os.path.join(home, named), "GOOGLE_APPLICATION_CREDENTIALS")
        fill("credentials", _credential(environ, "fcm.json"), "systemd's credential")
    if not (settings.auth_token_file or settings.no_auth):
        fill("auth_token_file", _credential(environ, "auth-tokens"), "systemd's credential")
    if not (settings.tls_cert or settings.tls_key):
        fill("tls_cert", _credential(environ, "tls-cert"), "systemd's credential")
        fill("tls_key", _credential(environ, "tls-key"), "systemd's credential")
    webhook = {"feedback_secret_file": "feedback-secret"} if "feedback_url" in values else {}
    wanted = {"proxy_auth_file": "proxy-auth", **webhook}
    for name in [name for name in wanted if not getattr(settings, name)]:
        fill(name, _credential(environ, wanted[name]), "systemd's credential")
    if not settings.spool:
        fill("spool", default_spool(environ, settings.sandbox), "default")
    if not settings.senders:
        fill("senders", min(4, os.cpu_count() or 1), "default")
    return Given(replace(settings, **values), sources)


# --------------------------------------------------------------------------------------- right alone, wrong together


def _check(given: Given[Settings], environ: Mapping[str, str]) -> None:
    _check_upstreams(given)
    ways(given.settings, environ)
    _check_listeners(given, environ)
    settings = given.settings
    for first, second in (("feedback_url", "feedback_secret_file"), ("feedback_secret_file", "feedback_url")):
        if getattr(settings, first) and not getattr(settings, second):
            raise Fatal(f"{given.name(first)} needs --{second.replace('_', '-')}: what is sent there is signed")
    url = urlsplit(settings.feedback_url)
    if url.scheme == "http" and not (is_loopback(url.hostname or "") or settings.feedback_plain):
        raise Fatal(
            f"{given.name('feedback_url')} must be https: device tokens would cross the network in clear; or say "
            "--feedback-plain"
        )
    if settings.retry_base > settings.retry_cap:
        raise Fatal(f"{given.name('retry_base')} is more than {given.name('retry_cap')}")


def _check_upstreams(given: Given[Settings]) -> None:
    settings = given.settings
    kinds = ("credentials", "token_command", "fcm_metadata")
    named = [given.name(kind) for kind in kinds if getattr(settings, kind)]
    if len(named) > 1:
        raise Fatal(f"{named[0]} and {named[1]} both give access tokens for FCM: choose one")
    if not settings.apikey and not settings.sandbox and not named:
        raise Fatal(
            "--apikey-file is missing, and so is --credentials: give a key for GCM or credentials for FCM, "
            "or --sandbox to try GoCM without Google"
        )
    if settings.token_command and not settings.fcm_project:
        raise Fatal(f"--fcm-project is missing: the command of {given.name('token_command')} does not name the project")
    if settings.sandbox and settings.port == settings.sandbox_port != 0:
        raise Fatal(f"{given.name('sandbox_port')} is also --port: choose another")


def _check_listeners(given: Given[Settings], environ: Mapping[str, str]) -> None:
    settings = given.settings
    for first, second in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if getattr(settings, first) and not getattr(settings, second):
            raise Fatal(f"{given.name(first)} needs {given.name(second)}: https takes both")
    if settings.tls_client_ca and not settings.tls_cert:
        raise Fatal(f"{given.name('tls_client_ca')} needs --tls-cert: certificates are shown by TLS")
    for name in ("socket_mode", "socket_group"):
        if getattr(settings, name) != getattr(Settings, name) and not settings.socket:
            raise Fatal(f"{given.name(name)} needs --socket: it says who may connect to that")
    if settings.no_auth and settings.auth_token_file:
        raise Fatal(f"{given.name('no_auth')} and {given.name('auth_token_file')} contradict: choose one")
    if "none" in settings.host and len(settings.host) > 1:
        raise Fatal(f"{given.name('host')} none contradicts the others: give one or the other")
    if settings.host == NO_HOST and not settings.socket and not environ.get("LISTEN_FDS"):
        raise Fatal(f"{given.name('host')} none leaves nothing to listen on: give --socket")
    for host in settings.host if settings.host != NO_HOST else ():
        check_open(settings, host, f"{given.name('host')} {host}")


def check_open(settings: Settings, host: str, what: str) -> None:
    """Raise Fatal when anybody could use the address `host` to send."""
    asks = settings.auth_token_file or settings.tls_client_ca
    if not (is_loopback(host) or settings.no_auth or asks):
        raise Fatal(
            f"{what} can be reached by other machines: give --auth-token-file or --tls-client-ca, listen on 127.0.0.1, "
            "or say --no-auth if a firewall guards it"
        )


def load(
    argv: Sequence[str], environ: Mapping[str, str], program: str = "gocm", description: str = "", home: str = ""
) -> Given[Settings]:
    """The server's settings, complete and checked; paths are given from `home`. Raises Fatal."""
    given = parse(Settings, argv, environ, program, description, home=home)
    check_variables(environ, (Settings, SandboxSettings))
    given = _complete(given, environ, home)
    _check(given, environ)
    return given


# ------------------------------------------------------------------------------------------------------------ showing


def _toml(row: Field[Any], value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and row.metadata["read"] is not file_mode:
        return repr(value) if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
    quoted = show(row, value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in quoted) + '"'


def describe(given: Given[Settings]) -> Iterable[str]:
    """Lines of a configuration file that would give the same settings, each with its source; secrets are hidden."""
    for row in fields(given.settings):
        value = getattr(given.settings, row.name)
        source = given.sources.get(row.name)
        said = source.name if source else "default"
        if row.metadata["hidden"] and value:
            yield f"# {row.name} is hidden ({said})"
        elif row.name == "config":
            yield f"# config = {_toml(row, value)} ({said})"
        else:
            yield f"{row.name} = {_toml(row, value)}  # {said}"
