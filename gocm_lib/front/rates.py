"""How fast each token's owner may send: a rate in tokens a second, which all nodes that share a spool share.

Owns what each has sent lately. A message of many tokens is taken whole when its owner is not behind, and then he is
behind for as long as it takes at his rate. Pure: `now` is an argument.
"""

import math
import threading

from gocm_lib.front.auth import Grant

MOST = 10_000  # owners that are remembered: more than a file of tokens can have
SOONEST, LATEST = 1, 3600  # seconds that we ask a client to wait


class Rates:
    """For all threads that answer clients. Times are monotonic."""

    def __init__(self) -> None:
        self._free_at: dict[bytes, float] = {}  # when the owner of a token, by its digest, is not behind any more
        self._turn = threading.Lock()

    def take(self, grant: Grant, tokens: int, nodes: int, now: float) -> int:
        """Take a message for so many tokens, at one of so many nodes. Returns 0, or after how many seconds to come
        again: it is not taken.
        """
        if not grant.rate:
            return 0
        with self._turn:
            free_at = max(self._free_at.get(grant.digest, now), now - 1.0)  # who was silent has a second's worth
            if free_at > now:
                return min(LATEST, max(SOONEST, math.ceil(free_at - now)))
            if len(self._free_at) >= MOST:
                self._free_at.clear()
            self._free_at[grant.digest] = free_at + tokens * nodes / grant.rate
        return 0
