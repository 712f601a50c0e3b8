"""Dialling in threads: a TLS handshake with Google takes three round trips, and a loop cannot wait for it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gocm_lib.config.settings import Exit
from gocm_lib.process import child, log
from gocm_lib.senders.places import DIALLERS
from gocm_lib.senders.pool import Pool
from gocm_lib.senders.streams import Channel
from gocm_lib.senders.upstream import DialError


class Dialler:
    """Makes the connections of one upstream. While it dials it has threads of its own: those of another upstream, which
    cannot be reached, would all be taken.
    """

    def __init__(self, pool: Pool, tell: Callable[[Pool, Channel | DialError], None]) -> None:
        """`tell` tells the loop what was dialled; it is called from the threads."""
        self._pool = pool
        self._tell = tell
        self._threads: ThreadPoolExecutor | None = None
        self._under_way = 0

    def dial(self, http2: bool) -> None:
        """Make a connection, and tell. With `http2` that is offered."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(DIALLERS, "dial")
        self._under_way += 1
        self._threads.submit(self._dial, http2)

    def _dial(self, http2: bool) -> None:
        try:
            made: Channel | DialError = self._pool.upstream.dial(http2)
        except DialError as error:
            made = error
        except Exception:  # the pool of threads would swallow it, and the dial count as under way for ever
            log.logger.exception("dialling failed")
            child.leave(Exit.FAILED)
        self._tell(self._pool, made)

    def done(self) -> None:
        """The loop has heard of one. When none is under way the threads may go."""
        self._under_way -= 1
        if self._threads is not None and not self._under_way:
            self._threads.shutdown(wait=False)
            self._threads = None
