"""A time limit on all that happens on a connection, from another thread.

A socket's own time limit is for each read: whoever sends a byte now and then never meets it.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def limit(seconds: float, sock: Callable[[], socket.socket | None]) -> Iterator[None]:
    """Shut down the socket that `sock` gives then (None: there is none yet) when the block takes longer than `seconds`.
    The block then ends in TimeoutError, whatever it made of that.
    """
    late = threading.Event()

    def give_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            if held := sock():
                socket.socket.shutdown(held, socket.SHUT_RDWR)  # of TLS too: no farewell that could take time

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"not done in {seconds:.0f} s")
