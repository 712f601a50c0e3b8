"""When a dead child is started again, and when to give up. Pure: `now` (monotonic) is an argument."""

from collections.abc import Callable

NEVER_READY = 5  # starts in a row that failed: the next would too
DEATHS, WINDOW, REST = 5, 10.0, 1.0  # after more deaths than this in so many seconds, rest before the next start

Start = Callable[[], None]


def restart_delay(deaths: list[float], now: float) -> float:
    """Seconds to wait before replacing a child, when children of its kind died at these times."""
    return REST if sum(now - death < WINDOW for death in deaths) > DEATHS else 0.0


class Restarts:
    """The deaths so far, and the starts that are due. Used by the supervisor."""

    def __init__(self) -> None:
        self._deaths: dict[str, list[float]] = {}  # the last few of each kind
        self._failed = 0  # starts in a row
        self._due: list[tuple[float, Start]] = []

    def succeeded(self) -> None:
        """A child got ready."""
        self._failed = 0

    def failed(self) -> bool:
        """A child died before it was ready. Returns whether to give up."""
        self._failed += 1
        return self._failed >= NEVER_READY

    def died(self, kind: str, now: float) -> None:
        """A child of this kind died."""
        self._deaths[kind] = [*self._deaths.get(kind, [])[-DEATHS:], now]

    def put_off(self, kind: str, start: Start, now: float) -> None:
        """Schedule the start of a child of this kind: at once, unless too many died lately."""
        self._due.append((now + restart_delay(self._deaths.get(kind, []), now), start))

    def try_again(self, start: Start, now: float) -> None:
        """Schedule a start that failed."""
        self._due.append((now + REST, start))

    def next_moment(self) -> float:
        """When the next start is due; inf: none is."""
        return min([at for at, _ in self._due], default=float("inf"))

    def take_due(self, now: float) -> list[Start]:
        """Take out the starts that are due."""
        due = [start for at, start in self._due if at <= now]
        self._due = [(at, start) for at, start in self._due if at > now]
        return due
