"""A sender's suspects (module suspect), and which of them may be sent now. No I/O, no clock."""

from collections import deque
from typing import Any

from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import COMPANY, FATAL


class Quarantine:
    """Suspects that wait, and those in flight. What a flight is, is the sender's business."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Slice, Any]] = deque()
        self._in_flight: dict[tuple[int, int], int] = {}  # job and first token: with how many deaths

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def blocks_others(self) -> bool:
        """Whether only what `admit` returns may be sent: a suspect that must be alone is in flight, or is the next."""
        if self._waiting and self._waiting[0][0].deaths >= FATAL - 1:
            return True
        return any(deaths >= FATAL - 1 for deaths in self._in_flight.values())

    def hold(self, part: Slice, flight: Any) -> None:
        """Keep a suspect's flight until it may be sent."""
        self._waiting.append((part, flight))

    def admit(self, in_flight: int) -> list[Any]:
        """The flights that may be sent now, while this many requests are in flight."""
        admitted = []
        while self._waiting:
            part, flight = self._waiting[0]
            alone = part.deaths >= FATAL - 1
            if (alone and (in_flight or self._in_flight)) or (self._in_flight and self.blocks_others and not alone):
                break
            if len(self._in_flight) >= COMPANY:
                break
            self._waiting.popleft()
            self._in_flight[part.job, part.runs[0].first] = part.deaths
            admitted.append(flight)
        return admitted

    def done(self, part: Slice) -> None:
        """A suspect's flight has ended, or was given up."""
        self._in_flight.pop((part.job, part.runs[0].first), None)

    def give_up(self, upstream: str) -> list[Any]:
        """Let go of an upstream's flights that wait, and return them."""
        given_up = [flight for part, flight in self._waiting if part.upstream == upstream]
        self._waiting = deque(entry for entry in self._waiting if entry[0].upstream != upstream)
        return given_up
