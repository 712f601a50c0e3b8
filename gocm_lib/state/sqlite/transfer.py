"""What a spool in a file gives to another kind of Store, and takes from it (module transfer)."""

import os
from collections.abc import Iterable
from itertools import count

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.state.sqlite.database import BESIDE, open_spool
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
    Row,
    columns,
    upto,
)


class File:
    """A spool in a file, whole and locked: no GoCM runs on it."""

    def __init__(self, path: str) -> None:
        """Raises Fatal."""
        self.path = path
        self._db, self._held = open_spool(path)

    def close(self) -> None:
        """Let others have it."""
        self._db.close()
        os.close(self._held)

    def packs_after(self, after: int) -> Packs:
        """The next packs with ids above `after`."""
        rows = self._rows(f"SELECT {columns(PACK)} FROM pack WHERE id > ? ORDER BY id LIMIT ?", after, PACKS)
        if not rows:
            return Packs([], [], [], [])
        ids = rows[0][0], rows[-1][0]
        bodies = self._rows("SELECT text FROM body WHERE id BETWEEN ? AND ? ORDER BY id", *ids)
        jobs = upto(after, rows)
        singles = self._rows(f"SELECT {columns(SINGLE)} FROM single WHERE job > ? AND job <= ?", *jobs)
        ended = self._rows(f"SELECT {columns(ENDED)} FROM ended WHERE pack BETWEEN ? AND ?", *ids)
        return Packs(rows, [body for (body,) in bodies], singles, ended)

    def rest(self) -> Rest:
        """All but the packs."""
        newest: dict[str, int] = dict(self._rows("SELECT name, seq FROM sqlite_sequence"))
        return Rest(
            self._rows(f"SELECT {columns(COUNTER)} FROM counter"),
            self._rows(f"SELECT {columns(ANSWERS)} FROM answers"),
            self._rows(f"SELECT {columns(KEY)} FROM idempotency"),
            {which: self._rows(f"SELECT seq, {columns(names)} FROM {which}") for which, names in LISTED.items()},
            {which: newest.get(which, 0) for which in LISTED},
            self._rows("SELECT job FROM forgotten")[0][0],
            {table: self._rows(f"SELECT {columns(names)} FROM {table}") for table, names in NOTES.items()},
        )

    def _rows(self, statement: str, *values: object) -> list[Row]:
        return self._db.execute(statement, values).fetchall()

    def retire(self) -> str:
        """All of it is elsewhere: let nobody send it again. Returns the file's name from now on."""
        self._db.execute("PRAGMA journal_mode = DELETE")
        self.close()
        names = (f"{self.path}.moved{number if number > 1 else ''}" for number in count(1))
        place = next(name for name in names if not os.path.lexists(name))  # others of this name were moved before
        os.rename(self.path, place)
        return place


class NewFile:
    """A spool in a file in the making: it is at its place when it is whole."""

    def __init__(self, path: str) -> None:
        """Raises Fatal where there is a spool already."""
        if os.path.exists(path):
            raise Fatal(f"there is a spool at {path}: move it away, or give another path", Exit.SPOOL_UNWRITABLE)
        self.path = path
        self._making = path + ".moving"
        # Of a move that was interrupted; a journal that stayed would be taken for the new file's, and spoil it.
        for suffix in ("", ".new", *BESIDE):
            if os.path.exists(self._making + suffix):
                os.unlink(self._making + suffix)
        self._db, self._held = open_spool(self._making)

    def take(self, packs: Packs) -> None:
        """Take packs."""
        self._db.execute("BEGIN")
        ids = [row[0] for row in packs.rows]
        self._put("body", ("id", "text"), zip(ids, packs.bodies))
        self._put("pack", PACK, packs.rows)
        self._put("single", SINGLE, packs.singles)
        self._put("ended", ENDED, packs.ended)
        self._db.execute("COMMIT")

    def take_rest(self, rest: Rest) -> None:
        """Take all else, put the spool in its place."""
        self._db.execute("BEGIN")
        self._put("counter", COUNTER, rest.counters)
        self._put("answers", ANSWERS, rest.answers)
        self._put("idempotency", KEY, rest.keys)
        for which, names in LISTED.items():
            self._put(which, ("seq", *names), rest.listed[which])
            self._db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (which,))
            self._db.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (which, rest.newest[which]))
        self._db.execute("UPDATE forgotten SET job = ?", (rest.forgotten,))
        for table, names in NOTES.items():
            self._put(table, names, rest.notes[table])
        self._db.execute("COMMIT")
        self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()
        os.close(self._held)
        os.rename(self._making, self.path)
        directory = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        for suffix in (".lock", ".reserve"):
            if os.path.exists(self._making + suffix):
                os.unlink(self._making + suffix)

    def _put(self, table: str, names: tuple[str, ...], rows: Iterable[Row]) -> None:
        marks = ", ".join("?" * len(names))
        self._db.executemany(f"INSERT INTO {table} ({columns(names)}) VALUES ({marks})", rows)
