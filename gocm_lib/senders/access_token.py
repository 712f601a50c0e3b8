"""Three ways to an access token of Google's: a credentials file, a command, the metadata server. For module
credentials.

Each way is a function of `now` that fetches a Token. Promises that no error text quotes a token server, a file or a
command, and that none of these can block or fill this process.
"""

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gocm_lib.config import settings as options
from gocm_lib.config.proxy import DIRECTLY, Proxy, Ways
from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.process import log

if TYPE_CHECKING:
    import urllib3

# urllib3 is imported where it is used: with an API key or a command this process needs none.

SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
COMMAND_LIFE = 600.0  # seconds that a token of unknown life is used: a command's is asked for again after half of it
LONGEST_LIFE = 7 * 86400.0  # seconds: what claims to be good for longer is a mistake
LONGEST_ANSWER = 64 * 1024  # bytes a command may print, or a token server answer
FETCH_TIMEOUT = 15.0  # seconds
CLOCK = "Google refuses it (invalid_grant): is this machine's clock right, and the key still valid?"

Got = TypeVar("Got")


class Token(NamedTuple):
    """An access token; times in seconds since 1970."""

    value: str
    fetched_at: float
    expires_at: float


class CredentialError(Exception):
    """No token could be fetched now. str() is for the log and holds nothing secret."""


def _http(ca: str = "", proxy: Proxy | None = None) -> "urllib3.PoolManager":
    import urllib3

    # google-auth passes no time-out of its own, and urllib3's default is none.
    timeout = urllib3.Timeout(connect=5.0, read=FETCH_TIMEOUT)
    how: dict[str, Any] = {"num_pools": 2, "timeout": timeout, "retries": False, "ca_certs": ca or None}
    return urllib3.ProxyManager(proxy.url, proxy_headers=proxy.headers, **how) if proxy else urllib3.PoolManager(**how)


class _Answer(NamedTuple):
    """A token server's answer, in the form that google-auth reads."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def _exchange(manager: "urllib3.PoolManager", method: str, url: str, **how: Any) -> _Answer:
    """Ask a token server. The answer must be short and is not unpacked: 400 KB of gzip can become a gigabyte. Raises
    CredentialError, and HTTPError of urllib3.
    """
    headers = {**(how.pop("headers", None) or {}), "Accept-Encoding": "identity"}
    answer = manager.request(method, url, headers=headers, preload_content=False, decode_content=False, **how)
    try:
        data = answer.read(LONGEST_ANSWER, decode_content=False)
    finally:
        answer.close()
    if answer.headers.get("Content-Encoding", "identity") != "identity" or len(data) == LONGEST_ANSWER:
        raise CredentialError(f"what answers there is no token server: more than {LONGEST_ANSWER} bytes, or packed")
    return _Answer(answer.status, answer.headers, data)


class _Outwards:
    """google-auth's transport: each request goes through a proxy or directly, depending on the URL."""

    def __init__(self, ca: str, out: Ways) -> None:
        self._ca = ca
        self._out = out

    def request(self, method: str, url: str, **how: Any) -> _Answer:
        import urllib3

        try:
            with _http(self._ca, self._out.to(url)) as manager:  # once in an hour: nothing is worth keeping
                return _exchange(manager, method, url, **how)
        except urllib3.exceptions.HTTPError as error:
            # google-auth would make it a bare TransportError, of which nobody learns which server it was.
            host = urllib3.util.parse_url(url).host
            raise CredentialError(f"{host} cannot be reached: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """What the system said, where it said something, else the kind of error: never a text with an answer in it."""
    system = error.__cause__ or error.__context__
    said = system.strerror if isinstance(system, OSError) else ""
    return said or type(error).__name__


def from_command(command: str, directory: str) -> Callable[[float], Token]:
    """A fetcher that runs the command, in `directory` if it exists. The command prints a token, or JSON with
    access_token and expires_in.
    """

    def fetch(now: float) -> Token:
        code, printed = _run(shlex.split(command), directory)
        if code:
            raise CredentialError(f"--token-command ended with exit code {code}")
        if printed.startswith(b"{"):
            return _from_json(printed, now, "--token-command")
        return _token(printed.decode("latin-1"), COMMAND_LIFE, now, "--token-command")

    return fetch


def _run(words: list[str], directory: str) -> tuple[int, bytes]:
    """Run a command in that directory, if it exists; returns exit code and output. The command and its children are
    killed when it takes too long or prints too much. Raises CredentialError.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=directory if os.path.isdir(directory) else "/",
        )
    except (OSError, IndexError) as error:
        raise CredentialError(f"--token-command cannot be run: {type(error).__name__}") from None

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    late = threading.Timer(FETCH_TIMEOUT, end)
    late.start()
    printing = process.stdout
    assert printing
    try:
        printed = printing.read(LONGEST_ANSWER)
        if len(printed) == LONGEST_ANSWER:
            raise CredentialError("--token-command prints too much")
        return process.wait(), printed.strip()
    finally:
        late.cancel()
        end()
        printing.close()
        process.wait()


def bounded(ask: Callable[[], Got]) -> Got:
    """What `ask` returns or raises; raises CredentialError when that takes too long.

    A socket's time limit applies to each read, so a server that sends a byte every two seconds would hold its caller
    for ever. The thread that is left behind ends with its server.
    """
    done: SimpleQueue[Future[Got]] = SimpleQueue()

    def run() -> None:
        future: Future[Got] = Future()
        try:
            future.set_result(ask())
        except Exception as error:
            future.set_exception(error)
        done.put(future)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    try:
        return done.get(timeout=2 * FETCH_TIMEOUT).result()
    except Empty:
        raise CredentialError("no answer in time") from None
    except CredentialError:
        raise
    except Exception as error:  # its text may quote an answer
        raise CredentialError(f"fetching failed: {type(error).__name__}") from None


def from_metadata(host: str) -> Callable[[float], Token]:
    """A fetcher that asks the metadata server, on a machine in Google's cloud."""
    _http()  # loads urllib3 now, while the children get ready, and not when clients are served

    def fetch(now: float) -> Token:
        body = ask_metadata(host, f"instance/service-accounts/default/token?scopes={SCOPE}")
        return _from_json(body, now, "the metadata server")

    return fetch


def ask_metadata(host: str, path: str) -> bytes:
    """A value from the metadata server. Raises CredentialError."""
    import urllib3

    try:
        url, headers = f"http://{host}/computeMetadata/v1/{path}", {"Metadata-Flavor": "Google"}
        answer = _exchange(_http(), "GET", url, headers=headers, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        raise CredentialError(f"the metadata server {host} cannot be reached: {type(error).__name__}") from None
    if answer.status != 200:
        raise CredentialError(f"the metadata server {host} answers {answer.status}")
    if answer.headers.get("Metadata-Flavor") != "Google":
        # Google says so in each answer (cloud.google.com/compute/docs/metadata/querying-metadata): what does not, is
        # somebody else at that address.
        raise CredentialError(f"what answers at {host} is no metadata server")
    return answer.data


def _from_json(body: bytes, now: float, source: str) -> Token:
    try:
        answer = json.loads(body)
        value, life = answer["access_token"], float(answer["expires_in"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        value, life = None, 0.0
    return _token(value, life, now, source)


def _token(value: Any, life: float, now: float, source: str) -> Token:
    """A Token from what a source gave. Raises CredentialError when the value cannot stand in a header, or its life
    makes no sense.
    """
    if not 1.0 <= life <= LONGEST_LIFE:  # NaN is not, either
        raise CredentialError(f"{source} gave no access_token with a sensible expires_in")
    try:
        if isinstance(value, str) and value:
            return Token(options.secret(value), now, now + life)
    except ValueError:
        pass
    raise CredentialError(f"{source} gave no token")


def from_file(path: str, ca: str = "", project: str = "", out: Ways = DIRECTLY) -> tuple[Callable[[float], Token], str]:
    """A fetcher for a credentials file, by google-auth, and the project id: the given one, else what the file names or
    Google knows, "" when neither does. `ca` as in --upstream-ca; `out` says how token servers are reached.

    Raises Fatal with exit code 3 when the file cannot be used or the extra is not installed.
    """
    try:
        import google.auth
        import google.auth.transport.urllib3
    except ImportError:
        raise Fatal(
            "--credentials needs google-auth: pip install 'gocm[fcm]', or use --token-command or --fcm-metadata",
            Exit.SENDER,
        ) from None
    request = google.auth.transport.urllib3.Request(_Outwards(ca, out))  # type: ignore[no-untyped-call]
    file = _CredentialsFile(path, request)
    return file.fetch, project or file.project()


class _CredentialsFile:
    """google-auth's credentials from a file. The file is read again when it has changed, or when its credentials were
    refused: Kubernetes replaces a mounted secret without a signal.
    """

    def __init__(self, path: str, request: Any) -> None:
        self._path = path
        self._request = request
        self._doubtful = False
        self._load()

    def _load(self) -> None:
        self._seen = _version(self._path)
        info = _read_file(self._path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a file from elsewhere should be validated; it is the operator's
                self._credentials, self._project = _by_google_auth(info, self._path, self._request)
        except Exception as error:  # google-auth meets an odd file with any exception; its text may quote the file
            raise Fatal(
                f"--credentials {self._path} cannot be used: google-auth says {type(error).__name__}; is it whole?",
                Exit.SENDER,
            ) from None

    def project(self) -> str:
        """The project id that the file names; for another cloud's identity the one that Google names; "" for none."""
        ask = getattr(self._credentials, "get_project_id", None)
        if not self._project and ask:
            with contextlib.suppress(CredentialError):
                self._project = bounded(lambda: ask(self._request))
        return self._project or ""

    def fetch(self, now: float) -> Token:
        """A fresh token. Raises CredentialError."""
        if self._doubtful or _version(self._path) != self._seen:
            try:
                self._load()
            except Fatal as error:  # it is being replaced, or is no better
                log.logger.warning("%s; going on with what it held before", error)
        self._doubtful = True
        try:
            self._credentials.refresh(self._request)  # not before_request(): that starts a look-up thread of its own
        except Exception as error:
            # An odd answer can raise anything. Its text may quote the answer, so all we take from it is whether it is
            # this one well-known word.
            reason = CLOCK if "invalid_grant" in str(error) else type(error).__name__
            reason = str(error) if isinstance(error, CredentialError) else reason
            raise CredentialError(f"no access token for --credentials: {reason}") from None
        self._doubtful = False
        life = COMMAND_LIFE
        if self._credentials.expiry is not None:
            life = self._credentials.expiry.replace(tzinfo=datetime.UTC).timestamp() - now
        return _token(self._credentials.token, life, now, "google-auth")


def _version(path: str) -> tuple[int, int, int] | None:
    """Values that differ when a file was replaced or written; None when there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _by_google_auth(info: dict[str, Any], path: str, request: Any) -> tuple[Any, str]:
    """google-auth's credentials for a file's content, and the project that it names. Raises anything."""
    if info["type"] != "external_account":
        import google.auth

        load = google.auth.load_credentials_from_file
        credentials, project = load(path, scopes=[SCOPE], request=request)  # type: ignore[no-untyped-call]
        return credentials, project or ""
    # Not by the same function: that would ask Google for the project at once, and fail where it cannot be reached.
    from google.auth import aws, identity_pool, pluggable

    kind: ModuleType = identity_pool
    if info.get("subject_token_type") == "urn:ietf:params:aws:token-type:aws4_request":
        kind = aws
    elif "executable" in info.get("credential_source", {}):
        kind = pluggable
    return kind.Credentials.from_info(info, scopes=[SCOPE]), ""


def _read_file(path: str) -> dict[str, Any]:
    """A credentials file's content. Raises Fatal for any other file."""
    try:
        with open(path, "rb") as file:
            found: dict[str, Any] = json.load(file)
    except OSError as error:
        raise Fatal(f"--credentials {path} cannot be read: {error.strerror}", Exit.SENDER) from None
    except (ValueError, RecursionError):
        raise Fatal(f"--credentials {path} is not JSON: give the file as Google made it", Exit.SENDER) from None
    kind = found.get("type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise Fatal(f"--credentials {path} is no Google credentials file: it has no type", Exit.SENDER)
    if kind == "service_account":
        for name in ("client_email", "private_key", "token_uri"):
            if not isinstance(found.get(name), str) or not found[name]:
                raise Fatal(f"--credentials {path} has no {name}: download the key again", Exit.SENDER)
        try:
            options.upstream_url(found["token_uri"])
        except ValueError as error:
            raise Fatal(f"--credentials {path}: token_uri {error}", Exit.SENDER) from None
    return found
