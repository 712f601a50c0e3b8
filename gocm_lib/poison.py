"""Which message makes senders die? The black box of a sender, the rule of suspicion, the quarantine. No I/O, no clock.

A message that ends its sender would end the next one too, and so for ever. So each sender notes in shared memory what
it has in the air, the supervisor reads the notes of one that died, and a token that is found there is a suspect. But
most senders die for other reasons, with hundreds of innocent tokens in the air. So suspects are tried in ever smaller
company, and nobody is condemned for a death that another could have caused:

    died with it | is sent again
    once         | with everything else, but at most COMPANY suspects at a time in a sender
    twice        | alone in its sender: nothing else in the air
    FATAL times  | not again: it is buried

A suspect that comes to ground, whatever the answer, is innocent.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from ctypes import Array
from typing import Any, NamedTuple

from gocm_lib.job import Slice

FATAL = 3  # deaths
COMPANY = 32  # suspects, or shared requests of so many, that a sender has in the air at once
UNREST = 10.0  # seconds: when more senders died in these than one message explains, somebody is killing them


class Aloft(NamedTuple):
    """A flight as the black box knows it, or a part of one: from which to which of a job's tokens."""

    job: int
    low: int
    high: int


class BlackBox:
    """What a sender has in the air, on shared memory: an array of three whole numbers for each run of tokens there may
    be. One process writes it; another may read it once the first is dead, at whatever moment that was.
    """

    def __init__(self, cells: "Array[int]") -> None:
        self._cells = cells
        self._used = 0  # cells that have ever been
        self._free: list[int] = []

    def take_off(self, part: Slice) -> list[int]:
        """Note a flight; the numbers to land it with."""
        # Each run: those of one flight may have others between them, which are elsewhere and no suspects.
        return [self._note(job, first, first + len(tokens) - 1) for job, first, _, tokens in part.runs]

    def _note(self, job: int, low: int, high: int) -> int:
        if self._free:
            place = self._free.pop()
        else:
            place, self._used = self._used, self._used + 3
        self._cells[place + 1] = low
        self._cells[place + 2] = high
        self._cells[place] = job  # last: this makes it count
        return place

    def land(self, places: Iterable[int]) -> None:
        for place in places:
            self._cells[place] = 0
            self._free.append(place)

    @staticmethod
    def read(cells: Sequence[int]) -> list[Aloft]:
        """The flights that the owner of these cells had in the air when it died."""
        return [Aloft(*cells[place : place + 3]) for place in range(0, len(cells), 3) if cells[place]]


def unrest(deaths: Iterable[float], now: float) -> bool:
    """Whether so many senders died lately, other than with a token alone in the air, that no single message explains
    it. Nobody is condemned then: it would be an innocent that was hit twice by chance.
    """
    return sum(now - UNREST < death <= now for death in deaths) >= FATAL


class Quarantine:
    """A sender's suspects, and the rule which of them may take off. A flight is whatever the sender means by it."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Slice, Any]] = deque()
        self._flying: dict[tuple[int, int], int] = {}  # job and first token: with how many deaths

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def grounds_others(self) -> bool:
        """Whether nothing may take off but what `admit` gives: a suspect that must be alone flies, or is the next."""
        if self._waiting and self._waiting[0][0].deaths >= FATAL - 1:
            return True
        return any(deaths >= FATAL - 1 for deaths in self._flying.values())

    def hold(self, part: Slice, flight: Any) -> None:
        """Keep a suspect's flight until it may take off."""
        self._waiting.append((part, flight))

    def admit(self, aloft: int) -> list[Any]:
        """The flights that may take off now, with so many flights in the air already."""
        admitted = []
        while self._waiting:
            part, flight = self._waiting[0]
            alone = part.deaths >= FATAL - 1
            if (alone and (aloft or self._flying)) or (self._flying and self.grounds_others and not alone):
                break
            if len(self._flying) >= COMPANY:
                break
            self._waiting.popleft()
            self._flying[part.job, part.runs[0].first] = part.deaths
            admitted.append(flight)
        return admitted

    def land(self, part: Slice) -> None:
        """A flight has come down, or was given up."""
        self._flying.pop((part.job, part.runs[0].first), None)

    def give_up(self, upstream: str) -> list[Any]:
        """Let go of an upstream's flights that wait, and return them."""
        given_up = [flight for part, flight in self._waiting if part.upstream == upstream]
        self._waiting = deque(entry for entry in self._waiting if entry[0].upstream != upstream)
        return given_up
