"""The state process: State behind multiprocessing's Manager, on the spool that the settings name.

Promises that a call is answered or, when nobody knows any more what the disk would keep, that the process ends. The
next one goes on from what is on disk.
"""

import contextlib
import hashlib
import multiprocessing.managers
import os
import sys
import threading
import time
from collections.abc import Collection, MutableSequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, NoReturn

from gocm_lib.config import spool_address
from gocm_lib.config.settings import Exit, Fatal, Settings, needs_psycopg
from gocm_lib.config.upstreams import described
from gocm_lib.config.upstreams import meanings as named
from gocm_lib.message.job import first_id
from gocm_lib.message.retry import Policy
from gocm_lib.process import child, log
from gocm_lib.state.admission import Keeping, Limits
from gocm_lib.state.contract import VERBS, Broken, Full, Lost, Meaning, Passing, Unsure
from gocm_lib.state.loop import Loop
from gocm_lib.state.pace import start_pace
from gocm_lib.state.pacing import UNPACED
from gocm_lib.state.sqlite.database import told
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.state import State
from gocm_lib.state.store import Store

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


def _leave_spool(reason: str) -> NoReturn:
    """Our lease of a shared spool is over: end. The next state process joins anew."""
    log.logger.error("%s", reason)
    child.leave(Exit.FAILED)


def _give_up(verb: str, error: Exception) -> NoReturn:
    if isinstance(error, Lost):
        _leave_spool("another node has what was ours")
    if isinstance(error, Unsure):
        _leave_spool(f"nobody knows what became of the last change ({error}): looking at what the spool has")
    log.logger.error("state failed in %s", verb, exc_info=error)
    # An fsync that failed once must not be tried again: the kernel has dropped what it could not write, and would say
    # that all is well. A whole new start reads what is really there.
    child.leave(Exit.SPOOL_FAILED if isinstance(error, Broken) else Exit.FAILED)


class Us(NamedTuple):
    """Who a state process is: `run` is a word for this run of the gateway, which all its state processes have; one that
    comes `again`, in place of another that died, waits for a spool elsewhere. `living` generations may have something
    in hand. `lease` is to have the time until which senders may send.
    """

    run: str
    again: bool
    living: Collection[int]
    lease: MutableSequence[float]


def _open(settings: Settings, keeping: Keeping, us: Us) -> Store:
    """The spool that the settings name."""
    if not spool_address.is_address(settings.spool):
        return SqliteStore.open(settings.spool, keeping)
    with needs_psycopg():
        from gocm_lib.state.postgres import opening
    opened = opening.open_store(settings, us.run, list(described(settings)), keeping, us.again)
    opened.start(us.lease, _leave_spool, waits=opened.rescued and bool(us.living))
    return opened


def _make(settings: Settings, now: float, us: Us) -> State:
    policy = Policy(settings.retry_base, settings.retry_cap, settings.max_attempts)
    rates = {name: each.rate / 60 for name, each in described(settings).items()}
    limits = Limits(settings.max_pending, settings.max_spool, settings.min_free_disk, max(1, len(rates)))
    kept = settings.max_failed, settings.max_report, settings.keep_jobs, settings.max_kept, settings.max_keys
    keeping = Keeping(limits, settings.failed_age, *kept, settings.hold_waves)
    paces = {name: start_pace(rate or UNPACED, now) for name, rate in rates.items()}
    store = _open(settings, keeping, us)
    with told():
        _check_meanings(store, settings)
        state = State(store, policy, keeping, paces, living=us.living)
        state.start(now)
    return state


def _check_meanings(store: Store, settings: Settings) -> None:
    """Note what the names of upstreams mean. Raises Fatal when messages wait for one that meant something else."""
    meanings = {name: Meaning(*meaning) for name, meaning in named(settings).items()}
    before, opened = store.meant(), store.totals.open
    for name, meaning in meanings.items():
        if opened.get(name) and before.get(name, meaning) != meaning:
            was = " ".join(before[name]).strip()
            reason = f"upstream {name} has {opened[name]} tokens to send as {was}: give the new one another name"
            raise Fatal(reason, topic="upstreams")
    if {**before, **meanings} != before:
        store.mean(meanings)


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


def main(
    settings: Settings,
    address: str,
    authkey: bytes,
    living: Collection[int],
    again: bool,
    lease: MutableSequence[float],
    control: Connection,
) -> None:
    """The state process (Us has who it is). Once it serves, it tells `control` what the front takes for the last job
    id, and whether somebody else may have what living generations have in hand; or why it refuses. Then it waits there
    for the word to finish.
    """
    child.enter("state", settings)
    us = Us(hashlib.blake2b(authkey, digest_size=16).hexdigest(), again, living, lease)
    try:
        state = _make(settings, time.time(), us)
    except Fatal as error:
        child.refuse(control, error.code, str(error))
    except (Full, Passing, Broken) as error:
        child.refuse(control, Exit.SPOOL_UNWRITABLE, f"cannot write the spool {settings.spool}: {error}")
    except Unsure as error:  # nothing was promised yet: the next one looks again
        child.refuse(control, Exit.FAILED, f"the spool {settings.spool} failed: {error}")
    Path(address).unlink(missing_ok=True)  # our predecessor's, if it was killed
    _Server.loop = loop = Loop(state, _give_up)
    threading.Thread(target=loop.run, name="loop", daemon=True).start()
    socket = _serve(address, authkey)
    threading.Thread(target=_stay_reachable, args=(address, authkey, socket), name="reachable", daemon=True).start()
    control.send(("ready", (first_id(state.last_job(), state.store.number), state.store.rescued)))
    child.wait_for_word(control)
    loop.turning.acquire()  # between two turns
    state.close()
    child.leave(Exit.OK)
