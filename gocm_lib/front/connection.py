"""A client's connection in the front's loop, from its first byte to its close: reads requests strictly, writes answers.

Module loop says when something can be read or written, and when time is up; module handlers decides what is answered.
Promises that answers come in the order of the requests, that a slow, silent or broken client costs a bounded time and
memory, and that no secret and no query is in the access log.
"""

import time
from enum import Enum
from typing import NamedTuple

from gocm_lib.front.auth import EVERYBODY
from gocm_lib.front.gate import SMALL, Asker, BodyRoom, Place
from gocm_lib.front.handlers import Answer
from gocm_lib.front.render import render, request_id
from gocm_lib.front.request import Head, Reader, Request
from gocm_lib.front.response import Response, refusal, unavailable
from gocm_lib.front.routes import Route
from gocm_lib.front.served import Watcher, find_route, set_to_work
from gocm_lib.front.wire import BLOCKED, Wire
from gocm_lib.message.bad_request import BadRequest

READS = 16  # pieces in a row that TLS may hold decrypted
BODY_RATE = 16 * 1024  # bytes a second: a body may take the head's time and as long as this rate needs
LINGER = 1.0  # seconds for which the rest of a refused request is read, so that the refusal is not lost in a reset
ROOM_PATIENCE = 1.0  # seconds that a body waits for room; who is second in the line waits half as long, and so on:
# else many of which each has a part of it would wait for each other
TOO_MUCH = "too much is in work here: come again in a moment"
CROWDED = "too many connections: come again in a moment"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Step(Enum):
    """What a connection does now."""

    GREET = 0  # shake hands, with TLS
    READ = 1  # the next request
    ROOM = 2  # wait for room for its body
    WORK = 3  # wait for its answer
    WRITE = 4  # the answer
    PAUSE = 5  # wait, because it asks on
    LINGER = 6  # read what nobody wants, until it has seen its refusal


class _Exchange(NamedTuple):
    """A request that is being answered, and since when. `held` bytes of the gate's budget are for its answer; its
    connection `goes_on`, or lingers.
    """

    request: Request | None
    began: float
    response: Response | None = None
    held: int = 0
    goes_on: bool = False
    lingers: bool = False


NOTHING = _Exchange(None, 0.0)


class ClientConnection:
    """One client's connection."""

    def __init__(self, wire: Wire, place: Place, watcher: Watcher, asker: Asker) -> None:
        self.place = place
        self.deadline = self.scheduled = float("inf")  # of what it does now; and when the loop looks at that next
        self.closed = False
        self._watcher = watcher
        self._reader = Reader(watcher.handlers.settings.max_body)
        self._asker = asker
        self._room = BodyRoom(watcher.gate.bodies, place.peer)
        self._route: Route | None = None  # of a request that was admitted before its body came
        self._head_began: float | None = None
        self._exchange = NOTHING
        self._write_by = 0.0  # when an answer must be written
        self._watched = True, False
        self._wire = wire
        self._step = Step.GREET if wire.is_tls else Step.READ
        self._set_deadline(place.since + watcher.handlers.settings.head_timeout)

    def fileno(self) -> int:
        return self._wire.fileno()

    # ---------------------------------------------------------------------------------------------- what the loop calls

    def on_ready(self) -> None:
        """The socket can be read, or written, whichever is watched for."""
        try:
            match self._step:
                case Step.READ:
                    self._read()
                case Step.WRITE:
                    self._after_writing(self._wire.flush())
                case Step.GREET:
                    self._greet()
                case Step.LINGER:
                    if not self._wire.receive():
                        self.close()
                case _:
                    # It has sent more than it was answered, or has gone: what it asked for before comes first.
                    self._watch(reads=False, writes=False)
        except BLOCKED:
            pass
        except OSError:
            self.close()  # the client is gone, or speaks no TLS

    def on_time(self, now: float) -> None:
        """The deadline has passed."""
        match self._step:
            case Step.PAUSE:
                self._listen()
            case Step.ROOM:
                self._refuse(BadRequest(TOO_MUCH, status=503))
            case Step.READ if not self._reader.idle:
                self._refuse(BadRequest("the request did not come in time", status=408))
            case Step.WORK:
                pass  # that has limits of its own
            case _:
                self.close()

    def go_on(self) -> None:
        """Go on with what was put off."""
        if self.closed:
            return
        if self._step is Step.READ:
            try:
                self._advance(time.monotonic())
            except OSError:
                self.close()  # the client is gone
            if self._wire.is_tls and self._is_at(Step.READ):
                self.on_ready()  # TLS may hold decrypted bytes that no selector reports
        elif self._step is Step.ROOM and self._room.hold(self._reader.size):
            self._listen()

    def has_unread(self) -> bool:
        """Whether bytes have come that were not read yet."""
        return self._wire.has_unread()

    def close(self) -> None:
        """End it, whatever it was doing."""
        if self.closed:
            return
        self.closed = True
        self._watcher.forget(self)
        self._room.give_back()
        if self._step is Step.WRITE:
            self._written(False)
        self._watcher.gate.leave(self.place)
        self._wire.close()

    def _is_at(self, step: Step) -> bool:
        return self._step is step and not self.closed

    def waits_for_room(self) -> bool:
        return self._is_at(Step.ROOM)

    def _watch(self, reads: bool, writes: bool) -> None:
        if (reads, writes) != self._watched and not self.closed:
            self._watched = reads, writes
            self._watcher.watch(self, reads, writes)

    def _set_deadline(self, when: float) -> None:
        self.deadline = when
        if when < self.scheduled:
            self._watcher.wake_at(self, when)

    # -------------------------------------------------------------------------------------------------------- reading

    def _greet(self) -> None:
        wanted = self._wire.greet()
        if wanted is None and self._wire.speaks_http2():
            self.closed = True
            self._watcher.speaks_http2(self, self._wire, self.place, self._asker)
        elif wanted is None:
            self._listen()
        else:
            self._watch(reads=not wanted, writes=wanted)

    def _listen(self) -> None:
        """Read the next request, of which something may have come already."""
        self._step = Step.READ
        self._watch(reads=True, writes=False)
        # The time of what it did before may be up; it is not the time of what has come of the next request.
        self._set_deadline((self.place.since if self._reader.idle else time.monotonic()) + self._may_be_idle())
        if self._wire.is_tls or not self._reader.idle:
            self._watcher.call_again(self)

    def _read(self) -> None:
        for _ in range(READS if self._wire.is_tls else 1):
            data = self._wire.receive()
            if not data:
                self.close()
                return
            self.place.busy = True
            self._reader.feed(data)
            self._advance(time.monotonic())
            if not self._is_at(Step.READ):
                return

    def _advance(self, now: float) -> None:
        """Deal with the next request as far as it has come."""
        try:
            request = self._reader.next()
            if request is not None:
                self._begin(request, now)
            elif not self._reader.idle:
                self._begin_body(now)
        except BadRequest as problem:
            self._refuse(problem)

    def _begin_body(self, now: float) -> None:
        """A request has come in part: what needs no body to be refused is refused without it, so that who has no token
        costs no memory.
        """
        if self._head_began is None:
            self._head_began = now if self.place.admitted else self.place.since
        if self._reader.head and self._route is None:
            self._route = self._admit(self._reader.head)
            if not self._watcher.gate.begin(self.place):
                self.close()
                return
            if self._reader.awaits_continue() and not self._wire.send(CONTINUE):
                self.close()  # it does not even take that
                return
        # A body has the time that what has come of it deserves.
        patience = self._watcher.handlers.settings.head_timeout + self._reader.size / BODY_RATE
        self._set_deadline(self._head_began + patience)
        if self._route and not self._room.hold(self._reader.size):
            self._step = Step.ROOM
            self._watch(reads=False, writes=False)
            self._set_deadline(now + ROOM_PATIENCE / self._watcher.wait_for_room(self))

    def _admit(self, head: Head | Request) -> Route:
        """The route of a request. Raises BadRequest when it may not be made."""
        route, self._asker = find_route(head, self._watcher.handlers, self._asker)
        if self.place.probes_only and not route.public:
            raise BadRequest(CROWDED, status=503)
        if not route.public:
            self._watcher.gate.admit(self.place)
        self._reader.take_at_most(route.most)
        return route

    def _may_be_idle(self) -> float:
        """Seconds that the connection may be silent before its next request: few, unless it was admitted."""
        settings = self._watcher.handlers.settings
        return settings.idle_timeout if self.place.admitted else settings.head_timeout

    # ------------------------------------------------------------------------------------------------------ answering

    def _begin(self, request: Request, now: float) -> None:
        """A request is whole: have it answered."""
        route, self._route, self._head_began = self._route, None, None
        if not self._watcher.gate.begin(self.place):
            self.close()
            return
        self._step, self._exchange = Step.WORK, _Exchange(request, now)
        try:
            route = route or self._admit(request)
        except BadRequest as problem:
            self._answer(refusal(problem, request.path))
            return
        request = request if self._asker.grant is EVERYBODY else request._replace(grant=self._asker.grant)
        set_to_work(self._watcher, request, route, self._decided)

    def _decided(self, what: Answer) -> None:
        if isinstance(what, Response):
            self._answer(what)
        else:
            self._watcher.carry_out(what, self._decided)

    def _answer(self, response: Response) -> None:
        request, began = self._exchange[:2]
        assert request
        self._room.give_back()
        if self.closed:  # it did not wait
            if response.written:
                response.written(False)
            return
        gate = self._watcher.gate
        # Not of a post: what was done is told in any case.
        large = len(response.body) if len(response.body) > SMALL and not request.body else 0
        held = gate.answers.take(large, self._asker.address) if large else 0
        if held is None:
            audit = response.audit
            if response.written:
                response.written(False)
                audit = ""  # nothing was taken off the list
            response, held = unavailable(TOO_MUCH)._replace(audit=audit), 0
        # One guess of a token a connection: each costs as much as a connection does.
        goes_on = request.keep_alive and not response.refuses_token and not self.place.probes_only and not gate.closing
        rid = request_id(request.headers.get("x-request-id"))
        self._exchange = _Exchange(request, began, response, held, goes_on)
        self._write(response, rid, request.method == "HEAD")
        took = time.monotonic() - began
        self._watcher.answered.note(self._asker, request.method, request.path, response, rid, took)

    def _refuse(self, problem: BadRequest) -> None:
        """Answer a request that could not be read to its end, and close so that the client still sees the answer."""
        self._room.give_back()
        response, rid = refusal(problem, self._reader.head.path if self._reader.head else ""), request_id(None)
        self._exchange = _Exchange(None, 0.0, response, lingers=True)
        self._write(response, rid, False)
        self._watcher.answered.note(self._asker, "-", "-", response, rid, 0.0)

    def _write(self, response: Response, rid: str, head_only: bool) -> None:
        kept_for = self._may_be_idle() if self._exchange.goes_on else 0.0
        data = render(response, rid, kept_for, head_only)
        self._write_by = time.monotonic() + self._watcher.handlers.settings.head_timeout + len(data) / BODY_RATE
        self._step = Step.WRITE
        try:
            self._after_writing(self._wire.send(data))
        except OSError:
            self.close()

    def _after_writing(self, whole: bool) -> None:
        if not whole:
            self._watch(reads=False, writes=True)
            # Whoever takes nothing for so long does not read.
            self._set_deadline(min(self._write_by, time.monotonic() + self._watcher.handlers.settings.head_timeout))
        elif not self._written(True):
            self._next()

    def _written(self, whole: bool) -> bool:
        """The answer was written, or will not be. Returns whether there is work to do for that before the next one."""
        response, held = self._exchange.response, self._exchange.held
        if held:
            self._watcher.gate.answers.give_back(held, self._asker.address)
        self._exchange = self._exchange._replace(response=None, held=0)
        written = response.written if response else None
        if written is None:
            return False
        self._step = Step.WORK
        if whole:
            self._watcher.workers.do("after", lambda: written(True), lambda _: self._next())
        else:
            written(False)  # which only gives back what it holds
        return True

    def _next(self) -> None:
        """Go on to the next request, or end."""
        if self.closed:
            return
        now = time.monotonic()
        done, self._exchange = self._exchange, NOTHING  # an idle client keeps no body of ours
        if done.lingers:
            # Closing a socket with unread data resets the connection, and the reset can overtake the answer.
            self._wire.finish()
            self._step = Step.LINGER
            self._watch(reads=True, writes=False)
            self._set_deadline(now + LINGER)
            return
        self._watcher.gate.answered(self.place, not self._reader.idle, now)
        if not done.goes_on:
            self.close()
        elif self.place.asks_on:
            self._step = Step.PAUSE
            self._watch(reads=False, writes=False)
            self._set_deadline(now + self._watcher.gate.strangers_pause())
        else:
            self._listen()
