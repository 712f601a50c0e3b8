"""From the command line to a running GoCM and its exit code: the commands."""

import http.client
import json
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from gocm_lib import access, bench, bundle, child, conceal, config, credentials, listener, log, sandbox, upstream
from gocm_lib.listener import ListenError
from gocm_lib.settings import BenchSettings, BundleSettings, Exit, SandboxSettings, Settings, SettingsError
from gocm_lib.supervisor import Stop, Supervisor
from gocm_lib.systemd import Systemd

PING_PATIENCE = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of COMMANDS, `serve` if none is named; the exit code is one of settings.Exit. Problems are one line
    on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else "serve"
    try:
        if argv is None and name == "serve":
            conceal.restart(words, os.environ)
        return COMMANDS[name].run(words)
    except (SettingsError, Stop) as problem:
        if problem.code != Exit.OK:
            print(f"gocm: {log.one_line(str(problem))}", file=sys.stderr)
        return problem.code


def _serve(words: Sequence[str]) -> int:
    given = config.load(words, os.environ, "gocm", _overview()).settings
    _start_log("front", given)
    return Supervisor(given, lambda: config.load(words, os.environ).settings, Systemd(os.environ)).run()


def _sandbox(words: Sequence[str]) -> NoReturn:
    given = config.parse(SandboxSettings, words, os.environ, "gocm sandbox").settings
    _start_log("sandbox", Settings())
    sandbox.command(given)


def _bench(words: Sequence[str]) -> int:
    return bench.command(config.parse(BenchSettings, words, {}, "gocm bench").settings)


def _bundle(words: Sequence[str]) -> int:
    return bundle.command(config.parse(BundleSettings, words, {}, "gocm bundle").settings, os.environ)


def _start_log(process: str, given: Settings) -> None:
    try:
        log.start(process, given.log_level, given.logto, given.log_format)
    except OSError as error:
        raise SettingsError(
            f"--logto {given.logto} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE
        ) from None


def _check_log(path: str) -> None:
    place = path if os.path.exists(path) else os.path.dirname(os.path.abspath(path))
    if path and (os.path.isdir(path) or not os.access(place, os.W_OK)):
        raise SettingsError(f"--logto {path} cannot be written", Exit.SPOOL_UNWRITABLE)


def _check_config(words: Sequence[str]) -> int:
    """All that a start would look at, but for ports and the spool, which a running server has in use."""
    child.forbid_core_dumps()
    settings = config.load(words, os.environ, "gocm check-config").settings
    access.read_policy(settings)
    _check_log(settings.logto)
    try:
        if settings.tls_cert:
            listener.tls_context(settings.tls_cert, settings.tls_key)
    except ListenError as problem:
        raise SettingsError(str(problem)) from None
    if settings.sandbox:
        print("the configuration is good; upstream: the sandbox")
        return Exit.OK
    found, _ = credentials.sources(settings)
    upstream.from_settings(settings)
    print("the configuration is good; upstreams: " + ", ".join(sorted(found)))
    return Exit.OK


def _print_config(words: Sequence[str]) -> int:
    child.forbid_core_dumps()
    for line in config.describe(config.load(words, os.environ, "gocm print-config")):
        print(line)
    return Exit.OK


def _ping(words: Sequence[str]) -> int:
    """Ask the server that these settings make whether it is ready."""
    settings = config.parse(Settings, words, os.environ, "gocm ping").settings
    connection = _connect(settings)
    try:
        connection.request("GET", "/readyz", headers={"Host": "localhost"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        print(f"{told['status']}: {'; '.join([*told.get('reasons', []), *told.get('notes', [])]) or 'ready'}")
        return Exit.OK if answer.status == 200 else Exit.FAILED
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        print(f"gocm: no GoCM answers: {error}", file=sys.stderr)
        return Exit.FAILED
    finally:
        connection.close()


def _connect(settings: Settings) -> http.client.HTTPConnection:
    if settings.host == "none":
        if not settings.socket:
            raise SettingsError("--host none leaves nobody to ask: give --socket")
        connection = http.client.HTTPConnection("localhost", timeout=PING_PATIENCE)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PING_PATIENCE)
        try:
            connection.sock.connect(settings.socket)
        except OSError as error:
            raise SettingsError(f"no GoCM answers on {settings.socket}: {error.strerror}", Exit.FAILED) from None
        return connection
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    if not settings.tls_cert:
        return http.client.HTTPConnection(host, settings.port, timeout=PING_PATIENCE)
    context = ssl.create_default_context()
    context.check_hostname = False  # we ask at an address, and tell nothing that is secret
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, settings.port, timeout=PING_PATIENCE, context=context)


class Command(NamedTuple):
    run: Callable[[Sequence[str]], int]
    meaning: str


# README's table is checked against this one.
COMMANDS = {
    "serve": Command(_serve, "serve; what `gocm` does when no command is named"),
    "check-config": Command(_check_config, "say whether a server would start with these options, without starting it"),
    "print-config": Command(_print_config, "print each option's value and where it came from, as a configuration file"),
    "ping": Command(_ping, "ask the server of these options whether it is ready: exit code 0 or 1"),
    "sandbox": Command(_sandbox, "run the pretend FCM and GCM alone"),
    "bench": Command(_bench, "measure this machine"),
    "bundle": Command(_bundle, "make the single file gocm.pyz"),
}


def _overview() -> str:
    rows = [f"  {name:14}{command.meaning.replace('`', '')}" for name, command in COMMANDS.items()]
    purpose = "Takes push notifications over HTTP, answers at once, delivers them to Google."
    return "\n".join([purpose, "", "commands:", *rows])
