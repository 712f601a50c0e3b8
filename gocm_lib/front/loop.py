"""The loop of the front: one thread reads and answers all clients, and commits what they bring.

In a turn it reads what has come, commits what is whole in one call, and writes each answer at once; nothing of that
waits. What blocks is done by workers. Owns the selector and the deadlines. Promises that an idle connection costs no
time, and that one whose time is up is told or closed.
"""

import contextlib
import errno
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gocm_lib.front.answered import Answered
from gocm_lib.front.connection import ClientConnection
from gocm_lib.front.deadlines import Deadlines
from gocm_lib.front.endings import Await, Endings
from gocm_lib.front.gate import Asker, Gate, Place
from gocm_lib.front.handlers import Answer, Handlers
from gocm_lib.front.intake import Intake
from gocm_lib.front.posts import Keep
from gocm_lib.front.served import Served
from gocm_lib.front.server import Server
from gocm_lib.front.streamed import StreamedConnection
from gocm_lib.front.wire import Wire
from gocm_lib.front.workers import Workers
from gocm_lib.process import cpu, log
from gocm_lib.process.bell import Bell

PULSE = 0.5  # seconds between two signs of life
ACCEPTS = 64  # connections accepted in a turn: those that are there want to be served, too
STOP_LIMIT = 10.0  # seconds until whoever stops us goes on all the same
REST = 0.05  # seconds without accepting when no file can be opened; and between two looks for room
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER = float("inf")


class Loop:
    """`call` may be called from any thread, `stop_accepting` from another one. Everything else happens in `run`."""

    def __init__(
        self,
        servers: Sequence[Server],
        handlers: Handlers,
        gate: Gate,
        intake: Intake,
        endings: Endings,
        bell: Bell,
    ) -> None:
        self.handlers, self.gate, self._intake, self._endings, self._bell = handlers, gate, intake, endings, bell
        self.workers, self.answered = Workers(self.call), Answered(handlers, gate)
        self._servers = list(servers)
        self._accepts_from = 0.0  # when connections are accepted again
        self._deadlines: Deadlines[Served] = Deadlines()
        self._calls: deque[Callable[[], None]] = deque()
        self._again: list[Served] = []
        self._roomless: dict[Served, None] = {}  # those that wait for room, the first first
        self._pulse_at = 0.0
        self._closing = threading.Event()  # to be set: no more connections are to be accepted
        self._closed = threading.Event()  # set: none are
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell.inside, READ, bell)
        for server in self._servers:
            server.socket.setblocking(False)
            self._selector.register(server, READ, server)

    # ----------------------------------------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Serve, in a thread of its own."""
        threading.Thread(target=self._run, name="front", daemon=True).start()

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called in the loop's thread."""
        self._calls.append(function)
        self._bell.ring()

    def stop_accepting(self) -> None:
        """Accept no more connections, and close the listening sockets; those that there are go on."""
        self._closing.set()
        self._bell.ring()
        self._closed.wait(STOP_LIMIT)

    # ------------------------------------------------------------------------------------------- what connections call

    def watch(self, connection: Served, reads: bool, writes: bool) -> None:
        events = (READ if reads else 0) | (WRITE if writes else 0)
        known = connection.fileno() in self._selector.get_map()
        if not events:
            self._selector.unregister(connection)
        elif known:
            self._selector.modify(connection, events, connection)
        else:
            self._selector.register(connection, events, connection)

    def wake_at(self, connection: Served, when: float) -> None:
        connection.scheduled = when
        self._deadlines.set(connection, when)

    def speaks_http2(self, connection: Served, wire: Wire, place: Place, asker: Asker) -> None:
        self.forget(connection)
        place.line = streamed = StreamedConnection(wire, place, self, asker)
        self._selector.register(streamed, READ, streamed)
        streamed.go_on()  # what came with the end of the handshake is decrypted already

    def call_again(self, connection: Served) -> None:
        self._again.append(connection)

    def wait_for_room(self, connection: Served) -> int:
        self._roomless[connection] = None
        return len(self._roomless)

    def carry_out(self, what: Keep | Await, done: Callable[[Answer], None]) -> None:
        now, handlers = time.monotonic(), self.handlers
        if isinstance(what, Keep):
            self._intake.offer(what.jobs, lambda kept: done(handlers.kept(what, kept)), now)
        else:
            self._endings.add(what, lambda found: done(handlers.ended(what, found)), now)

    def forget(self, connection: Served) -> None:
        self._roomless.pop(connection, None)
        self._deadlines.drop(connection)
        with contextlib.suppress(KeyError):  # it is not watched
            self._selector.unregister(connection)

    # ---------------------------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        cpu.stay()
        while True:
            for server in self._serve(self._patience()):
                self._accept(server)
            now = time.monotonic()
            self._catch_up(now)
            self._expire(now)
            for each in (self._intake, self._endings):
                each.turn(now)
                each.client.attend(now)
                each.client.watch(self._selector, each)
            if now >= self._pulse_at:
                self._pulse(now)

    def _serve(self, patience: float) -> list[Server]:
        """Serve who is connected, within so many seconds. Returns the listeners at which somebody waits."""
        ready = [key.data for key, _ in self._selector.select(patience)]
        for each in ready:
            self._on_ready(each)
        return [each for each in ready if isinstance(each, Server)]

    def _on_ready(self, what: Any) -> None:
        if isinstance(what, (ClientConnection, StreamedConnection)):
            if not what.closed:  # another one's end, in this turn, may have been its own
                what.on_ready()
        elif what is self._intake or what is self._endings:
            what.client.write()
            what.read(time.monotonic())
        elif what is self._bell:
            self._bell.hear()

    def _catch_up(self, now: float) -> None:
        """What workers have done, and what connections have put off."""
        while self._calls:
            self._calls.popleft()()
        again, self._again = self._again, []
        for connection in again:
            connection.go_on()
        for connection in list(self._roomless):
            connection.go_on()
            if not connection.waits_for_room():
                self._roomless.pop(connection, None)
        if self._closing.is_set() and not self._closed.is_set():
            self._close_listeners()

    def _patience(self) -> float:
        now = time.monotonic()
        if self._calls or self._again:
            return 0.0
        moments = [self._pulse_at, self._deadlines.next_moment()]
        moments += [self._intake.next_moment(), self._endings.next_moment()]
        if self._roomless:
            moments.append(now + REST)
        return max(0.0, min(moments) - now)

    def _expire(self, now: float) -> None:
        for connection in self._deadlines.due(now):
            connection.scheduled = NEVER
            if connection.closed:
                continue  # by the one before it
            if connection.deadline > now:
                self.wake_at(connection, connection.deadline)  # it has moved meanwhile
            else:
                connection.deadline = NEVER
                connection.on_time(now)

    def _pulse(self, now: float) -> None:
        self._pulse_at = now + PULSE
        for server in self._servers:
            self.handlers.collector.move(server.part)
        if self._accepts_from and now >= self._accepts_from and not self._closing.is_set():
            self._accepts_from = 0.0
            for server in self._servers:
                self._selector.register(server, READ, server)

    # ------------------------------------------------------------------------------------------------------- accepting

    def _accept(self, server: Server) -> None:
        newcomers = list(self._newcomers(server))
        if self.gate.is_crowded(len(newcomers)):
            # A proxy that keeps to a number closes one before it opens the next: who has left before these came
            # needs no place any more.
            self._serve(0.0)
        for sock, address in newcomers:
            try:
                server.process_request(sock, address)
            except Exception:
                log.logger.exception("a connection cannot be served")
                server.shutdown_request(sock)

    def _newcomers(self, server: Server) -> Iterator[tuple[Any, object]]:
        """Sockets of new connections and their addresses."""
        for _ in range(0 if self._accepts_from else ACCEPTS):
            try:
                yield server.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._rest()
                return

    def _rest(self) -> None:
        """No file can be opened: connections stay in the backlog, and asking at once would spin."""
        self._accepts_from = time.monotonic() + REST
        for server in self._servers:
            self._selector.unregister(server)

    def adopt(self, connection: Served) -> None:
        """Serve a new connection."""
        self._selector.register(connection, READ, connection)

    def _close_listeners(self) -> None:
        self._endings.hurry()
        # What was accepted before is answered: its client cannot know that it came late.
        for server in self._servers:
            if not self._accepts_from:
                self._accept(server)
            with contextlib.suppress(KeyError):
                self._selector.unregister(server)
            server.listener.remove()
            server.server_close()
            self.handlers.collector.still(server.part)
        self._servers.clear()
        self._closed.set()
