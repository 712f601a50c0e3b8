"""The socket of a client that is led here under Google's name: it speaks TLS at once, or asks for it by CONNECT."""

import socket
import ssl

from gocm_lib.front import google, response
from gocm_lib.front.request import MAX_HEAD
from gocm_lib.front.wire import PIECE, Wire
from gocm_lib.message.bad_request import BadRequest

HANDSHAKE = 0x16  # the first byte of TLS (RFC 8446, 5.1)
LED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class LedWire(Wire):
    """Greets as Wire does; before that it is led, if the client asks for it."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext) -> None:
        super().__init__(sock, None, False)
        self.is_tls = True
        self._tls = tls
        self._asked = b""

    def greet(self) -> bool | None:
        if not isinstance(self.sock, ssl.SSLSocket):
            self._lead()
        return super().greet()

    def _lead(self) -> None:
        """Begin TLS, once it is known that this is wanted. Raises one of BLOCKED until then, OSError if it is not."""
        if not self._asked and self.sock.recv(1, socket.MSG_PEEK)[:1] == bytes([HANDSHAKE]):
            self._begin()
            return
        while b"\r\n\r\n" not in self._asked and len(self._asked) <= MAX_HEAD:
            more = self.sock.recv(PIECE)
            if not more:
                raise ConnectionError("it has gone")
            self._asked += more
        head, _, early = self._asked.partition(b"\r\n\r\n")
        try:
            if not google.is_ours(*google.asked_for(head)):
                raise google.elsewhere()
            if early:
                raise BadRequest("wait for the answer to CONNECT")
        except BadRequest as problem:
            body = response.error(problem)
            self.sock.send(b"HTTP/1.1 %d Only Google's push is here\r\n" % problem.status)
            self.sock.send(b"Content-Length: %d\r\nContent-Type: application/json\r\n\r\n%b" % (len(body), body))
            raise ConnectionError("it asked for something else") from None
        self.sock.send(LED)
        self._begin()

    def _begin(self) -> None:
        self.sock = self._tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
