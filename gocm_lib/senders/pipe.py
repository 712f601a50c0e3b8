"""Both ends of a generation's queue, a multiprocessing.Queue, without its waiting and without its thread.

The queue has a pipe and a lock for those who read it. Its own `put` hands everything to a thread, which takes turns
with the one that answers clients: that doubled the price of a message in the front. Its own `get` holds the lock while
it waits, so that a sender which is killed while idle would take the lock with it. Promises that an Outlet never blocks
its caller, and that an Inlet holds the lock only while there is something to read.
"""

import os
import pickle
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue

from gocm_lib.message.job import Slice
from gocm_lib.process import framing

Item = list[Slice]


class Outlet:
    """The writing end, in the front process. May be used by several threads."""

    def __init__(self, queue: "Queue[Item]") -> None:
        self._queue = queue  # kept: its end of the pipe is closed with it
        self._descriptor = queue._writer.fileno()  # type: ignore[attr-defined]
        os.set_blocking(self._descriptor, False)
        self._unsent: deque[bytes] = deque()
        self._lock = threading.Lock()

    def put(self, item: Item) -> None:
        """Put an item into the queue. What the pipe has no room for now is written later, in a thread: there is never
        more of it than senders may have in hand.
        """
        message = framing.framed(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        with self._lock:
            waits = bool(self._unsent)
            self._unsent.append(message)
            if waits or self._write():
                return
        threading.Thread(target=self._write_rest, name="outlet", daemon=True).start()

    def _write(self) -> bool:
        """Write what the pipe takes. Returns whether that was everything."""
        while self._unsent:
            try:
                written = os.write(self._descriptor, self._unsent[0])
            except BlockingIOError:
                return False
            except OSError:  # nobody reads any more: the generation is over, and what it had in hand will be released
                self._unsent.clear()
                return True
            if written < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][written:]
            else:
                self._unsent.popleft()
        return True

    def _write_rest(self) -> None:
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        while True:
            room.poll()
            with self._lock:
                if self._write():
                    return


class Inlet:
    """The reading end, in a sender. Its descriptor can be watched."""

    def __init__(self, queue: "Queue[Item]") -> None:
        self._queue = queue
        self._lock = queue._rlock  # type: ignore[attr-defined]
        self._descriptor: int = queue._reader.fileno()  # type: ignore[attr-defined]
        os.set_blocking(self._descriptor, False)

    def fileno(self) -> int:
        return self._descriptor

    def take(self, most: int, weight: Callable[[Slice], int]) -> Sequence[Slice]:
        """What there is, until its weight is `most`. Nothing also where another sender is just taking."""
        found: list[Slice] = []
        if not self._lock.acquire(block=False):
            return found
        try:
            while most > 0 and (message := self._read()) is not None:
                item: Item = pickle.loads(message)
                found += item
                most -= sum(map(weight, item))
        finally:
            self._lock.release()
        return found

    def _read(self) -> bytes | None:
        """The next message; None: there is none."""
        try:
            start = os.read(self._descriptor, framing.START)
        except BlockingIOError:
            return None
        if not start:
            return None  # the front is gone, and so are we in a moment
        start += self._rest(framing.START - len(start))
        size = framing.size_of(start)
        return self._rest(size) if size >= 0 else None

    def _rest(self, size: int) -> bytes:
        """So many bytes, of which the front is just writing the last."""
        parts: list[bytes] = []
        while size:
            try:
                part = os.read(self._descriptor, size)
            except BlockingIOError:
                select.select([self._descriptor], [], [], 1.0)
                continue
            if not part:
                raise EOFError("the front is gone")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
