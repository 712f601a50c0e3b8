"""The run report in PostgreSQL: counters, and the tokens that an application must replace or delete (module
sqlite/report says what they promise). The caller owns the transaction.

What a transaction counts it appends (Database.count); how much there is of everything is counted so, too, by names of
its own (GAUGES). Whoever adds to a list, or takes from it, holds that list's row until the commit.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from gocm_lib.state import admission
from gocm_lib.state.contract import Count, Entry, Invalid, Replaced, Unregistered
from gocm_lib.state.postgres.database import Database, clean
from gocm_lib.state.waves import BEFORE, RECENT, Bucket, Tally

# What is counted like an event, by how much it becomes more or less: store.Totals. Of each upstream its open tokens, of
# each list its entries; and the bytes of bodies, for the size of the tables hardly shrinks when they are emptied.
GAUGES = ("jobs", "open", "failed", "over", "finished", "keys", "listed", "bytes")
LATEST = 10  # entries of each list that are remembered to be shown
_ENTRY = {
    "canonical": ("original, canonical", Replaced),
    "notregistered": ("token, wave", Unregistered),
    "invalid": ("token, reason", Invalid),
}
_COLUMNS = {
    "canonical": {"original": "text", "canonical": "text", "upstream": "text"},
    "notregistered": {"token": "text", "upstream": "text", "wave": "bool"},
    "invalid": {"token": "text", "reason": "text", "upstream": "text"},
    "held": {"token": "text", "upstream": "text"},
}
_ADD = """
WITH given AS (SELECT DISTINCT ON (key) * FROM unnest({arrays}) WITH ORDINALITY AS rows ({columns}, place)
    ORDER BY key, place),
new AS (SELECT given.*, row_number() OVER (ORDER BY place) AS number FROM given
    WHERE NOT EXISTS (SELECT 1 FROM {list} AS there WHERE there.key = given.key)),
last AS (UPDATE list SET newest = newest + (SELECT count(*) FROM new) WHERE name = %s
    RETURNING newest - (SELECT count(*) FROM new) AS before),
added AS (INSERT INTO {list} (seq, {columns}) SELECT before + number, {columns} FROM new, last WHERE number <= %s
    RETURNING 1)
SELECT (SELECT count(*) FROM new), (SELECT count(*) FROM added)
"""
_SUMS = """
SELECT name, upstream, reason, coalesce(sum(value) FILTER (WHERE node = %(node)s), 0)::bigint,
    coalesce(sum(value) FILTER (WHERE node <> %(node)s), 0)::bigint
FROM (SELECT * FROM counter UNION ALL SELECT * FROM tally) AS sides GROUP BY 1, 2, 3
"""
FOLD = (
    "WITH gone AS (DELETE FROM tally RETURNING *)"
    " INSERT INTO counter SELECT node, name, upstream, reason, sum(value) FROM gone GROUP BY 1, 2, 3, 4"
    " ON CONFLICT (node, name, upstream, reason) DO UPDATE SET value = counter.value + excluded.value",
    "WITH gone AS (DELETE FROM answers RETURNING *), newest AS (SELECT max(minute) AS minute FROM gone)"
    " INSERT INTO answers SELECT upstream, gone.minute, sum(answers), sum(unregistered),"
    " coalesce(min(first) FILTER (WHERE first > 0), 0) FROM gone, newest"
    f" WHERE gone.minute > newest.minute - {RECENT + BEFORE} GROUP BY 1, 2",
)


def sums(db: Database) -> tuple[dict[Count, int], dict[Count, int]]:
    """What was counted, by this node and by all others."""
    rows = db.ask(_SUMS, {"node": db.node})
    return {Count(*row[:3]): row[3] for row in rows}, {Count(*row[:3]): row[4] for row in rows}


def key_of(token: str) -> bytes:
    """What tells a token from others, and is never too long for an index."""
    return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _only(upstream: str) -> tuple[str, tuple[str, ...]]:
    """The end of a condition for the entries of an upstream ("": of all), and its values."""
    return (" AND upstream = %s", (upstream,)) if upstream else ("", ())


class RunReport:
    """The counters and the lists, for PostgresStore."""

    def __init__(self, db: Database, longest: int) -> None:
        self.db = db
        self.longest = longest
        self.latest_replaced: deque[Replaced] = deque(maxlen=LATEST)
        self.latest_unregistered: deque[Unregistered] = deque(maxlen=LATEST)

    # ------------------------------------------------------------------------------------------------------- adding

    def add_canonicals(self, found: Sequence[tuple[str, str, str]]) -> None:
        """Report that tokens were replaced. A newer replacement takes the place of an older one."""
        for original, canonical, _ in found:
            self.latest_replaced.appendleft(Replaced(0, original, canonical))
        rows = {key_of(original): (clean(original), clean(canonical), name) for original, canonical, name in found}
        self._hold("canonical")
        gone = self.db.changed(
            "DELETE FROM canonical USING unnest(%b::bytea[], %b::text[]) AS new (key, canonical)"
            " WHERE canonical.key = new.key AND canonical.canonical <> new.canonical RETURNING 1",
            (list(rows), [canonical for _, canonical, _ in rows.values()]),
        )
        self._count("canonical", -gone)
        self._add("canonical", [(key, *row) for key, row in rows.items()])

    def add_unregistered(self, found: Sequence[tuple[str, str, bool, bool]]) -> None:
        """Report that tokens are unregistered: of each its upstream, whether it is of a wave, or one to hold back."""
        for token, _, wave, _ in found:
            self.latest_unregistered.appendleft(Unregistered(0, token, wave))
        if listed := [(key_of(token), clean(token), name, wave) for token, name, wave, hold in found if not hold]:
            self._hold("notregistered")
            self._add("notregistered", listed)
        if held := [(key_of(token), clean(token), name) for token, name, _, hold in found if hold]:
            self._hold("held")
            self._add("held", held)

    def add_invalid(self, found: Sequence[tuple[str, str, str]]) -> None:
        """Report what is no token of ours, for one of outcome.INVALID."""
        self._hold("invalid")
        self._add("invalid", [(key_of(token), clean(token), reason, name) for token, reason, name in found])

    def _hold(self, which: str) -> None:
        """Nobody else changes this list until our commit."""
        self.db.tell("SELECT 1 FROM list WHERE name = %s FOR UPDATE", (which,))

    def _add(self, which: str, rows: Sequence[Sequence[object]], unbounded: bool = False) -> None:
        """Add entries, each its key and its columns, those that are not there, as far as there is room."""
        types = {"key": "bytea", **_COLUMNS[which]}
        room = (1 << 62) if unbounded else max(0, self.longest - self.length(which))
        arrays = ", ".join(f"%b::{kind}[]" for kind in types.values())
        statement = _ADD.format(list=which, columns=", ".join(types), arrays=arrays)
        columns = [list(column) for column in zip(*rows)]
        [[found, added]] = self.db.ask(statement, (*columns, which, room))
        self._count(which, added)
        if found > added:
            self.db.count({Count("dropped", reason="notregistered" if which == "held" else which): found - added})

    def length(self, which: str) -> int:
        """How many entries a list has."""
        [[count]] = self.db.ask(
            "SELECT coalesce(sum(value), 0)::bigint FROM (SELECT * FROM counter UNION ALL SELECT * FROM tally) AS sides"
            " WHERE name = 'listed' AND reason = %s",
            (which,),
        )
        return int(count) + self.db.counted[Count("listed", reason=which)]

    def _count(self, which: str, more: int) -> None:
        if more:
            self.db.count({Count("listed", reason=which): more})

    # ------------------------------------------------------------------------------------------------------ reading

    def newest(self, which: str) -> int:
        """The highest number that an entry of a list has or had; 0: none."""
        [[newest]] = self.db.ask("SELECT newest FROM list WHERE name = %s", (which,))
        return int(newest)

    def page(self, which: str, after: int, limit: int, upstream: str) -> list[Entry]:
        """Up to `limit` entries of a list with numbers above `after`, those of an upstream ("": of all)."""
        (columns, kind), (only, values) = _ENTRY[which], _only(upstream)
        statement = f"SELECT seq, {columns} FROM {which} WHERE seq > %s{only} ORDER BY seq LIMIT %s"
        rows = self.db.ask(statement, (after, *values, limit))
        entries: Iterable[Any] = (kind(*row) for row in rows)
        return admission.page(entries)

    def borrow(self, which: str) -> bool:
        """Have a list for this node alone, so that no entry is handed out by two. Whether that can be: not while a node
        has it that is there, for as long as the slowest reader may take.
        """
        return bool(
            self.db.changed(
                "UPDATE list SET reader = %(node)s, until = now() + interval '15 minutes'"
                " WHERE name = %(which)s AND (reader IN (0, %(node)s) OR until < now() OR NOT EXISTS"
                " (SELECT 1 FROM node WHERE id = reader AND lease > now())) RETURNING 1",
                {"node": self.db.node, "which": which},
            )
        )

    def hand_out(self, which: str, limit: int, upstream: str) -> list[Entry]:
        """The first entries of a list that we have borrowed; it is given back if there are none."""
        entries = self.page(which, 0, limit, upstream)
        if not entries:
            self.give_back(which)
        return entries

    def give_back(self, which: str) -> None:
        """Let others have a list."""
        self.db.tell("UPDATE list SET reader = 0 WHERE name = %s AND reader = %s", (which, self.db.node))

    def forget(self, which: str, upto: int, upstream: str) -> bool:
        """Delete a list's entries up to number `upto`. Whether there ever was that number; else nothing is deleted."""
        self._hold(which)
        if upto > self.newest(which):
            return False
        only, values = _only(upstream)
        gone = self.db.changed(f"DELETE FROM {which} WHERE seq <= %s{only} RETURNING 1", (upto, *values))
        self._count(which, -gone)
        return True

    def answers(self, upstream: str) -> list[Bucket]:
        """What was kept of an upstream's answers."""
        rows = self.db.ask(
            "SELECT minute, sum(answers)::bigint, sum(unregistered)::bigint,"
            " coalesce(min(first) FILTER (WHERE first > 0), 0)::bigint"
            " FROM answers WHERE upstream = %(upstream)s AND minute > (SELECT max(minute) FROM answers WHERE"
            f" upstream = %(upstream)s) - {RECENT + BEFORE} GROUP BY minute ORDER BY minute",
            {"upstream": upstream},
        )
        return [Bucket(minute, Tally(answers, unregistered), first) for minute, answers, unregistered, first in rows]

    def keep_answers(self, upstream: str, heard: Bucket) -> None:
        """Add to a minute of an upstream's answers."""
        self.db.tell(
            "INSERT INTO answers VALUES (%s, %s, %s, %s, %s)", (upstream, heard.number, *heard.tally, heard.first)
        )

    # -------------------------------------------------------------------------------------------------------- waves

    def mark(self, upstream: str, first: int, hold: bool) -> None:
        """Mark an upstream's entries of the list `notregistered` from this number on as a wave's, or hold them back.
        What was released before has its mark, and stays.
        """
        self._hold("notregistered")
        which = "seq >= %s AND upstream = %s AND NOT wave"
        if not hold:
            self.db.tell(f"UPDATE notregistered SET wave = true WHERE {which}", (first, upstream))
            return
        found = self.db.ask(
            f"DELETE FROM notregistered WHERE {which} RETURNING seq, key, token, upstream", (first, upstream)
        )
        self._count("notregistered", -len(found))
        self._move("held", [row[1:] for row in sorted(found)])

    def release(self, limit: int) -> int:
        """Put up to `limit` entries that are held back into the list, as its newest: who reads by a cursor may be past
        the numbers that they would have had. Returns how many.
        """
        found = self._take_held(limit)
        self._move("notregistered", [(*row[1:], True) for row in found])
        return len(found)

    def discard(self, limit: int) -> int:
        """Forget up to `limit` entries that are held back. Returns how many."""
        return len(self._take_held(limit))

    def _take_held(self, limit: int) -> list[tuple[Any, ...]]:
        self._hold("held")
        found = self.db.ask(
            "DELETE FROM held WHERE seq IN (SELECT seq FROM held ORDER BY seq LIMIT %s)"
            " RETURNING seq, key, token, upstream",
            (limit,),
        )
        self._count("held", -len(found))
        return sorted(found)

    def _move(self, there: str, rows: Sequence[Sequence[object]]) -> None:
        """Add entries that were in another list, whether or not there is room."""
        if rows:
            self._hold(there)
            self._add(there, rows, unbounded=True)
