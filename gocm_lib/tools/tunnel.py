"""Ways through the sandbox to other hosts than Google's, for programs that take it for their proxy: `--pass`.

Two threads for each, that carry bytes and do not look at them. Promises that no more than MOST are open.
"""

import contextlib
import http.client
import socket
import threading
from collections.abc import Mapping

from gocm_lib.config import proxy
from gocm_lib.config.settings import Fatal, Settings
from gocm_lib.process import log

MOST = 256
PATIENCE = 15.0  # seconds to reach a host
PIECE = 64 * 1024


class Tunnels:
    """The open ones."""

    def __init__(self, ways: proxy.Ways) -> None:
        self._ways = ways
        self._free = threading.Semaphore(MOST)
        self._told: set[tuple[str, int]] = set()  # which cannot be reached

    def lead(self, client: socket.socket, host: str, port: int) -> None:
        """Lead a client, whose request to be led is read already, to a host. Takes over its socket."""
        client.setblocking(True)
        threading.Thread(target=self._lead, args=(client, host, port), name="tunnel", daemon=True).start()

    def _lead(self, client: socket.socket, host: str, port: int) -> None:
        with client, contextlib.suppress(OSError):
            if not self._free.acquire(blocking=False):
                client.sendall(b"HTTP/1.1 503 Too many tunnels\r\nContent-Length: 0\r\n\r\n")
                return
            try:
                self._carry(client, host, port)
            finally:
                self._free.release()

    def _carry(self, client: socket.socket, host: str, port: int) -> None:
        try:
            far = self._dial(host, port)
        except (OSError, http.client.HTTPException) as error:
            if (host, port) not in self._told and len(self._told) < MOST:
                self._told.add((host, port))
                log.logger.warning("%s port %d cannot be reached: %s", host, port, error)
            client.sendall(b"HTTP/1.1 502 Cannot be reached\r\nContent-Length: 0\r\n\r\n")
            return
        with far:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(far, client), name="tunnel", daemon=True)
            back.start()
            _copy(client, far)
            back.join()

    def _dial(self, host: str, port: int) -> socket.socket:
        """A connection to a host, by the proxy that leads there. Raises OSError, HTTPException."""
        bare = host.strip("[]")
        through = self._ways.to(f"https://{host}:{port}")
        if through is None:
            made = socket.create_connection((bare, port), PATIENCE)
        else:
            asks = http.client.HTTPConnection(through.host, through.port, timeout=PATIENCE)
            asks.set_tunnel(bare, port, dict(through.headers))
            asks.connect()
            assert asks.sock
            made = asks.sock
        made.settimeout(None)
        return made


def tunnels(environ: Mapping[str, str], own: str) -> Tunnels:
    """Those by the proxy of this environment, if it names one. `own` is where we listen ourselves: host:port. Raises
    Fatal.
    """
    ways = proxy.ways(Settings(), environ)
    before = ways.to("https://example.org")
    if before is not None and str(before) == own:
        raise Fatal(f"the proxy that is set is this sandbox itself ({own}): unset HTTPS_PROXY, then start it")
    return Tunnels(ways)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Carry what comes, until its end; then the other end is told of it."""
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            target.sendall(data)
    for sock, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            sock.shutdown(how)
