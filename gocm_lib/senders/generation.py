"""Generations: each is a queue and the senders that serve it. From their start to the release of what they had in hand.

A process that is killed while it reads a multiprocessing.Queue dies holding the queue's lock, and every other reader
then waits for ever. So a queue is never repaired: when one sender dies, its whole generation ends. A new generation
starts at once; the old one's other senders finish what is in flight; when the last of them has left, what the
generation still had in hand is released, to be sent again.

Owned by the supervisor, in its main thread. All times are monotonic.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue

from gocm_lib.config.settings import Settings
from gocm_lib.config.upstreams import described
from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import InFlight
from gocm_lib.monitoring import counters
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import log
from gocm_lib.process.child import Child
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.feeder import Feeder
from gocm_lib.senders.in_hand import crash_log_size
from gocm_lib.senders.pipe import Outlet
from gocm_lib.state.client import Client, StateUnavailable

LEASE = 15.0  # seconds: a sender that shows no progress for so long loses what it has in hand
DYING = 5.0  # seconds, beyond the upstream's time limit, that the others of a dead sender's generation have to finish
RELEASE_AGAIN = 0.2  # seconds until the state process is told again what it did not answer

Spawn = Callable[..., Child]  # of a kind and a name, with arguments


def stands_still(moved_at: float, now: float) -> bool:
    """Whether a sender that last made progress at `moved_at` has lost its lease on what it has in hand."""
    return now - moved_at > LEASE


@dataclass(eq=False)
class Generation:
    """A queue and its senders. `deadline` is set once it is finishing."""

    number: int
    queue: "Queue[list[Slice]]"
    outlet: Outlet
    senders: list[Child] = field(default_factory=list)
    crash_logs: dict[str, Sequence[int]] = field(default_factory=dict)  # of each sender, by its name
    deadline: float | None = None
    killed: bool = False  # by us, for not being done in time


class Generations:
    """The generations that have senders, and those that have ended but are not released yet."""

    def __init__(
        self,
        context: ForkServerContext,
        spawn: Spawn,
        address: str,
        authkey: bytes,
        collector: Collector,
        lease: Sequence[float],
    ) -> None:
        """`spawn` starts a child that the supervisor watches; the state process is reached at `address`, and says in
        `lease` until when senders may send.
        """
        self._context = context
        self._spawn = spawn
        self._address = address
        self._authkey = authkey
        self._collector = collector
        self._lease = lease
        self._client = Client(address, authkey)
        self._feeder: Feeder | None = None
        self._running: list[Generation] = []
        self._newest = 0  # the number of the last generation started
        self._ended: list[int] = []  # generations that are to be released
        self._crashes: list[tuple[int, str, list[InFlight]]] = []  # what dead senders had in flight, not told yet

    def __bool__(self) -> bool:
        """Whether any sender is there."""
        return bool(self._running)

    @property
    def unreleased(self) -> bool:
        """Whether the state process has yet to hear what ended senders had in hand."""
        return bool(self._ended or self._crashes)

    def next_moment(self, now: float) -> float:
        """When `turn` has something to do next, unless something happens before."""
        moments = [each.deadline for each in self._running if each.deadline is not None]
        return min([*moments, now + RELEASE_AGAIN if self.unreleased else float("inf")])

    def feed(self, feeder: Feeder) -> None:
        """Have this feeder feed the newest generation."""
        self._feeder = feeder
        feeder.switch(self._newest, self._running[-1].outlet)

    def start(self, settings: Settings) -> None:
        """Start the next generation and have it fed. Raises OSError."""
        try:
            queue: Queue[list[Slice]] = self._context.Queue()
        except OSError as error:
            needed = "/dev/shm must be there, writable, and have room for semaphores"
            raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: {needed}") from None
        self._newest += 1
        generation = Generation(self._newest, queue, Outlet(queue))
        upstreams = list(described(settings))
        for place in range(settings.senders):
            name = f"sender-{self._newest}.{place + 1}"
            crash_log = generation.crash_logs[name] = self._context.RawArray("q", crash_log_size(settings))
            cells = self._context.RawArray("d", counters.cells(len(upstreams)))
            arguments = (name, self._newest, queue, crash_log, cells, self._lease, self._address, self._authkey)
            generation.senders.append(self._spawn("sender", name, *arguments))
            self._collector.counts_in(name, cells, upstreams)
        # Our copy of the reading end would keep the outlet waiting for room when all its senders are dead; without it
        # there is an error to write to them. (concurrent.futures does the same.)
        queue._reader.close()  # type: ignore[attr-defined]
        self._running.append(generation)
        if self._feeder:
            self._feeder.switch(self._newest, generation.outlet)

    def lost(self, dead: Child, ended: str, upstream_timeout: float) -> bool:
        """A sender has ended, and with it its generation; `ended` says how. Returns whether that was unexpected, so
        that a new generation is needed.
        """
        generation = next(each for each in self._running if dead in each.senders)
        generation.senders.remove(dead)
        if dead.process.exitcode and not generation.killed:
            crash_log = CrashLog.read(generation.crash_logs[dead.name])
            self._crashes.append((generation.number, dead.name, crash_log))
        unexpected = generation.deadline is None
        if unexpected:
            log.logger.error("%s died (%s); a new generation of senders takes over", dead.name, ended)
            self._finish(generation, time.monotonic() + upstream_timeout + DYING)
        if not generation.senders:
            generation.queue.close()
            self._running.remove(generation)
            self._ended.append(generation.number)
            self._release()
        return unexpected

    @property
    def numbers(self) -> tuple[int, ...]:
        """The generations that may have something in hand."""
        return *(each.number for each in self._running), *self._ended

    def end_all(self, upstream_timeout: float, why: str, at_once: bool = False) -> bool:
        """End the generation that is fed, as if one of its senders had died; or all, at once. Returns whether there was
        one that is fed, so that a new one is needed.
        """
        fed = [each for each in self._running if each.deadline is None]
        for generation in fed:
            log.logger.info("generation %d ends: %s", generation.number, why)
            self._finish(generation, time.monotonic() + upstream_timeout + DYING)
        for generation in self._running if at_once else ():
            log.logger.warning("generation %d is killed: what it has in hand is another node's", generation.number)
            generation.deadline = time.monotonic()
        return bool(fed)

    def finish(self, deadline: float) -> None:
        """Let all generations finish what is in flight until the deadline. Then nothing more is claimed."""
        for generation in self._running:
            if generation.deadline is None:
                self._finish(generation, deadline)
            generation.deadline = deadline

    def _finish(self, generation: Generation, deadline: float) -> None:
        generation.deadline = deadline
        try:
            self._client.begin(generation.number + 1)
        except StateUnavailable:
            pass  # then no claim is waiting there either
        if self._feeder:
            self._feeder.hold()
        for each in generation.senders:
            each.tell("finish")
            self._collector.leaves(each.name)

    def ask(self, now: float, we_stood_still: bool) -> None:
        """Ask all senders whether they are alive, and kill those that stand still: one of them may hold the lock of the
        queue. With `we_stood_still` the silence is our own fault.
        """
        # One that finishes answers no more; its generation's deadline is what ends it.
        for generation in [each for each in self._running if each.deadline is None]:
            for each in [each for each in generation.senders if each.ready]:
                if we_stood_still:
                    each.moved_at = now
                elif stands_still(each.moved_at, now):
                    log.logger.error("%s has stood still for %.0f s and is killed", each.name, now - each.moved_at)
                    each.process.kill()
                each.ask()

    def turn(self, now: float) -> None:
        """Kill what has not finished in time, and release what has ended."""
        for overdue in [each for each in self._running if each.deadline is not None and each.deadline <= now]:
            overdue.deadline, overdue.killed = float("inf"), True
            for late in overdue.senders:
                log.logger.warning(
                    "%s is not done in time, so killed; what it has in flight may arrive twice", late.name
                )
                late.process.kill()
        self._release()

    def _release(self) -> None:
        """Tell the state process about crashes first, then about ended generations: a release makes suspects ready
        again.
        """
        while self.unreleased:
            try:
                if self._crashes:
                    self._client.record_crash(*self._crashes[0], time.time())
                    del self._crashes[0]
                    continue
                released = self._client.release(self._ended[0])
            except StateUnavailable:
                return  # the next turn tries again
            number = self._ended.pop(0)
            log.logger.info("generation %d has ended; %d tokens it had in hand are sent again", number, released)
