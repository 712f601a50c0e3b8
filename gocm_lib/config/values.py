"""From command line, GOCM_ variables and configuration file to Settings.

The command line overrides the environment, which overrides the file, which overrides the defaults. Promises one Fatal
that names the option, says where its value came from, and tells what to do.
"""

import argparse
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from gocm_lib import __version__
from gocm_lib.config import spool_address, upstreams, usage
from gocm_lib.config.proxy import ways
from gocm_lib.config.settings import (
    NO_HOST,
    PATHS,
    Exit,
    Fatal,
    SandboxSettings,
    Settings,
    UpstreamSettings,
    as_flag,
    as_variable,
    file_mode,
    flag,
    is_loopback,
    option_flag,
    rows,
    secret,
    show,
    spellings,
    upstream_name,
)

AnySettings = TypeVar("AnySettings")
WORDS = "*words"  # what argparse calls that which is no option; no field can be called so
COMMAND_LINE, ENVIRONMENT, FILE, DEFAULT = 3, 2, 1, 0  # how much a source counts


class Source(NamedTuple):
    """Where an option's value came from: its precedence, and its name there."""

    rank: int
    name: str


class Given(NamedTuple, Generic[AnySettings]):
    """Settings, and for each option that was given the Source of its value."""

    settings: AnySettings
    sources: Mapping[str, Source]
    words: tuple[str, ...] = ()  # of the command line that are no options

    def name(self, option: str) -> str:
        """An option as the operator spelt it, for an error about it."""
        return self.sources[option].name if option in self.sources else as_flag(option)

    def rank(self, option: str) -> int:
        return self.sources[option].rank if option in self.sources else DEFAULT


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error that says what was meant by `word`; "": nothing is near."""
    import difflib  # here, as others below: few starts need it

    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


# ------------------------------------------------------------------------------------------------------ three sources


class _Parser(argparse.ArgumentParser):
    text = ""  # of --help; "": as argparse makes it

    def format_help(self) -> str:
        return self.text or super().format_help()

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL)
        if unknown:
            word = unknown[1].partition("=")[0]
            shown = [name for name, row in self._option_string_actions.items() if row.help != argparse.SUPPRESS]
            message = f"unknown option or argument {word[:64]}" + nearest(word, shown)
        raise Fatal(f"{message} (see {self.prog} --help)", Exit.USAGE)


class _Version(argparse.Action):
    """Prints the versions. Loading urllib3 would take as long as everything else together, so its metadata is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata
        import platform

        python, urllib3 = platform.python_version(), importlib.metadata.version("urllib3")
        print(f"gocm {__version__} (python {python}, urllib3 {urllib3})")
        parser.exit()


def _parser(kind: type, program: str, text: str, words: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.text = text
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    for row in rows(kind):
        # Python's argparse takes one-dash long names as they stand, so Go's spelling needs no second parser.
        names = (option_flag(row), *row.metadata["also"])
        help_text = row.metadata["help"].replace("%", "%%")
        how: dict[str, Any] = {"metavar": row.metadata["metavar"]}
        if row.metadata["many"]:
            how["action"] = "append"
        elif row.metadata["read"] is flag:
            how = {"action": "store_const", "const": "true"}
        elif row.default not in ("", ()):
            help_text += f" (default {show(row, row.default)})"
        parser.add_argument(*names, dest=row.name, help=help_text, **how)
        for old in spellings(row)[1:]:
            parser.add_argument(as_flag(old), dest=old, help=argparse.SUPPRESS, **how)
    if words:
        parser.add_argument(WORDS, metavar=words, nargs="*", default=[])
    return parser


Texts = dict[str, tuple[Sequence[str], Source]]  # of options: one, or several of one that may be repeated


def _load_toml(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise Fatal(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal(f"--config {path} is not TOML: {error}") from None


def _from_table(found: Mapping[str, Any], path: str, kind: type, table: str = "") -> Texts:
    """The options in a table of a TOML file, as texts. Raises Fatal."""
    of_kind = [row for row in rows(kind) if row.name != "config"]
    known = {name: row for row in of_kind for name in spellings(row)}
    texts: Texts = {}
    for key, value in found.items():
        spelt, where = key.replace("-", "_"), f"{key} in {table}{path}"
        if spelt not in known and isinstance(value, dict):
            raise Fatal(f"{where[:200]!r} is no option; a table is [upstream.NAME]", topic="upstreams")
        if spelt not in known:
            raise Fatal(f"{where[:200]!r} is no option{nearest(spelt, [row.name for row in of_kind])}")
        name = known[spelt].name
        where += "" if spelt == name else f" (old name of {name})"
        if name in texts:
            raise Fatal(f"{where} is given twice")
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if not isinstance(value, (str, int, float)):
            raise Fatal(f"{where} must be a text, a number, true or false")
        texts[name] = [str(value).lower() if isinstance(value, bool) else str(value)], Source(FILE, where)
        if known[name].metadata["hidden"] and os.stat(path).st_mode & 0o007:
            raise Fatal(f"{where} is a secret, and everybody here may read that file: chmod 600 {path}")
    return texts


def parse(
    kind: type[AnySettings],
    argv: Sequence[str],
    environ: Mapping[str, str],
    program: str = "gocm",
    text: str = "",
    words: str = "",
    home: str = "",
) -> Given[AnySettings]:
    """Settings of the given kind from the command line, then GOCM_ variables, then the file that `config` names, then
    defaults. `text` is what --help prints; "": what argparse makes of it. `words` names the other words that the
    command line may have, as --help shows them; "": none. Paths are relative to `home`; "": to the current directory.

    Raises Fatal: exit code 2 for the form of the command line, 78 for a value. `--help` and `--version` print and raise
    SystemExit(0), as argparse does.
    """
    parser = _parser(kind, program, text, words)
    argv = list(argv)
    end = argv.index("--") if words and "--" in argv else len(argv)
    argv, rest = argv[:end], argv[end + 1 :]  # argparse forgets what -- means when options and words mix
    found = vars(parser.parse_intermixed_args(argv) if words else parser.parse_args(argv))
    texts: Texts = {}
    known = {row.name: row for row in rows(kind)}
    variables = {
        name: environ[as_variable(name)]
        for row in known.values()
        for name in spellings(row)
        if as_variable(name) in environ and not _is_another_s(as_variable(name), environ)
    }
    for row in known.values():
        if (word := _spelling(row, found, as_flag)) is not None:
            given = found[word.key] if row.metadata["many"] else [found[word.key]]
            texts[row.name] = given, Source(COMMAND_LINE, word.shown)
        elif (word := _spelling(row, variables, as_variable)) is not None:
            texts[row.name] = [variables[word.key]], Source(ENVIRONMENT, word.shown)
    tables: Mapping[str, Any] = {}
    if "config" in texts and (file := texts["config"][0][0]):
        texts, tables = _with_file(texts, os.path.join(home, file), kind, home)
    values: dict[str, Any] = {}
    for name, (given, source) in texts.items():
        found_values = [_read(known[name], text, source, home) for text in given]
        values[name] = _together(found_values) if known[name].metadata["many"] else found_values[0]
    sources = {name: source for name, (_, source) in texts.items()}
    settings = kind(**values)
    if tables and isinstance(settings, Settings):
        named = {name: upstreams.named(settings, name, table) for name, table in tables.items()}
        settings = replace(settings, upstream=named)
    return Given(settings, sources, (*found.get(WORDS, ()), *rest))


def _with_file(texts: Texts, path: str, kind: type, home: str) -> tuple[Texts, Mapping[str, Any]]:
    """The options with those of the configuration file, and what its tables of upstreams have. Raises Fatal."""
    in_file = _load_toml(path)
    tables = _tables(in_file.pop("upstream", {}), path, home) if issubclass(kind, Settings) else {}
    return _from_table(in_file, path, kind) | texts, tables


def _tables(found: Any, path: str, home: str) -> dict[str, dict[str, Any]]:
    """The options of each table `[upstream.NAME]` of the file. Raises Fatal."""
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise Fatal(f"upstream in {path} must be tables: [upstream.NAME]", topic="upstreams")
    known = {row.name: row for row in rows(UpstreamSettings)}
    tables = {}
    for name, table in found.items():
        try:
            upstream_name(name or "-")
        except ValueError as error:
            raise Fatal(f"[upstream.{name[:64]}] in {path}: {error}", topic="upstreams") from None
        try:
            texts = _from_table(table, path, UpstreamSettings, f"[upstream.{name}] of ")
            tables[name] = {key: _read(known[key], text, source, home) for key, ([text], source) in texts.items()}
        except Fatal as problem:
            raise Fatal(str(problem), problem.code, "upstreams") from None
    return tables


class _Spelling(NamedTuple):
    key: str  # the field's name, or its old one
    shown: str  # as the operator wrote it; an old name says so


def _spelling(row: Field[Any], given: Mapping[str, Any], written: Callable[[str], str]) -> _Spelling | None:
    """Which of an option's names is among those `given`; None: neither. Raises Fatal when both are."""
    used = [name for name in spellings(row) if name in given]
    if not used:
        return None
    if len(used) > 1:
        raise Fatal(f"{written(used[1])} is the old name of {written(used[0])}: give one of them")
    old = "" if used[0] == row.name else f" (old name of {written(row.name)})"
    return _Spelling(used[0], written(used[0]) + old)


def _read(row: Field[Any], text: str, source: Source, home: str) -> Any:
    """The value of an option's text. Raises Fatal."""
    if "\0" in text:
        raise Fatal(f"{source.name} has a NUL character in it")
    read = row.metadata["read"]
    if read in PATHS and text not in ("", ":memory:") and not spool_address.is_address(text):
        # Without `..`: the folder before it may be gone tomorrow.
        text = os.path.normpath(os.path.join(home, text))
    try:
        return read(text)
    except ValueError as error:
        raise Fatal(f"{source.name} {error}") from None


def _together(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values of an option that was given several times, each time with one value or several."""
    return tuple(part for value in values for part in (value if isinstance(value, tuple) else (value,)))


def _is_another_s(name: str, environ: Mapping[str, str]) -> bool:
    """Whether this variable is no option: Kubernetes makes some for each service, and a service may be called gocm;
    and `gocm sandbox exec` says where the sandbox is, maybe to an application's tests that start a server.
    """
    if name in ("GOCM_PORT", "GOCM_SANDBOX") and "://" in environ[name]:
        return True
    return bool(re.match("GOCM_(SERVICE_|PORT_[0-9])", name))


def check_variables(environ: Mapping[str, str], kinds: Iterable[type]) -> None:
    """Raise Fatal for a GOCM_ variable that belongs to no option: a misspelt one would silently do nothing."""
    of_kinds = [row for kind in kinds for row in rows(kind)]
    known = {as_variable(name) for row in of_kinds for name in spellings(row)}
    for name in environ:
        if name.startswith("GOCM_") and name not in known and not _is_another_s(name, environ):
            near = nearest(name, [as_variable(row.name) for row in of_kinds])
            raise Fatal(f"{name[:64]} is no option's variable{near}")


# -------------------------------------------------------------------------------------------- what follows from others


def default_spool(environ: Mapping[str, str], sandbox: bool) -> str:
    """systemd's StateDirectory= if there is one, else the place that XDG gives to state that must outlive a restart.
    The sandbox has its own spool: a message for Google must never reach the pretend upstream, nor the other way round.
    """
    return os.path.join(state_directory(environ), "sandbox.db" if sandbox else "gocm.db")


def state_directory(environ: Mapping[str, str]) -> str:
    """Where what must outlive a restart is kept."""
    if environ.get("STATE_DIRECTORY"):
        return environ["STATE_DIRECTORY"].split(":")[0]
    return os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local/state/gocm")


def _credential(environ: Mapping[str, str], name: str) -> str:
    """The path of a credential that systemd has passed (LoadCredential=), "" when it has not."""
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
    """A secret and the name of its source. The option itself counts most, then the option that ends in `-file`, then
    systemd's credential of that name. `what` the secret is, in words.
    """
    read = next(row for row in rows(Settings) if row.name == name).metadata["read"]
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
    """The same settings, filled in from systemd and from where Google's tools keep things. systemd's credentials
    `apikey`, `auth-tokens`, `tls-cert`, `tls-key`, `feedback-secret`, `proxy-auth` and `fcm.json` stand in for the
    options of the API key, the auth tokens, the TLS files, the webhook's secret, the proxy's user, and Google
    credentials; for the last GOOGLE_APPLICATION_CREDENTIALS does, too.
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
    _fill_spool(given, environ, fill)
    values["upstream"] = {name: _with_secret(name, each, environ) for name, each in settings.upstream.items()}
    if not settings.senders:
        fill("senders", min(4, os.cpu_count() or 1), "default")
    return Given(replace(settings, **values), sources)


def _with_secret(name: str, found: UpstreamSettings, environ: Mapping[str, str]) -> UpstreamSettings:
    """An upstream of the configuration file, with its key read; its credential may be systemd's `upstream-NAME`."""
    if not upstreams.is_complete(found) and (kept := _credential(environ, f"upstream-{name}")):
        is_key = found.dialect == upstreams.GCM
        found = replace(found, apikey_file=kept) if is_key else replace(found, credentials=kept)
    if found.apikey_file:
        found = replace(found, apikey=read_key(found.apikey_file, f"apikey-file of [upstream.{name}]"))
    return found


def _fill_spool(given: Given[Settings], environ: Mapping[str, str], fill: Callable[[str, Any, str], None]) -> None:
    """Where the spool is, and for one in PostgreSQL who we are. Whoever connects reads the URL's file himself."""
    settings = given.settings
    kept = _credential(environ, "spool")
    path = settings.spool_file or (kept if not settings.spool and os.path.isfile(kept) else "")
    source = given.name("spool_file") if settings.spool_file else "systemd's credential"
    if settings.spool and settings.spool_file:
        raise Fatal(f"{given.name('spool')} and {given.name('spool_file')} both say where the spool is: choose one")
    if path:
        fill("spool_file", path, source)
        fill("spool", spool_address.shown(read_spool_address(path, source)), source)
    elif not settings.spool:
        fill("spool", default_spool(environ, settings.sandbox), "default")
    if not settings.node:
        fill("node", re.sub("[^A-Za-z0-9._-]", "-", socket.gethostname())[:63].lstrip("._-") or "node", "default")


def read_spool_address(path: str, source: str) -> str:
    """The URL in a file that `source` names. Raises Fatal."""
    return _read_secret(path, source, lambda url: spool_address.check(url, with_password=True), "the spool's URL")


# --------------------------------------------------------------------------------------- right alone, wrong together


def _check(given: Given[Settings], environ: Mapping[str, str]) -> None:
    _check_upstreams(given)
    ways(given.settings, environ)
    _check_listeners(given, environ)
    settings = given.settings
    for first, second in (("feedback_url", "feedback_secret_file"), ("feedback_secret_file", "feedback_url")):
        if getattr(settings, first) and not getattr(settings, second):
            raise Fatal(
                f"{given.name(first)} needs --{second.replace('_', '-')}: what is sent there is signed", topic="reports"
            )
    url = urlsplit(settings.feedback_url)
    if url.scheme == "http" and not (is_loopback(url.hostname or "") or settings.feedback_plain):
        raise Fatal(
            f"{given.name('feedback_url')} must be https: device tokens would cross the network in clear; or say "
            "--feedback-plain",
            topic="reports",
        )
    if settings.retry_base > settings.retry_cap:
        raise Fatal(f"{given.name('retry_base')} is more than {given.name('retry_cap')}")


def _check_upstreams(given: Given[Settings]) -> None:
    settings = given.settings
    kinds = ("credentials", "token_command", "fcm_metadata")
    named = [given.name(kind) for kind in kinds if getattr(settings, kind)]
    if len(named) > 1:
        raise Fatal(f"{named[0]} and {named[1]} both give access tokens for FCM: choose one")
    for name, each in settings.upstream.items():
        if name in upstreams.of_options(settings):
            raise Fatal(f"[upstream.{name}] and the options both describe upstream {name}: choose one")
        if not upstreams.is_complete(each) and not settings.sandbox:
            wanted = "apikey-file" if each.dialect == upstreams.GCM else "credentials, token-command or metadata"
            raise Fatal(f"[upstream.{name}] in {settings.config} needs {wanted}", topic="upstreams")
    if not settings.apikey and not settings.sandbox and not named and not settings.upstream:
        raise Fatal(
            "--apikey-file is missing, and so is --credentials: give a key for GCM or credentials for FCM, "
            "or --sandbox to try GoCM without Google",
            topic="credentials",
        )
    if settings.token_command and not settings.fcm_project:
        raise Fatal(f"--fcm-project is missing: the command of {given.name('token_command')} does not name the project")
    there = (
        {upstreams.FCM, upstreams.GCM, *settings.upstream} if settings.sandbox else upstreams.described(settings).keys()
    )
    if settings.default_upstream and settings.default_upstream not in there:
        raise Fatal(f"{given.name('default_upstream')} must be one of {', '.join(there)}", topic="upstreams")
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
    """Raise Fatal when everybody could send by way of the address `host`."""
    asks = settings.auth_token_file or settings.tls_client_ca
    if not (is_loopback(host) or settings.no_auth or asks):
        raise Fatal(
            f"{what} can be reached by other machines: give --auth-token-file or --tls-client-ca, listen on 127.0.0.1, "
            "or say --no-auth if a firewall guards it",
            topic="security",
        )


def load(
    argv: Sequence[str], environ: Mapping[str, str], program: str = "gocm", text: str = "", home: str = ""
) -> Given[Settings]:
    """The server's settings, complete and checked. Paths are relative to `home`. Raises Fatal."""
    given = parse(Settings, argv, environ, program, text or usage.overview(program), home=home)
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
    """The lines of a configuration file that would give the same settings, each with its source. Secrets are hidden."""
    for row in rows(given.settings):
        value = getattr(given.settings, row.name)
        source = given.sources.get(row.name)
        said = source.name if source else "default"
        if row.metadata["hidden"] and value:
            yield f"# {row.name} is hidden ({said})"
        elif row.name == "config":
            yield f"# config = {_toml(row, value)} ({said})"
        else:
            yield f"{row.name} = {_toml(row, value)}  # {said}"
    for name, each in given.settings.upstream.items():
        yield f"[upstream.{name}]"
        for row in rows(each):
            value = getattr(each, row.name)
            if row.metadata["hidden"] and value:
                yield f"# {row.name} is hidden"
            elif value != row.default:
                yield f"{row.name} = {_toml(row, value)}"
