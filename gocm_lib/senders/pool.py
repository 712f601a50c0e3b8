"""Pool: an upstream's connections in one sender, and the requests that wait for one. No I/O, no clock.

Decides which request goes on which connection, how many connections are to be dialled, which requests are held until
the first answers for their message are back, and what is given back unsent. Module loop does what it decides.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import FIRST_ANSWERS, Outcome, Verdict
from gocm_lib.senders.connection import Channel
from gocm_lib.senders.upstream import Upstream
from gocm_lib.senders.width import Width

DIALLERS = 16  # dials under way at once; each has a thread
IDLE_LIMIT = 30.0  # seconds; we close an idle connection before the upstream does, mostly
DIAL_REST = 0.25  # seconds without dialling after a failure
CANARIES = 8  # requests of a job with more that go first: else a bad message is sent a thousand times before an answer
PROVEN_JOBS = 4096  # that are remembered
REFUSED = 0.5  # seconds; less than the shortest pause, so that its probe gets through
REFUSALS = 8  # jobs in a row that the upstream refused us for: what waits here is not sent to hear the same


@dataclass(eq=False, slots=True)
class Flight:
    """A request on its way: its tokens, its bytes, when it times out (monotonic), whether it is being sent a second
    time, its numbers in the crash log.
    """

    part: Slice
    request: bytes
    deadline: float = 0.0
    repeated: bool = False
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

    def __init__(self, upstream: Upstream, connections: int) -> None:
        """`connections` is how many connections there may be."""
        self.upstream = upstream
        self.width = Width(connections)
        self._waiting: deque[Flight] = deque()
        self._repeats: deque[Flight] = deque()  # to go on a fresh connection only
        self._idle: dict[Channel, float] = {}  # since when; the longest first, the newest is used first
        self._answered: set[Channel] = set()  # connections that have brought an answer
        self._connected = 0
        self._dialling = 0
        self._dial_after = 0.0  # after a failure to connect, so as not to dial again in a tight loop
        self._canaries: dict[int, Canary] = {}  # by job
        self._proven: dict[int, None] = {}  # jobs whose message was not rejected, the latest last
        self._refusals: set[int] = set()  # jobs that the upstream refused us for, one after the other
        self._refusal: Outcome | None = None  # the last outcome that blamed the upstream,
        self._refused_until = 0.0  # and until when what still comes from the queue is given back with it, unsent

    def __len__(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiting)

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

    def repeat(self, flight: Flight, channel: Channel) -> bool:
        """Queue a request again whose connection was closed without an answer. False: it must not be sent again."""
        # Kept alive, then closed just as we wrote: an idle time-out at the other end, and the request was not looked
        # at. Once more, on a connection that cannot be stale. Or a new one that the path has turned away: once more,
        # on one that works.
        if flight.repeated or not (channel.exchanges > 1 or self.width.is_narrow):
            return False
        flight.repeated = True
        if self.width.is_narrow:
            self._waiting.appendleft(flight)
        else:
            self._repeats.append(flight)
        return True

    def judge(self, flight: Flight, outcome: Outcome, now: float) -> Judgement:
        """Decide what the end of a request means for those that wait. Mostly NOTHING."""
        job = flight.part.job
        returned = self._judge_message(job, outcome) if job in self._canaries else []
        if outcome.verdict is Verdict.UPSTREAM_CONFIG:
            self._refusals.add(job)
            refused = self._give_back(outcome, now) if len(self._refusals) >= REFUSALS else None
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

    def _give_back(self, outcome: Outcome, now: float) -> list[Flight]:
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

    def next(self, suspects_only: bool) -> tuple[Channel, Flight] | None:
        """A waiting request, and the idle connection to send it on; None while there is no such pair."""
        if not (self._waiting and self._idle) or (suspects_only and not self._waiting[0].part.deaths):
            return None
        channel = self._choose()
        if channel is None:
            return None
        del self._idle[channel]
        return channel, self._waiting.popleft()

    def _choose(self) -> Channel | None:
        """The idle connection for the next request: the newest one. When the path turns away new connections, one that
        has worked; and for a request that was turned away before, only such a one, if any is left.
        """
        newest = next(reversed(self._idle))
        if not self.width.is_narrow:
            return newest
        works = next((channel for channel in self._idle if channel in self._answered), None)
        if works is None and not (self._waiting[0].repeated and self._connected > len(self._idle)):
            return newest
        return works

    def dials_wanted(self, now: float) -> int:
        """How many connections to dial now. They are counted as being dialled."""
        if now < self._dial_after:
            return 0
        # No more than there are threads: a dial that queued for one would connect after the need has passed.
        wanted = min(len(self._repeats) + len(self._waiting), DIALLERS) - self._dialling
        if wanted <= 0:
            return 0
        there = self._connected + self._dialling
        wanted = max(0, min(wanted, self.width.allowed(there, now) - there))
        self._dialling += wanted
        return wanted

    def dialled(self, channel: Channel, now: float, finishing: bool) -> Flight | None:
        """A connection was made. Returns the request to send on it at once; None: the connection is idle."""
        self._dialling -= 1
        self._connected += 1
        if self._repeats and not finishing:
            return self._repeats.popleft()
        self._idle[channel] = now
        return None

    def dial_failed(self, outcome: Outcome, now: float) -> list[Flight] | None:
        """A connection could not be made. Returns the requests to give back for that; None while other connections are
        left.
        """
        self._dialling -= 1
        self._dial_after = now + DIAL_REST
        self.width.note(False, self._connected, now)
        # When nothing is left that could serve them, asking once for each would take a time-out each.
        return None if self._connected else self._give_back(outcome, now)

    def works(self, channel: Channel, now: float) -> None:
        """A connection has brought an answer."""
        if channel not in self._answered:
            self._answered.add(channel)
            self.width.note(True, self._connected, now)

    def free(self, channel: Channel, now: float) -> None:
        """A connection is ready for the next request."""
        self._idle[channel] = now

    def has_idle(self, channel: Channel) -> bool:
        """Whether an idle connection is one of this pool's."""
        return channel in self._idle

    def lost(self, channel: Channel, now: float, turned_away: bool = False) -> None:
        """A connection was closed. `turned_away`: it was new, and the path may have closed it."""
        self._idle.pop(channel, None)
        self._answered.discard(channel)
        self._connected -= 1
        if turned_away:
            self.width.note(False, self._connected, now)

    def idle_too_long(self, now: float) -> list[Channel]:
        """The connections to close now."""
        found = []
        for channel, since in self._idle.items():
            if since + IDLE_LIMIT > now:
                break
            found.append(channel)
        return found

    def moments(self, now: float) -> list[float]:
        """Times at which there is something to do, unless something happens before."""
        found = [next(iter(self._idle.values())) + IDLE_LIMIT] if self._idle else []
        # A dial_after in the past asks for nothing: those requests wait for a connection, whose event wakes the loop.
        if (self._waiting or self._repeats) and self._dial_after > now:
            found.append(self._dial_after)
        return found
