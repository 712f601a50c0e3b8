"""What systemd hands to us and what we tell it: sd_notify(3), the watchdog, sockets that it has opened.

Nothing here needs systemd: where it did not start us, there is no socket, no watchdog, and telling does nothing.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping

from gocm_lib.config.settings import Fatal
from gocm_lib.process import log

NOTIFY_WITHIN = 1.0  # seconds: if it does not listen we go on
FIRST_SOCKET = 3  # sd_listen_fds(3)
OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Systemd:
    """`watchdog`: the seconds within which it must hear from us, or None. `sockets`: those it has opened for us."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take what is for us out of the environment: our children must not take it for theirs. Raises Fatal
        when what is said to be a socket is none.
        """
        found = {name: environ.pop(name, "") for name in OURS}
        self._address = found["NOTIFY_SOCKET"]
        self.watchdog = _watchdog(found)
        self.sockets = [_socket(FIRST_SOCKET + n) for n in range(_sockets(found))]

    def notify(self, message: str) -> None:
        """Tell it lines like READY=1."""
        if not self._address:
            return
        address = self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_WITHIN)
            try:
                sock.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
            except OSError as error:
                log.logger.warning("cannot notify systemd: %s", error.strerror or error)


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
