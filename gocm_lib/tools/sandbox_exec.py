"""`gocm sandbox exec -- COMMAND...`: a command, say a test suite, for which the sandbox is Google.

Three processes. This one starts the two others, passes signals on to the command, and ends as it ends. In front of a
terminal the command is in our process group, and hears from the terminal itself; else it has one of its own, so that
what is sent to our group reaches it once. The sandbox process is in a session of its own, so that no terminal
interrupts it; when we die it ends the command, too. Promises that nothing is left behind: no process, not even one that
the command has left in the background, for it would be led nowhere; and no file but --received. If both are killed at
once, the next start of a GoCM removes the folder.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from errno import EACCES, ENOEXEC
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, NoReturn

from gocm_lib.config import values
from gocm_lib.config.settings import ExecSettings, Exit, Fatal, option_flag, rows
from gocm_lib.config.usage import brief
from gocm_lib.front.google_variables import around, led, variables
from gocm_lib.process import child, log, resources, run_directory
from gocm_lib.tools import sandbox
from gocm_lib.tools.pretend import Mode, Pretender
from gocm_lib.tools.record import Record

# Passed on when somebody sends them to us; what a terminal sends, it sends to the command itself too.
PASSED = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
CANNOT_RUN, NOT_FOUND = 126, 127  # as shells and env(1) say it
PATIENCE = 5.0  # seconds for the sandbox to sum up
GRACE = 2.0  # seconds for a command to end, when we are gone
MARGIN = 0.05  # seconds between two looks at whether it has
_HELP = """\
usage: gocm sandbox exec [OPTIONS] -- COMMAND...

Runs a command, say a test suite, that takes the sandbox for Google:
  gocm sandbox exec -- python3 -m pytest
  gocm sandbox exec --pass -- mvn test
Its exit code is the command's; 126 and 127: the command cannot be run.
gocm help google says more.
options:"""


def command(words: Sequence[str]) -> int:
    """Run the command. Returns its exit code; is ended by the signal that it was ended by. Raises Fatal."""
    if "--" not in words and not {"--help", "-h", "--version"} & set(words):
        raise Fatal("put -- before the command: gocm sandbox exec -- pytest", Exit.USAGE, "google")
    options = [f"  {option_flag(row)} {row.metadata['metavar']}".ljust(20) + brief(row) for row in rows(ExecSettings)]
    text = "\n".join([_HELP, *options, ""])
    given = values.parse(ExecSettings, words, os.environ, "gocm sandbox exec", text, words="-- COMMAND")
    if not given.words:
        raise Fatal("say which command: gocm sandbox exec -- pytest", Exit.USAGE, "google")
    try:
        folder, _lock = run_directory.make()
    except OSError as error:
        reason = error.strerror or "there is none that can be written"
        raise Fatal(f"no folder can be made in $TMPDIR: {reason}", Exit.SPOOL_UNWRITABLE, "google") from None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED | {signal.SIGCHLD})
    try:
        status: int = _Run(given.settings, folder, before).of(given.words)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if status < 0:
        _end_by(-status)
    return status


class _Run:
    """A run: the sandbox process, and the command."""

    def __init__(self, settings: ExecSettings, folder: str, mask: set[Any]) -> None:
        """`mask`: the signals that were blocked before, as they are to be for the command."""
        self._folder = folder
        self._mask = mask
        self._control, theirs = Pipe()
        self._sandbox = os.fork()
        if not self._sandbox:
            self._control.close()
            _play(settings, folder, theirs)
        theirs.close()
        self._command = 0
        self._shares = _is_in_front()

    def of(self, words: tuple[str, ...]) -> int:
        """Run a command in the sandbox. Returns its exit code, or minus the signal that ended it. Raises Fatal."""
        try:
            ports = self._ready()
            if early := signal.sigpending() & PASSED:
                return -int(min(early))
            if code := self._start(words, ports):
                return code
            status = self._wait()
            if self._sandbox:
                self._sum_up()
            return status
        finally:
            self._control.close()
            if self._sandbox:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self._sandbox, 0)

    def _ready(self) -> tuple[int, int]:
        """The sandbox's ports, once it is there."""
        try:
            word, fact = self._control.recv()
        except EOFError:
            raise Fatal("the sandbox has ended before it began", Exit.FAILED, "google") from None
        if word == "refused":
            code, reason = fact
            raise Fatal(reason, code, "google")
        port, tls_port = fact
        return port, tls_port

    def _start(self, words: tuple[str, ...], ports: tuple[int, int]) -> int:
        """Start the command. Returns 0, or the exit code to end with."""
        if past := around(os.environ):
            print(f"gocm: left out of NO_PROXY, as Google is there: {log.one_line(', '.join(past))}", file=sys.stderr)
        environ = led(variables(self._folder, *ports), os.environ)
        # Ours is Python's own doing, not what was set before.
        default = [signal.SIGPIPE, signal.SIGXFSZ]
        group: dict[str, Any] = {} if self._shares else {"setpgroup": 0}
        try:
            self._command = os.posix_spawnp(words[0], words, environ, setsigmask=self._mask, setsigdef=default, **group)
        except (OSError, ValueError) as error:  # an empty name is a ValueError
            reason = error.strerror if isinstance(error, OSError) else "it has no name"
            print(f"gocm: {log.one_line(words[0])} cannot be run: {reason}", file=sys.stderr)
            return CANNOT_RUN if isinstance(error, OSError) and error.errno in (EACCES, ENOEXEC) else NOT_FOUND
        return 0

    def _wait(self) -> int:
        """Pass signals on until the command has ended. Returns how it ended."""
        while True:
            told = signal.sigwaitinfo(PASSED | {signal.SIGCHLD})
            if told.si_signo != signal.SIGCHLD:
                # The kernel sends for a terminal (sigaction(2)): to all in front of it, but a hang-up to its session's
                # leader alone.
                leads = told.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
                if told.si_code <= 0 or leads or not self._shares:
                    self._pass_on(told.si_signo)
            elif (status := self._reap()) is not None:
                return status

    def _pass_on(self, number: int) -> None:
        """Send a signal to the command; or, as whoever ends a group means all of it, to its group."""
        with contextlib.suppress(ProcessLookupError):
            if self._shares:
                os.kill(self._command, number)
            else:
                os.killpg(self._command, number)
                os.killpg(self._command, signal.SIGCONT)  # one that is stopped would not hear

    def _reap(self) -> int | None:
        """Reap whoever has ended; as a container's first process we get orphans, too. Returns how the command ended, if
        it has.
        """
        ended = None
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found[0], os.waitstatus_to_exitcode(found[1])
                if pid == self._command:
                    ended = status
                elif pid == self._sandbox:
                    self._sandbox = 0
                    how = child.how_it_ended(status)
                    print(f"gocm: the sandbox has ended ({how}), and with it the command", file=sys.stderr)
                    if ended is None:
                        self._pass_on(signal.SIGTERM)
        return Exit.FAILED if ended is not None and not self._sandbox else ended

    def _sum_up(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._control.send("finish")
            if self._control.poll(2 * GRACE + PATIENCE):
                print(f"gocm: the sandbox was sent {self._control.recv()}", file=sys.stderr)
                return
        os.kill(self._sandbox, signal.SIGKILL)


def _is_in_front() -> bool:
    """Whether a terminal's keys reach us."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _end_by(number: int) -> NoReturn:
    """End by a signal, as the command did: a shell that runs a script goes by that when it was interrupted."""
    resources.forbid_core_dumps()
    sys.stderr.flush()
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # one that ends nobody


# -------------------------------------------------------------------------------------------------- the sandbox process


def _play(settings: ExecSettings, folder: str, control: Connection) -> NoReturn:
    """Be the sandbox: say ("ready", ports) or ("refused", (code, reason)), answer "finish" with the summary, and end
    when the other side does. All signals that could end it are blocked by our parent.
    """
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    log.start("sandbox", "warning", "", "text")
    try:
        doors, lead = sandbox.take_place(folder, "127.0.0.1", 0, 0, settings.pass_)
        record = Record(_open(settings.received))
    except Fatal as problem:
        child.refuse(control, problem.code, str(problem))
    except Exception:
        log.logger.exception("the sandbox cannot start")
        child.leave(Exit.FAILED)
    pretender = Pretender(Mode(settings.latency), None, True, True)
    pretender.received.follow(record.take)

    def heard() -> None:
        with contextlib.suppress(EOFError, OSError):  # it was killed
            control.recv()
        _end_command(folder)
        with contextlib.suppress(OSError):
            control.send(record.summary())
        shutil.rmtree(folder, ignore_errors=True)
        child.leave(Exit.OK)

    try:
        played = sandbox.Sandbox(doors, pretender, lead._replace(refused=record.refuse_host))
        played.hear(control, heard)
        with contextlib.suppress(OSError):  # it was killed already: that is heard, too
            control.send(("ready", (doors[0].port, doors[1].port)))
        played.run()
    except Exception:
        log.logger.exception("the sandbox failed")
        child.leave(Exit.FAILED)


def _open(path: str) -> IO[bytes] | None:
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # tokens are in it
        return open(descriptor, "wb")
    except OSError as error:
        raise Fatal(f"--received {path} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None


def _end_command(folder: str) -> None:
    """End all that is left of the command: politely first."""
    for number, limit in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for pid in _led_by(folder):
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        until = time.monotonic() + limit
        while _led_by(folder) and time.monotonic() < until:
            time.sleep(MARGIN)


def _led_by(folder: str) -> list[int]:
    """The processes that are led here: our folder is in the environment that each was started with."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if os.fsencode(folder) + b"/" in file.read():
                found.append(int(name))
    return found
