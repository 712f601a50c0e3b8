"""From an address to a PostgresStore: is there a spool of our format, does its server keep it, and who are we.

What cannot be right later is a Fatal at once. What may be (the server is away) is waited for by a state process that
takes over from another one: its front and its senders are there, and wait as well.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import errors

from gocm_lib.config import spool_address
from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.config.values import read_spool_address, state_directory
from gocm_lib.process import log
from gocm_lib.state.admission import Keeping
from gocm_lib.state.postgres.database import connect, reason
from gocm_lib.state.postgres.node import identify, join
from gocm_lib.state.postgres.schema import Durability, unfit
from gocm_lib.state.postgres.store import PostgresStore

AGAIN = 0.5  # seconds between two tries
TOLD_EVERY = 60.0  # seconds between two lines of the log about a server that is away


def address(settings: Settings) -> str:
    """The whole address of the spool that the settings name, with its password. Raises Fatal."""
    url = read_spool_address(settings.spool_file, "--spool-file") if settings.spool_file else settings.spool
    return spool_address.complete(url, settings.node)


def open_store(
    settings: Settings,
    run: str,
    upstreams: Sequence[str],
    keeping: Keeping,
    patient: bool,
) -> PostgresStore:
    """The store that the settings name, joined as a node. `run` is a word for this run of the gateway. Raises Fatal."""
    who = identify(settings.node, run, state_directory(os.environ))
    told_at = float("-inf")
    while True:
        try:
            check(settings)
            here = address(settings)
            me = join(here, who, time.sleep)
            log.logger.info("node %s has number %d on the spool %s", who.name, me.number, settings.spool)
            return PostgresStore.open(here, me, upstreams, keeping)
        except psycopg.OperationalError as error:
            problem = f"the spool {settings.spool} cannot be reached: {reason(error)}"
            if not patient:
                raise Fatal(problem, Exit.SPOOL_UNWRITABLE, topic="fleet") from None
            if time.monotonic() >= told_at + TOLD_EVERY:
                told_at = time.monotonic()
                log.logger.error("%s: waiting for it", problem)
            time.sleep(AGAIN)
        except psycopg.Error as error:
            raise Fatal(f"the spool {settings.spool} fails: {reason(error)}", Exit.FAILED, topic="fleet") from None


def check_now(settings: Settings) -> None:
    """Raise Fatal unless a node would find its spool."""
    try:
        check(settings)
    except psycopg.Error as error:
        problem = f"the spool {settings.spool} cannot be reached: {reason(error)}"
        raise Fatal(problem, Exit.SPOOL_UNWRITABLE, topic="fleet") from None


def check(settings: Settings) -> None:
    """Raise Fatal where there is no spool for us, or one that does not keep what it should."""
    with contextlib.closing(connect(address(settings))) as connection:

        def ask(statement: str) -> list[tuple[Any, ...]]:
            return connection.execute(statement).fetchall()

        try:
            [[format_there, works_with, moving]] = ask("SELECT format, works_with, moving FROM gocm.meta")
        except (errors.InvalidSchemaName, errors.UndefinedTable):
            problem = f"there is no spool at {settings.spool}: make one (gocm spool init)"
            raise Fatal(problem, Exit.CONFIG, topic="fleet") from None
        except errors.InsufficientPrivilege:
            problem = f"the spool {settings.spool} is not for this user: gocm spool init --grant, by its owner"
            raise Fatal(problem, Exit.CONFIG, topic="fleet") from None
        if problem := unfit(format_there, works_with):
            raise Fatal(f"the spool {settings.spool} is not for us: {problem}", Exit.SPOOL_DAMAGED, topic="fleet")
        if moving:
            raise Fatal(f"the spool {settings.spool} is, or was, moved {moving}", Exit.CONFIG, topic="fleet")
        durability = Durability(ask)
    if problems := durability.problems(settings.spool_durable):
        raise Fatal(f"the spool {settings.spool} would not keep its promise: {'; '.join(problems)}", Exit.CONFIG)
