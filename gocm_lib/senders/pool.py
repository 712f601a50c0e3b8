"""Pool: the requests of one upstream that wait in one sender. No I/O, no clock.

Decides which request is sent next, which are held until the first answers for their message are back, which are sent
again, and what is given back unsent. Module places knows the connections; module loop does what both decide.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gocm_lib.http2.client import Again
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import FIRST_ANSWERS, Outcome, Verdict
from gocm_lib.senders.connection import Request, WireError
from gocm_lib.senders.places import OLD, Places
from gocm_lib.senders.streams import Channel
from gocm_lib.senders.upstream import Upstream

CANARIES = 8  # requests of a job with more that go first: else a bad message is sent a thousand times before an answer
PROVEN_JOBS = 4096  # that are remembered
REFUSED = 0.5  # seconds; less than the shortest pause, so that its probe gets through
REFUSALS = 8  # jobs in a row that the upstream refused us for: what waits here is not sent to hear the same
TRIES = 5  # how often a request is sent again that nobody has looked at: some servers refuse for ever
STARVED = 30.0  # seconds without a place on any connection, though nothing is on them
NO_PLACE = Outcome(Verdict.UNREACHABLE, "HTTP/2: no streams are allowed")


@dataclass(eq=False, slots=True)
class Flight:
    """A request on its way: its tokens, when it times out (monotonic), whether it was repeated once because it had most
    likely not been looked at, how often because it had certainly not, its numbers in the crash log.
    """

    part: Slice
    request: Request
    deadline: float = 0.0
    repeated: bool = False
    tries: int = 0
    noted: Iterable[int] = ()


@dataclass(eq=False, slots=True)
class Canary:
    """A job whose first requests are out. The others are held until the answers tell whether its message is good."""

    held: list[Flight]
    refused: int = 0  # how many of the first answers rejected the message, or refused us


class Judgement(NamedTuple):
    """What the end of a request means for requests that wait: which are `returned` to the spool unsent, and which are
    `refused` like this one. None: the upstream does not refuse us in general.
    """

    returned: list[Flight]
    refused: list[Flight] | None


NOTHING = Judgement([], None)


class Pool:
    """One upstream's waiting requests and connections, for the loop's thread only. All times are monotonic."""

    def __init__(self, upstream: Upstream, most: int) -> None:
        """At most `most` requests in flight."""
        self.upstream = upstream
        self.places = Places(most, upstream.http2)
        self._waiting: deque[Flight] = deque()
        self._repeats: deque[Flight] = deque()  # to go on a fresh connection only
        self._canaries: dict[int, Canary] = {}  # by job
        self._proven: dict[int, None] = {}  # jobs whose message was not rejected, the latest last
        self._refusals: set[int] = set()  # jobs that the upstream refused us for, one after the other
        self._refusal: Outcome | None = None  # the last outcome that blamed the upstream,
        self._refused_until = 0.0  # and until when what still comes from the queue is given back with it, unsent
        self._starved_since: float | None = None

    def __len__(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether it has no connection, and wants none."""
        return not (self.waits or self._canaries or self.places.connected or self.places.dialling)

    # ---------------------------------------------------------------------------------------------------- requests

    def refusal(self, now: float) -> Outcome | None:
        """While waiting requests are given back unsent: the outcome to settle a new one with. None: add it."""
        return self._refusal if now < self._refused_until else None

    def add(self, flights: list[Flight]) -> None:
        """Queue the requests of a slice. If there are many, and the job is new, queue only its canaries."""
        job = flights[0].part.job
        if job in self._canaries:
            self._canaries[job].held += flights
        elif len(flights) > CANARIES and job not in self._proven:
            self._waiting.extend(flights[:CANARIES])
            self._canaries[job] = Canary(flights[CANARIES:])
        else:
            self._waiting.extend(flights)

    def add_first(self, flight: Flight) -> None:
        """Queue a request before all others."""
        self._waiting.appendleft(flight)

    def again(self, flight: Flight, channel: Channel, error: WireError, now: float) -> bool:
        """Queue a request again that has got no answer. False: that counts as an attempt."""
        if error.old:
            self.places.speak_http1(now + OLD)
        if error.again is Again.FREELY:
            flight.tries += 1
            if flight.tries <= TRIES:
                self._waiting.appendleft(flight)
            return flight.tries <= TRIES
        narrow = self.places.width.is_narrow
        if flight.repeated or not (error.again is Again.ONCE or (channel.turned_away and narrow)):
            return False
        flight.repeated = True
        if narrow:  # a new one would be turned away
            self._waiting.appendleft(flight)
        else:
            self._repeats.append(flight)  # on a connection that cannot be stale
        return True

    def judge(self, flight: Flight, outcome: Outcome, now: float) -> Judgement:
        """Decide what the end of a request means for those that wait. Mostly NOTHING."""
        job = flight.part.job
        returned = self._judge_message(job, outcome) if job in self._canaries else []
        if outcome.verdict is Verdict.UPSTREAM_CONFIG:
            self._refusals.add(job)
            refused = self.give_back(outcome, now) if len(self._refusals) >= REFUSALS else None
            return Judgement(returned, refused)
        if outcome.answered:
            self._refusals.clear()
        return Judgement(returned, None) if returned else NOTHING

    def _judge_message(self, job: int, outcome: Outcome) -> list[Flight]:
        """The requests of a job that are returned unsent after one of its first answers. This rule knows only this
        sender's answers and only holds requests back; State._try_messages sees the answers of all senders, and stops
        the whole job.
        """
        canary = self._canaries[job]
        refused = outcome.rejects_message or outcome.verdict is Verdict.UPSTREAM_CONFIG
        canary.refused += refused
        if refused and canary.refused < FIRST_ANSWERS:
            return []
        del self._canaries[job]
        if refused:
            return canary.held
        self._waiting.extend(canary.held)
        self._proven[job] = None
        if len(self._proven) > PROVEN_JOBS:
            del self._proven[next(iter(self._proven))]
        return []

    def give_back(self, outcome: Outcome, now: float) -> list[Flight]:
        """Take out all waiting requests, because of an outcome that blames the upstream."""
        self._refusal, self._refused_until = outcome, now + REFUSED
        self._refusals.clear()
        waiting = [*self._repeats, *self._waiting]
        self._repeats.clear()
        self._waiting.clear()
        for canary in self._canaries.values():
            waiting += canary.held
        self._canaries.clear()
        return waiting

    # ------------------------------------------------------------------------------------------------- connections

    def assign(self, suspects_only: bool, now: float, runs: int) -> Iterator[tuple[Channel, Flight]]:
        """Waiting requests with at most so many runs together, each with the connection to begin it on before the next
        is asked for.
        """
        self.places.begin_turn()
        while self._waiting and not (suspects_only and not self._waiting[0].part.deaths):
            flight = self._waiting[0]
            channel = self.places.find(len(flight.request.body), flight.repeated, now)
            runs -= len(flight.part.runs)
            if channel is None or runs < 0:
                break
            self._waiting.popleft()
            yield channel, flight

    def dials_wanted(self, now: float) -> int:
        """How many connections to dial now. They are counted as being dialled."""
        return self.places.dials_wanted(len(self._waiting), len(self._repeats), now) if self.waits else 0

    @property
    def waits(self) -> bool:
        """Whether a request waits for a connection."""
        return bool(self._waiting or self._repeats)

    def dialled(self, channel: Channel, now: float, finishing: bool) -> Iterator[Flight]:
        """A connection was made. Returns the requests that need a fresh one, each to be begun on it before the next is
        asked for.
        """
        self.places.dialled(channel, now)
        while self._repeats and not finishing and self.places.fits(channel, len(self._repeats[0].request.body)):
            yield self._repeats.popleft()

    def dial_failed(self, outcome: Outcome, now: float) -> list[Flight] | None:
        """A connection could not be made. Returns the requests to give back for that; None while other connections are
        left.
        """
        self.places.dial_failed(now)
        # When nothing is left that could serve them, asking once for each would take a time-out each.
        return None if self.places.connected else self.give_back(outcome, now)

    def starved(self, now: float) -> list[Flight]:
        """The requests to give back, with NO_PLACE, because the upstream lets us begin none."""
        places = self.places
        if not self._waiting or places.in_flight or places.dialling or not places.connected:
            self._starved_since = None
        elif self._starved_since is None:
            self._starved_since = now
        elif now - self._starved_since >= STARVED:
            self._starved_since = None
            return self.give_back(NO_PLACE, now)
        return []

    def next_moment(self, now: float) -> float:
        """When there is something to do, unless something happens before."""
        moment = self.places.next_moment(self.waits, now)
        return min(moment, self._starved_since + STARVED) if self._starved_since is not None else moment
