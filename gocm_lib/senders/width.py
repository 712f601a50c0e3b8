"""Width: how many connections the path to an upstream allows. Pure.

A firewall or a NAT may turn away new connections above its limit, while the existing ones work. Then dialling on is
useless: the sender uses what works, and now and then tries one more. Only the fate of *new* connections counts: an
upstream that breaks old and new ones alike is another problem.
"""

from collections import deque

REMEMBERED, ENOUGH = 16, 4  # new connections that are remembered; so many tell something
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until one more is tried, doubled each time that it is turned away
STEP = 8  # when the last one was not: grown by one in so many


class Width:
    """`room` is how many connections there may be, `most` how many we want."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.room = most
        self._new: deque[bool] = deque(maxlen=REMEMBERED)
        self._wait = FIRST_WAIT
        self._try_at = 0.0
        self._trying = False

    @property
    def is_narrow(self) -> bool:
        """Whether the path allows fewer than we want."""
        return self.room < self.most

    def note(self, works: bool, others: int, now: float) -> None:
        """A new connection works, or was turned away, while there were this many `others`."""
        self._new.append(works)
        tried, self._trying = self._trying, False
        if works:
            self._wait = FIRST_WAIT
        elif not others:  # that is no limit: nothing gets through
            self.room, self._wait = self.most, FIRST_WAIT
            self._new.clear()
        elif len(self._new) >= ENOUGH and 2 * sum(self._new) < len(self._new):
            if tried:  # else it was dialled before we knew
                self._wait = min(LONGEST_WAIT, 2 * self._wait)
            self._try_at = now + self._wait
            self.room = min(self.room, others)

    def allowed(self, connected: int, now: float) -> int:
        """How many connections there may be now, when there are `connected` already."""
        if self.is_narrow and connected >= self.room and now >= self._try_at:
            self.room = min(self.most, self.room + (max(1, self.room // STEP) if self._new[-1] else 1))
            self._try_at, self._trying = now + self._wait, True
        return self.room
