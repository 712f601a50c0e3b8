"""A time limit on everything that happens on a connection, enforced from another thread.

A socket's own time limit applies to each read: a peer that sends a byte now and then never meets it.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def limit(seconds: float, sock: Callable[[], socket.socket | None]) -> Iterator[None]:
    """When the block takes longer than `seconds`, shut down the socket that `sock` returns at that moment (None: there
    is none yet). The block then raises TimeoutError, whatever it made of the shutdown.
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
