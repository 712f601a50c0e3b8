"""When each connection is to be looked at next. Pure.

Times are rounded up to a grain, and connections kept by it: ten thousand that come and go cost no sorting, and one that
has gone leaves nothing behind.
"""

import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

GRAIN = 0.005  # seconds
Item = TypeVar("Item", bound=Hashable)


class Deadlines(Generic[Item]):
    """Items and their times, one for each."""

    def __init__(self) -> None:
        self._grains: dict[int, set[Item]] = {}
        self._order: list[int] = []  # of the grains, a heap; some of them may be gone
        self._known: dict[Item, int] = {}  # the grain of each item

    def __len__(self) -> int:
        return len(self._known)

    def set(self, item: Item, when: float) -> None:
        """This is the item's time, whatever it was before."""
        self.drop(item)
        grain = math.ceil(when / GRAIN)
        if grain not in self._grains:
            self._grains[grain] = set()
            heapq.heappush(self._order, grain)
        self._grains[grain].add(item)
        self._known[item] = grain

    def drop(self, item: Item) -> None:
        """The item has no time any more."""
        grain = self._known.pop(item, None)
        if grain is not None:
            self._grains[grain].discard(item)

    def due(self, now: float) -> list[Item]:
        """The items whose time has come; they have none any more."""
        found: list[Item] = []
        while self._order and self._order[0] * GRAIN <= now:
            found += self._grains.pop(heapq.heappop(self._order))
        for item in found:
            del self._known[item]
        return found

    def next_moment(self) -> float:
        """When something may be due; infinity: never."""
        while self._order and not self._grains[self._order[0]]:
            del self._grains[heapq.heappop(self._order)]
        return self._order[0] * GRAIN if self._order else math.inf
