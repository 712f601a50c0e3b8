"""Client calls State's verbs in the state process, each within a time limit; LoopClient does so for loops.

Promises that no call takes longer than its limit: it raises StateUnavailable instead. If the state process dies before
answering, the call is repeated until the time limit. `replay` and `discard` are not: the second answer would count
nothing.
"""

import errno
import multiprocessing.connection
import multiprocessing.managers
import os
import pickle
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from gocm_lib.message.outcome import Result
from gocm_lib.message.suspect import InFlight
from gocm_lib.process import framing
from gocm_lib.state.contract import (
    Accepted,
    Cancelled,
    Claimed,
    Entry,
    Failed,
    Full,
    Meaning,
    Passing,
    Past,
    Place,
    Shared,
    Snapshot,
    Status,
    Summary,
    Which,
)
from gocm_lib.state.packs import Pack

READ = 64 * 1024  # bytes that are read at once; for much more the C library asks the kernel for memory each time
LIMIT = 1.5  # seconds for a call, and
TURN = 0.4  # for the calls before it: a client of ours is answered within 2, if only with 503

COUNTING = (
    "replay",
    "discard",
    "release_held",
    "discard_held",
)  # they tell how many there were: of a second call, none


class StateUnavailable(Exception):
    """The state process did not answer within the limit. Whether it did what it was asked is not known."""


class Client(Shared):
    """Calls State's verbs in the state process, each within a time limit. Threads may share one; they take turns.

    It speaks to multiprocessing's Manager over a socket with kernel time limits. The Manager's own proxies would wait
    for ever for a process that is stopped, in the middle of an answer or of the greeting.
    """

    def __init__(self, address: str, authkey: bytes, limit: float = LIMIT) -> None:
        self.address = address
        self.authkey = authkey
        self.limit = limit
        self._turn = threading.Lock()
        self._connection: Connection | None = None
        self._ident = ""

    def accept(self, packs: Sequence[Pack], seen: int | None = None) -> Accepted:
        accepted: Accepted = self._call("accept", packs, seen)
        return accepted

    def begin(self, generation: int) -> None:
        self._call("begin", generation)

    def follow(self, rates: Mapping[str, float], meanings: Mapping[str, Meaning], now: float) -> None:
        self._call("follow", rates, meanings, now)

    def hold(self, upstream: str, by: str, now: float) -> None:
        self._call("hold", upstream, by, now)

    def let_go(self, upstream: str) -> bool:
        held: bool = self._call("let_go", upstream)
        return held

    def claim(
        self,
        generation: int,
        batch: int,
        in_hand_limits: Mapping[str, int],
        ready: Mapping[str, float],
        now: float,
        wait: float,
    ) -> Claimed:
        claimed: Claimed = self._call("claim", generation, batch, in_hand_limits, ready, now, wait)
        return claimed

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        self._call("settle", generation, results, now)

    def record_crash(self, generation: int, sender: str, flights: Sequence[InFlight], now: float) -> int:
        set_aside: int = self._call("record_crash", generation, sender, flights, now)
        return set_aside

    def release(self, generation: int) -> int:
        released: int = self._call("release", generation)
        return released

    def snapshot(self) -> Snapshot:
        snapshot: Snapshot = self._call("snapshot")
        return snapshot

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        status: Status | Past | None = self._call("status", job, state, after, limit)
        return status

    def ended(self, jobs: Sequence[int], anyway: Sequence[int], now: float) -> dict[int, Status | Past | None]:
        ended: dict[int, Status | Past | None] = self._call("ended", jobs, anyway, now)
        return ended

    def jobs(self, tag: str, after: int, limit: int, upstreams: Sequence[str] = ()) -> list[Summary]:
        jobs: list[Summary] = self._call("jobs", tag, after, limit, upstreams)
        return jobs

    def page(self, which: str, after: int, limit: int, upstream: str = "") -> Sequence[Entry]:
        entries: Sequence[Entry] = self._call("page", which, after, limit, upstream)
        return entries

    def hand_out(self, which: str, limit: int, upstream: str = "") -> Sequence[Entry] | None:
        entries: Sequence[Entry] | None = self._call("hand_out", which, limit, upstream)
        return entries

    def handed_out(self, which: str, upto: int, upstream: str = "") -> None:
        self._call("handed_out", which, upto, upstream)

    def forget(self, which: str, upto: int, upstream: str = "") -> bool:
        known: bool = self._call("forget", which, upto, upstream)
        return known

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        failed: list[Failed] = self._call("failed", which, after, limit)
        return failed

    def cancel(self, job: int, now: float) -> Cancelled | Past | None:
        cancelled: Cancelled | Past | None = self._call("cancel", job, now)
        return cancelled

    def cancel_all(self, jobs: Sequence[int], now: float) -> list[Cancelled | Past | None]:
        cancelled: list[Cancelled | Past | None] = self._call("cancel_all", jobs, now)
        return cancelled

    def replay(self, which: Which, now: float) -> int:
        replayed: int = self._call("replay", which, now)
        return replayed

    def discard(self, which: Which) -> int:
        discarded: int = self._call("discard", which)
        return discarded

    def release_held(self) -> int:
        released: int = self._call("release_held")
        return released

    def discard_held(self) -> int:
        discarded: int = self._call("discard_held")
        return discarded

    def _call(self, verb: str, *arguments: object) -> Any:
        deadline = time.monotonic() + self.limit
        if not self._turn.acquire(timeout=TURN):
            raise StateUnavailable("another call is waiting for the state process")
        asked = False
        try:
            while True:
                try:
                    connection = self._connection or self.dial()
                    asked = True
                    # Connection.send does the same with a pickler for what only processes have, made each time.
                    connection.send_bytes(pickle.dumps((self._ident, verb, arguments, {})))
                    kind, answer = connection.recv()
                    break
                except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
                    self.close()
                    # It died, or is being replaced: ask again while there is time.
                    late = isinstance(error, BlockingIOError) or time.monotonic() + 0.05 > deadline
                    if late or (asked and verb in COUNTING):
                        raise StateUnavailable(f"the state process does not answer ({type(error).__name__})") from None
                    time.sleep(0.02)
        finally:
            self._turn.release()
        if isinstance(answer, (Full, Passing)):
            raise StateUnavailable(str(answer))
        if kind != "#RETURN":
            raise RuntimeError(f"state process failed in {verb}: {answer}")
        return answer

    def dial(self) -> Connection:
        """A new connection, over which calls can be made. Raises OSError, EOFError, AuthenticationError."""
        asking, (self._ident, _verbs) = self._greet("create", "State")
        asking.close()
        self._connection, _ = self._greet("accept_connection", threading.current_thread().name)
        return self._connection

    def _greet(self, function: str, argument: str) -> tuple[Connection, Any]:
        """Connect, and call one of the Manager's own functions; returns the connection and the answer."""
        sock = socket.socket(socket.AF_UNIX)
        limit = struct.pack("ll", int(self.limit), int(self.limit % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(self.address)
            # Before the greeting: what is sent then is unpickled, and the path may lead to another user's socket.
            _pid, user, _group = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.geteuid():
                raise PermissionError(errno.EPERM, f"{self.address} is the socket of user {user}")
        except OSError:
            sock.close()
            raise
        connection = Connection(sock.detach())
        try:
            multiprocessing.connection.answer_challenge(connection, self.authkey)
            multiprocessing.connection.deliver_challenge(connection, self.authkey)
            dispatch = multiprocessing.managers.dispatch  # type: ignore[attr-defined]
            return connection, dispatch(connection, None, function, (argument,))
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class LoopClient:
    """Makes one call at a time without waiting for it, for a loop with a selector, which watches `sock`. If the state
    process dies before answering, or takes longer than `limit` seconds, the call is made again, to whoever answers
    then: so only verbs that may be repeated are called so.
    """

    def __init__(self, address: str, authkey: bytes, ring: Callable[[], None], limit: float = LIMIT) -> None:
        """`ring` wakes the loop, from another thread: there is something to `attend` to."""
        self._client = Client(address, authkey, limit)
        self._ring = ring
        self._limit = limit
        self._call: bytes | None = None  # that is under way
        self._since = 0.0  # when it was made, or made again
        self._unsent = b""
        self._arrived = bytearray()
        self._dialled: socket.socket | None = None  # by the thread that dials, for the loop to take over
        self._dialling = False
        self.sock: socket.socket | None = None
        self._watched: tuple[socket.socket | None, int] = (None, 0)  # by the selector, and for what
        self.troubled = ""  # why the call that is under way was made again

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._call is not None

    def call(self, verb: str, *arguments: object) -> None:
        """Make a call. Its answer will be in what `read` returns."""
        self._call = framing.framed(pickle.dumps(("", verb, arguments, {})))
        self._make()

    def _make(self) -> None:
        assert self._call is not None
        self._since = time.monotonic()
        if self.sock is None:
            self._dial()
        else:
            self._unsent = self._call
            self.write()

    def _dial(self) -> None:
        if not self._dialling:
            self._dialling = True
            threading.Thread(target=self._greet, name="state dialler", daemon=True).start()

    def _greet(self) -> None:
        """Connect, however long that takes: greeting is a conversation, for which a loop cannot wait."""
        while True:
            try:
                self._dialled = socket.socket(fileno=os.dup(self._client.dial().fileno()))
                self._client.close()
                break
            except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
                self._client.close()
                self.troubled = type(error).__name__
                time.sleep(0.05)
        self._ring()

    def attend(self, now: float) -> None:
        """Take over a new connection; give up one that does not answer."""
        if self.sock and self.busy and now - self._since > self._limit:
            self._lose("no answer")
        if self._dialled is not None:
            self.sock, self._dialled, self._dialling = self._dialled, None, False
            self.sock.setblocking(False)
            if self.busy:
                self._make()

    def write(self) -> None:
        """Write what the socket takes."""
        if self.sock is None:
            return
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(type(error).__name__)

    def read(self) -> list[Any]:
        """The answer to the call, if it has come: what the verb returns, or StateUnavailable."""
        try:
            while self.sock:
                data = self.sock.recv(READ)
                if not data:
                    self._lose("closed")
                    break
                self._arrived += data
                if len(data) < READ:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(type(error).__name__)
        message = framing.take(self._arrived)
        if message is None or self._call is None:
            return []
        self._call, self.troubled = None, ""
        kind, answer = pickle.loads(message)
        if isinstance(answer, (Full, Passing)):
            return [StateUnavailable(str(answer))]
        if kind != "#RETURN":
            raise RuntimeError(f"state process failed: {answer}")
        return [answer]

    def _lose(self, why: str) -> None:
        """The connection is of no use any more. It is closed when it is not watched any more: before that its number
        must not be another's.
        """
        self.troubled = why
        self.sock, self._unsent = None, b""
        self._arrived.clear()
        if self.busy:
            self._since = time.monotonic()
            self._dial()

    def watch(self, selector: selectors.BaseSelector, data: object) -> None:
        """Have the selector watch the connection that there is now, with this data."""
        wanted = self.sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        known, events = self._watched
        if known is not self.sock:
            if known is not None:
                selector.unregister(known)
                known.close()
            if self.sock is not None:
                selector.register(self.sock, wanted[1], data)
        elif self.sock is not None and events != wanted[1]:
            selector.modify(self.sock, wanted[1], data)
        self._watched = wanted

    def next_moment(self) -> float:
        """When there is something to `attend` to, unless something happens before."""
        return self._since + self._limit if self.busy and self.sock else float("inf")
