"""A writer of log lines that never blocks its callers, even when the log's reader or disk stands still.

Owns the file descriptor and the only thread that writes to it: a write to a full pipe or a hanging disk may block for
ever, and O_NONBLOCK would apply to every process that shares the pipe. Promises that `put` never waits; that lines are
written in the order of `put`, never torn by another process (at most MAX_LINE bytes per write to an appending
descriptor); and that lines for which there is no room are counted, and the count is logged once there is room.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_LINE = 4096  # POSIX's PIPE_BUF on Linux: a longer write to a pipe may be torn
ROOM = 1 << 18  # bytes of lines that wait to be written
STUCK = 0.5  # seconds that a write takes when nobody reads: then nobody is waited for


class Writer:
    """One log file or stderr, for all threads of a process."""

    def __init__(self, path: str, tell: Callable[[int], bytes]) -> None:
        """Append to the file at `path`, or write to stderr if it is empty. `tell` makes a line from the number of
        dropped lines. Raises OSError when the file cannot be opened.
        """
        self.path = path
        self.dropped = 0  # lines, since the start
        self._tell = tell
        self._descriptor = _open(path)
        self._lines: deque[bytes | Callable[[OSError], None]] = deque()  # a callable: open the file anew
        self._waiting = 0  # bytes
        self._untold = 0
        self._is_read = True  # as far as we know
        self._writing_since: float | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queue a line; drop and count it when too many wait."""
        with self._changed:
            if self._waiting + len(line) > ROOM:
                self._drop(1)
                return
            self._lines.append(line)
            self._waiting += len(line)
            self._changed.notify_all()

    def reopen(self, failed: Callable[[OSError], None]) -> None:
        """After the lines queued so far, go on in the file that is at the path then: the old one was renamed by log
        rotation. When it cannot be opened, keep the old one and call `failed` with the reason.
        """
        with self._changed:
            self._lines.append(failed)
            self._changed.notify_all()

    def flush(self, patience: float) -> None:
        """Return when everything is written, after `patience` seconds at most, or at once if nobody reads."""
        deadline = time.monotonic() + patience
        with self._changed:
            while (self._lines or self._writing_since is not None) and time.monotonic() < deadline:
                since = self._writing_since
                if since is not None and time.monotonic() - since > STUCK:
                    return
                self._changed.wait(STUCK / 10)

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._untold += count

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing_since = None
                self._changed.notify_all()
                while not self._lines and not (self._untold and self._is_read):
                    self._changed.wait()
                self._writing_since = time.monotonic()
                untold = self._untold if not self._lines else 0
                batch = [] if untold else self._take()
            if untold:
                self._tell_of(untold)
            elif isinstance(batch, list):
                self._write(batch)
            else:
                self._open_anew(batch)

    def _take(self) -> list[bytes] | Callable[[OSError], None]:
        """What to do next: lines that together are no longer than one may be, or reopening the file."""
        first = self._lines.popleft()
        if not isinstance(first, bytes):
            return first
        batch, size = [first], len(first)
        while self._lines:
            line = self._lines[0]
            if not isinstance(line, bytes) or size + len(line) > MAX_LINE:
                break
            self._lines.popleft()
            batch.append(line)
            size += len(line)
        self._waiting -= size
        return batch

    def _tell_of(self, untold: int) -> None:
        if self._put_out(self._tell(untold)):
            with self._changed:
                self._untold -= untold

    def _write(self, batch: list[bytes]) -> None:
        if not self._put_out(b"".join(batch)):
            with self._changed:
                self._drop(len(batch))

    def _put_out(self, data: bytes) -> bool:
        try:
            os.write(self._descriptor, data)
            self._is_read = True
        except OSError:  # the disk is full, or nobody will ever read
            self._is_read = False
        return self._is_read

    def _open_anew(self, failed: Callable[[OSError], None]) -> None:
        if not self.path:
            return
        try:
            fresh = _open(self.path)
        except OSError as error:
            failed(error)
            return
        os.dup2(fresh, self._descriptor, inheritable=False)
        os.close(fresh)
        self._is_read = True


def _open(path: str) -> int:
    if not path:
        return 2
    # A pipe that nobody has open to read would hold even the opening.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o640)
    os.set_blocking(descriptor, True)
    return descriptor
