"""What systemd passes to us and what we tell it: sd_notify(3), the watchdog, sockets that it has opened.

Nothing here needs systemd. When systemd did not start us, there is no socket and no watchdog, and telling does nothing.
"""

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from gocm_lib.config.settings import Fatal
from gocm_lib.process import log

NOTIFY_WITHIN = 1.0  # seconds: if it does not listen we go on
FIRST_SOCKET = 3  # sd_listen_fds(3)
OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Systemd:
    """`watchdog`: the seconds within which systemd must hear from us, or None. `sockets`: the sockets that it has
    opened.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take our variables out of the environment, so that children do not use them. Raises Fatal when a descriptor
        that should be a socket is not one.
        """
        found = {name: environ.pop(name, "") for name in OURS}
        self._address = found["NOTIFY_SOCKET"]
        self.watchdog = _watchdog(found)
        self.next_ping = 0.0 if self.watchdog else float("inf")  # when the watchdog is told next (monotonic)
        self.sockets = [_socket(FIRST_SOCKET + n) for n in range(_sockets(found))]

    def notify(self, message: str) -> None:
        """Send lines like READY=1."""
        if not self._address:
            return
        address = self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_WITHIN)
            try:
                sock.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
            except OSError as error:
                log.logger.warning("cannot notify systemd: %s", error.strerror or error)

    def ping(self, now: float, stuck: Callable[[float], Sequence[str]]) -> None:
        """Tell the watchdog that we live, when it is time, unless `stuck(seconds)` names a part that has not moved for
        that long.
        """
        if self.watchdog is None or now < self.next_ping:
            return
        self.next_ping = now + self.watchdog / 4
        if still := stuck(self.watchdog / 2):
            log.logger.error("systemd's watchdog is not told that we live: %s stands still", ", ".join(still))
        else:
            self.notify("WATCHDOG=1")


def _socket(descriptor: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise Fatal(f"LISTEN_FDS: descriptor {descriptor} is no socket: {error.strerror}") from None
    sock.set_inheritable(False)
    return sock


def _for_us(pid: str) -> bool:
    return not pid or pid == str(os.getpid())


def _watchdog(found: Mapping[str, str]) -> float | None:
    wait = found["WATCHDOG_USEC"]
    return int(wait) / 1e6 if wait.isdecimal() and int(wait) and _for_us(found["WATCHDOG_PID"]) else None


def _sockets(found: Mapping[str, str]) -> int:
    count = found["LISTEN_FDS"]
    return int(count) if count.isdecimal() and found["LISTEN_PID"] == str(os.getpid()) else 0
