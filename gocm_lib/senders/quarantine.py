"""A sender's suspects (module suspect), and which of them may take off. No I/O, no clock."""

from collections import deque
from typing import Any

from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import COMPANY, FATAL


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
