"""Client: calls State's verbs in the state process, each within a time limit.

Promises that no call takes longer than its limit: it ends in StateUnavailable instead. A call whose answer was lost
because the state process died is repeated while there is time, which every verb allows but those whose answer would
then be another (COUNTING).
"""

import errno
import multiprocessing.connection
import multiprocessing.managers
import os
import pickle
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIMIT = 1.5  # seconds for a call, and
TURN = 0.4  # for the calls before it: a client of ours is answered within 2, if only with 503

VERBS = (
    *("accept", "begin", "claim", "settle", "accuse", "release"),
    *("snapshot", "status", "page", "forget", "failed", "replay", "discard"),
)
COUNTING = ("replay", "discard")  # they tell how many there were: of a second call, none


class StateUnavailable(Exception):
    """The state process did not answer within the limit. Whether it did what was asked is not known."""


class Client:
    """Calls State's verbs in the state process, each within a time limit. Threads may share one; they take turns.

    It speaks to multiprocessing's Manager, but over a socket with kernel time limits: the Manager's own proxies wait
    for ever for a process that is stopped, in the middle of an answer as in the greeting.
    """

    def __init__(self, address: str, authkey: bytes, limit: float = LIMIT) -> None:
        self.address = address
        self.authkey = authkey
        self.limit = limit
        self._turn = threading.Lock()
        self._connection: Connection | None = None
        self._ident = ""

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in VERBS:
            raise AttributeError(verb)
        return lambda *arguments: self._call(verb, arguments)

    def _call(self, verb: str, arguments: tuple) -> Any:
        deadline = time.monotonic() + self.limit
        if not self._turn.acquire(timeout=TURN):
            raise StateUnavailable("another call is waiting for the state process")
        asked = False
        try:
            while True:
                try:
                    if self._connection is None:
                        self._dial()
                    asked = True
                    # Connection.send does the same with a pickler for what only processes have, made each time.
                    self._connection.send_bytes(pickle.dumps((self._ident, verb, arguments, {})))
                    kind, answer = self._connection.recv()
                    break
                except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
                    self.close()
                    # It died, or is being replaced: ask again while there is time.
                    late = isinstance(error, BlockingIOError) or time.monotonic() + 0.05 > deadline
                    if late or (asked and verb in COUNTING):
                        raise StateUnavailable(f"the state process does not answer ({type(error).__name__})") from None
                    time.sleep(0.02)
        finally:
            self._turn.release()
        if isinstance(answer, sqlite3.OperationalError):
            raise StateUnavailable(str(answer))
        if kind != "#RETURN":
            raise RuntimeError(f"state process failed in {verb}: {answer}")
        return answer

    def _dial(self) -> None:
        self._ident, _verbs = self._greet("create", "State", keep=False)
        self._greet("accept_connection", threading.current_thread().name, keep=True)

    def _greet(self, function: str, argument: str, *, keep: bool) -> Any:
        """Call one of the Manager's own functions; keep the connection for verbs if it is to serve them."""
        sock = socket.socket(socket.AF_UNIX)
        limit = struct.pack("ll", int(self.limit), int(self.limit % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(self.address)
            # Before the greeting: what is sent then is unpickled, and the path may lead to another user's socket.
            _pid, user, _group = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.geteuid():
                raise PermissionError(errno.EPERM, f"{self.address} is the socket of user {user}")
        except OSError:
            sock.close()
            raise
        connection = Connection(sock.detach())
        try:
            multiprocessing.connection.answer_challenge(connection, self.authkey)
            multiprocessing.connection.deliver_challenge(connection, self.authkey)
            answer = multiprocessing.managers.dispatch(connection, None, function, (argument,))
        except BaseException:
            connection.close()
            raise
        if keep:
            self._connection = connection
        else:
            connection.close()
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
