"""The event loop of a sender: one thread, hundreds of requests in flight. Owns the sockets and reads the clock.

Promises that each token handed to `push` is settled once, with the outcome of its last attempt, unless the process dies
or finishes first.
"""

import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from gocm_lib.config.settings import Exit
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import NO_ANSWER, Outcome, Result, Verdict, address
from gocm_lib.monitoring.counters import Counters
from gocm_lib.process import child, log
from gocm_lib.senders.connection import Channel, Response, WireError
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.pool import DIALLERS, Flight, Pool
from gocm_lib.senders.quarantine import Quarantine
from gocm_lib.senders.upstream import DialError, Upstream

BUSY = 16  # flights; with more the loop lets answers gather for
GATHER = 0.002  # seconds, and then reads them in one turn: a turn, and the waking up for it, cost what an answer does
RETURNED = Outcome(Verdict.RETURNED, "others of its message were refused")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """`push`, `finish` and `progress` may be called from any thread. Everything else happens in `run`."""

    def __init__(
        self,
        upstreams: dict[str, Upstream],
        connections: int,
        timeout: float,
        settled: SimpleQueue[list[Result] | None],
        crash_log: CrashLog,
        counters: Counters,
    ) -> None:
        """At most `connections` to each upstream; `timeout` seconds for an answer. Results are put into `settled`."""
        self.pools = {name: Pool(upstream, connections) for name, upstream in upstreams.items()}
        # Threads of its own for each: another upstream's, which cannot be reached, would all be taken. A TLS handshake
        # with Google takes three round trips, and must not stall the loop.
        self._diallers = {name: ThreadPoolExecutor(DIALLERS, "dial") for name in upstreams}
        self.connections = connections
        self.timeout = timeout
        self.settled = settled
        self.results: list[Result] = []  # in this turn
        self.crash_log = crash_log
        self.counters = counters
        self.quarantine = Quarantine()
        self.flights: dict[
            Channel, tuple[Pool, Flight]
        ] = {}  # in the order in which they were sent, so of their deadlines
        self.wants = threading.Event()  # set while there is room for more from the queue
        self.wants.set()
        self._inbox: deque[list[Slice] | tuple[Pool, Channel | DialError]] = deque()
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
        """Let `run` return once nothing is in flight. What waits is left to the next generation."""
        self._finishing = True
        self._ring()

    def progress(self) -> int:
        """How often the loop has turned. Asking makes it turn once more, unless it is stuck."""
        self._ring()
        return self._turns

    def _ring(self) -> None:
        try:
            self._bell_out.send(b"!")
        except BlockingIOError:
            pass  # it is ringing

    def _dial(self, pool: Pool) -> None:
        try:
            dialled: Channel | DialError = pool.upstream.dial()
        except DialError as error:
            dialled = error
        except Exception:  # the pool of threads would swallow it, and the dial count as under way for ever
            log.logger.exception("dialling failed")
            child.leave(Exit.FAILED)
        self._inbox.append((pool, dialled))
        self._ring()

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Turn until `finish` was called and nothing is in flight."""
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
                for pool, flight in self.quarantine.admit(len(self.flights)):
                    pool.add_first(flight)
            for name, pool in self.pools.items():
                self._pump(name, pool, now)
            self._ask_for_more()
            if self.results:
                self.settled.put(self.results)
                self.results = []

    def _patience(self) -> float | None:
        """Seconds until a time limit is reached; None when nothing has one."""
        now = time.monotonic()
        moments = [next(iter(self.flights.values()))[1].deadline] if self.flights else []
        for pool in self.pools.values():
            moments += pool.moments(now)
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
                self._enqueue(self.pools[claimed.upstream], claimed)

    def _enqueue(self, pool: Pool, claimed: Slice) -> None:
        if refusal := pool.refusal(time.monotonic()):
            self._settle(claimed, refusal)
            return
        flights = [Flight(part, request) for part, request in pool.upstream.requests(claimed)]
        if not claimed.deaths:
            pool.add(flights)
            return
        for flight in flights:
            self.quarantine.hold(flight.part, (pool, flight))

    def _on_dialled(self, pool: Pool, dialled: Channel | DialError) -> None:
        now = time.monotonic()
        if isinstance(dialled, DialError):
            if (flights := pool.dial_failed(dialled.outcome, now)) is not None:
                self._give_back(pool, flights, dialled.outcome)
            return
        self._selector.register(dialled, READ, dialled)
        if flight := pool.dialled(dialled, now, self._finishing):
            self._send(pool, dialled, flight, now)

    def _give_back(self, pool: Pool, flights: list[Flight], outcome: Outcome) -> None:
        """Settle unsent requests, and the pool's waiting suspects, with an outcome that blames the upstream."""
        suspects = [flight for _, flight in self.quarantine.give_up(pool.upstream.dialect.NAME)]
        for flight in [*flights, *suspects]:
            self._settle(flight.part, outcome)

    def _pump(self, name: str, pool: Pool, now: float) -> None:
        """Put waiting requests on idle connections; dial when there are too few."""
        if self._finishing:
            return
        blocked = self.quarantine.blocks_others
        while found := pool.next(suspects_only=blocked):
            self._send(pool, *found, now)
        for _ in range(pool.dials_wanted(now)):
            self._diallers[name].submit(self._dial, pool)

    def _send(self, pool: Pool, channel: Channel, flight: Flight, now: float) -> None:
        flight.deadline = now + self.timeout
        flight.noted = self.crash_log.begin(flight.part)
        self.flights[channel] = pool, flight
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
        pool, flight = self.flights.pop(channel)
        now, clock = time.monotonic(), time.time()
        pool.works(channel, now)
        self.counters.answered(flight.part.upstream, response.status, now - flight.deadline + self.timeout, clock)
        outcomes = pool.upstream.outcomes(flight.part, response, clock)
        self.crash_log.end(flight.noted)
        self._done(pool, flight, *outcomes)
        if response.reusable:
            pool.free(channel, now)
        else:
            self._close(pool, channel)

    def _on_broken(self, channel: Channel, error: WireError) -> None:
        if channel not in self.flights:
            pool = next(pool for pool in self.pools.values() if pool.has_idle(channel))
            self._close(pool, channel, turned_away=not channel.exchanges)
            return
        pool, flight = self.flights.pop(channel)
        self.crash_log.end(flight.noted)
        self._close(pool, channel, turned_away=error.silent and channel.exchanges == 1)
        if error.silent and pool.repeat(flight, channel):
            return
        self.counters.unanswered(flight.part.upstream)
        self._done(pool, flight, Outcome(Verdict.DEFERRED, str(error), answered=False, cause=error.cause))

    def _expire(self, now: float) -> None:
        while self.flights:
            channel, (_, flight) = next(iter(self.flights.items()))
            if flight.deadline > now:
                break
            self._on_broken(channel, WireError(NO_ANSWER, cause="timeout"))
        for pool in self.pools.values():
            for channel in pool.idle_too_long(now):
                self._close(pool, channel)

    def _close(self, pool: Pool, channel: Channel, turned_away: bool = False) -> None:
        self._selector.unregister(channel)
        channel.close()
        pool.lost(channel, time.monotonic(), turned_away)

    def _done(self, pool: Pool, flight: Flight, *outcomes: Outcome) -> None:
        """Settle a request with an outcome for each of its tokens, or one for all. Do what the pool decides."""
        self._settle(flight.part, *outcomes)
        judged = pool.judge(flight, outcomes[0], time.monotonic())
        for each in judged.returned:
            self._settle(each.part, RETURNED)
        if judged.refused is not None:
            self._give_back(pool, judged.refused, outcomes[0])

    def _settle(self, part: Slice, *outcomes: Outcome) -> None:
        if part.deaths:
            self.quarantine.done(part)
        self.results += address(part, outcomes if len(outcomes) > 1 else outcomes * part.size)

    def _ask_for_more(self) -> None:
        # Suspects that wait for their turn are not counted: they would keep everybody else's messages waiting, too.
        load = len(self.flights) + sum(map(len, self.pools.values()))
        if load < self.connections * 5 // 4 and not self.wants.is_set():
            self.wants.set()
