"""One sender process: takes slices from its generation's queue, sends them, settles what became of them.

        queue -> taker thread -> [ the loop: one thread, hundreds of requests in flight ] -> settler thread -> State
                                       ^ connected channels
                                  dialling threads

The loop owns every channel and every flight; the other threads only hand things over. Promises that each token taken
is settled once, with the outcome of the last attempt, unless this process dies or finishes first: then it is still
claimed by our generation and the supervisor releases it.
"""

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from queue import Empty, SimpleQueue

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message import fcm, gcm
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import FIRST_ANSWERS, NO_ANSWER, Outcome, Result, Verdict, address, join
from gocm_lib.monitoring.counters import Meter
from gocm_lib.process import child, log
from gocm_lib.senders import upstream as upstreams
from gocm_lib.senders.connection import Channel, Response, WireError
from gocm_lib.senders.crash_log import BlackBox
from gocm_lib.senders.quarantine import Quarantine
from gocm_lib.senders.upstream import DialError, Upstream
from gocm_lib.senders.width import Width
from gocm_lib.state.client import Client, StateUnavailable

DIALLERS = 16  # threads: a TLS handshake with Google takes three round trips, and must not stall the loop
IDLE_LIMIT = 30.0  # seconds; we close an idle connection before the upstream does, mostly
DIAL_REST = 0.25  # seconds without dialling after a failure
SETTLE_EVERY = 0.02  # seconds: outcomes that end within it share a transaction and its fsync
MULTICASTS = 20  # that may be in the queue and the senders: in tokens far more than they have connections
BUSY = 16  # flights; with more the loop lets answers gather for
GATHER = 0.002  # seconds, and then reads them in one turn: a turn, and the waking up for it, cost what an answer does
FIRST_FLIGHTS = 8  # of a job with more: a bad message is not sent a thousand times before its first answer is back
TRUSTED_JOBS = 4096
RETURNED = Outcome(Verdict.RETURNED, "others of its message were refused")
REFUSED = 0.5  # seconds; less than the shortest pause, so that its probe gets through
REFUSALS = 8  # jobs in a row that the upstream refused us for: what waits here is not sent to hear the same
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(eq=False, slots=True)
class Flight:
    """A request on its way: whose tokens, the bytes, when it is given up, whether it was written twice."""

    part: Slice
    request: bytes
    deadline: float = 0.0
    repeated: bool = False
    noted: Sequence[int] = ()  # its places in the black box


@dataclass(eq=False, slots=True)
class Trial:
    """A job's flights that are held until its first answers tell whether its message is any good."""

    held: list[Flight]
    refused: int = 0  # how many of the first answers said that the message itself is bad, or refused us for it


@dataclass(eq=False, slots=True)
class Lane:
    """An upstream's connections in this sender, and the requests that wait for one."""

    upstream: Upstream
    width: Width
    # Threads of its own: another upstream's, which cannot be reached, would all be taken.
    diallers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DIALLERS, "dial"))
    waiting: deque[Flight] = field(default_factory=deque)
    repeats: deque[Flight] = field(default_factory=deque)  # to go on a fresh connection only
    idle: dict[Channel, float] = field(default_factory=dict)  # since when; in that order, the newest is used first
    proven: set[Channel] = field(default_factory=set)  # connections that have brought an answer
    connected: int = 0
    dialling: int = 0
    trials: dict[int, Trial] = field(default_factory=dict)  # by job
    trusted: dict[int, None] = field(default_factory=dict)  # jobs that have passed, the latest last
    refused: Outcome | None = None  # the last outcome that blamed the upstream,
    refused_until: float = 0.0  # and until when what still comes from the queue is given back with it, unsent
    refusals: set[int] = field(default_factory=set)  # jobs that the upstream refused us for, one after the other
    dial_after: float = 0.0  # after a failure to connect, so as not to ask again in a tight loop


class Loop:
    """The event loop. `push` and `finish` may be called from any thread, everything else happens in `run`."""

    def __init__(
        self,
        lanes: dict[str, Upstream],
        connections: int,
        timeout: float,
        settled: SimpleQueue[list[Result] | None],
        box: BlackBox,
        meter: Meter,
    ) -> None:
        self.lanes = {name: Lane(upstream, Width(connections)) for name, upstream in lanes.items()}
        self.connections = connections
        self.timeout = timeout
        self.settled = settled
        self.landed: list[Result] = []  # in this turn
        self.box = box
        self.meter = meter
        self.quarantine = Quarantine()
        self.flights: dict[Channel, tuple[Lane, Flight]] = {}  # in the order they took off, so of their deadlines
        self.wants = threading.Event()  # set while there is room for more from the queue
        self.wants.set()
        self._inbox: deque[list[Slice] | tuple[Lane, Channel | DialError]] = deque()
        self._finishing = False
        self._turns = 0
        self._bell_in, self._bell_out = socket.socketpair()
        self._bell_in.setblocking(False)
        self._bell_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell_in, READ, None)

    # ------------------------------------------------------------------------------------------ from other threads

    def push(self, slices: list[Slice]) -> None:
        """Hand over slices to send."""
        self._inbox.append(slices)
        self._ring()

    def finish(self) -> None:
        """Let `run` return once what is in flight has landed; what waits is left to the next generation."""
        self._finishing = True
        self._ring()

    def progress(self) -> int:
        """How often the loop has turned; asking makes it turn once more, unless it is stuck."""
        self._ring()
        return self._turns

    def _ring(self) -> None:
        try:
            self._bell_out.send(b"!")
        except BlockingIOError:
            pass  # it is ringing

    def _dial(self, lane: Lane) -> None:
        try:
            dialled: Channel | DialError = lane.upstream.dial()
        except DialError as error:
            dialled = error
        except Exception:  # the pool of threads would swallow it, and the lane count on this dial for ever
            log.logger.exception("dialling failed")
            child.leave(Exit.FAILED)
        self._inbox.append((lane, dialled))
        self._ring()

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        while not (self._finishing and not self.flights):
            self._turns += 1
            if len(self.flights) > BUSY:
                time.sleep(GATHER)
            for key, events in self._selector.select(self._patience()):
                if key.data is None:
                    self._answer_bell()
                else:
                    self._on_ready(key.data, events)
            now = time.monotonic()
            self._expire(now)
            if self.quarantine:
                for lane, flight in self.quarantine.admit(len(self.flights)):
                    lane.waiting.appendleft(flight)
            for lane in self.lanes.values():
                self._pump(lane, now)
            self._ask_for_more()
            if self.landed:
                self.settled.put(self.landed)
                self.landed = []

    def _patience(self) -> float | None:
        """Seconds until something has to be given up; None when nothing is there to give up."""
        now = time.monotonic()
        moments = [next(iter(self.flights.values()))[1].deadline] if self.flights else []
        for lane in self.lanes.values():
            if lane.idle:
                moments.append(next(iter(lane.idle.values())) + IDLE_LIMIT)
            # A dial_after in the past asks for nothing: those requests wait for a channel, and its event wakes us.
            if (lane.waiting or lane.repeats) and lane.dial_after > now:
                moments.append(lane.dial_after)
        return max(0.0, min(moments) - now) if moments else None

    def _answer_bell(self) -> None:
        try:
            self._bell_in.recv(4096)
        except BlockingIOError:
            pass
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, tuple):
                self._on_dialled(*item)
                continue
            for claimed in item:
                self._enqueue(self.lanes[claimed.upstream], claimed)

    def _enqueue(self, lane: Lane, claimed: Slice) -> None:
        """Queue a slice's requests; of many for a job new to us only the first, the others wait for its trial."""
        if lane.refused and time.monotonic() < lane.refused_until:
            self._settle(claimed, lane.refused)
            return
        flights = [Flight(part, request) for part, request in lane.upstream.requests(claimed)]
        if claimed.deaths:
            for flight in flights:
                self.quarantine.hold(flight.part, (lane, flight))
        elif claimed.job in lane.trials:
            lane.trials[claimed.job].held += flights
        elif len(flights) > FIRST_FLIGHTS and claimed.job not in lane.trusted:
            lane.waiting.extend(flights[:FIRST_FLIGHTS])
            lane.trials[claimed.job] = Trial(flights[FIRST_FLIGHTS:])
        else:
            lane.waiting.extend(flights)

    def _try(self, lane: Lane, job: int, outcome: Outcome) -> None:
        """Let an answer decide what becomes of a job's held flights."""
        trial = lane.trials[job]
        refused = outcome.condemns or outcome.verdict is Verdict.UPSTREAM_CONFIG
        trial.refused += refused
        if refused and trial.refused < FIRST_ANSWERS:
            return
        del lane.trials[job]
        if refused:
            # Not sent, so given back: what becomes of them is decided where the whole job is known.
            for flight in trial.held:
                self._settle(flight.part, RETURNED)
            return
        lane.waiting.extend(trial.held)
        lane.trusted[job] = None
        if len(lane.trusted) > TRUSTED_JOBS:
            del lane.trusted[next(iter(lane.trusted))]

    def _on_dialled(self, lane: Lane, dialled: Channel | DialError) -> None:
        lane.dialling -= 1
        if isinstance(dialled, Channel):
            lane.connected += 1
            self._selector.register(dialled, READ, dialled)
            if lane.repeats and not self._finishing:
                self._take_off(lane, dialled, lane.repeats.popleft(), time.monotonic())
            else:
                lane.idle[dialled] = time.monotonic()
            return
        lane.dial_after = time.monotonic() + DIAL_REST
        lane.width.note(False, lane.connected, time.monotonic())
        if not lane.connected:
            # Nothing is left that could serve them, and asking once for each would take a time-out each.
            self._give_back(lane, dialled.outcome)

    def _give_back(self, lane: Lane, outcome: Outcome) -> None:
        """Settle all that waits in a lane with an outcome that blames the upstream: none of it was sent."""
        lane.refused, lane.refused_until = outcome, time.monotonic() + REFUSED
        lane.refusals.clear()
        waiting = [*lane.repeats, *lane.waiting]
        waiting += [flight for _, flight in self.quarantine.give_up(lane.upstream.dialect.NAME)]
        lane.repeats.clear()
        lane.waiting.clear()
        for trial in lane.trials.values():
            waiting += trial.held
        lane.trials.clear()
        for flight in waiting:
            self._settle(flight.part, outcome)

    def _pump(self, lane: Lane, now: float) -> None:
        """Bring waiting requests and connections together; dial when there are too few."""
        if self._finishing:
            return
        grounded = self.quarantine.grounds_others
        while lane.waiting and lane.idle and not (grounded and not lane.waiting[0].part.deaths):
            channel = self._choose(lane)
            if channel is None:
                break
            del lane.idle[channel]
            self._take_off(lane, channel, lane.waiting.popleft(), now)
        if now < lane.dial_after:
            return
        # No more than there are threads: a dial that queued for one would connect after the need has passed.
        wanted = min(len(lane.repeats) + len(lane.waiting), DIALLERS) - lane.dialling
        there = lane.connected + lane.dialling
        for _ in range(min(wanted, lane.width.allowed(there, now) - there) if wanted > 0 else 0):
            lane.dialling += 1
            lane.diallers.submit(self._dial, lane)

    @staticmethod
    def _choose(lane: Lane) -> Channel | None:
        """The idle connection for the next request: the newest. Where new ones are turned away, one that works, and for
        a request that has met that nothing else, while there is any that may.
        """
        newest = next(reversed(lane.idle))
        if not lane.width.is_narrow:
            return newest
        proven = next((channel for channel in lane.idle if channel in lane.proven), None)
        if proven is None and not (lane.waiting[0].repeated and lane.connected > len(lane.idle)):
            return newest
        return proven

    def _take_off(self, lane: Lane, channel: Channel, flight: Flight, now: float) -> None:
        flight.deadline = now + self.timeout
        flight.noted = self.box.take_off(flight.part)
        self.flights[channel] = lane, flight
        try:
            channel.begin(flight.request)
        except WireError as error:
            self._on_broken(channel, error)
        else:
            if channel.unsent:
                self._selector.modify(channel, READ | WRITE, channel)

    def _on_ready(self, channel: Channel, events: int) -> None:
        try:
            if events & WRITE and channel.unsent:
                channel.write()
                if not channel.unsent:
                    self._selector.modify(channel, READ, channel)
            response = channel.read() if events & READ else None
        except WireError as error:
            self._on_broken(channel, error)
        else:
            if response is not None:
                self._on_response(channel, response)

    def _on_response(self, channel: Channel, response: Response) -> None:
        lane, flight = self.flights.pop(channel)
        now, took = time.time(), time.monotonic() - flight.deadline + self.timeout
        if channel not in lane.proven:
            lane.proven.add(channel)
            lane.width.note(True, lane.connected, time.monotonic())
        self.meter.answered(flight.part.upstream, response.status, took, now)
        outcomes = lane.upstream.outcomes(flight.part, response, now)
        self.box.land(flight.noted)
        self._land(lane, flight, *outcomes)
        if outcomes[0].verdict is not Verdict.UPSTREAM_CONFIG:
            lane.refusals.clear()
        elif len(lane.refusals | {flight.part.job}) >= REFUSALS:
            self._give_back(lane, outcomes[0])
        else:
            lane.refusals.add(flight.part.job)
        if response.reusable:
            lane.idle[channel] = time.monotonic()
        else:
            self._drop(lane, channel)

    def _on_broken(self, channel: Channel, error: WireError) -> None:
        if channel not in self.flights:
            lane = next(lane for lane in self.lanes.values() if channel in lane.idle)
            del lane.idle[channel]
            self._drop(lane, channel)
            if not channel.exchanges:
                lane.width.note(False, lane.connected, time.monotonic())
            return
        lane, flight = self.flights.pop(channel)
        self.box.land(flight.noted)
        self._drop(lane, channel)
        if error.silent and channel.exchanges == 1:
            lane.width.note(False, lane.connected, time.monotonic())
        if error.silent and not flight.repeated and (channel.exchanges > 1 or lane.width.is_narrow):
            # Kept alive, then closed without a word just as we wrote: an idle time-out at the other end, and the
            # request was not looked at. Once more, on a connection that cannot be stale. Or a new one that the path
            # has turned away: once more, on one that works.
            flight.repeated = True
            if lane.width.is_narrow:
                lane.waiting.appendleft(flight)
            else:
                lane.repeats.append(flight)
            return
        self.meter.unanswered(flight.part.upstream)
        self._land(lane, flight, Outcome(Verdict.DEFERRED, str(error), answered=False, cause=error.cause))

    def _expire(self, now: float) -> None:
        while self.flights:
            channel, (_, flight) = next(iter(self.flights.items()))
            if flight.deadline > now:
                break
            self._on_broken(channel, WireError(NO_ANSWER, cause="timeout"))
        for lane in self.lanes.values():
            while lane.idle:
                channel, since = next(iter(lane.idle.items()))
                if since + IDLE_LIMIT > now:
                    break
                del lane.idle[channel]
                self._drop(lane, channel)

    def _drop(self, lane: Lane, channel: Channel) -> None:
        self._selector.unregister(channel)
        channel.close()
        lane.proven.discard(channel)
        lane.connected -= 1

    def _land(self, lane: Lane, flight: Flight, *outcomes: Outcome) -> None:
        """Settle a flight: with an outcome for each of its tokens, or one for all."""
        self._settle(flight.part, *outcomes)
        if flight.part.job in lane.trials:
            self._try(lane, flight.part.job, outcomes[0])

    def _settle(self, part: Slice, *outcomes: Outcome) -> None:
        if part.deaths:
            self.quarantine.land(part)
        self.landed += address(part, outcomes if len(outcomes) > 1 else outcomes * part.size)

    def _ask_for_more(self) -> None:
        # Suspects that wait for their turn are not counted: they would keep everybody else's messages waiting, too.
        load = len(self.flights) + sum(len(lane.waiting) for lane in self.lanes.values())
        if load < self.connections * 5 // 4 and not self.wants.is_set():
            self.wants.set()


def _take(queue: "Queue[list[Slice]]", loop: Loop) -> None:
    while True:
        # What we cannot send yet stays in the queue for a sender that can.
        loop.wants.wait()
        slices = queue.get()
        loop.wants.clear()
        loop.push(slices)


class _Settler:
    """Has outcomes settled, in batches, until None arrives; a state process that is away is waited for."""

    def __init__(self, outcomes: SimpleQueue[list[Result] | None], client: Client, generation: int) -> None:
        self._outcomes = outcomes
        self._client = client
        self._generation = generation
        self._since: float | None = None

    def settled_at(self) -> float:
        """When all had been settled that there was (monotonic): now, unless something has been waiting since then."""
        since = self._since
        return time.monotonic() if since is None else since

    def run(self) -> None:
        last = False
        while not last:
            batch = [self._outcomes.get()]
            if batch[0] is not None:
                time.sleep(SETTLE_EVERY)
            try:
                while batch[-1] is not None:
                    batch.append(self._outcomes.get_nowait())
            except Empty:
                pass
            last = batch[-1] is None
            if results := join(result for results in batch if results for result in results):
                self._settle(results)

    def _settle(self, results: Sequence[Result]) -> None:
        self._since = time.monotonic()
        troubled = False
        while True:
            try:
                self._client.settle(self._generation, results, time.time())
                break
            except StateUnavailable as error:
                if not troubled:
                    log.logger.warning("outcomes wait to be settled: %s", error)
                troubled = True
                time.sleep(0.1)
        self._since = None


def rooms(settings: Settings) -> dict[str, int]:
    """How many tokens of each upstream the queue and the senders may have in hand together."""
    flights = settings.senders * settings.connections
    return {fcm.NAME: 2 * flights, gcm.NAME: max(MULTICASTS * gcm.TOKENS_PER_REQUEST, 2 * flights)}


def box_size(settings: Settings) -> int:
    """Cells for the black box of a sender with these settings: should all that may be in hand be in its flights, and no
    two tokens in one run.
    """
    return 3 * (settings.connections + rooms(settings)[gcm.NAME])


def main(
    settings: Settings,
    name: str,
    generation: int,
    queue: "Queue[list[Slice]]",
    box: MutableSequence[int],
    cells: MutableSequence[float],
    address: str,
    authkey: bytes,
    control: Connection,
) -> None:
    """The sender process `name` of a generation. Tells `control` that it is ready, or why it cannot start; finishes
    what is in flight when told to there.
    """
    child.enter(name, settings)
    try:
        lanes = upstreams.from_settings(settings)
    except Fatal as error:
        child.refuse(control, Exit.SENDER, str(error))
    settled: SimpleQueue[list[Result] | None] = SimpleQueue()
    meter = Meter(cells, list(DIALECTS))
    loop = Loop(lanes, settings.connections, settings.upstream_timeout, settled, BlackBox(box), meter)
    settler = _Settler(settled, Client(address, authkey), generation)
    settling = threading.Thread(target=settler.run, name="settler")
    settling.start()
    running = threading.Thread(target=loop.run, name="loop")
    running.start()
    threading.Thread(target=_take, args=(queue, loop), name="taker", daemon=True).start()
    control.send(("ready", None))
    child.wait_for_word(control, loop.progress, settler.settled_at)
    loop.finish()
    running.join()
    settled.put(None)
    settling.join()
    child.leave(Exit.OK)
