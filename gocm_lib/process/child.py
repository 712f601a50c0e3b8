"""The edge of every child process: its log, its signals, its leash, and how it speaks with the supervisor.

Promises that a child is gone within a second of its parent's death, leaves SIGTERM and SIGINT to the supervisor, and
ends with a traceback in the log when one of its threads fails, so that no process lives on half dead.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import gocm_lib
from gocm_lib.config.settings import Exit, Settings
from gocm_lib.process import log

M_ARENA_MAX = -8  # glibc's malloc.h


def enter(name: str, settings: Settings) -> None:
    """Make the calling process, just started by the supervisor, the child `name`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.start(name, settings.log_level, settings.logto, settings.log_format)
    watch_threads()
    collect_seldom()
    keep_one_heap()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leash, args=(parent.sentinel,), name="leash", daemon=True).start()


@contextlib.contextmanager
def same_code(environ: MutableMapping[str, str]) -> Iterator[None]:
    """While the forkserver is started in here, it finds what we are made of, in a folder or in the single file: Pythons
    before 3.12.8 and 3.13.1 hand no path on to it (CPython issue 117378), so it would import nothing ahead, or another
    GoCM that is installed. The real path, not a link: that may name another version tomorrow.
    """
    before = environ.get("PYTHONPATH")
    ours = os.path.realpath(os.path.dirname(os.path.dirname(gocm_lib.__file__)))
    environ["PYTHONPATH"] = os.pathsep.join([ours, before] if before else [ours])
    try:
        yield
    finally:
        # Else other programs that we start, which may be Python's too, would import ours.
        if before is None:
            del environ["PYTHONPATH"]
        else:
            environ["PYTHONPATH"] = before


def forget_lost_forkserver() -> None:
    """Where its socket is gone, children are started by a new forkserver; the old one goes on watching those that it
    has started.
    """
    ours: Any = forkserver._forkserver
    if ours._forkserver_address and not os.path.exists(ours._forkserver_address):
        ours._forkserver_pid = None


def forbid_core_dumps() -> None:
    """Let no core file of ours or our children be written: keys and messages would be in it."""
    # 1, not 0: a limit of 0 does not keep the kernel from piping a core to a program, and 1 does (fs/coredump.c).
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def raise_file_limit() -> int:
    """Allow ourselves and our children as many open files as we may: each connection is one, and the usual soft limit
    is 1,024. How many that is for each process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _leash(sentinel: int) -> None:
    # Not PR_SET_PDEATHSIG: that fires when the *thread* that started us ends.
    wait([sentinel])
    os._exit(Exit.FAILED)


def watch_threads() -> None:
    """From now on an exception that ends a thread ends the process, with its traceback in the log."""

    def failed(problem: threading.ExceptHookArgs) -> None:
        name = problem.thread.name if problem.thread else "?"
        log.logger.critical("thread %s failed", name, exc_info=problem.exc_value)
        leave(Exit.FAILED)

    threading.excepthook = failed


def collect_seldom() -> None:
    """Have the garbage collector leave alone what is there now, and look seldom at the rest: hardly anything of ours
    refers to itself, and the thousands of messages in hand were looked through again and again (5 % of the time).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def keep_one_heap() -> None:
    """Have all threads allocate from one heap. The GNU C library would give each a heap of its own (mallopt(3)), and
    each would keep what its thread once needed: 30 readers of large pages left 400 MB behind, of one heap 50.
    """
    with contextlib.suppress(AttributeError):  # another C library, which has no such call
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def refuse(control: Connection, code: Exit, reason: str) -> NoReturn:
    """Tell the supervisor why this process cannot start, and end."""
    control.send(("refused", (code, reason)))
    leave(code)


def leave(code: Exit) -> NoReturn:
    """End this process, whatever its threads do; what was logged is written before, if somebody takes it."""
    log.flush()
    os._exit(code)


def wait_for_word(
    control: Connection, progress: Callable[[], int] = int, settled_at: Callable[[], float] = time.monotonic
) -> None:
    """Return when the supervisor says to finish, or hangs up. Until then, when it asks, tell it `progress()`: a number
    that stands still only when this process's work does; `settled_at()`: when nothing was left to be settled; and how
    many lines of our log were dropped. When it says so, log anew, from another level on.
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
