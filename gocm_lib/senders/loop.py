"""The event loop of a sender: one thread takes slices from the queue, sends them, has outcomes settled.

Owns the sockets and reads the clock; only dialling, which blocks, has threads of its own. What has come is dealt with
in one go, never one thing a turn: a turn, and the waking up for it, cost what an answer does. Promises that each token
taken from the queue is settled once, with the outcome of its last attempt, unless the process dies or finishes first.
"""

import selectors
import time
from collections.abc import Sequence

from gocm_lib.http2 import frames
from gocm_lib.http2.client import OUR_FAULT, Again
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import NO_ANSWER, Outcome, Result, Verdict, address
from gocm_lib.monitoring.counters import Counters
from gocm_lib.process import log
from gocm_lib.process.bell import Bell
from gocm_lib.senders.appetite import Appetite
from gocm_lib.senders.connection import Ended, Response, WireError
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.pipe import Inlet
from gocm_lib.senders.pool import NO_PLACE, Flight, Pool
from gocm_lib.senders.pools import Pools
from gocm_lib.senders.quarantine import Quarantine
from gocm_lib.senders.settler import Settler
from gocm_lib.senders.streams import Channel, Http2Channel
from gocm_lib.senders.upstream import DialError, Upstream

BUSY = 16  # flights; with more the loop lets answers gather for
GATHER = 0.004  # seconds, and then reads them in one turn
LOOK = 0.2  # seconds between two looks whether something may be sent again
TICK = 1.0  # seconds between two looks at what time does to connections
RETURNED = Outcome(Verdict.RETURNED, "others of its message were refused")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """`finish` and `progress` may be called from any thread. Everything else happens in `run`."""

    def __init__(
        self,
        upstreams: dict[str, Upstream],
        most: int,
        timeout: float,
        bell: Bell,
        inlet: Inlet,
        settler: Settler,
        crash_log: CrashLog,
        counters: Counters,
        lease: Sequence[float],
    ) -> None:
        """At most `most` requests to each upstream in flight; `timeout` seconds for an answer. `lease` has the time
        until which something may be sent.
        """
        self.pools = Pools(upstreams, most, bell.ring)
        self._appetite = Appetite(most, len(upstreams))
        self.timeout = timeout
        self.results: list[Result] = []  # in this turn,
        self._awaited = False  # and whether somebody waits for any of them
        self.crash_log = crash_log
        self.counters = counters
        self._lease = lease
        self.quarantine = Quarantine()
        self.flights: dict[Flight, tuple[Pool, Channel]] = {}  # in the order in which they were sent, so of deadlines
        self._inlet, self._settler, self._bell = inlet, settler, bell
        self._dirty: dict[Channel, Pool] = {}  # connections that have something to write
        self._writing: set[Channel] = set()  # those whose sockets had no room for all of it
        self._finishing = self._taking = False  # the latter: the inlet is watched
        self._turns, self._ticked = 0, 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell.inside, READ, bell)

    # ------------------------------------------------------------------------------------------ from other threads

    def finish(self) -> None:
        """Let `run` return once nothing is in flight and all is settled. What waits is left to the next generation."""
        self._finishing = True
        self._bell.ring()

    def progress(self) -> int:
        """How often the loop has turned. Asking makes it turn once more, unless it is stuck."""
        self._bell.ring()
        return self._turns

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Turn until `finish` was called, nothing is in flight, and all is settled."""
        self._watch_inlet(time.monotonic())
        while not (self._finishing and not self.flights and self._settler.idle):
            self._turns += 1
            if len(self.flights) > BUSY:
                time.sleep(GATHER)
            arrived = self._read_all()
            now = time.monotonic()
            if arrived:
                self._take(now)
            while self.pools.dialled:
                self._on_dialled(*self.pools.take_dialled(), now)
            self._expire(now)
            if self.quarantine:
                for pool, flight in self.quarantine.admit(len(self.flights)):
                    self.pools.wake(pool.upstream.name).add_first(flight)
            for pool in self.pools.live.values():
                if pool.waits and now < self._lease[0]:
                    self._pump(pool, now)
            self._write()
            self._settle_due(now)
            self._watch_inlet(now)

    def _read_all(self) -> bool:
        """Read what has come from upstreams, the state process and other threads. Returns whether something is in the
        queue: it is taken last, when answers have made room.
        """
        arrived = False
        for key, events in self._selector.select(self._patience()):
            if key.data is self._inlet:
                arrived = True
            elif key.data is self._settler:
                self._on_state(events)
            elif key.data is self._bell:
                self._bell.hear()
            else:
                self._on_ready(key.data, events)
        return arrived

    def _patience(self) -> float | None:
        """Seconds until there is something to do; None when nothing is going on."""
        now = time.monotonic()
        moments = [self._settler.next_moment(), self._settler.client.next_moment()]
        moments += [pool.next_moment(now) for pool in self.pools.live.values()]
        if not (self._taking or self._finishing):
            moments.append(max(self._appetite.next_look(), now + GATHER))
        if now >= self._lease[0]:
            moments.append(now + LOOK)
        if self.flights:
            moments += [next(iter(self.flights)).deadline, self._ticked + TICK]
        soonest = min(moments)
        return max(0.0, soonest - now) if soonest < float("inf") else None

    def _load(self) -> int:
        # Suspects that wait for their turn are not counted: they would keep everybody else's messages waiting, too.
        return len(self.flights) + len(self.pools)

    def _watch_inlet(self, now: float) -> None:
        """Watch the queue, unless there is enough in hand: what we cannot send yet is left to a sender that can."""
        wanted = self._appetite.wants(self._load(), now) and not self._finishing
        if wanted != self._taking:
            self._taking = wanted
            if wanted:
                self._selector.register(self._inlet, READ, self._inlet)
            else:
                self._selector.unregister(self._inlet)

    def _take(self, now: float) -> None:
        room = self._appetite.room(self._load(), now)
        for claimed in self._inlet.take(room, lambda found: self.pools.upstreams[found.upstream].count(found)):
            pool = self.pools.wake(claimed.upstream)
            if refusal := pool.refusal(now):
                self._settle(claimed, [refusal])
                continue
            flights = [Flight(part, request) for part, request in pool.upstream.requests(claimed)]
            if not claimed.deaths:
                pool.add(flights)
                continue
            for flight in flights:
                self.quarantine.hold(flight.part, (pool, flight))

    # ------------------------------------------------------------------------------------------------- connections

    def _on_dialled(self, pool: Pool, dialled: Channel | DialError, now: float) -> None:
        if isinstance(dialled, DialError):
            if (flights := pool.dial_failed(dialled.outcome, now)) is not None:
                self._give_back(pool, flights, dialled.outcome)
            return
        self._selector.register(dialled, READ, dialled)
        self.counters.connected(pool.upstream.name, dialled.protocol, 1)
        for flight in pool.dialled(dialled, now, self._finishing or now >= self._lease[0]):
            self._begin(pool, dialled, flight, now)

    def _pump(self, pool: Pool, now: float) -> None:
        """Put waiting requests on connections; dial when there are too few."""
        if self._finishing:
            return
        for channel, flight in pool.assign(self.quarantine.blocks_others, now, self.crash_log.room()):
            self._begin(pool, channel, flight, now)
        self.pools.dial(pool, now)

    def _begin(self, pool: Pool, channel: Channel, flight: Flight, now: float) -> None:
        flight.deadline = now + self.timeout
        flight.noted = self.crash_log.begin(flight.part)
        self.flights[flight] = pool, channel
        pool.places.take(channel)
        channel.begin(flight, flight.request, now)
        self._dirty[channel] = pool

    def _write(self) -> None:
        """Write once to each connection that has something to write, whatever was begun on it in this turn."""
        dirty, self._dirty = self._dirty, {}
        for channel, pool in dirty.items():
            self._after(pool, channel, channel.write())
            if channel.unsent != (channel in self._writing) and pool.places.is_ours(channel):
                (self._writing.add if channel.unsent else self._writing.discard)(channel)
                self._selector.modify(channel, READ | WRITE if channel.unsent else READ, channel)

    def _on_ready(self, channel: Channel, events: int) -> None:
        pool = self.pools.of(channel)
        self._after(pool, channel, channel.read(time.monotonic()) if events & READ else [])

    def _after(self, pool: Pool, channel: Channel, ended: Sequence[Ended]) -> None:
        """Deal with what has ended on a connection, and with its own end."""
        now, clock = time.monotonic(), time.time()
        for flight, how in reversed(ended):  # so that of those that go back to the front the oldest is first again
            del self.flights[flight]
            self.crash_log.end(flight.noted)
            pool.places.give(channel, now)
            if isinstance(how, Response):
                self._on_response(pool, channel, flight, how, now, clock)
            else:
                self._on_lost(pool, channel, flight, how, now)
        if isinstance(channel, Http2Channel) and (channel.client.goaways or channel.client.refusals):
            self._on_goaways(pool, channel, now)
        if not pool.places.is_ours(channel):
            return
        if channel.over:
            self._close(pool, channel, now)
        elif channel.unsent:
            self._dirty[channel] = pool

    def _on_response(
        self, pool: Pool, channel: Channel, flight: Flight, response: Response, now: float, clock: float
    ) -> None:
        pool.places.works(channel, now)
        took = now - flight.deadline + self.timeout
        self.counters.answered(flight.part.upstream, response.status, took, clock)
        self._done(pool, flight, pool.upstream.outcomes(flight.part, response, clock), now)

    def _on_lost(self, pool: Pool, channel: Channel, flight: Flight, error: WireError, now: float) -> None:
        if pool.again(flight, channel, error, now):
            self.counters.repeated(flight.part.upstream)
            return
        self.counters.unanswered(flight.part.upstream)
        # One that nobody has looked at, however often it was sent, was not taken: that is an answer.
        answered = error.again is Again.FREELY
        cause = "unavailable" if answered else error.cause
        self._done(pool, flight, [Outcome(Verdict.DEFERRED, str(error), answered=answered, cause=cause)], now)

    def _on_goaways(self, pool: Pool, channel: Http2Channel, now: float) -> None:
        name = pool.upstream.name
        self.counters.refused(name, channel.client.refusals)
        channel.client.refusals = 0
        while channel.client.goaways:
            code, said = channel.client.goaways.pop(0)
            self.counters.goaway(name, code)
            pool.places.told(code, now)
            if code in OUR_FAULT:
                log.logger.error("%s ends a connection and says that it is our fault: GOAWAY %s", name, said)
            elif code != frames.Code.NO_ERROR:
                log.logger.warning("%s ends a connection: GOAWAY %s", name, said)
            if code == frames.Code.INADEQUATE_SECURITY:
                outcome = Outcome(Verdict.UPSTREAM_CONFIG, f"HTTP/2: {said}")
                self._give_back(pool, pool.give_back(outcome, now), outcome)

    def _expire(self, now: float) -> None:
        while self.flights:
            flight = next(iter(self.flights))
            if flight.deadline > now:
                break
            pool, channel = self.flights[flight]
            self._after(pool, channel, channel.give_up(flight, WireError(NO_ANSWER, cause="timeout"), now))
        ticks = now >= self._ticked + TICK
        for pool in self.pools.live.values():
            for channel in pool.places.idle_too_long(now):
                self._close(pool, channel, now)
            for streaming in pool.places.streams() if ticks else ():
                self._after(pool, streaming, streaming.tick(now))
            if starved := pool.starved(now):
                self._give_back(pool, starved, NO_PLACE)
        if ticks:
            self._ticked = now

    def _close(self, pool: Pool, channel: Channel, now: float) -> None:
        self._selector.unregister(channel)
        self._writing.discard(channel)
        self._dirty.pop(channel, None)
        channel.close()
        pool.places.lost(channel, now)
        self.counters.connected(pool.upstream.name, channel.protocol, -1)

    # ---------------------------------------------------------------------------------------------------- outcomes

    def _give_back(self, pool: Pool, flights: list[Flight], outcome: Outcome) -> None:
        """Settle unsent requests, and the pool's waiting suspects, with an outcome that blames the upstream."""
        suspects = [flight for _, flight in self.quarantine.give_up(pool.upstream.name)]
        for flight in [*flights, *suspects]:
            self._settle(flight.part, [outcome])

    def _done(self, pool: Pool, flight: Flight, outcomes: list[Outcome], now: float) -> None:
        """Settle a request with an outcome for each of its tokens, or one for all. Do what the pool decides."""
        self._settle(flight.part, outcomes)
        judged = pool.judge(flight, outcomes[0], now)
        for each in judged.returned:
            self._settle(each.part, [RETURNED])
        if judged.refused is not None:
            self._give_back(pool, judged.refused, outcomes[0])

    def _settle(self, part: Slice, outcomes: list[Outcome]) -> None:
        if part.deaths:
            self.quarantine.done(part)
        self.results += address(part, outcomes if len(outcomes) > 1 else outcomes * part.size)
        self._awaited |= part.awaited

    def _settle_due(self, now: float) -> None:
        if self.results:
            self._settler.add(self.results, now, self._awaited)
            self.results, self._awaited = [], False
        for name, pool in self.pools.live.items():
            self.counters.in_flight(name, pool.places.in_flight)
        if now == self._ticked:
            self.pools.rest()
        self._settler.turn(now, self._finishing and not self.flights)
        self._settler.client.attend(now)
        self._settler.client.watch(self._selector, self._settler)

    def _on_state(self, events: int) -> None:
        if events & WRITE:
            self._settler.client.write()
        if events & READ:
            self._settler.read(time.monotonic())
