"""The commands: from the command line to a running GoCM and its exit code."""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from gocm_lib.config import hide_key, spool_address, usage, values
from gocm_lib.config.settings import (
    NO_HOST,
    BenchSettings,
    BundleSettings,
    CancelSettings,
    ClientSettings,
    CompletionSettings,
    Exit,
    FailedSettings,
    Fatal,
    HelpSettings,
    PingSettings,
    SandboxSettings,
    SendSettings,
    Settings,
    SpoolSettings,
    TokenSettings,
    WatchSettings,
    needs_psycopg,
)
from gocm_lib.process import early, log

# What the server's children run: `main` of these modules. Named here, for only the children load them.
CHILDREN = {
    "state": "gocm_lib.state.server",
    "sender": "gocm_lib.senders.sender",
    "sandbox": "gocm_lib.tools.sandbox",
}
# What a command needs is imported where it begins: all of it takes 0.13 s of CPU, more than most commands have to do.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of COMMANDS, `serve` if none is named. Returns an exit code of settings.Exit; problems are one line
    on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "serve"
    try:
        if name not in COMMANDS:
            raise Fatal(
                f"there is no command {name[:64]}{values.nearest(name, COMMANDS)} (see gocm --help)", Exit.USAGE
            )
        if name != "serve":
            early.listen_no_more()
        if argv is None and name in ("serve", "ping", "check-config"):
            hide_key.restart(words, os.environ)
        return COMMANDS[name].run(words)
    except Fatal as problem:
        if problem.code != Exit.OK:
            more = f"; see gocm help {problem.topic}" if problem.topic else ""
            print(f"gocm: {log.one_line(str(problem))}{more}", file=sys.stderr)
        return problem.code


def _print_all(run: Callable[[], int]) -> int:
    """Run a command that prints what it finds, and return its exit code. The reader may stop reading at any time."""
    from gocm_lib.tools.api_client import ApiError

    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        raise ApiError("interrupted") from None
    except OSError as error:  # of print: all others are told otherwise
        # For what the interpreter would write at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return Exit.FAILED
        raise ApiError(f"the answer cannot be written: {error.strerror}") from None


def _serve(words: Sequence[str]) -> int:
    home = _home()
    commands = {name: command.meaning for name, command in COMMANDS.items()}
    text = usage.overview("gocm", Settings, PURPOSE, commands)
    given = values.load(words, os.environ, "gocm", text, home).settings
    # Only now: --version and mistakes are told at once.
    from gocm_lib.process import init, resources
    from gocm_lib.process.forkserver import Forkserver
    from gocm_lib.process.systemd import Systemd

    if (code := init.step_aside()) is not None:
        return code
    _start_log("front", given)
    os.chdir("/")
    early.note(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # What children inherit comes first.
    resources.forbid_core_dumps()
    resources.keep_one_heap()
    files = resources.raise_file_limit()
    systemd = Systemd(os.environ)

    def reread() -> Settings:
        return values.load(words, os.environ, home=home).settings

    forkserver = Forkserver({kind: CHILDREN[kind] for kind in CHILDREN if given.sandbox or kind != "sandbox"})
    try:
        from gocm_lib.supervisor import Supervisor  # takes half a second: the forkserver imports meanwhile

        code = Supervisor(given, files, home, reread, systemd, forkserver).run()
    finally:
        forkserver.close()
    return _end(code)


def _end(code: Exit) -> NoReturn:
    """End the server's own process. Threads that nobody waits for may be inside TLS while the interpreter takes itself
    apart: a clean stop ended with SIGSEGV, once in some thousand. So what is registered for the end is done, and
    nothing else.
    """
    from gocm_lib.process import child

    atexit._run_exitfuncs()
    child.leave(code)


def _home() -> str:
    """The current directory at the start. It may disappear with the release that is in it, or be gone already."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _sandbox(words: Sequence[str]) -> int:
    if words[:1] == ["exec"]:
        from gocm_lib.tools import sandbox_exec

        return sandbox_exec.command(words[1:])
    return _sandbox_alone(words)


def _sandbox_alone(words: Sequence[str]) -> NoReturn:
    from gocm_lib.tools import sandbox

    given = values.parse(SandboxSettings, words, os.environ, "gocm sandbox").settings
    _start_log("sandbox", Settings())
    sandbox.command(given)


def _bench(words: Sequence[str]) -> int:
    from gocm_lib.tools import bench

    return bench.command(values.parse(BenchSettings, words, {}, "gocm bench").settings)


def _bundle(words: Sequence[str]) -> int:
    from gocm_lib.tools import bundle

    return bundle.command(values.parse(BundleSettings, words, {}, "gocm bundle").settings, os.environ)


def _start_log(process: str, given: Settings) -> None:
    try:
        log.start(process, given.log_level, given.logto, given.log_format)
    except OSError as error:
        raise Fatal(f"--logto {given.logto} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None


def _check_log(path: str) -> None:
    place = path if os.path.exists(path) else os.path.dirname(os.path.abspath(path))
    if path and (os.path.isdir(path) or not os.access(place, os.W_OK)):
        raise Fatal(f"--logto {path} cannot be written", Exit.SPOOL_UNWRITABLE)


def _check_config(words: Sequence[str]) -> int:
    """Check everything that a start would, except ports and a spool's file, which a running server has in use."""
    from gocm_lib.front import accounts, auth, listener, webhook
    from gocm_lib.process import resources
    from gocm_lib.senders import credentials, upstream

    resources.forbid_core_dumps()
    settings = values.load(words, os.environ, "gocm check-config").settings
    auth.read_policy(settings)
    if settings.door_google:
        accounts.read(settings)
    if settings.feedback_secret_file:
        webhook.read_secret(settings.feedback_secret_file)
    _check_log(settings.logto)
    if spool_address.is_address(settings.spool):
        with needs_psycopg():
            from gocm_lib.state.postgres import opening
        opening.check_now(settings)
    if settings.tls_cert:
        listener.tls_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if settings.sandbox:
        print("the configuration is good; upstream: the sandbox")
        return Exit.OK
    found, _ = credentials.sources(settings, _home())
    upstream.from_settings(settings)
    print("the configuration is good; upstreams: " + ", ".join(sorted(found)))
    return Exit.OK


def _print_config(words: Sequence[str]) -> int:
    from gocm_lib.process import resources

    resources.forbid_core_dumps()
    for line in values.describe(values.load(words, os.environ, "gocm print-config")):
        print(line)
    return Exit.OK


def _ping(words: Sequence[str]) -> int:
    """Ask the server with these settings, or the one that `--to` names, whether it is ready."""
    from gocm_lib.tools.api_client import ApiClient, ApiError, show

    text = usage.overview("gocm ping", PingSettings)
    settings = values.parse(PingSettings, words, os.environ, "gocm ping", text).settings
    place, ca = (settings.to, settings.ca) if settings.to else (_place(settings), settings.ca or None)
    status, told = ApiClient(place, ca=ca).ask("GET", "/readyz")
    if not isinstance(told, dict) or "status" not in told:
        raise ApiError("what answers there is no GoCM")
    said = [part for name in ("reasons", "notes") if isinstance(part := told.get(name), list)]
    show(f"{told['status']}: {'; '.join(str(each) for part in said for each in part) or 'ready'}")
    return Exit.OK if status == 200 else Exit.FAILED


def _place(settings: Settings) -> str:
    """Where the server with these settings is found."""
    if settings.host == NO_HOST:
        if not settings.socket:
            raise Fatal("--host none leaves nobody to ask: give --socket")
        return os.path.abspath(settings.socket)
    [first, *_] = settings.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(first, first)
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _feedback(words: Sequence[str]) -> int:
    from gocm_lib.tools import feedback

    return _print_all(lambda: feedback.command(words))


def _failed(words: Sequence[str]) -> int:
    from gocm_lib.tools import failed

    return _print_all(lambda: failed.command(words))


def _cancel(words: Sequence[str]) -> int:
    from gocm_lib.tools import cancel

    return _print_all(lambda: cancel.command(words))


def _hold(words: Sequence[str]) -> int:
    from gocm_lib.tools import hold

    return _print_all(lambda: hold.command("hold", words))


def _resume(words: Sequence[str]) -> int:
    from gocm_lib.tools import hold

    return _print_all(lambda: hold.command("resume", words))


def _token(words: Sequence[str]) -> int:
    from gocm_lib.tools import token

    return _print_all(lambda: token.command(words))


def _spool(words: Sequence[str]) -> int:
    with needs_psycopg():
        from gocm_lib.state.postgres import administration
    return _print_all(lambda: administration.command(words, os.environ))


def _send(words: Sequence[str]) -> int:
    from gocm_lib.tools import send

    given = values.parse(SendSettings, words, {}, "gocm send", words="TOKEN")
    return _print_all(lambda: send.command(given.settings, given.words))


def _watch(words: Sequence[str]) -> int:
    from gocm_lib.tools import watch

    given = values.parse(WatchSettings, words, {}, "gocm watch").settings
    return _print_all(lambda: watch.command(given))


def _help(words: Sequence[str]) -> int:
    from gocm_lib.tools import manual

    return _print_all(lambda: manual.command(words, PURPOSE, {name: each.meaning for name, each in COMMANDS.items()}))


def _completion(words: Sequence[str]) -> int:
    from gocm_lib.tools import completion

    return _print_all(lambda: completion.command(words, {name: each.options for name, each in COMMANDS.items()}))


class Command(NamedTuple):
    """A row of the table: the function that runs the command, its kind of options, and what it does."""

    run: Callable[[Sequence[str]], int]
    options: type
    meaning: str


PURPOSE = "Takes push notifications over HTTP, answers at once, delivers them to Google."
COMMANDS = {
    "serve": Command(_serve, Settings, "serve; what `gocm` does when no command is named"),
    "check-config": Command(_check_config, Settings, "say whether a server would start with these options"),
    "print-config": Command(_print_config, Settings, "print each option's value and where it came from, as TOML"),
    "ping": Command(_ping, PingSettings, "ask a server whether it is ready: exit code 0 or 1"),
    "send": Command(_send, SendSettings, "send a message to tokens, from a file too, by a running server"),
    "watch": Command(_watch, WatchSettings, "show live what goes on in a running server"),
    "feedback": Command(_feedback, ClientSettings, "release or discard unregistered tokens that are held back"),
    "failed": Command(_failed, FailedSettings, "list, replay or discard the failed tokens of a running server"),
    "cancel": Command(_cancel, CancelSettings, "stop messages of a running server, by id or by tag"),
    "hold": Command(_hold, ClientSettings, "send nothing to an upstream, and keep its messages"),
    "resume": Command(_resume, ClientSettings, "send to it again"),
    "token": Command(_token, TokenSettings, "make an auth token: `gocm token new NAME`"),
    "spool": Command(_spool, SpoolSettings, "make, check or look at a spool in PostgreSQL"),
    "sandbox": Command(_sandbox, SandboxSettings, "run the pretend FCM and GCM alone, or `exec` a command with them"),
    "bench": Command(_bench, BenchSettings, "measure this machine"),
    "bundle": Command(_bundle, BundleSettings, "make the single file gocm.pyz"),
    "help": Command(_help, HelpSettings, "explain a topic: `gocm help` lists them"),
    "completion": Command(_completion, CompletionSettings, "print completions for bash, zsh or fish"),
}
