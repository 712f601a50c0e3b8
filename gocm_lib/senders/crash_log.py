"""The black box of a sender: what it has in the air, for the supervisor to read when it has died. No I/O, no clock."""

from collections.abc import Iterable, MutableSequence, Sequence

from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import Aloft


class BlackBox:
    """What a sender has in the air, on shared memory: an array of three whole numbers for each run of tokens there may
    be. One process writes it; another may read it once the first is dead, at whatever moment that was.
    """

    def __init__(self, cells: MutableSequence[int]) -> None:
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
