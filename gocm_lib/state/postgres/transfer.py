"""What a spool in PostgreSQL takes from a file and gives to one (module transfer). `move` is the command.

No node runs meanwhile, and none starts: the spool says that it is being moved. Into PostgreSQL packs are nobody's, and
taken by any node. How far a move has come is kept with each part of it, so one that was interrupted, by whatever, goes
on where it was. When all is there the file is renamed. Out of PostgreSQL everything is copied into a new file, which
takes its place when it is whole; a move that was interrupted begins again.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import errors

from gocm_lib.config import spool_address
from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.state.postgres.database import Row, clean
from gocm_lib.state.postgres.report import GAUGES, key_of
from gocm_lib.state.postgres.spool import ROW
from gocm_lib.state.sqlite.transfer import File, NewFile
from gocm_lib.state.store import FAILED
from gocm_lib.state.transfer import (
    ANSWERS,
    COUNTER,
    ENDED,
    KEY,
    LISTED,
    NOTES,
    PACK,
    PACKS,
    SINGLE,
    Packs,
    Rest,
    columns,
    upto,
)

Connection = psycopg.Connection[Row]
Tell = Callable[[str], None]


def move(here: str, there: str, connect: Callable[[str], Connection], tell: Tell) -> None:
    """Move a spool from a path to an address, or the other way round. `connect` makes a connection of an address,
    `tell` says how it goes. Raises Fatal and psycopg.Error.
    """
    if spool_address.is_address(here) == spool_address.is_address(there):
        raise Fatal("one of the two must be a path, and the other the URL of a spool in PostgreSQL", Exit.USAGE)
    if spool_address.is_address(there):
        if not os.path.exists(here):
            raise Fatal(f"there is no spool at {here}", Exit.USAGE)
        with contextlib.closing(connect(there)) as connection:
            _move_in(File(here), connection, tell)
        return
    with contextlib.closing(connect(here)) as connection:
        _move_out(connection, there, tell)


# ----------------------------------------------------------------------------------------------------------------- in


def _move_in(file: File, connection: Connection, tell: Tell) -> None:
    source = os.path.abspath(file.path)
    _begin(connection, f"from {source}")
    connection.execute("INSERT INTO moved (source) VALUES (%s) ON CONFLICT DO NOTHING", (source,))
    [[upto, done]] = connection.execute("SELECT upto, done FROM moved WHERE source = %s", (source,))
    count = 0
    while not done and (found := file.packs_after(upto)).rows:
        try:
            with connection.transaction():
                _take(connection, found)
                connection.execute("UPDATE moved SET upto = %s WHERE source = %s", (found.rows[-1][0], source))
        except errors.UniqueViolation:
            if not upto:  # nothing of it is there but what was there before: nodes may start
                connection.execute("UPDATE meta SET moving = ''")
            raise Fatal("the spool has messages of that file already: was a copy of it moved before?") from None
        upto = found.rows[-1][0]
        count += len(found.rows)
        tell(f"{count} packs moved")
    if not done:
        with connection.transaction():
            _take_rest(connection, file.rest())
            connection.execute("UPDATE moved SET done = true WHERE source = %s", (source,))
    connection.execute("UPDATE meta SET moving = ''")
    tell(f"all is moved; the file is {file.retire()} now")


def _put(connection: Connection, table: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with connection.cursor().copy(f"COPY {table} ({columns(names)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _take(connection: Connection, found: Packs) -> None:
    done = PACK.index("open")
    _put(connection, "body", ("id", "text"), [(row[0], body.encode()) for row, body in zip(found.rows, found.bodies)])
    _put(connection, "pack", (*PACK, "node", "done"), [(*row, 0, row[done] == 0) for row in found.rows])
    _put(connection, "single", (*SINGLE, "node"), [(*_cleaned(row, SINGLE), 0) for row in found.singles])
    _put(connection, "ended", ENDED, [(*row[:-1], clean(row[-1])) for row in found.ended])
    sums: dict[tuple[str, str], int] = {}

    def count(name: str, value: int, upstream: str = "") -> None:
        sums[name, upstream] = sums.get((name, upstream), 0) + value

    for row, body in zip(found.rows, found.bodies):
        named = dict(zip(PACK, row))
        count("jobs", named["jobs"])
        count("open", named["open"], named["upstream"])
        count("finished", named["finished"])
        count("over", named["size"] - named["open"])
        count("bytes", len(body.encode()) + ROW)
    failed = sum(row[SINGLE.index("state")] == FAILED for row in found.singles)
    count("failed", failed)
    count("over", -failed)
    _put(connection, "tally", ("node", *COUNTER), [(0, name, up, "", value) for (name, up), value in sums.items()])


def _cleaned(row: Row, names: Sequence[str]) -> Row:
    """A row as the server takes it."""
    return tuple(
        bool(value) if name in ("waits", "wave") else clean(value) if isinstance(value, str) else value
        for name, value in zip(names, row)
    )


def _take_rest(connection: Connection, rest: Rest) -> None:
    _put(connection, "tally", ("node", *COUNTER), [(0, *row) for row in rest.counters])
    _put(connection, "answers", ANSWERS, rest.answers)
    added = 0
    for row in rest.keys:
        cursor = connection.execute(
            f"INSERT INTO idempotency ({columns(KEY)}) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", row
        )
        added += cursor.rowcount
    gauges = [("keys", "", "", added)]
    for which, names in LISTED.items():
        gauges.append(("listed", "", which, _take_list(connection, which, names, rest)))
    _put(connection, "tally", ("node", *COUNTER), [(0, *row) for row in gauges])
    connection.execute("UPDATE forgotten SET job = greatest(job, %s)", (rest.forgotten,))
    for table, names in NOTES.items():
        marks = ", ".join(["%s"] * len(names))
        with connection.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {table} ({columns(names)}) VALUES ({marks}) ON CONFLICT DO NOTHING".encode(),
                rest.notes[table],
            )


def _take_list(connection: Connection, which: str, names: Sequence[str], rest: Rest) -> int:
    """Add a list's entries to what there is. Into a list that had none they keep their numbers, which readers know."""
    [[newest]] = connection.execute("SELECT newest FROM list WHERE name = %s FOR UPDATE", (which,))
    added = 0
    marks = ", ".join(["%s"] * (len(names) + 2))
    for number, row in enumerate(sorted(rest.listed[which]), newest + 1):
        seq = number if newest else row[0]
        values = _cleaned(row[1:], names)
        added += connection.execute(
            f"INSERT INTO {which} (seq, key, {columns(names)}) VALUES ({marks}) ON CONFLICT DO NOTHING",
            (seq, key_of(str(row[1])), *values),
        ).rowcount
    most = newest + len(rest.listed[which]) if newest else rest.newest[which]
    connection.execute("UPDATE list SET newest = greatest(newest, %s) WHERE name = %s", (most, which))
    return added


# ---------------------------------------------------------------------------------------------------------------- out


def _begin(connection: Connection, what: str) -> bool:
    """Let no node start. Whether this move was begun before. Raises Fatal while a node runs."""
    with connection.transaction():
        [[moving]] = connection.execute("SELECT moving FROM meta FOR UPDATE")
        if moving not in ("", what):
            raise Fatal(f"the spool is, or was, moved {moving}", Exit.USAGE)
        if connection.execute("SELECT 1 FROM node WHERE lease > now()").fetchone():
            raise Fatal("nodes run on the spool: stop all of them first (gocm spool nodes)", Exit.SPOOL_IN_USE)
        connection.execute("UPDATE meta SET moving = %s", (what,))
    return bool(moving)


def _move_out(connection: Connection, path: str, tell: Tell) -> None:
    target = os.path.abspath(path)
    if _begin(connection, f"to {target}") and os.path.exists(target):
        tell(f"all is moved already, to {target}")
        return
    file, after, count = NewFile(target), 0, 0
    while (found := _packs_after(connection, after)).rows:
        after = found.rows[-1][0]
        file.take(found)
        count += len(found.rows)
        tell(f"{count} packs moved")
    file.take_rest(_rest(connection))
    tell(f"all is moved to {target}; no node starts on the old spool any more")


def _packs_after(connection: Connection, after: int) -> Packs:
    def rows(statement: str, *values: object) -> list[Row]:
        return connection.execute(statement.encode(), values, binary=True).fetchall()

    found = rows(f"SELECT {columns(PACK)} FROM pack WHERE id > %s ORDER BY id LIMIT %s", after, PACKS)
    ids = [row[0] for row in found]
    bodies = rows("SELECT text FROM body WHERE id = ANY(%s::bigint[]) ORDER BY id", ids)
    if not found:
        return Packs([], [], [], [])
    singles = rows(f"SELECT {columns(SINGLE)} FROM single WHERE job > %s AND job <= %s", *upto(after, found))
    ended = rows(f"SELECT {columns(ENDED)} FROM ended WHERE pack = ANY(%s::bigint[])", ids)
    return Packs(found, [body.decode() for (body,) in bodies], singles, ended)


def _rest(connection: Connection) -> Rest:
    def rows(statement: str, *values: object) -> list[Row]:
        return connection.execute(statement.encode(), values, binary=True).fetchall()

    sums = "(SELECT * FROM counter UNION ALL SELECT * FROM tally) AS sides"
    counters = rows(
        f"SELECT name, upstream, reason, sum(value)::bigint FROM {sums} WHERE name <> ALL(%s::text[])"
        " GROUP BY 1, 2, 3 HAVING sum(value) <> 0",
        list(GAUGES),
    )
    answers = rows(
        "SELECT upstream, minute, sum(answers)::bigint, sum(unregistered)::bigint,"
        " coalesce(min(first) FILTER (WHERE first > 0), 0)::bigint FROM answers GROUP BY 1, 2"
    )
    return Rest(
        counters,
        answers,
        rows(f"SELECT {columns(KEY)} FROM idempotency"),
        {which: rows(f"SELECT seq, {columns(names)} FROM {which}") for which, names in LISTED.items()},
        dict(rows("SELECT name, newest FROM list")),
        rows("SELECT max(job) FROM forgotten")[0][0],
        {table: rows(f"SELECT {columns(names)} FROM {table}") for table, names in NOTES.items()},
    )
