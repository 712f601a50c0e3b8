"""Starts, watches, replaces and stops GoCM's processes. The only place that knows all of them, and signals.

supervisor (this process: also the front and the feeder)
  |- state      restarted when it dies: the spool has everything
  |- sandbox    with --sandbox
  |- generation 1: a queue and its senders (module senders.generation)
  |- generation 2: ...
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any

from gocm_lib import __version__
from gocm_lib.config import spool_address
from gocm_lib.config.proxy import DIRECTLY, ways
from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.config.upstreams import described, differ, meanings
from gocm_lib.front.front import Front
from gocm_lib.monitoring import health
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import child, early, log, resources
from gocm_lib.process.child import Child
from gocm_lib.process.forkserver import Forkserver
from gocm_lib.process.restarts import Restarts
from gocm_lib.process.systemd import Systemd
from gocm_lib.senders import changes, credentials, in_hand
from gocm_lib.senders.changes import fit_files
from gocm_lib.senders.credentials import Credentials, Source
from gocm_lib.senders.feeder import WAIT, Feeder
from gocm_lib.senders.generation import Generations
from gocm_lib.state.client import Client, LoopClient, StateUnavailable
from gocm_lib.state.contract import Meaning, Snapshot
from gocm_lib.tools import sandbox

START_LIMIT = 60.0  # seconds until every child must be ready; a large spool is checked at its start
ASK_EVERY = 5.0  # seconds between two questions to each child whether it is alive


class Supervisor:
    """Everything that runs, from its start to its stop. Used by cli, in the main thread."""

    def __init__(
        self,
        settings: Settings,
        files: int,
        home: str,
        reread: Callable[[], Settings],
        systemd: Systemd,
        forkserver: Forkserver,
    ) -> None:
        """`files` is how many files each process may have open, `home` where we were started; `reread` gives the
        settings as they are then (SIGHUP). Raises Fatal.
        """
        self.files = files
        self.settings = fit_files(settings, files)
        self.given = settings  # as it was given, to tell what SIGHUP changes
        self.home = home
        self.reread = reread
        self.systemd = systemd
        self.collector = Collector()
        self.forkserver = forkserver
        self.address = forkserver.place("state")
        self.authkey = os.urandom(32)
        self.children: list[Child] = []
        self.lease = _lease(forkserver, settings)
        shared = self.address, self.authkey, self.collector, self.lease
        self.generations = Generations(forkserver.context, self._spawn, *shared)
        self.front: Front | None = None
        self.feeder: Feeder | None = None
        self.credentials: Credentials | None = None
        self.restarts = Restarts()
        # Often enough for the watchdog, whom the senders' moves are told.
        self.ask_every = min(ASK_EVERY, systemd.watchdog / 8) if systemd.watchdog else ASK_EVERY
        self.next_ask = 0.0  # when the children are next asked whether they are alive
        self.signals, self.wakeup = early.signals, early.wakeup()
        self.sandbox_listener: socket.socket | None = None
        self.stopping = False

    def _client(self, *limit: float) -> Client:
        return Client(self.address, self.authkey, *limit)

    # -------------------------------------------------------------------------------------------------- the course

    def run(self) -> Exit:
        """Serve until SIGTERM or SIGINT. Raises Fatal when that is not possible, or no longer."""
        try:
            self._start()
            while not self._told_to_stop():
                self._turn(60.0)
            return self._stop()
        finally:
            self._abandon()

    def _told_to_stop(self) -> bool:
        """Deal with the signals that were noted: SIGHUP reads settings and credentials again, the others stop."""
        while self.feeder and signal.SIGHUP in self.signals:  # while we start it waits
            self.signals.remove(signal.SIGHUP)
            self.systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._reload()
            self.systemd.notify("READY=1")
        return any(number != signal.SIGHUP for number in self.signals)

    def _reload(self) -> None:
        """Apply those changed settings that may change now, name the others, and open the log files again."""
        assert self.front and self.credentials
        try:
            how = self.files, self.home, self._pointed, partial(_look, self._client())
            change = changes.read(self.settings, self.given, self.reread(), *how)
            self.front.follow(self.settings, change.settings)
        except Fatal as problem:
            log.logger.error("SIGHUP: nothing is changed: %s; see gocm help %s", problem, problem.topic)
            return
        self.credentials.replace(change.sources)
        before, self.settings, self.given = self.settings, change.settings, change.given
        self._serve_upstreams(before)
        log.restart(self.settings.log_level)
        for each in self.children:
            each.tell(("log", self.settings.log_level))
        change.tell()

    def _pointed(self, settings: Settings) -> Settings:
        """The settings, sending to our own sandbox if there is one."""
        here = self.sandbox_listener
        return sandbox.point_at(settings, here.getsockname()[1]) if here else settings

    def _serve_upstreams(self, before: Settings) -> None:
        """Send to the upstreams of today's settings from now on."""
        assert self.feeder
        found = described(self.settings)
        self.collector.serve(found)
        try:
            rates = {name: each.rate / 60 for name, each in found.items()}
            self._client().follow(rates, {n: Meaning(*m) for n, m in meanings(self.settings).items()}, time.time())
        except StateUnavailable as error:
            log.logger.error("SIGHUP: the state process has not heard of it, and will when it starts: %s", error)
        if not differ(before, self.settings):
            return
        if self.generations.end_all(self.settings.upstream_timeout, "the upstreams have changed"):
            self.restarts.put_off("sender", self._start_generation, time.monotonic())
        self.feeder.follow(in_hand.terms(self.settings))
        for name in described(before).keys() - found.keys():
            log.logger.warning("SIGHUP: upstream %s is taken away: what is left of its messages is kept", name)

    def _start(self) -> None:
        """Listen first, so that a taken port is told at once. Serve last, when every child is ready."""
        loops = partial(LoopClient, self.address, self.authkey)
        front = self.front = Front(self.settings, self._client, loops, self.collector, self.systemd)
        if self.settings.sandbox:
            self._point_at_sandbox()
        found = self._start_children()
        self._await_ready()
        child.watch_threads()
        resources.collect_seldom()
        held = self.credentials = Credentials(found)
        waiting = self._client(WAIT + self._client().limit)
        self.feeder = Feeder(waiting, held, in_hand.terms(self.settings), self.collector)
        self.generations.feed(self.feeder)
        [newest_job] = [each.fact[0] for each in self.children if each.kind == "state"]
        front.serve(self.settings, newest_job, held.expiry, held.header, self.feeder.put)
        self.collector.serve(found)
        _tell_started(self.settings, front.listeners)
        self.systemd.notify(f"READY=1\nSTATUS=listening on {' and '.join(map(str, front.listeners))}")

    def _start_children(self) -> dict[str, Source]:
        """Start the first children; they get ready side by side. Returns the sources of credentials. Raises Fatal."""
        found, self.settings = credentials.sources(self.settings, self.home)
        if self.settings.sandbox:
            self._start_sandbox()
        self._start_state()
        try:
            self._start_generation()
        except OSError as error:
            raise Fatal(f"cannot start the senders: {error.strerror or error}", Exit.CONFIG) from None
        return found

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not all(each.ready for each in self.children):
            if self._told_to_stop():
                raise Fatal("stopped while starting", Exit.OK)
            if time.monotonic() > deadline:
                raise Fatal(f"not every process was ready within {START_LIMIT:.0f} s", Exit.FAILED)
            self._turn(1.0)

    def _turn(self, patience: float) -> None:
        """Wait for something to happen, for `patience` seconds at most, and deal with it."""
        now = time.monotonic()
        moment = min(self.next_ask, self.generations.next_moment(now), self.restarts.next_moment())
        moment = min(moment, self.systemd.next_ping)
        watched: dict[Any, Child] = {each.process.sentinel: each for each in self.children}
        watched |= {each.control: each for each in self.children}
        for happened in wait([*watched, self.wakeup], min(patience, max(0.0, moment - now))):
            if happened is self.wakeup:
                self.wakeup.recv(4096)
            elif happened is watched[happened].control:
                self._hear(watched[happened])
        for each in [each for each in self.children if not each.process.is_alive()]:
            self._on_death(each)
        now = time.monotonic()
        self._ask_and_ping(now)
        self._start_due(now)
        self.generations.turn(now)

    def _hear(self, each: Child) -> None:
        starting, dropped = not each.ready, each.dropped
        each.hear()
        self.collector.lines_dropped += each.dropped - dropped
        if starting and each.ready:
            self.restarts.succeeded()
            if each.kind == "state" and self.feeder and not self.stopping:
                self._replace_generations(each.fact[1])
            self.collector.child_ready(each.kind, each.name)
        if each.name in self.collector.senders:
            self.collector.sender_moves(each.name, each.moved_at, each.settled_at)

    def _ask_and_ping(self, now: float) -> None:
        if self.front:
            self.front.look_at_certificate(self.settings)
        if now >= self.next_ask:
            self.forkserver.look_after_directory()
            self.generations.ask(now, we_stood_still=now - self.next_ask > self.ask_every)
            for each in self.children:
                if each.kind == "state" and each.ready:
                    each.ask()  # for its log's sake: whether it moves, the intake sees
            self.next_ask = now + self.ask_every
        self.systemd.ping(now, lambda limit: health.stuck(self.collector.pulses.copy(), now, limit))

    # ----------------------------------------------------------------------------------------------- starting children

    def _spawn(self, kind: str, name: str, *arguments: object) -> Child:
        made = self.forkserver.spawn(kind, name, self.settings, *arguments)
        self.children.append(made)
        self.collector.child_started(name, made.process.pid or 0)
        return made

    def _point_at_sandbox(self) -> None:
        """Make the socket that the sandbox will serve, and send there. Raises Fatal."""
        port = self.settings.sandbox_port
        try:
            self.sandbox_listener = sandbox.listen("127.0.0.1", port)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise Fatal(f"cannot listen on port {port}: {reason}; give another --sandbox-port", Exit.ADDRESS) from None
        self.settings = self._pointed(self.settings)
        place = self.sandbox_listener.getsockname()
        log.logger.info("sandbox: what it received is at http://%s:%d/sandbox/received", *place)

    def _start_sandbox(self) -> None:
        self._spawn("sandbox", "sandbox", self.sandbox_listener)

    def _start_state(self) -> None:
        # Who has what in hand only the state process knows. One that takes over is told which generations may have
        # something, and they end. Until there is a feeder none has.
        living = self.generations.numbers if self.feeder else ()
        self._spawn("state", "state", self.address, self.authkey, living, bool(self.feeder), self.lease)

    def _start_generation(self) -> None:
        self.generations.start(self.settings)

    def _replace_generations(self, rescued: bool) -> None:
        """A state process has taken over: end the senders that may have something in hand, and start others."""
        why = "nobody knows any more what it has in hand"
        if self.generations.end_all(self.settings.upstream_timeout, why, rescued):
            self.restarts.put_off("sender", self._start_generation, time.monotonic())

    def _start_due(self, now: float) -> None:
        """Start what is due to be started again."""
        for start in self.restarts.take_due(now):
            try:
                start()
            except OSError as error:
                log.logger.error("a process cannot be started just now: %s", error.strerror or error)
                self.restarts.try_again(start, now)

    # ------------------------------------------------------------------------------------------------------- deaths

    def _on_death(self, dead: Child) -> None:
        ended = dead.reap()
        self.children.remove(dead)
        self.collector.child_ended(dead.kind, dead.name, died=bool(dead.process.exitcode))
        self._stop_if_hopeless(dead, ended)
        now = time.monotonic()
        self.restarts.died(dead.kind, now)
        if dead.kind == "sender":
            if self.generations.lost(dead, ended, self.settings.upstream_timeout) and not self.stopping:
                self.restarts.put_off("sender", self._start_generation, now)
            return
        _tell_death(dead, ended, self.settings.spool)
        self.restarts.put_off(dead.kind, self._start_state if dead.kind == "state" else self._start_sandbox, now)

    def _stop_if_hopeless(self, dead: Child, ended: str) -> None:
        """Raise Fatal when a replacement would end the same way."""
        if dead.process.exitcode == Exit.SPOOL_FAILED:
            raise Fatal(f"the spool {self.settings.spool} cannot be written any more; see the log", Exit.SPOOL_FAILED)
        if dead.refusal and (not self.feeder or dead.refusal[0] in (Exit.SENDER, Exit.SPOOL_DAMAGED)):
            code, reason = dead.refusal
            raise Fatal(reason, code)
        if not dead.ready and self.restarts.failed():
            reason = dead.refusal[1] if dead.refusal else ended
            raise Fatal(f"{dead.name} cannot get ready: {reason}", Exit.CRASHING)

    # ----------------------------------------------------------------------------------------------------- stopping

    def _stop(self) -> Exit:
        """No new jobs; what is in flight gets the drain time; the rest stays in the spool."""
        assert self.front
        number = next(number for number in self.signals if number != signal.SIGHUP)
        log.logger.info("stopping on %s", signal.Signals(number).name)
        self.systemd.notify("STOPPING=1")
        self.stopping = True
        limit = self._client().limit
        deadline = time.monotonic() + self.settings.drain
        self.front.stop(2 * limit + 1.0)
        self.generations.finish(deadline)
        while self.generations:
            self._turn(1.0)
        while self.generations.unreleased and time.monotonic() < deadline + limit:
            self._turn(1.0)
        for each in self.children:
            each.tell("finish")
        rejected = sum(self.collector.rejected.values())
        log.logger.info("stopped; %d requests were refused since the start", rejected)
        return Exit.OK

    def _abandon(self) -> None:
        """Leave no process and no file of ours behind."""
        deadline = time.monotonic() + 2.0
        for each in self.children:
            if each.kind == "state":
                each.tell("finish")
                each.process.join(max(0.0, deadline - time.monotonic()))
            each.process.kill()
        for each in self.children:
            each.process.join(2.0)
        if self.front:
            self.front.remove()


def _look(client: Client) -> Snapshot:
    """What there is to report. Raises Fatal."""
    try:
        return client.snapshot()
    except StateUnavailable as error:
        raise Fatal(f"nobody knows what upstreams have to send: {error}") from None


def _tell_started(settings: Settings, listeners: Iterable[object]) -> None:
    places = " and ".join(map(str, listeners))
    log.logger.info("gocm %s listens on %s, keeps messages in %s", __version__, places, settings.spool)
    if (out := ways(settings, os.environ)) is not DIRECTLY:
        log.logger.info("%s", out)
    for name, each in described(settings).items():
        log.logger.info("upstream %s: %s", name, "the sandbox" if settings.sandbox else each.url)


def _lease(forkserver: Forkserver, settings: Settings) -> Sequence[float]:
    """The time until which senders may send: the state process of a shared spool puts it off while it is heard of. And
    what it leaves to the next one.
    """
    if not spool_address.is_address(settings.spool):
        return [float("inf")]
    lease: Sequence[float] = forkserver.context.RawArray("d", [float("inf"), 0.0])
    return lease


def _tell_death(dead: Child, ended: str, spool: str) -> None:
    log.logger.error("the %s process died (%s) and is started again", dead.name, ended)
    if dead.kind == "state" and spool == ":memory:":
        log.logger.error("the spool was in memory only: messages that were not sent yet are lost")
