"""Starts, watches, rebuilds and stops GoCM's processes. The only place that knows processes and signals.

    supervisor (this process: also the HTTP front, intake and feeder)
      |- state      restarted when it dies: the spool has everything
      |- sandbox    with --sandbox
      |- generation 1: a queue and its senders
      |- generation 2: ...

A process that is killed while it reads a multiprocessing.Queue dies holding the queue's lock, and every other reader
then waits for ever. So a queue is never repaired: with the first sender that dies its whole generation ends. A new one
starts at once, the old one's other senders finish what is in flight, and when the last has left, what the generation
still had in hand is released to be sent again.
"""

import contextlib
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any

from gocm_lib import __version__
from gocm_lib.config import values
from gocm_lib.config.proxy import DIRECTLY, ways
from gocm_lib.config.settings import NO_HOST, Exit, Fatal, Settings
from gocm_lib.front import auth, listener, server
from gocm_lib.front.gate import Gate
from gocm_lib.front.handlers import Service
from gocm_lib.front.intake import LIMIT as intake_limit
from gocm_lib.front.intake import Intake
from gocm_lib.front.listener import Listener, ListenError
from gocm_lib.front.server import Server
from gocm_lib.front.webhook import Feedback
from gocm_lib.message import fcm, gcm
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Slice
from gocm_lib.message.suspect import Aloft
from gocm_lib.monitoring import counters, health
from gocm_lib.monitoring.collector import Vitals
from gocm_lib.monitoring.export import Exporter
from gocm_lib.monitoring.trend import Trend
from gocm_lib.process import child, early, log
from gocm_lib.process.run_directory import RunDirectory
from gocm_lib.process.systemd import Systemd
from gocm_lib.senders import credentials, sender
from gocm_lib.senders.crash_log import BlackBox
from gocm_lib.senders.credentials import Credentials, Source
from gocm_lib.senders.feeder import WAIT, Feeder
from gocm_lib.state import state
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.tools import sandbox

START_LIMIT = 60.0  # seconds until every child must be ready; a large spool is checked at its start
NEVER_READY = 5  # starts in a row that failed: the next would too
RESTARTS, RESTART_WINDOW, RESTART_REST = 5, 10.0, 1.0  # so many deaths in so many seconds: rest before the next start
ASK_EVERY, LEASE = 5.0, 15.0  # seconds: a sender that shows no progress for so long loses what it has in hand
CERTIFICATE_LOOK, CERTIFICATE_SOON = 86400.0, 14 * 86400.0  # seconds: how often its end is looked at; when it is told
OF_UPSTREAMS = {"apikey", "apikey_file", "credentials", "token_command"}  # options that the sandbox stands in for
FRONT_FILES, FILES_PER_SENDER, SENDER_FILES = 56, 12, 32  # open files but connections: here, for each sender, in one


def restart_delay(deaths: list[float], now: float) -> float:
    """Seconds to wait before replacing a child, after its like died at these times."""
    return RESTART_REST if sum(now - death < RESTART_WINDOW for death in deaths) > RESTARTS else 0.0


def fit_files(settings: Settings, files: int) -> Settings:
    """The settings with no more connections than a process that may have so many open files can serve. Without that,
    who comes late would take the place of what we need ourselves. Raises Fatal when that leaves none.
    """
    clients = files - FRONT_FILES - FILES_PER_SENDER * settings.senders
    upstream = (files - SENDER_FILES) // len(DIALECTS)
    if min(clients, upstream) < 1:
        raise Fatal(f"{files} open files are too few for {settings.senders} senders: raise ulimit -n", Exit.CONFIG)
    return replace(
        settings,
        max_connections=min(settings.max_connections, clients),
        connections=min(settings.connections, upstream),
    )


def stands_still(moved_at: float, now: float) -> bool:
    """Whether a sender that last showed progress at `moved_at` has lost its lease on what it has in hand."""
    return now - moved_at > LEASE


def how_it_ended(exitcode: int | None) -> str:
    """A process's end in words."""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _tls(settings: Settings) -> ssl.SSLContext:
    return listener.tls_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


class Child:
    """A child process and the pipe to it. It says ("ready", fact), ("refused", (code, reason)) or ("alive", (progress,
    when all was settled, lines of its log that were dropped)); we ask whether it is alive, and say when to finish.
    """

    def __init__(self, context: Any, kind: str, name: str, target: Callable[..., None], *arguments: object) -> None:
        self.kind = kind
        self.name = name
        self.ready = False
        self.fact: Any = None
        self.refusal: tuple[Exit, str] | None = None
        self.asked = False  # whether it is alive, and it has not said yet
        self.progress = -1
        self.settled_at = 0.0
        self.dropped = 0
        self.moved_at = 0.0  # when we last saw it progress
        self.control, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs), name=name, daemon=True)
        self.process.start()
        try:
            self.handle: int | None = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):  # not on this system; or it has ended already
            self.handle = None
        theirs.close()
        log.logger.debug("%s is process %d", name, self.process.pid)

    def hear(self) -> None:
        """Take in what the child has said."""
        try:
            while self.control.poll():
                word, fact = self.control.recv()
                if word == "ready":
                    self.ready, self.fact = True, fact
                    self.moved_at = self.settled_at = time.monotonic()
                elif word == "alive":
                    progress, self.settled_at, self.dropped = fact
                    self.moved_at = time.monotonic() if progress != self.progress else self.moved_at
                    self.progress, self.asked = progress, False
                else:
                    self.refusal = fact
        except (EOFError, OSError):
            pass  # it has ended; its sentinel tells

    def ask(self) -> None:
        """Ask whether it is alive; only once until it says so, for the pipe to one that reads nothing would fill up."""
        if not self.asked:
            self.asked = True
            self.tell("alive?")

    def tell(self, word: str | tuple[str, str]) -> None:
        """Say "alive?", ("log", level): to log anew from that level on, or "finish": what it has in hand, and leave."""
        try:
            self.control.send(word)
        except OSError:
            pass  # it has ended; its sentinel tells

    def bury(self) -> str:
        """Reap it; its end in words. A child may only seem dead, its forkserver being killed: then it is ended now, or
        it might keep the spool's lock.
        """
        self.hear()
        self.process.join()
        self.control.close()
        if self.handle is not None:
            with contextlib.suppress(OSError):  # it has ended, as nearly always
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
                wait([self.handle], 1.0)
            os.close(self.handle)
        return how_it_ended(self.process.exitcode)


@dataclass(eq=False)
class Generation:
    """A queue and the senders that serve it. `deadline` is set once it is finishing."""

    number: int
    queue: "Queue[list[Slice]]"
    senders: list[Child] = field(default_factory=list)
    boxes: dict[str, Sequence[int]] = field(default_factory=dict)  # the black box of each sender
    deadline: float | None = None
    killed: bool = False  # by us, for not being done in time


class Supervisor:
    def __init__(self, settings: Settings, home: str, reread: Callable[[], Settings], systemd: Systemd) -> None:
        """`home` is where we were started, `reread` gives the settings as they are then (SIGHUP)."""
        child.forbid_core_dumps()
        child.keep_one_heap()
        files = child.raise_file_limit()
        self.settings = fit_files(settings, files)
        if self.settings != settings:
            log.logger.warning(
                "%d files may be open: serving at most %d clients, %d upstream connections per sender; raise ulimit -n",
                *(files, self.settings.max_connections, self.settings.connections),
            )
        self.given = settings  # as it was given, to tell what SIGHUP changes
        self.home = home
        self.reread = reread
        self.systemd = systemd
        self.vitals = Vitals()
        self.context = get_context("forkserver")
        try:
            self.directory = RunDirectory()
        except OSError as error:
            reason = f"{error.strerror or error}: give another $TMPDIR"
            raise Fatal(f"no directory for our sockets can be made: {reason}", Exit.CONFIG) from None
        self.address = os.path.join(self.directory.path, "state")
        self.authkey = os.urandom(32)
        self.client = Client(self.address, self.authkey)
        self.children: list[Child] = []
        self.generations: list[Generation] = []
        self.newest = 0  # the number of the last generation started
        self.ended: list[int] = []  # generations to be released still
        self.accusations: list[tuple[int, str, list[Aloft]]] = []  # what dead senders had in the air, to be told still
        self.deaths: dict[str, list[float]] = {"state": [], "sender": [], "sandbox": []}
        self.failed_starts = 0
        self.due: list[tuple[float, Callable[[], None]]] = []  # starts that were put off
        # Often enough for the watchdog, whom the senders' moves are told.
        self.ask_every = min(ASK_EVERY, systemd.watchdog / 8) if systemd.watchdog else ASK_EVERY
        self.next_ask = 0.0  # when the senders are next asked whether they are alive
        self.next_look = 0.0  # when our certificate's end is looked at next
        self.next_ping = 0.0  # when systemd's watchdog is next told that we live
        self.signals = early.signals
        self.listeners: list[Listener] = []
        self.servers: list[Server] = []
        self.feeder: Feeder | None = None
        self.sandbox_listener: socket.socket | None = None
        self.stopping = False

    # -------------------------------------------------------------------------------------------------- the course

    def run(self) -> Exit:
        """Serve until SIGTERM or SIGINT. Raises Fatal when that is not possible (any more)."""
        self._catch_signals()
        try:
            self._start()
            while not self._told_to_stop():
                self._turn(60.0)
            return self._stop()
        finally:
            self._abandon()

    def _catch_signals(self) -> None:
        # Handlers only note: what they interrupt may hold any lock. The socket wakes the wait in _turn.
        self.wakeup, bell = socket.socketpair()
        self.wakeup.setblocking(False)
        bell.setblocking(False)
        signal.set_wakeup_fd(bell.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: self.signals.append(received))

    def _told_to_stop(self) -> bool:
        """Deal with the signals noted: SIGHUP reads settings and credentials again, the others stop."""
        while self.servers and signal.SIGHUP in self.signals:  # while we start it waits
            self.signals.remove(signal.SIGHUP)
            self.systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._reload()
            self.systemd.notify("READY=1")
        return any(number != signal.SIGHUP for number in self.signals)

    def _reload(self) -> None:
        """Follow what can be followed of changed settings, and say what cannot; open the log files anew."""
        try:
            fresh = self.reread()
            names = [row.name for row in fields(fresh) if getattr(fresh, row.name) != getattr(self.given, row.name)]
            live = {row.name for row in fields(fresh) if row.metadata["live"]}
            live -= OF_UPSTREAMS if self.settings.sandbox else set()
            changed = {name: getattr(fresh, name) for name in names if name in live}
            settings = replace(self.settings, **changed)
            self._follow(settings, {} if settings.sandbox else self._sources(fresh))
        except (Fatal, ListenError) as problem:
            log.logger.error("SIGHUP: nothing is changed: %s", problem)
            return
        self.settings, self.given = settings, replace(self.given, **changed)
        log.restart(settings.log_level)
        for each in self.children:
            each.tell(("log", settings.log_level))
        log.logger.info("SIGHUP: keys, tokens and certificates were read again, log files opened again")
        if changed:
            log.logger.info("SIGHUP: changed: %s", ", ".join(changed))
        if fixed := [name for name in names if name not in live]:
            log.logger.warning("SIGHUP: these need a restart: %s", ", ".join(fixed))

    def _sources(self, fresh: Settings) -> dict[str, Source]:
        """The sources of credentials by these settings. Raises Fatal when they are for others than we serve."""
        found, project = credentials.sources(fresh, self.home)
        if set(found) != set(self.servers[0].service.upstreams) or project != self.settings.fcm_project:
            raise Fatal("an upstream or its project that is given, changed or taken away needs a restart")
        return found

    def _follow(self, settings: Settings, found: dict[str, Source]) -> None:
        """Go by these settings and sources of credentials. Raises Fatal or ListenError, and goes by the old
        ones, if they are no good.
        """
        if bool(settings.tls_cert) != bool(self.settings.tls_cert):
            raise Fatal("--tls-cert given or taken away needs a restart")
        self._check_open(settings)
        tls = _tls(settings) if settings.tls_cert else None
        self.servers[0].service.follow(settings)
        for each in self.servers:
            each.tls = None if each.listener.is_local else tls
        self.credentials.replace(found)
        self.next_look = 0.0

    def _look_at_certificate(self, settings: Settings, now: float) -> None:
        """Note when our certificate ends, and say so when that is soon."""
        if not settings.tls_cert:
            return
        self.vitals.certificate_end = ends = listener.certificate_end(settings.tls_cert)
        if ends is not None and ends - now < CERTIFICATE_SOON:
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
            log.logger.warning("the certificate of --tls-cert %s %s", "has ended" if ends < now else "ends", when)

    def _start(self) -> None:
        """Bind first, so that a taken port is told at once; serve last, when every child is ready."""
        settings = self.settings
        # Bad files of tokens and secrets are told before anything is begun.
        auth.read_policy(settings)
        feedback = None
        if settings.feedback_url:
            feedback = Feedback(settings, Client(self.address, self.authkey), self.vitals)
        self._listen()
        tls = None
        if settings.tls_cert:
            tls = self._or_stop(Exit.CONFIG, _tls, settings)
        self.context.set_forkserver_preload(
            ["gocm_lib.senders.sender", "gocm_lib.tools.sandbox"]
        )  # imported once for all children
        self._ensure_forkserver()
        if settings.sandbox:
            self._start_sandbox()
            self._await_ready()
        found, project = credentials.sources(self.settings, self.home)
        self.settings = replace(self.settings, fcm_project=project)
        self._start_state()
        try:
            self._start_generation()
        except OSError as error:
            raise Fatal(f"cannot start the senders: {error.strerror or error}", Exit.CONFIG) from None
        self._await_ready()
        child.watch_threads()
        child.collect_seldom()
        facts = {each.kind: each.fact for each in self.children}
        rooms = sender.rooms(settings)
        self.credentials = Credentials(found)
        waiting = Client(self.address, self.authkey, WAIT + self.client.limit)
        self.feeder = Feeder(waiting, self.credentials, rooms, self.vitals)
        self.feeder.switch(self.newest, self.generations[-1].queue)
        intake = Intake(Client(self.address, self.authkey, intake_limit), facts["state"], self.vitals)
        upstreams = sorted(found)  # fcm before gcm: v1 is the default where there are both
        asking, probing = Client(self.address, self.authkey), Client(self.address, self.authkey)
        trend = Trend(self.vitals, Client(self.address, self.authkey), self.credentials.expiry)
        known = self.credentials.expiry, self.vitals, trend
        service = Service(self.settings, upstreams, intake, asking, probing, *known)
        gate = Gate(self.settings.max_connections)
        self.servers = [Server(each, service, gate, None if each.is_local else tls) for each in self.listeners]
        exporting = Client(self.address, self.authkey)
        exporter = Exporter(self.settings, self.vitals, exporting, self.credentials.expiry, self.systemd)
        for each in self.servers:
            each.start()
        self._tell_started(upstreams)
        exporter.start()
        trend.start()
        if feedback:
            feedback.start()

    def _tell_started(self, upstreams: Sequence[str]) -> None:
        settings = self.settings
        places = " and ".join(map(str, self.listeners))
        log.logger.info("gocm %s listens on %s, keeps messages in %s", __version__, places, settings.spool)
        if (out := ways(settings, os.environ)) is not DIRECTLY:
            log.logger.info("%s", out)
        for name in upstreams:
            url = {gcm.NAME: settings.gcm_url, fcm.NAME: settings.fcm_url}[name]
            log.logger.info("upstream %s: %s", name, "the sandbox" if settings.sandbox else url)
        self.systemd.notify(f"READY=1\nSTATUS=listening on {places}")

    def _listen(self) -> None:
        """Make the sockets, unless systemd has opened them. Raises Fatal."""
        settings = self.settings
        self.listeners = [listener.inherited(sock) for sock in self.systemd.sockets]
        if self.listeners:
            log.logger.info("systemd has opened the sockets: --host and --port are not used")
        self._check_open(settings)
        if not self.listeners and settings.host != NO_HOST:
            self.listeners = self._or_stop(Exit.ADDRESS, listener.tcp, settings.host, settings.port)
        if settings.socket:
            mode, group = settings.socket_mode, settings.socket_group
            self.listeners.append(self._or_stop(Exit.ADDRESS, listener.unix, settings.socket, mode, group))

    def _check_open(self, settings: Settings) -> None:
        """Raise Fatal when everybody could send by a socket that systemd has opened."""
        for each in self.listeners:
            if not each.is_local:
                values.check_open(settings, each.host, f"the socket on {each} that systemd has opened")

    @staticmethod
    def _or_stop(code: Exit, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except ListenError as problem:
            raise Fatal(str(problem), code) from None

    @staticmethod
    def _ensure_forkserver() -> None:
        """Have it run, and deaf to SIGTERM: with it would die every child's only witness. The first time before the
        first thread; later it is there, unless somebody has killed it.
        """
        # Blocked, not ignored: it inherits the mask, and a SIGTERM to us meanwhile is kept for us. The resource
        # tracker goes first, because its start unblocks.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        with child.same_code(os.environ):
            child.forget_lost_forkserver()
            forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

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
        moments = [at for at, _ in self.due] + [g.deadline for g in self.generations if g.deadline is not None]
        moments += [now + 0.2] if self.ended or self.accusations else []
        moments.append(self.next_ask)
        if self.systemd.watchdog:
            moments.append(self.next_ping)
        watched: dict[Any, Child] = {each.process.sentinel: each for each in self.children}
        watched |= {each.control: each for each in self.children}
        for happened in wait([*watched, self.wakeup], max(0.0, min(moments + [now + patience]) - now)):
            if happened is self.wakeup:
                self.wakeup.recv(4096)
            elif happened is watched[happened].control:
                self._hear(watched[happened])
        for each in [each for each in self.children if not each.process.is_alive()]:
            self._on_death(each)
        now = time.monotonic()
        for overdue in [g for g in self.generations if g.deadline is not None and g.deadline <= now]:
            overdue.deadline, overdue.killed = float("inf"), True
            for late in overdue.senders:
                log.logger.warning(
                    "%s is not done in time, so killed; what it has in flight may arrive twice", late.name
                )
                late.process.kill()
        self._ask_and_ping(now)
        starts = [start for at, start in self.due if at <= now]
        self.due = [(at, start) for at, start in self.due if at > now]
        for start in starts:
            try:
                start()
            except OSError as error:
                log.logger.error("a process cannot be started just now: %s", error.strerror or error)
                self.due.append((now + RESTART_REST, start))
        self._release_ended()

    def _ask_and_ping(self, now: float) -> None:
        if now >= self.next_look:
            self.next_look = now + CERTIFICATE_LOOK
            self._look_at_certificate(self.settings, time.time())
        if now >= self.next_ask:
            self._look_after_directory()
            self._ask_senders(now)
            for each in self.children:
                if each.kind == "state" and each.ready:
                    each.ask()  # for its log's sake: whether it moves, the intake sees
            self.next_ask = now + self.ask_every
        if self.systemd.watchdog and now >= self.next_ping:
            self._ping(now)

    def _look_after_directory(self) -> None:
        try:
            if self.directory.restore():
                log.logger.error("somebody removed %s, where our sockets were: made anew", self.directory.path)
        except OSError as error:
            log.logger.error("%s, where our sockets were, is gone: %s", self.directory.path, error.strerror)

    def _hear(self, each: Child) -> None:
        starting, dropped = not each.ready, each.dropped
        each.hear()
        self.vitals.lines_dropped += each.dropped - dropped
        if starting and each.ready:
            self.failed_starts = 0
            self.vitals.child_ready(each.kind, each.name)
        if each.name in self.vitals.senders:
            self.vitals.sender_moves(each.name, each.moved_at, each.settled_at)

    def _ping(self, now: float) -> None:
        """Tell systemd's watchdog that we live, unless something of ours stands still."""
        assert self.systemd.watchdog is not None
        self.next_ping = now + self.systemd.watchdog / 4
        still = health.stuck(self.vitals.pulses.copy(), now, self.systemd.watchdog / 2)
        if not still:
            self.systemd.notify("WATCHDOG=1")
        else:
            log.logger.error("systemd's watchdog is not told that we live: %s stands still", ", ".join(still))

    def _ask_senders(self, now: float) -> None:
        """Kill the senders that stand still: one may hold the lock that all others read the queue with."""
        we_stood_still = now - self.next_ask > self.ask_every
        # One that finishes answers no more; its generation's deadline is what ends it.
        asked = [generation.senders for generation in self.generations if generation.deadline is None]
        for each in [each for senders in asked for each in senders if each.ready]:
            if we_stood_still:
                each.moved_at = now
            elif stands_still(each.moved_at, now):
                log.logger.error("%s has stood still for %.0f s and is killed", each.name, now - each.moved_at)
                each.process.kill()
            each.ask()

    # ----------------------------------------------------------------------------------------------- starting children

    def _spawn(self, kind: str, name: str, target: Callable[..., None], *arguments: object) -> Child:
        self._look_after_directory()
        self._ensure_forkserver()
        self.children.append(Child(self.context, kind, name, target, self.settings, *arguments))
        self.vitals.child_started(name, self.children[-1].process.pid)
        return self.children[-1]

    def _start_sandbox(self) -> None:
        if self.sandbox_listener is None:
            self.sandbox_listener = self._listen_for_sandbox(self.settings.sandbox_port)
            port = self.sandbox_listener.getsockname()[1]
            self.settings = sandbox.point_at(self.settings, port)
            log.logger.info("sandbox: what it received is at http://127.0.0.1:%d/sandbox/received", port)
        self._spawn("sandbox", "sandbox", sandbox.main, self.sandbox_listener)

    @staticmethod
    def _listen_for_sandbox(port: int) -> socket.socket:
        try:
            return sandbox.listen("127.0.0.1", port)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise Fatal(f"cannot listen on port {port}: {reason}; give another --sandbox-port", Exit.ADDRESS) from None

    def _start_state(self) -> None:
        # Until there is a feeder this run has claimed nothing: what is claimed is the last run's, to be released.
        first = self.feeder is None
        self._spawn("state", "state", state.main, self.address, self.authkey, first)

    def _start_generation(self) -> None:
        try:
            queue = self.context.Queue()
        except OSError as error:
            needed = "/dev/shm must be there, writable, and have room for semaphores"
            raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: {needed}") from None
        self.newest += 1
        generation = Generation(self.newest, queue)
        for place in range(self.settings.senders):
            name = f"sender-{self.newest}.{place + 1}"
            box = generation.boxes[name] = self.context.RawArray("q", sender.box_size(self.settings))
            cells = self.context.RawArray("d", counters.cells(len(DIALECTS)))
            arguments = (name, self.newest, queue, box, cells, self.address, self.authkey)
            generation.senders.append(self._spawn("sender", name, sender.main, *arguments))
            self.vitals.counts_in(name, cells)
        # Our copy of the reading end would keep the queue's thread blocked in a full pipe when all its senders are
        # dead; without it the thread gets EPIPE and ends. (concurrent.futures does the same.)
        queue._reader.close()  # type: ignore[attr-defined]
        queue._ignore_epipe = True  # type: ignore[attr-defined]
        queue.cancel_join_thread()
        self.generations.append(generation)
        if self.feeder:
            self.feeder.switch(self.newest, queue)

    # ------------------------------------------------------------------------------------------------------- deaths

    def _on_death(self, dead: Child) -> None:
        ended = dead.bury()
        self.children.remove(dead)
        self.vitals.child_ended(dead.kind, dead.name, died=bool(dead.process.exitcode))
        if dead.process.exitcode == Exit.SPOOL_FAILED:
            raise Fatal(f"the spool {self.settings.spool} cannot be written any more; see the log", Exit.SPOOL_FAILED)
        if dead.refusal and (not self.feeder or dead.refusal[0] in (Exit.SENDER, Exit.SPOOL_DAMAGED)):
            code, reason = dead.refusal
            raise Fatal(reason, code)
        if not dead.ready:
            self.failed_starts += 1
            if self.failed_starts >= NEVER_READY:
                raise Fatal(
                    f"{dead.name} cannot get ready: {dead.refusal[1] if dead.refusal else ended}", Exit.CRASHING
                )
        deaths = self.deaths[dead.kind]
        deaths[:] = [*deaths[-RESTARTS:], time.monotonic()]
        if dead.kind == "sender":
            self._on_sender_death(dead, ended)
            return
        log.logger.error("the %s process died (%s) and is started again", dead.name, ended)
        if dead.kind == "state" and self.settings.spool == ":memory:":
            log.logger.error("the spool was in memory only: messages that were not sent yet are lost")
        self._later(dead.kind, self._start_state if dead.kind == "state" else self._start_sandbox)

    def _on_sender_death(self, dead: Child, ended: str) -> None:
        generation = next(g for g in self.generations if dead in g.senders)
        generation.senders.remove(dead)
        if dead.process.exitcode and not generation.killed:
            self.accusations.append((generation.number, dead.name, BlackBox.read(generation.boxes[dead.name])))
        if generation.deadline is None:
            log.logger.error("%s died (%s); a new generation of senders takes over", dead.name, ended)
            self._finish_generation(generation, self.settings.upstream_timeout + 5.0)
            if not self.stopping:
                self._later("sender", self._start_generation)
        if not generation.senders:
            generation.queue.close()
            self.generations.remove(generation)
            self.ended.append(generation.number)
            self._release_ended()

    def _finish_generation(self, generation: Generation, patience: float) -> None:
        """Let a generation finish what is in flight; nothing more is claimed for it once this returns."""
        generation.deadline = time.monotonic() + patience
        try:
            self.client.begin(generation.number + 1)
        except StateUnavailable:
            pass  # then no claim is waiting there either
        if self.feeder:
            self.feeder.hold()
        for each in generation.senders:
            each.tell("finish")
            self.vitals.leaves(each.name)

    def _later(self, kind: str, start: Callable[[], None]) -> None:
        now = time.monotonic()
        self.due.append((now + restart_delay(self.deaths[kind], now), start))

    def _release_ended(self) -> None:
        while self.accusations or self.ended:
            try:
                if self.accusations:
                    self.client.accuse(*self.accusations[0], time.time())
                    del self.accusations[0]
                    continue
                released = self.client.release(self.ended[0])
            except StateUnavailable:
                return  # the next turn tries again
            log.logger.info("generation %d has ended; %d tokens it had in hand are sent again", self.ended[0], released)
            del self.ended[0]

    # ----------------------------------------------------------------------------------------------------- stopping

    def _stop(self) -> Exit:
        """No new jobs; what is in flight gets the drain time; the rest stays in the spool."""
        number = next(number for number in self.signals if number != signal.SIGHUP)
        log.logger.info("stopping on %s", signal.Signals(number).name)
        self.systemd.notify("STOPPING=1")
        self.stopping = True
        deadline = time.monotonic() + self.settings.drain
        server.stop(self.servers, 2 * self.client.limit + 1.0)
        for generation in self.generations:
            if generation.deadline is None:
                self._finish_generation(generation, self.settings.drain)
            generation.deadline = deadline
        while self.generations:
            self._turn(1.0)
        while (self.ended or self.accusations) and time.monotonic() < deadline + self.client.limit:
            self._turn(1.0)
        for each in self.children:
            each.tell("finish")
        rejected = sum(self.vitals.rejected.values())
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
        for place in self.listeners:
            place.remove()
        self.directory.remove()
