"""What moves from one kind of Store to another (`gocm spool move`): packs as they are, then all that is counted once.

Whoever gives and whoever takes each does it with statements of its own; this is what they hand over. Columns are named
as both have them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PACKS = 500  # that are handed over at once
Row = tuple[Any, ...]

PACK = ("id", "last", "upstream", "lane", "since", "size", "fresh", "open", "jobs", "finished", "ended", "gone")
SINGLE = (
    *("job", "n", "upstream", "rank", "due_at", "waits", "attempts", "charged", "deaths", "since", "state"),
    *("failure", "reason", "canonical"),
)
ENDED = ("pack", "first", "positions", "at", "ids")
COUNTER = ("name", "upstream", "reason", "value")
ANSWERS = ("upstream", "minute", "answers", "unregistered", "first")
KEY = ("job", "key", "body", "accepted_at")
NOTES = {
    "label": ("job", "name", "tag", "upstream"),
    "later": ("pack", "due", "upstream"),
    "hold": ("upstream", "since", "name"),
    "meaning": ("upstream", "dialect", "project"),
}
# The lists of the report, without the number of an entry, which comes first; the first of these is the token.
LISTED = {
    "canonical": ("original", "canonical", "upstream"),
    "notregistered": ("token", "upstream", "wave"),
    "invalid": ("token", "reason", "upstream"),
    "held": ("token", "upstream"),
}


class Packs(NamedTuple):
    """Some packs in the order of their ids: their rows, their bodies and Ends, and Singles (see `upto`)."""

    rows: Sequence[Row]
    bodies: Sequence[str]
    singles: Sequence[Row]
    ended: Sequence[Row]


class Rest(NamedTuple):
    """What is not a pack's. `newest` has the highest number that an entry of each list has or had."""

    counters: Sequence[Row]
    answers: Sequence[Row]
    keys: Sequence[Row]
    listed: Mapping[str, Sequence[Row]]
    newest: Mapping[str, int]
    forgotten: int
    notes: Mapping[str, Sequence[Row]]


def upto(after: int, rows: Sequence[Row]) -> tuple[int, int]:
    """Which jobs' Singles go with the packs after `after`, of which these are the rows: above the first of the two, up
    to the second. Packs may have ids between each other's, so it is not by packs; each goes with one part.
    """
    return after, rows[-1][0] if len(rows) == PACKS else 1 << 62


def columns(names: Sequence[str]) -> str:
    """Columns as SQL lists them."""
    return ", ".join(names)
