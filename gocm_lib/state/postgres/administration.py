"""`gocm spool`: make, check, look at and move a spool in PostgreSQL, for who looks after it. Asks the server itself."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence

import psycopg
from psycopg import errors

from gocm_lib.config import spool_address, values
from gocm_lib.config.settings import Exit, Fatal, MoveSettings, SpoolSettings
from gocm_lib.process import log
from gocm_lib.state.postgres import schema, transfer
from gocm_lib.state.postgres.database import Row, connect, reason
from gocm_lib.state.postgres.schema import GRANTS, SCHEMA, Durability

Connection = psycopg.Connection[Row]


def command(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `gocm spool` with these words; returns the exit code. Raises Fatal."""
    action = words[0] if words else ""
    if action in ("-h", "--help"):
        action, words = "init", ["init", *words]
    if action not in ACTIONS:
        raise Fatal(f"say what to do: gocm spool {', '.join(ACTIONS)}", Exit.USAGE, topic="fleet")
    if (run := ACTIONS[action]) is None:
        return _move(words[1:], environ)
    settings = values.parse(SpoolSettings, words[1:], environ, f"gocm spool {action}").settings
    url = settings.spool
    if settings.spool_file:
        url = values.read_spool_address(settings.spool_file, "--spool-file")
    if not spool_address.is_address(url):
        raise Fatal("say which spool: --spool postgresql://USER@HOST/DATABASE, or --spool-file", Exit.USAGE)
    try:
        with contextlib.closing(psycopg.connect(spool_address.complete(url, "spool"), autocommit=True)) as connection:
            return run(connection, settings)
    except errors.UndefinedTable:
        raise _no_spool(url) from None
    except psycopg.Error as error:
        problem = f"the spool {spool_address.shown(url)}: {reason(error)}"
        raise Fatal(problem, Exit.SPOOL_UNWRITABLE, topic="fleet") from None


def _move(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """`gocm spool move FROM TO`: each a path, a URL, or a file with one (as `@FILE`)."""
    given = values.parse(MoveSettings, words, environ, "gocm spool move", words="PLACE")
    if len(given.words) != 2:
        raise Fatal("say from where to where: gocm spool move gocm.db postgresql://USER@HOST/DATABASE", Exit.USAGE)
    here, there = (_place(each) for each in given.words)

    def connect_to(url: str) -> Connection:
        return connect(spool_address.complete(url, "move"))

    try:
        transfer.move(here, there, connect_to, _show)
    except errors.UndefinedTable:
        raise _no_spool(there if spool_address.is_address(there) else here) from None
    except psycopg.Error as error:
        raise Fatal(f"the move failed: {reason(error)}; begin it again", Exit.SPOOL_UNWRITABLE, topic="fleet") from None
    return Exit.OK


def _no_spool(url: str) -> Fatal:
    problem = f"there is no spool at {spool_address.shown(url)}: make one (gocm spool init)"
    return Fatal(problem, Exit.CONFIG, topic="fleet")


def _place(word: str) -> str:
    """A spool's place as it is given to `move`. Raises Fatal."""
    if word.startswith("@"):
        return values.read_spool_address(word[1:], "the file")
    try:
        return spool_address.check(word, with_password=False) if spool_address.is_address(word) else word
    except ValueError as error:
        raise Fatal(f"{spool_address.shown(word)} {error}", Exit.USAGE) from None


def _show(*words: object) -> None:
    print("\t".join(log.one_line(str(word)) for word in words))


def _init(connection: Connection, settings: SpoolSettings) -> int:
    """Make the tables, all or none, and let a role use them. Both may be done again."""
    if settings.grant and not re.fullmatch("[A-Za-z_][A-Za-z0-9_$]{0,62}", settings.grant):
        raise Fatal(f"--grant {settings.grant} is no role's name", Exit.USAGE)
    with connection.transaction():
        there = connection.execute("SELECT to_regclass('gocm.meta') IS NOT NULL").fetchone() == (True,)
        if problems := Durability(_ask(connection)).unfit():
            raise Fatal(f"no spool can be there: {'; '.join(problems)}", Exit.CONFIG, topic="fleet")
        if not there:
            connection.execute(SCHEMA)
        if settings.grant:
            connection.execute(GRANTS.format(role=f'"{settings.grant}"').encode())
    _show("the spool is there already" if there else "an empty spool is made")
    if settings.grant:
        _show(f"{settings.grant} may use it")
    return Exit.OK


def _check(connection: Connection, settings: SpoolSettings) -> int:
    """Say what a message's `ok` means here, and what is wrong. Exit code 1 when something is."""
    ask = _ask(connection)
    durability = Durability(ask)
    problems = durability.problems(settings.spool_durable)
    if not ask("SELECT 1 WHERE to_regclass('gocm.meta') IS NOT NULL"):
        problems.append("there is no spool: gocm spool init")
    elif problem := schema.unfit(*ask("SELECT format, works_with FROM gocm.meta")[0]):
        problems.append(f"the spool is not for this version: {problem}")
    for problem in problems:
        _show(f"wrong: {problem}")
    where = "on two machines" if durability.standby else "on the server's disk"
    if not problems:
        _show(f"good: what is answered with ok is {where}")
    return Exit.FAILED if problems else Exit.OK


def _ask(connection: Connection) -> schema.Ask:
    return lambda statement: connection.execute(statement.encode()).fetchall()


# Those who may use the spool, but do not own it.
_ROLES = """
SELECT DISTINCT grantee FROM information_schema.role_table_grants
WHERE table_schema = 'gocm' AND table_name = 'pack' AND privilege_type = 'INSERT' AND grantee <> current_user
"""


def _upgrade(connection: Connection, _: SpoolSettings) -> int:
    """Make the spool one of today's format. First what is new is added, while nodes of the format before go on; once
    all nodes are new ones, and this is done again, older ones are refused.
    """
    with connection.transaction():
        [[found]] = connection.execute("SELECT format FROM gocm.meta FOR UPDATE")
        connection.execute("SET LOCAL search_path = gocm")
        for number in range(found, schema.FORMAT):
            connection.execute(schema.STEPS[number].encode())
        for (role,) in connection.execute(_ROLES).fetchall():  # what is new is theirs as well
            connection.execute(GRANTS.format(role=f'"{role}"').encode())
        connection.execute("UPDATE meta SET format = greatest(format, %s)", (schema.FORMAT,))
        [[oldest]] = connection.execute(
            "SELECT coalesce(min(format), %s) FROM node WHERE lease > now()", (schema.FORMAT,)
        )
        connection.execute("UPDATE meta SET works_with = greatest(works_with, %s)", (min(oldest, schema.FORMAT),))
    _show(f"the spool has format {max(found, schema.FORMAT)}")
    if oldest < schema.FORMAT:
        _show(f"nodes of format {oldest} run: replace them, and do this again")
    return Exit.OK


def _nodes(connection: Connection, _: SpoolSettings) -> int:
    """List the nodes: number, name, whether its lease lasts, open tokens of its packs, version, since when."""
    [[moving]] = connection.execute("SELECT moving FROM gocm.meta")
    if moving:
        _show(f"the spool is, or was, moved {moving}: no node may start on it")
    rows = connection.execute(
        "SELECT node.id, name, CASE WHEN lease > now() THEN 'alive' WHEN departed THEN 'left' ELSE 'gone' END,"
        " coalesce(sum(open), 0), version,"
        " to_char(joined, 'YYYY-MM-DD HH24:MI:SS') FROM gocm.node LEFT JOIN gocm.pack ON pack.node = node.id AND"
        " NOT done GROUP BY node.id ORDER BY node.id"
    )
    for row in [("number", "name", "is", "to send", "version", "since"), *rows]:
        _show(*row)
    [[waiting]] = connection.execute("SELECT coalesce(sum(open), 0) FROM gocm.pack WHERE node = 0 AND NOT done")
    if waiting and not moving:
        _show(f"{waiting} tokens are nobody's, and taken by who is free")
    return Exit.OK


Action = Callable[[Connection, SpoolSettings], int]
ACTIONS: dict[str, Action | None] = {
    "init": _init,
    "check": _check,
    "nodes": _nodes,
    "upgrade": _upgrade,
    "move": None,
}
