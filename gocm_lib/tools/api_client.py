"""Calls a running server, for the commands that need one."""

import http.client
import json
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.process import deadline, log

PATIENCE = 60.0  # seconds for an answer: a replay of many tokens takes its time
LARGEST = 64 * 1024 * 1024  # bytes of an answer: ours have 8 MiB of text, which JSON may write longer
WIDEST = 10_000  # characters of a column
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def show(*columns: object) -> None:
    """Print one line of text that came from the network, without control characters: the server at a port may be
    anybody's.
    """
    print(*(log.one_line(str(column)[:WIDEST]) for column in columns), sep="\t", flush=True)


class ApiError(Fatal):
    """The server does not answer, or refuses. str() is the line for the operator. The exit code is 1."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.FAILED)


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: http.client.HTTPMessage  # names in any case
    body: bytes

    def reason(self) -> str:
        """The server's own reason for refusing."""
        try:
            return str(json.loads(self.body)["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return f"HTTP {self.status}"

    def retry_after(self) -> int:
        """After how many seconds the server asks us to come again; 1 when it does not say."""
        given = self.headers.get("Retry-After", "")
        return max(1, int(given)) if re.fullmatch("[0-9]{1,5}", given) else 1


class ApiClient:
    """A server at a URL, or at the path of its UNIX socket. `ca`: PEM file of the authorities to trust, "" for the
    system's, None to accept any server (then no secret may be sent).
    """

    def __init__(self, to: str, token: str = "", ca: str | None = "") -> None:
        self._to = to
        self._headers = {"Host": "localhost"} if to.startswith("/") else {}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._below = "" if to.startswith("/") else urlsplit(to).path.rstrip("/")  # where a proxy has put it
        self._connection = _connection(to, ca)

    def _request(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        try:
            self._connection.connect()
            sock = self._connection.sock
            with deadline.limit(PATIENCE, lambda: sock):
                self._connection.request(method, self._below + path, body, {**self._headers, **headers})
                answer = self._connection.getresponse()
                content = answer.read(LARGEST)
                if answer.read(1):
                    raise ValueError(f"its answer has more than {LARGEST} bytes")
            return Answer(answer.status, answer.headers, content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ApiError(f"no GoCM answers at {self._to}: {reason}") from None
        finally:
            self._connection.close()  # the next request opens it again

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The answer to a POST. Raises ApiError when there is none."""
        return self._request("POST", path, body, headers)

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        """The status and the JSON of an answer. Raises ApiError when the answer is something else."""
        answer = self._request(method, path, body.encode() if body else None, FORM if body is not None else {})
        try:
            return answer.status, json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"no GoCM answers at {self._to}: {error}") from None

    def take(self, method: str, path: str, has: str, body: str | None = None) -> dict[str, Any]:
        """The JSON object of a 200 that has this member. Raises ApiError with the server's reason otherwise."""
        status, told = self.ask(method, path, body)
        if status != 200:
            raise ApiError(str((isinstance(told, dict) and told.get("error")) or f"HTTP {status}"))
        if not isinstance(told, dict) or has not in told:
            raise ApiError(f"what answers at {self._to} is no GoCM")
        return told


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


def _connection(to: str, ca: str | None) -> http.client.HTTPConnection:
    if to.startswith("/"):
        return _UnixConnection(to)
    parts = urlsplit(to)
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError):
        raise Fatal(f"--ca {ca} holds no PEM certificates") from None
    if ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
