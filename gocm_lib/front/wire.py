"""A client's socket, plain or with TLS, that never blocks."""

import contextlib
import select
import socket
import ssl

PIECE = 64 * 1024  # bytes read at once
BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """A client's socket. What cannot be done now raises one of BLOCKED; what cannot be done at all, OSError."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None, is_local: bool) -> None:
        """With `tls` the client has to greet first. Raises OSError when it is gone already."""
        self._out = memoryview(b"")  # what the socket has not taken yet
        self.is_tls = tls is not None
        if not is_local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) if tls else sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def greet(self) -> bool | None:
        """Go on with the handshake of TLS. None: it is done; else whether it waits for writing."""
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except BLOCKED as wanted:
            return isinstance(wanted, ssl.SSLWantWriteError)
        return None

    def speaks_http2(self) -> bool:
        """Whether that was agreed on in the handshake."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.selected_alpn_protocol() == "h2"

    def receive(self) -> bytes:
        """What has come; b"" at the end. TLS may hold more, decrypted, that no selector reports."""
        return self.sock.recv(PIECE)

    def send(self, data: bytes) -> bool:
        """Write as much as the socket takes. Returns whether that was everything: else `flush` later."""
        self._out = memoryview(data)
        return self.flush()

    def flush(self) -> bool:
        """Write what is left, as much as the socket takes. Returns whether that was everything."""
        try:
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]
        except BLOCKED:
            return False
        return True

    @property
    def left(self) -> int:
        """How many bytes the socket has not taken yet."""
        return len(self._out)

    def has_unread(self) -> bool:
        """Whether bytes have come that were not read yet."""
        look = select.poll()
        look.register(self.sock, select.POLLIN)
        return bool(look.poll(0))

    def finish(self) -> None:
        """Write nothing more."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # of TLS too: no farewell that could take time
        self.sock.close()
