"""Endings: tells who waits for a message what became of it, once nothing of it is to be sent any more.

Belongs to the front's loop, and keeps neither it nor a thread waiting: while somebody waits the state process is asked
for those that have ended, soon and then ever more seldom. Promises that everybody is told: at the end of the message,
or at the end of his patience what is known then. All times are monotonic.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gocm_lib.front.response import Response
from gocm_lib.state.client import LoopClient, StateUnavailable
from gocm_lib.state.contract import Past, Status

# Of the time that the newest has waited already: so much later its end may be told. Seconds at least, and at most.
LATER, SOONEST, LATEST = 0.05, 0.005, 0.25
ASKED_AGAIN = 1.5  # seconds without an answer until the state process is asked again
GRACE = 1.0  # seconds beyond somebody's patience, for the answer to what is known
MOST = 2000  # that wait, for all are asked for each time. More are told at once what is known
NEVER = float("inf")

Ending = Status | Past | None | StateUnavailable  # what there is to tell of a message


class Await(NamedTuple):
    """What a handler wants before it answers: this job's end, or so many seconds. `answer` makes the Response of what
    is known then; it may raise BadRequest or StateUnavailable.
    """

    job: int
    patience: float
    answer: Callable[[Ending], Response]


class _Waiting(NamedTuple):
    """Who waits, since and until when."""

    since: float
    until: float
    done: Callable[[Ending], None]


class Endings:
    """See above."""

    def __init__(self, client: LoopClient) -> None:
        self.client = client
        self._waiting: defaultdict[int, list[_Waiting]] = defaultdict(list)
        self._count = 0
        self._ask_at = NEVER
        self._hurries = False

    def add(self, wanted: Await, done: Callable[[Ending], None], now: float) -> None:
        """Tell `done` of a job's end."""
        patience = 0.0 if self._hurries or self._count >= MOST else wanted.patience
        self._waiting[wanted.job].append(_Waiting(now, now + patience, done))
        self._count += 1
        self._ask_at = min(self._ask_at, now + min(SOONEST, patience))

    def hurry(self) -> None:
        """Tell everybody now what is known: we are stopping."""
        self._hurries, self._ask_at = True, 0.0
        for each in self._waiting.values():
            each[:] = [waiting._replace(until=min(waiting.until, waiting.since)) for waiting in each]

    def turn(self, now: float) -> None:
        """Ask for what has ended, if it is time to."""
        if not self._waiting or now < self._ask_at:
            return
        if self.client.busy:
            self._give_up(now)
            return
        late = [job for job, each in self._waiting.items() if any(waiting.until <= now for waiting in each)]
        self.client.call("ended", [job for job in self._waiting if job not in late], late, now)
        self._plan(now)

    def _plan(self, now: float) -> None:
        """When to ask again, or else to look who has waited for too long."""
        everybody = [waiting for each in self._waiting.values() for waiting in each]
        if not everybody:
            self._ask_at = NEVER
            return
        newest = max(waiting.since for waiting in everybody)
        soon = now + min(max(SOONEST, LATER * (now - newest)), LATEST)
        self._ask_at = max(now + SOONEST, min(soon, *(waiting.until for waiting in everybody)))

    def _give_up(self, now: float) -> None:
        """The state process does not answer: who has waited for long enough is told so."""
        gone = StateUnavailable("the state process does not answer")
        for job in list(self._waiting):
            self._tell(job, gone, [each for each in self._waiting[job] if each.until + GRACE <= now])
        self._ask_at = now + SOONEST

    def read(self, now: float) -> None:
        """The state process has said something."""
        for answer in self.client.read():
            if not isinstance(answer, StateUnavailable):
                for job, what in answer.items():
                    is_over = not isinstance(what, Status) or what.finished
                    self._tell(job, what, [each for each in self._waiting[job] if is_over or each.until <= now])
        self._plan(now)

    def _tell(self, job: int, what: Ending, whom: Iterable[_Waiting]) -> None:
        for each in whom:
            self._waiting[job].remove(each)
            self._count -= 1
            each.done(what)
        if not self._waiting[job]:
            del self._waiting[job]

    def next_moment(self) -> float:
        """When `turn` has something to do, unless something happens before."""
        return min(self._ask_at, self.client.next_moment())
