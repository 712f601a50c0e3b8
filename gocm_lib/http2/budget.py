"""How much a peer may ask for that gets it nowhere: frames that cost us work and bring no message on. Pure.

SETTINGS, PINGs, resets, empty frames: each is allowed, and a flood of them is how HTTP/2 servers are brought down. A
connection has a stock of them, which grows with time and with the work that is done for it.
"""


class Budget:
    """So many at once, and so many more a second. All times are monotonic seconds."""

    def __init__(self, stock: float, a_second: float, now: float) -> None:
        self._most = stock
        self._left = stock
        self._a_second = a_second
        self._at = now

    def earn(self, more: float) -> None:
        """Something useful was done."""
        self._left = min(self._most, self._left + more)

    def spend(self, now: float, price: float = 1.0) -> bool:
        """Take one. False: there is none left."""
        self._left = min(self._most, self._left + (now - self._at) * self._a_second) - price
        self._at = now
        return self._left >= 0
