"""The loop that serves all callers of the state: one thread, no lock, no thread for each of them.

A turn takes what has arrived. Accepts and settles that came together are applied in one transaction, with one fsync,
before any of them is answered; an accept that comes alone waits for nobody, a settle a moment for an accept, while such
come. A claim that finds nothing waits here, and is looked at again after each turn. When what came together cannot be
kept, nothing of it has happened, and each call is made alone: when the disk is full the log is written down, which may
be enough, then the reserve is given up. A disk that stays full, and a spool that another program has locked, are told
to the caller, who may try again. After any other failure nobody knows what the next commit would keep: `give_up` is
called, which does not return.

Callers speak the protocol of multiprocessing's Manager: a message is framed (module framing), and a pickle.
"""

import os
import pickle
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, cast

from gocm_lib.process import framing, log
from gocm_lib.state.contract import VERBS, Claimed, Full, Passing
from gocm_lib.state.state import SOON, State

TOGETHER = ("accept", "settle")  # verbs that may share a transaction
RIDE = 0.02  # seconds that a settle waits for an accept
READ = 64 * 1024  # bytes that are read at once; for much more the C library asks the kernel for memory each time

GiveUp = Callable[[str, Exception], NoReturn]


class _Caller:
    """A connection: what has arrived of the next call, and what is still to be written."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.arrived = bytearray()
        self.unsent = b""

    def calls(self) -> Iterable[tuple[str, tuple[Any, ...]]]:
        """The calls that have arrived whole: verb and arguments."""
        while (message := framing.take(self.arrived)) is not None:
            _ident, verb, arguments, _ = pickle.loads(message)
            yield verb, arguments


def _framed(kind: str, answer: object) -> bytes:
    return framing.framed(pickle.dumps((kind, answer)))


class _Call(NamedTuple):
    caller: _Caller
    verb: str
    arguments: tuple[Any, ...]


class _Waiting(NamedTuple):
    """A claim that has found nothing yet, and when it came."""

    call: _Call
    came: float
    known: object  # the pauses of then


class Loop:
    """Serves callers that were handed over by `adopt`, in the thread that calls `run`."""

    def __init__(self, state: State, give_up: GiveUp) -> None:
        self.state = state
        self.turning = threading.Lock()  # held during a turn: whoever takes it has ended the service
        self._give_up = give_up
        self._selector = selectors.DefaultSelector()
        self._new: deque[socket.socket] = deque()
        self._waker, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._waiting: list[_Waiting] = []
        self._riders: list[_Call] = []  # settles that wait for an accept,
        self._riders_by = 0.0  # until then
        self._accepted_at = -RIDE

    def adopt(self, descriptor: int) -> None:
        """Serve the other end of this socket from now on. May be called from any thread."""
        sock = socket.socket(fileno=os.dup(descriptor))
        sock.setblocking(False)
        self._new.append(sock)
        self._waker.send(b"\0")

    def run(self) -> None:
        """Serve until the process ends."""
        patience: float | None = None
        while True:
            calls: list[_Call] = []
            if self._riders:
                wait = max(0.0, self._riders_by - time.monotonic())
                patience = wait if patience is None else min(patience, wait)
            for key, events in self._selector.select(patience):
                if key.fileobj is self._wakeup:
                    self._take_over()
                elif events & selectors.EVENT_WRITE:
                    self._write(key.data, b"")
                else:
                    calls += self._read(key.data)
            with self.turning:
                if calls := self._with_riders(calls, time.monotonic()):
                    self._turn(calls)
                patience = self._look_again() if self._waiting else None

    # --------------------------------------------------------------------------------------------------------- callers

    def _take_over(self) -> None:
        self._wakeup.recv(4096)
        while self._new:
            sock = self._new.popleft()
            self._selector.register(sock, selectors.EVENT_READ, _Caller(sock))

    def _read(self, caller: _Caller) -> list[_Call]:
        try:
            while True:
                more = caller.sock.recv(READ)
                caller.arrived += more
                if len(more) < READ:
                    break
        except BlockingIOError:
            more = b"\0"
        except OSError:
            more = b""
        if not more:
            self._leave(caller)
            return []
        try:
            return [_Call(caller, verb, arguments) for verb, arguments in caller.calls()]
        except Exception as error:  # it has our key, and speaks otherwise: another version of us, at best
            log.logger.error("a caller of the state process is not understood: %s", type(error).__name__)
            self._leave(caller)
            return []

    def _leave(self, caller: _Caller) -> None:
        if caller.sock.fileno() >= 0:
            self._selector.unregister(caller.sock)
            caller.sock.close()
        self._waiting = [each for each in self._waiting if each.call.caller is not caller]

    def _write(self, caller: _Caller, more: bytes) -> None:
        """Write to a caller as much as he takes; the rest when he does."""
        if caller.sock.fileno() < 0:
            return
        before = caller.unsent
        caller.unsent = before + more if before else more
        try:
            caller.unsent = caller.unsent[caller.sock.send(caller.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._leave(caller)
            return
        if bool(before) != bool(caller.unsent):
            wanted = selectors.EVENT_WRITE if caller.unsent else selectors.EVENT_READ
            self._selector.modify(caller.sock, wanted, caller)

    # ----------------------------------------------------------------------------------------------------------- turns

    def _with_riders(self, calls: list[_Call], now: float) -> list[_Call]:
        """The calls to make now. While messages come, settles that came alone wait a moment for the next accept: it has
        its commit anyway, and who settles waits for nothing.
        """
        if any(call.verb == "accept" for call in calls):
            self._accepted_at = now
        elif calls and now < self._accepted_at + RIDE and all(call.verb == "settle" for call in calls):
            if not self._riders:
                self._riders_by = now + RIDE
            self._riders += calls
            calls = []
        if self._riders and (calls or now >= self._riders_by):
            calls, self._riders = self._riders + calls, []
        return calls

    def _turn(self, calls: list[_Call]) -> None:
        together = [call for call in calls if call.verb in TOGETHER]
        answered = self._make_together(together) if len(together) > 1 else False
        for call in calls:
            if call.verb not in VERBS:
                self._answer(call, "#ERROR", AttributeError(f"the state has no verb {call.verb!r}"))
            elif call.verb == "claim":
                self._claim(call)
            elif not (answered and call.verb in TOGETHER):
                self._answer(call, *self._make(call))

    def _make_together(self, calls: list[_Call]) -> bool:
        """Make calls in one transaction. Returns whether that could be."""
        try:
            with self.state.turn():
                answers = [getattr(self.state, call.verb)(*call.arguments) for call in calls]
        except (Full, Passing):
            return False
        except Exception as error:
            self._give_up(calls[0].verb, error)
        for call, answer in zip(calls, answers):
            self._answer(call, "#RETURN", answer)
        return True

    def _make(self, call: _Call) -> tuple[str, object]:
        """Make a call alone. Returns the kind of the answer, and the answer."""
        remedies = [self.state.make_way, self.state.use_reserve]
        while True:
            try:
                return "#RETURN", getattr(self.state, call.verb)(*call.arguments)
            except Full as error:
                if not remedies:
                    return "#ERROR", error
                remedies.pop(0)()
            except Passing as error:
                return "#ERROR", error
            except Exception as error:
                self._give_up(call.verb, error)

    def _answer(self, call: _Call, kind: str, answer: object) -> None:
        self._write(call.caller, _framed(kind, answer))

    # --------------------------------------------------------------------------------------------------- waiting claims

    def _claim(self, call: _Call) -> None:
        *_, now, _wait = call.arguments
        self._make(call._replace(verb="keep_house", arguments=(now,)))
        self._waiting.append(_Waiting(call, time.monotonic(), self.state.pacing.news()))

    def _look_again(self) -> float | None:
        """Look at the claims that wait. Returns in how many seconds to do so again, if nothing happens before."""
        soonest: float | None = None
        for each in list(self._waiting):
            *arguments, now, wait = each.call.arguments
            waited = time.monotonic() - each.came
            left = (min(wait, SOON) if self.state.busy else wait) - waited
            call = each.call._replace(verb="look", arguments=(*arguments, now + waited))
            kind, answer = self._make(call)
            if kind == "#RETURN":
                answer, rest = cast(tuple[Claimed, float], answer)
                if rest and left > 0 and answer.pauses == each.known:
                    soonest = min(rest, left) if soonest is None else min(soonest, rest, left)
                    continue
            self._waiting.remove(each)
            self._answer(each.call, kind, answer)
        return soonest
