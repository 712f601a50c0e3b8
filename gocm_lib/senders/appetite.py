"""Whether a sender takes more from its queue. Pure: `now` is an argument, monotonic.

What it cannot send yet is left to a sender that can. But the queue is one for all upstreams: when all senders have much
in hand of one that is silent, what lies before another's messages is taken all the same. The feeder sees to it that of
no upstream there is more than so much.
"""

YIELD = 0.05  # seconds for which a sender with much in hand leaves what is in the queue to others


class Appetite:
    """Of one sender."""

    def __init__(self, most: int, upstreams: int) -> None:
        """It has at most `most` requests in flight to each of so many upstreams."""
        self._much = most * 5 // 4  # requests in hand, with which nothing is taken that others could take
        self._several = upstreams > 1
        self._yields_until = 0.0

    def wants(self, load: int, now: float) -> bool:
        """Whether to take something, with so many requests in hand."""
        if load < self._much:
            self._yields_until = now + YIELD
            return True
        return self._several and now >= self._yields_until

    def room(self, load: int, now: float) -> int:
        """How many requests to take now. From here on others come first again."""
        self._yields_until = now + YIELD
        return self._much - load if load < self._much else self._much

    def next_look(self) -> float:
        """When to look again whether others have left something; infinite, if that changes nothing."""
        return self._yields_until if self._several else float("inf")
