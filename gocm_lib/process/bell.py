"""Wakes a loop that waits in a selector, from other threads."""

import socket


class Bell:
    """Watch `inside` for reading."""

    def __init__(self) -> None:
        self.inside, self._outside = socket.socketpair()
        self.inside.setblocking(False)
        self._outside.setblocking(False)

    def ring(self) -> None:
        """Have the loop turn."""
        try:
            self._outside.send(b"!")
        except BlockingIOError:
            pass  # it is ringing

    def hear(self) -> None:
        """It was heard."""
        try:
            self.inside.recv(4096)
        except BlockingIOError:
            pass
