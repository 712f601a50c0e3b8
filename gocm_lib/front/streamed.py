"""A client's connection that speaks HTTP/2: many requests at once. For those who come under Google's name, whose SDKs
open hundreds of requests on one connection.

The protocol is http2/server, without a socket; here are its socket, its time and who may ask. Promises what module
connection does: a slow, silent or broken client costs a bounded time and memory.
"""

import time
from functools import partial
from typing import NamedTuple

from gocm_lib.front.gate import Asker, BodyRoom, Place
from gocm_lib.front.handlers import Answer
from gocm_lib.front.render import fields, request_id
from gocm_lib.front.request import Head, Request
from gocm_lib.front.response import Response, refusal
from gocm_lib.front.routes import Route
from gocm_lib.front.served import Watcher, find_route, set_to_work
from gocm_lib.front.wire import BLOCKED, Wire
from gocm_lib.http2.frames import Code
from gocm_lib.http2.server import Incoming, Server
from gocm_lib.message.bad_request import BadRequest

READS = 2  # pieces in a row: of small frames one takes long enough
STREAMS = 100  # requests at once, as with Google
TICK = 1.0  # seconds between two looks at what time does to a connection with something open
MOST_HELD = 8 * 1024 * 1024  # bytes of bodies that have not ended, of one client
MOST_UNREAD = 256 * 1024  # bytes of answers, and of what else the protocol has us say, that a client may leave unread
BODY_RATE = 16 * 1024  # bytes a second that a body may take


class _Exchange(NamedTuple):
    """What is known of a request that is being answered: since when, by whom it is asked, and its id."""

    method: str
    path: str
    began: float
    asker: Asker
    rid: str


class StreamedConnection:
    """One client's connection."""

    def __init__(self, wire: Wire, place: Place, watcher: Watcher, asker: Asker) -> None:
        now = time.monotonic()
        self.place = place
        self.deadline = self.scheduled = float("inf")
        self.closed = False
        self._wire = wire
        self._watcher = watcher
        self._asker = asker
        self._room = BodyRoom(watcher.gate.bodies, place.peer)
        self._server = Server(now, watcher.handlers.settings.max_body, STREAMS)
        self._unfinished = 0, now  # the oldest request that has not come whole, and since when it is that
        self._admitted: dict[int, tuple[Route, Asker]] = {}  # requests whose bodies are still to come
        self._working = 0  # requests that are being answered
        self._quiet_since = now  # nothing has been asked: pings do not keep a place
        self._stuck = 0, now  # bytes that the client does not take, and since when so many
        self._pauses = False  # it asks on, and is not read for a while
        self._watched = True, False

    def fileno(self) -> int:
        return self._wire.fileno()

    def has_unread(self) -> bool:
        """Whether bytes have come that were not read yet."""
        return self._wire.has_unread()

    def waits_for_room(self) -> bool:
        return False

    # ---------------------------------------------------------------------------------------------- what the loop calls

    def on_ready(self) -> None:
        """The socket can be read, or written."""
        try:
            if self._watched[0]:
                self._read()
            if not self.closed:
                self._flush()
        except OSError:
            self.close()  # the client is gone

    def go_on(self) -> None:
        """Go on with what was put off: TLS may hold decrypted bytes that no selector reports."""
        if not self.closed:
            self.on_ready()

    def on_time(self, now: float) -> None:
        """Time has passed."""
        settings = self._watcher.handlers.settings
        (number, since), (left, stuck_since) = self._unfinished, self._stuck
        if left and now > stuck_since + settings.head_timeout:
            self.close()  # whoever takes nothing for so long does not read
            return
        if number and now > since + settings.head_timeout + self._server.held / BODY_RATE:
            self._give_up("the request did not come in time")
        elif not self._pauses and self._is_quiet() and now >= self._quiet_since + self._may_be_quiet():
            self._server.leave(None, Code.NO_ERROR, "nothing was asked")
        self._pauses = False
        self._server.tick(now)
        try:
            self._flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """End it, whatever it was doing."""
        if self.closed:
            return
        self.closed = True
        self._watcher.forget(self)
        self._room.give_back()
        self._watcher.gate.leave(self.place)
        self._wire.close()

    # ------------------------------------------------------------------------------------------------- reading, writing

    def _read(self) -> None:
        for _ in range(READS):
            try:
                data = self._wire.receive()
            except BLOCKED:
                return
            if not data:
                self.close()
                return
            now = time.monotonic()
            whole = self._server.receive(data, now)
            for head, length in self._server.begun():
                self._admit(head, length, now)
            for incoming in whole:
                if self._server.awaits(incoming.stream) and not self.closed:
                    self._begin(incoming, now)
            if self.closed:
                return
            self.place.busy = bool(self._server.open)
            self._look_at_bodies(now)
        self._watcher.call_again(self)

    def _look_at_bodies(self, now: float) -> None:
        """Requests that have come in part: they may take so much time and memory, and no more."""
        if (oldest := self._server.oldest_unfinished) != self._unfinished[0]:
            self._unfinished = oldest, now
        held = self._server.held
        if held > MOST_HELD or not self._room.hold(held):
            self._give_up("too much is in work here")

    def _give_up(self, why: str) -> None:
        self._server.leave(None, Code.ENHANCE_YOUR_CALM, why)
        self._server.over = True

    def _flush(self) -> None:
        """Write what there is, and close when it is over. Raises OSError."""
        out = self._server.out
        if out and self._wire.flush():
            data = bytes(out)
            out.clear()
            self._wire.send(data)
        waits = not self._wire.flush() or bool(out)
        if self._server.over and not waits:
            self.close()
            return
        if self._wire.left != self._stuck[0]:
            self._stuck = self._wire.left, time.monotonic()
        self._watch(not (self._pauses or self._server.over) and len(out) < MOST_UNREAD, waits)
        self._set_deadline()

    def _watch(self, reads: bool, writes: bool) -> None:
        if (reads, writes) != self._watched and not self.closed:
            self._watched = reads, writes
            self._watcher.watch(self, reads, writes)

    def _is_quiet(self) -> bool:
        return not (self._server.open or self._server.out or self._wire.left)

    def _may_be_quiet(self) -> float:
        """For how many seconds."""
        settings = self._watcher.handlers.settings
        return settings.idle_timeout if self.place.admitted else settings.head_timeout

    def _set_deadline(self) -> None:
        if self._pauses:
            return
        quiet_until = self._quiet_since + self._may_be_quiet()
        # One that is set stays: whatever comes must not put off a look at what does not.
        self.deadline = min(self.deadline, quiet_until if self._is_quiet() else time.monotonic() + TICK)
        if self.deadline < self.scheduled:
            self._watcher.wake_at(self, self.deadline)

    # ------------------------------------------------------------------------------------------------------- answering

    def _admit(self, incoming: Incoming, length: int, now: float) -> None:
        """The head of a request has come: what needs no body to be refused is refused without it, so that who has no
        token costs no memory.
        """
        path, _, query = incoming.path.partition("?")
        head = Head(incoming.method, path, query, incoming.headers, length, False, True, False)
        if (found := self._find(head, incoming.stream, now)) is None:
            return
        if len(self._admitted) > 2 * STREAMS:  # some were reset since
            self._admitted = {each: kept for each, kept in self._admitted.items() if self._server.awaits(each)}
        self._admitted[incoming.stream] = found
        self._server.take_at_most(incoming.stream, found[0].most)

    def _find(self, head: Head | Request, stream: int, now: float) -> tuple[Route, Asker] | None:
        """The route of a request, and who asks; None: it is refused, and answered."""
        try:
            route, asker = find_route(head, self._watcher.handlers, self._asker)
            if self.place.probes_only:
                raise BadRequest("too many connections: come again in a moment", status=503)
        except BadRequest as problem:
            self._working += 1
            self._answer(stream, self._exchange(head, now), refusal(problem, head.path))
            return None
        if not route.public:
            self._watcher.gate.admit(self.place)
        return route, asker

    def _exchange(self, head: Head | Request, now: float) -> _Exchange:
        return _Exchange(head.method, head.path, now, self._asker, request_id(head.headers.get("x-request-id")))

    def _begin(self, incoming: Incoming, now: float) -> None:
        """A request is whole: have it answered."""
        path, _, query = incoming.path.partition("?")
        request = Request(incoming.method, path, query, incoming.headers, incoming.body, True)
        if not self._watcher.gate.begin(self.place):
            self.close()
            return
        found = self._admitted.pop(incoming.stream, None) or self._find(request, incoming.stream, now)
        if found is None:
            return
        route, asker = found
        self._working += 1
        exchange = self._exchange(request, now)._replace(asker=asker)
        decided = partial(self._decided, incoming.stream, exchange)
        set_to_work(self._watcher, request._replace(grant=asker.grant), route, decided)

    def _decided(self, stream: int, exchange: _Exchange, what: Answer) -> None:
        if isinstance(what, Response):
            self._answer(stream, exchange, what)
            if not self.closed:
                try:
                    self._flush()
                except OSError:
                    self.close()
        else:
            self._watcher.carry_out(what, partial(self._decided, stream, exchange))

    def _answer(self, stream: int, exchange: _Exchange, response: Response) -> None:
        now = time.monotonic()
        self._working -= 1
        gate = self._watcher.gate
        if not self.closed:
            shared, own = fields(response, exchange.rid)
            self._server.answer(stream, response.status, shared, response.body, own)
            # One guess of a token a connection: each costs as much as a connection does. What came with it is not
            # looked at.
            if response.refuses_token or gate.closing:
                last = stream if response.refuses_token else None
                self._server.leave(last, Code.NO_ERROR, "ask again on a new connection")
            if not self._working:
                self._quiet_since = now
                gate.answered(self.place, bool(self._server.open), now)
                self._room.give_back()
                if self.place.asks_on:
                    self._pause(now)
        method, path, began, asker, rid = exchange
        self._watcher.answered.note(asker, method, path, response, rid, now - began)

    def _pause(self, now: float) -> None:
        """Read nothing for a moment: who was never admitted and asks on waits for the others who do."""
        self._pauses = True
        self._watch(False, self._watched[1])
        self.deadline = now + self._watcher.gate.strangers_pause()
        if self.deadline < self.scheduled:
            self._watcher.wake_at(self, self.deadline)
