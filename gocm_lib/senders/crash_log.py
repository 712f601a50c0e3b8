"""The crash log of a sender: what it has in flight, for the supervisor to read when the sender has died. No I/O."""

from collections.abc import Iterable, MutableSequence, Sequence

from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import InFlight


class CrashLog:
    """An array of whole numbers in shared memory, three for each run of tokens in flight. The sender writes it; the
    supervisor may read it once the sender is dead, whenever that happened.
    """

    def __init__(self, cells: MutableSequence[int]) -> None:
        self._cells = cells
        self._used = 0  # cells that have ever been
        self._free: list[int] = []

    def room(self) -> int:
        """How many runs can be noted."""
        return (len(self._cells) - self._used) // 3 + len(self._free)

    def begin(self, part: Slice) -> list[int]:
        """Note a request that is being sent, as far as there is room; returns the numbers for `end`."""
        # Each run: those of one flight may have others between them, which are elsewhere and no suspects.
        return [
            self._note(job, first, first + len(tokens) - 1)
            for job, first, _, tokens in part.runs
            if self._free or self._used < len(self._cells)
        ]

    def _note(self, job: int, low: int, high: int) -> int:
        if self._free:
            place = self._free.pop()
        else:
            place, self._used = self._used, self._used + 3
        self._cells[place + 1] = low
        self._cells[place + 2] = high
        self._cells[place] = job  # last: this makes it count
        return place

    def end(self, places: Iterable[int]) -> None:
        """Strike out what `begin` noted."""
        for place in places:
            self._cells[place] = 0
            self._free.append(place)

    @staticmethod
    def read(cells: Sequence[int]) -> list[InFlight]:
        """What the owner of these cells had in flight when it died."""
        return [InFlight(*cells[place : place + 3]) for place in range(0, len(cells), 3) if cells[place]]
