"""From the command line to a running GoCM and its exit code: the commands."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode

from gocm_lib.config import hide_key, values
from gocm_lib.config.settings import (
    NO_HOST,
    BenchSettings,
    BundleSettings,
    Exit,
    FailedSettings,
    SandboxSettings,
    SendSettings,
    Settings,
    SettingsError,
    WatchSettings,
)
from gocm_lib.front import auth, listener, webhook
from gocm_lib.front.listener import ListenError
from gocm_lib.process import child, init, log
from gocm_lib.process.systemd import Systemd
from gocm_lib.senders import credentials, upstream
from gocm_lib.supervisor import Stop, Supervisor
from gocm_lib.tools import bench, bundle, sandbox, send, watch
from gocm_lib.tools.api_client import Remote, RemoteError, show


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of COMMANDS, `serve` if none is named; the exit code is one of settings.Exit. Problems are one line
    on stderr.
    """
    child.fill_standard_files()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else "serve"
    try:
        if name != "serve":
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if argv is None and name in ("serve", "ping", "check-config"):
            hide_key.restart(words, os.environ)
        return COMMANDS[name].run(words)
    except (SettingsError, Stop) as problem:
        if problem.code != Exit.OK:
            print(f"gocm: {log.one_line(str(problem))}", file=sys.stderr)
        return problem.code


def _print_all(run: Callable[[], int]) -> int:
    """What a command returns that prints what it finds. Nobody need read it to the end."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        raise RemoteError("interrupted") from None
    except OSError as error:  # of print: all others are told otherwise
        # For what the interpreter would write at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return Exit.FAILED
        raise RemoteError(f"the answer cannot be written: {error.strerror}") from None


def _serve(words: Sequence[str]) -> int:
    home = _home()
    given = values.load(words, os.environ, "gocm", _overview(), home).settings
    if (code := init.step_aside()) is not None:
        return code
    _start_log("front", given)
    os.chdir("/")

    def reread() -> Settings:
        return values.load(words, os.environ, home=home).settings

    return Supervisor(given, home, reread, Systemd(os.environ)).run()


def _home() -> str:
    """Where we are started; it may be gone tomorrow, with the release that was in it, or already."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _sandbox(words: Sequence[str]) -> NoReturn:
    given = values.parse(SandboxSettings, words, os.environ, "gocm sandbox").settings
    _start_log("sandbox", Settings())
    sandbox.command(given)


def _bench(words: Sequence[str]) -> int:
    return bench.command(values.parse(BenchSettings, words, {}, "gocm bench").settings)


def _bundle(words: Sequence[str]) -> int:
    return bundle.command(values.parse(BundleSettings, words, {}, "gocm bundle").settings, os.environ)


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
    settings = values.load(words, os.environ, "gocm check-config").settings
    auth.read_policy(settings)
    if settings.feedback_secret_file:
        webhook.read_secret(settings.feedback_secret_file)
    _check_log(settings.logto)
    try:
        if settings.tls_cert:
            listener.tls_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    except ListenError as problem:
        raise SettingsError(str(problem)) from None
    if settings.sandbox:
        print("the configuration is good; upstream: the sandbox")
        return Exit.OK
    found, _ = credentials.sources(settings, _home())
    upstream.from_settings(settings)
    print("the configuration is good; upstreams: " + ", ".join(sorted(found)))
    return Exit.OK


def _print_config(words: Sequence[str]) -> int:
    child.forbid_core_dumps()
    for line in values.describe(values.load(words, os.environ, "gocm print-config")):
        print(line)
    return Exit.OK


def _ping(words: Sequence[str]) -> int:
    """Ask the server that these settings make whether it is ready."""
    settings = values.parse(Settings, words, os.environ, "gocm ping").settings
    status, told = Remote(_place(settings), ca=None).ask("GET", "/readyz")
    if not isinstance(told, dict) or "status" not in told:
        raise RemoteError("what answers there is no GoCM")
    said = [part for name in ("reasons", "notes") if isinstance(part := told.get(name), list)]
    show(f"{told['status']}: {'; '.join(str(each) for part in said for each in part) or 'ready'}")
    return Exit.OK if status == 200 else Exit.FAILED


def _place(settings: Settings) -> str:
    """Where the server with these settings is found."""
    if settings.host == NO_HOST:
        if not settings.socket:
            raise SettingsError("--host none leaves nobody to ask: give --socket")
        return os.path.abspath(settings.socket)
    [first, *_] = settings.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(first, first)
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _failed(words: Sequence[str]) -> int:
    """`gocm failed list|replay|discard`."""
    action = words[0] if words else ""
    if action not in ("list", "replay", "discard"):
        raise SettingsError("say what to do: gocm failed list, replay or discard", Exit.USAGE)
    given = values.parse(FailedSettings, words[1:], {}, f"gocm failed {action}").settings
    token = auth.first_token(given.auth_token_file) if given.auth_token_file else ""
    remote = Remote(given.to, token, given.ca)
    fields = {name: getattr(given, name) for name in ("job", "reason", "upstream", "older") if getattr(given, name)}
    if action == "list":
        return _print_all(lambda: _list_failed(remote, fields, given.json))
    form = urlencode(fields | ({"all": 1} if given.all else {}))
    done = remote.take("POST", f"/gcm/failed/{action}", f"{action}ed", form)
    show(f"{done[action + 'ed']} {action}ed" + ("; for the others there is no room now" if done.get("left") else ""))
    return Exit.OK


def _list_failed(remote: Remote, fields: dict[str, Any], as_json: bool) -> int:
    after: dict[str, Any] = {"limit": 1000}
    try:
        while page := (answer := remote.take("GET", f"/gcm/failed?{urlencode(fields | after)}", "failed"))["failed"]:
            for entry in page:
                _show_failed(entry, as_json)
            if answer["next"] is None:
                break
            after["after"] = answer["next"]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise RemoteError("what answers there is no GoCM") from None
    return Exit.OK


def _show_failed(entry: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(entry))
        return
    failed_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["failed_at"]))
    show(failed_at, *(entry[column] for column in ("job", "n", "upstream", "reason", "token", "detail")))


def _send(words: Sequence[str]) -> int:
    given = values.parse(SendSettings, words, {}, "gocm send", words="TOKEN")
    return _print_all(lambda: send.command(given.settings, given.words))


def _watch(words: Sequence[str]) -> int:
    given = values.parse(WatchSettings, words, {}, "gocm watch").settings
    return _print_all(lambda: watch.command(given))


class Command(NamedTuple):
    run: Callable[[Sequence[str]], int]
    meaning: str


# README's table is checked against this one.
COMMANDS = {
    "serve": Command(_serve, "serve; what `gocm` does when no command is named"),
    "check-config": Command(_check_config, "say whether a server would start with these options, without starting it"),
    "print-config": Command(_print_config, "print each option's value and where it came from, as a configuration file"),
    "ping": Command(_ping, "ask the server of these options whether it is ready: exit code 0 or 1"),
    "send": Command(_send, "send a message to tokens, from a file too, through a running server"),
    "watch": Command(_watch, "show live what goes on in a running server"),
    "failed": Command(_failed, "list, replay or discard the failed tokens of a running server"),
    "sandbox": Command(_sandbox, "run the pretend FCM and GCM alone"),
    "bench": Command(_bench, "measure this machine"),
    "bundle": Command(_bundle, "make the single file gocm.pyz"),
}


def _overview() -> str:
    rows = [f"  {name:14}{command.meaning.replace('`', '')}" for name, command in COMMANDS.items()]
    purpose = "Takes push notifications over HTTP, answers at once, delivers them to Google."
    return "\n".join([purpose, "", "commands:", *rows])
