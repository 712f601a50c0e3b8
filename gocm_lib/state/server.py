"""The state process: State behind multiprocessing's Manager, on the spool that the settings name.

Promises that a call is answered or, when nobody knows any more what the disk would keep, that the process ends. The
next one goes on from what is on disk.
"""

import contextlib
import multiprocessing.managers
import os
import sys
import threading
import time
from collections.abc import Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message.retry import Policy
from gocm_lib.process import child, log
from gocm_lib.state.admission import Keeping, Limits
from gocm_lib.state.contract import VERBS, Broken, Full, Passing
from gocm_lib.state.loop import Loop
from gocm_lib.state.pace import start_pace
from gocm_lib.state.sqlite.database import told
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.state import State

UNPACED = 1e6  # messages a second: no limit but what an upstream's own 429 and 503 make of it
LOOK_EVERY = 1.0  # seconds between two looks whether our socket is there


class _Server(multiprocessing.managers.Server):
    """The Manager's server: it listens and asks for the key, and hands who has it over to the loop."""

    loop: Loop

    def serve_client(self, conn: Connection) -> NoReturn:
        """A caller is admitted."""
        self.loop.adopt(conn.fileno())
        sys.exit()  # this thread, which then closes its descriptor


class _Known:
    """What callers ask the Manager for: a name, and which verbs it has. The loop does what it is asked."""


def _give_up(verb: str, error: Exception) -> NoReturn:
    log.logger.error("state failed in %s", verb, exc_info=error)
    # An fsync that failed once must not be tried again: the kernel has dropped what it could not write, and would say
    # that all is well. A whole new start reads what is really there.
    child.leave(Exit.SPOOL_FAILED if isinstance(error, Broken) else Exit.FAILED)


def _make(settings: Settings, now: float, living: Collection[int]) -> State:
    policy = Policy(settings.retry_base, settings.retry_cap, settings.max_attempts)
    fcm = settings.credentials or settings.token_command or settings.fcm_metadata
    upstreams = bool(settings.apikey) + bool(fcm)
    limits = Limits(settings.max_pending, settings.max_spool, settings.min_free_disk, max(1, upstreams))
    kept = settings.max_failed, settings.max_report, settings.keep_jobs, settings.max_kept, settings.max_keys
    keeping = Keeping(limits, settings.failed_age, *kept, settings.hold_waves)
    unpaced = start_pace(UNPACED, now)
    paced = start_pace(settings.fcm_rate / 60, now) if settings.fcm_rate else unpaced
    store = SqliteStore.open(settings.spool, keeping)
    with told():
        state = State(store, policy, keeping, {"gcm": unpaced, "fcm": paced}, living=living)
        state.start(now)
    return state


def _serve(address: str, authkey: bytes) -> os.stat_result:
    """Listen at this address for calls, in a thread. Returns the stat of the socket."""
    server = _Server({"State": (_Known, VERBS, {}, None)}, address, authkey, "pickle")
    threading.Thread(target=server.serve_forever, name="manager", daemon=True).start()
    return os.lstat(address)


def _stay_reachable(address: str, authkey: bytes, socket: os.stat_result) -> None:
    """Make the socket again when it was removed. Existing connections would not notice, but nobody could connect any
    more.
    """
    while True:
        time.sleep(LOOK_EVERY)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(address), socket):
                continue
        if not os.path.lexists(address):
            try:
                socket = _serve(address, authkey)
            except OSError:
                continue  # its directory is gone, too: the supervisor makes that
            log.logger.error("somebody removed the state process's socket: made anew")


def main(settings: Settings, address: str, authkey: bytes, living: Collection[int], control: Connection) -> None:
    """The state process: the first of this run, or one in place of another that died; then `living` are the generations
    that may have something in hand. Tells `control` the highest job id on disk once it serves, or why it refuses; then
    waits there for the word to finish.
    """
    child.enter("state", settings)
    try:
        state = _make(settings, time.time(), living)
    except Fatal as error:
        child.refuse(control, error.code, str(error))
    except (Full, Passing, Broken) as error:
        child.refuse(control, Exit.SPOOL_UNWRITABLE, f"cannot write the spool {settings.spool}: {error}")
    Path(address).unlink(missing_ok=True)  # our predecessor's, if it was killed
    _Server.loop = loop = Loop(state, _give_up)
    threading.Thread(target=loop.run, name="loop", daemon=True).start()
    socket = _serve(address, authkey)
    threading.Thread(target=_stay_reachable, args=(address, authkey, socket), name="reachable", daemon=True).start()
    control.send(("ready", state.last_job()))
    child.wait_for_word(control)
    loop.turning.acquire()  # between two turns
    state.close()
    child.leave(Exit.OK)
