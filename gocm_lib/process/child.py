"""A child process: both ends of the pipe to it.

The supervisor holds a Child. In the child's process, `enter` comes first, `wait_for_word` or `refuse` later, `leave`
last. On the pipe the child says ("ready", fact), ("refused", (code, reason)) or ("alive", (progress, when all was
settled, log lines dropped)); the supervisor says "alive?", ("log", level) or "finish".

Promises that a child is gone within a second of its parent's death, leaves SIGTERM and SIGINT to the supervisor, and
ends with a traceback in the log when one of its threads fails, so that no process lives on half dead.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any, NoReturn

from gocm_lib.config.settings import Exit, Settings
from gocm_lib.process import log, resources

# ------------------------------------------------------------------------------------------------ the supervisor's end


class Child:
    """A child process as the supervisor knows it. `fact` is what it said when it got ready, `refusal` why it did not.
    All times are monotonic.
    """

    def __init__(self, context: ForkServerContext, kind: str, module: str, name: str, *arguments: object) -> None:
        """Start a child: `main` of the module gets these arguments and its end of the pipe. Raises OSError."""
        self.kind = kind
        self.name = name
        self.ready = False
        self.fact: Any = None
        self.refusal: tuple[Exit, str] | None = None
        self.asked = False  # whether it is alive, with no answer yet
        self.progress = -1
        self.settled_at = 0.0
        self.dropped = 0
        self.moved_at = 0.0  # when we last saw it progress
        self.control, theirs = context.Pipe()
        self.process = context.Process(target=run, args=(module, *arguments, theirs), name=name, daemon=True)
        self.process.start()
        try:
            self.handle: int | None = os.pidfd_open(self.process.pid or 0)
        except (AttributeError, OSError):  # not on this system; or it has ended already
            self.handle = None
        theirs.close()
        log.logger.debug("%s is process %d", name, self.process.pid)

    def hear(self) -> None:
        """Take in what the child has said."""
        try:
            while self.control.poll():
                word, fact = self.control.recv()
                if word == "ready":
                    self.ready, self.fact = True, fact
                    self.moved_at = self.settled_at = time.monotonic()
                elif word == "alive":
                    progress, self.settled_at, self.dropped = fact
                    self.moved_at = time.monotonic() if progress != self.progress else self.moved_at
                    self.progress, self.asked = progress, False
                else:
                    self.refusal = fact
        except (EOFError, OSError):
            pass  # it has ended; its sentinel tells

    def ask(self) -> None:
        """Ask whether it is alive, unless its answer is outstanding: the pipe to one that reads nothing would fill."""
        if not self.asked:
            self.asked = True
            self.tell("alive?")

    def tell(self, word: str | tuple[str, str]) -> None:
        """Say one of the words that `wait_for_word` knows."""
        try:
            self.control.send(word)
        except OSError:
            pass  # it has ended; its sentinel tells

    def reap(self) -> str:
        """Reap the child; returns its end in words. When its forkserver is killed, a child only seems dead: it is
        killed here, because it might hold the spool's lock.
        """
        self.hear()
        self.process.join()
        self.control.close()
        if self.handle is not None:
            with contextlib.suppress(OSError):  # it has ended, as nearly always
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
                wait([self.handle], 1.0)
            os.close(self.handle)
        return how_it_ended(self.process.exitcode)


def how_it_ended(exitcode: int | None) -> str:
    """A process's end in words."""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


# ----------------------------------------------------------------------------------------------------- the child's end


def run(module: str, *arguments: object) -> None:
    """What a child process does: `main` of its module, which only the child needs to load."""
    importlib.import_module(module).main(*arguments)


def enter(name: str, settings: Settings) -> None:
    """Make the calling process, just started by the supervisor, the child `name`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.start(name, settings.log_level, settings.logto, settings.log_format)
    watch_threads()
    resources.collect_seldom()
    resources.keep_one_heap()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leash, args=(parent.sentinel,), name="leash", daemon=True).start()


def _leash(sentinel: int) -> None:
    # Not PR_SET_PDEATHSIG: that fires when the *thread* that started us ends.
    wait([sentinel])
    os._exit(Exit.FAILED)


def watch_threads() -> None:
    """From now on an exception that ends a thread ends the process, with its traceback in the log."""

    def failed(problem: threading.ExceptHookArgs) -> None:
        try:
            name = problem.thread.name if problem.thread else "?"
            log.logger.critical("thread %s failed", name, exc_info=problem.exc_value)
        finally:  # even if that fails, too: with no file left to open, say
            leave(Exit.FAILED)

    threading.excepthook = failed


def refuse(control: Connection, code: Exit, reason: str) -> NoReturn:
    """Tell the supervisor why this process cannot start, and end."""
    control.send(("refused", (code, reason)))
    leave(code)


def leave(code: Exit) -> NoReturn:
    """End this process, whatever its threads do. Its log is written first, if the reader takes it."""
    try:
        log.flush()
    finally:
        os._exit(code)


def wait_for_word(
    control: Connection, progress: Callable[[], int] = int, settled_at: Callable[[], float] = time.monotonic
) -> None:
    """Return when the supervisor says to finish, or hangs up. Until then answer "alive?" with `progress()`, a number
    that stands still only when this process's work does; `settled_at()`, when nothing was left to be settled; and how
    many lines of this process's log were dropped. At ("log", level) reopen the log, from that level on.
    """
    try:
        while True:
            match control.recv():
                case "alive?":
                    control.send(("alive", (progress(), settled_at(), log.dropped())))
                case ("log", str(level)):
                    log.restart(level)
                case _:
                    return
    except (EOFError, OSError):
        pass
