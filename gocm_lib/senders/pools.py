"""Pools of all upstreams in one sender, and the diallers that make their connections. Each is made when it is needed.

A sender that has many upstreams, of which most are idle, is not to look at each of them in every turn: `live` has those
with something to do.
"""

from collections import deque
from collections.abc import Callable, Mapping

from gocm_lib.senders.dialler import Dialler
from gocm_lib.senders.pool import Pool
from gocm_lib.senders.streams import Channel
from gocm_lib.senders.upstream import DialError, Upstream


class Pools:
    """For the loop's thread only."""

    def __init__(self, upstreams: Mapping[str, Upstream], most: int, ring: Callable[[], None]) -> None:
        """At most `most` requests in flight to each upstream; `ring` wakes the loop when something was dialled."""
        self.upstreams = upstreams
        self.live: dict[str, Pool] = {}
        self.dialled: deque[tuple[Pool, Channel | DialError]] = deque()  # and not dealt with yet
        self._most, self._ring = most, ring
        self._pools: dict[str, Pool] = {}
        self._diallers: dict[str, Dialler] = {}

    def __len__(self) -> int:
        """How many requests wait for a connection."""
        return sum(map(len, self.live.values()))

    def wake(self, name: str) -> Pool:
        """An upstream's pool, which has something to do."""
        if name not in self._pools:
            self._pools[name] = made = Pool(self.upstreams[name], self._most)
            self._diallers[name] = Dialler(made, self._note)
        self.live[name] = self._pools[name]
        return self.live[name]

    def of(self, channel: Channel) -> Pool:
        """The pool that a connection belongs to."""
        return next(pool for pool in self.live.values() if pool.places.is_ours(channel))

    def dial(self, pool: Pool, now: float) -> None:
        """Make as many connections as a pool wants."""
        http2 = pool.places.offers_http2(now)
        for _ in range(pool.dials_wanted(now)):
            self._diallers[pool.upstream.name].dial(http2)

    def _note(self, pool: Pool, made: Channel | DialError) -> None:
        self.dialled.append((pool, made))
        self._ring()

    def take_dialled(self) -> tuple[Pool, Channel | DialError]:
        """The first of `dialled`."""
        pool, made = self.dialled.popleft()
        self._diallers[pool.upstream.name].done()
        return pool, made

    def rest(self) -> None:
        """Look no more at those that have nothing to do."""
        self.live = {name: pool for name, pool in self.live.items() if not pool.is_idle}
