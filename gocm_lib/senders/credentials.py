"""From an API key or Google credentials to Authorization headers, renewed in time. One owner for all senders.

Lives in the front process; the feeder puts the header of the moment on what it feeds, so a renewed token is used by the
next request. A token is renewed before it ends, and while that fails the old one is used as long as it is good.
Promises that keys, tokens and what a token server answered appear in no log, argv or error text.
"""

import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import urllib3

from gocm_lib.config import settings as options
from gocm_lib.config import values
from gocm_lib.config.proxy import DIRECTLY, Proxy, Ways, ways
from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message import fcm, gcm
from gocm_lib.message.outcome import UNAUTHORIZED
from gocm_lib.process import log
from gocm_lib.state.contract import Pause

SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
RENEW_BEFORE = 300.0  # seconds before a token's end; Google's live an hour
COMMAND_LIFE = 600.0  # seconds that a token of unknown life is used: a command's is asked for again after half of it
LONGEST_LIFE = 7 * 86400.0  # seconds: what claims to be good for longer is a mistake
LONGEST_ANSWER = 64 * 1024  # bytes a command may print, or a token server answer
FETCH_TIMEOUT = 15.0
RETRY_FIRST, RETRY_LONGEST = 1.0, 60.0
CLOCK = "Google refuses it (invalid_grant): is this machine's clock right, and the key still valid?"


class Token(NamedTuple):
    """An access token; times in seconds since 1970."""

    value: str
    fetched_at: float
    expires_at: float


class Header(NamedTuple):
    """An Authorization header, and since when it is in use: who refused an older one may be asked again."""

    text: str
    since: float


Got = TypeVar("Got")


class CredentialError(Exception):
    """No token could be had now; str() is for the log and holds nothing secret."""


def renewal(token: Token) -> float:
    """When a token is to be renewed: well before its end, but not at once again when it is short-lived."""
    return max(token.expires_at - RENEW_BEFORE, token.fetched_at + (token.expires_at - token.fetched_at) / 2)


def retry_delay(failures: int) -> float:
    """Seconds until a failed renewal is tried again."""
    return min(RETRY_LONGEST, RETRY_FIRST * 2.0 ** min(failures - 1, 16))


# --------------------------------------------------------------------- three ways to a token; each a function of now


def _http(ca: str = "", proxy: Proxy | None = None) -> urllib3.PoolManager:
    # google-auth passes no time-out of its own, and urllib3's default is none.
    timeout = urllib3.Timeout(connect=5.0, read=FETCH_TIMEOUT)
    how: dict[str, Any] = {"num_pools": 2, "timeout": timeout, "retries": False, "ca_certs": ca or None}
    return urllib3.ProxyManager(proxy.url, proxy_headers=proxy.headers, **how) if proxy else urllib3.PoolManager(**how)


class _Answer(NamedTuple):
    """A token server's answer, as google-auth reads it."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def _exchange(manager: urllib3.PoolManager, method: str, url: str, **how: Any) -> _Answer:
    """Ask a token server. Its answer may be short only, and is not unpacked: 400 KB of gzip can be a gigabyte. Raises
    CredentialError, urllib3's HTTPError.
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
    """What google-auth makes its requests with: by a proxy or directly, as the URL has it."""

    def __init__(self, ca: str, out: Ways) -> None:
        self._ca = ca
        self._out = out

    def request(self, method: str, url: str, **how: Any) -> _Answer:
        with _http(self._ca, self._out.to(url)) as manager:  # once in an hour: nothing is worth keeping
            return _exchange(manager, method, url, **how)


def from_command(command: str, directory: str) -> Callable[[float], Token]:
    """Run the command, in a directory if it is there; it prints a token, or JSON with access_token and expires_in."""

    def fetch(now: float) -> Token:
        code, printed = _run(shlex.split(command), directory)
        if code:
            raise CredentialError(f"--token-command ended with exit code {code}")
        if printed.startswith(b"{"):
            return _from_json(printed, now, "--token-command")
        return _token(printed.decode("latin-1"), COMMAND_LIFE, now, "--token-command")

    return fetch


def _run(words: list[str], directory: str) -> tuple[int, bytes]:
    """Exit code and output of a command, run in that directory if it is there. It and what it started are killed when
    it takes or prints too much.
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
    """What `ask` returns or raises; CredentialError when that takes too long.

    Time-outs of sockets bound each read, so a server that sends a byte every two seconds holds its caller for ever.
    The thread that is left behind then ends with its server.
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
    """Ask the metadata server of the machine on Google's cloud that we run on."""

    def fetch(now: float) -> Token:
        body = ask_metadata(host, f"instance/service-accounts/default/token?scopes={SCOPE}")
        return _from_json(body, now, "the metadata server")

    return fetch


def ask_metadata(host: str, path: str) -> bytes:
    """A value of the metadata server. Raises CredentialError."""
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
    """A Token of what a source gave. CredentialError when it cannot stand in a header, or its life is not sensible."""
    if not 1.0 <= life <= LONGEST_LIFE:  # NaN is not, either
        raise CredentialError(f"{source} gave no access_token with a sensible expires_in")
    try:
        if isinstance(value, str) and value:
            return Token(options.secret(value), now, now + life)
    except ValueError:
        pass
    raise CredentialError(f"{source} gave no token")


def from_file(path: str, ca: str = "", project: str = "", out: Ways = DIRECTLY) -> tuple[Callable[[float], Token], str]:
    """The fetcher for a credentials file, by google-auth, and the project id: the given one, else what the file names
    or Google knows of it ("" when nobody does). `ca`: as --upstream-ca; `out`: how token servers are reached.

    Raises Fatal, with exit code 3, when the file cannot be used or the extra is not installed.
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
    """What google-auth makes of a file, read again when that has changed or what it holds was refused. Nobody need tell
    us: Kubernetes replaces a mounted secret without a signal.
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
        """The project id that the file names, or that Google does if it is of another cloud's identity; "" if not."""
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
    """What differs when a file has been replaced or written; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _by_google_auth(info: dict[str, Any], path: str, request: Any) -> tuple[Any, str]:
    """google-auth's credentials of a file's content and the project that it names. Raises anything."""
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
    """A credentials file's content. Raises Fatal when it is none."""
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


# ------------------------------------------------------------------------------------------------------- the owner


class Keeper:
    """Keeps one upstream's access token fresh, in a thread of its own."""

    def __init__(self, name: str, fetch: Callable[[float], Token]) -> None:
        self.name = name
        self.fetch = fetch
        self.token: Token | None = None
        self._failures = 0  # to get a token, in a row
        self._renewed_for: Pause | None = None  # the last pause that made us renew it
        self._hurry = threading.Event()
        threading.Thread(target=self._run, name=f"credentials-{name}", daemon=True).start()

    def header(self) -> Header | None:
        """The Authorization header of the moment; None while there is no token that is good."""
        token = self.token
        return Header(f"Bearer {token.value}", token.fetched_at) if token and time.time() < token.expires_at else None

    def renew(self) -> None:
        """Fetch a new token soon: the old one was refused, or the credentials have changed."""
        self._hurry.set()

    def refused(self, pause: Pause) -> None:
        """The upstream is paused because it refuses our token: renew it, unless it is newer, or renewing fails already,
        or was tried in such a pause: once for each length, and as seldom as the longest, if it does not help.
        """
        last = self._renewed_for
        tried = last and last.delay == pause.delay and 0 <= pause.began - last.began < pause.delay
        if self.token and self.token.fetched_at < pause.began and not tried and not self._failures:
            self._renewed_for = pause
            self.renew()

    def _run(self) -> None:
        while True:
            wait = retry_delay(self._failures) if self._failures else 0.0
            if not self._failures and self.token:
                wait = max(1.0, renewal(self.token) - time.time())
            self._hurry.wait(wait)
            self._hurry.clear()
            try:
                self.token = bounded(lambda: self.fetch(time.time()))
            except CredentialError as error:
                self._failures += 1
                pause = retry_delay(self._failures)
                log.logger.error("upstream %s: %s; trying again in %.0f s", self.name, error, pause)
                continue
            self._failures = 0
            left = self.token.expires_at - time.time()
            log.logger.info("upstream %s: new access token, good for %.0f s", self.name, left)


@dataclass(frozen=True)
class Source:
    """Where an upstream's Authorization comes from: a header, which may be read `again`, or what fetches tokens."""

    header: str = ""
    again: Callable[[], str] | None = None
    fetch: Callable[[float], Token] | None = None


class Credentials:
    """The Authorization headers of every upstream."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._fixed: dict[str, Header] = {}
        self._again: dict[str, Callable[[], str]] = {}
        self._read_for: dict[str, float] = {}  # the pauses, by when they began, for which a key was read again
        self._keepers: dict[str, Keeper] = {}
        self.replace(sources)

    def replace(self, sources: dict[str, Source]) -> None:
        """Take these from now on (SIGHUP): a token in use stays in use until the new source has given one."""
        for name, source in sources.items():
            if source.fetch is None:
                self._fixed[name] = Header(source.header, time.time())
                self._again.pop(name, None)
                if source.again:
                    self._again[name] = source.again
            elif name in self._keepers:
                self._keepers[name].fetch = source.fetch
                self._keepers[name].renew()
            else:
                self._keepers[name] = Keeper(name, source.fetch)

    def __len__(self) -> int:
        return len(self._fixed) + len(self._keepers)

    def ready(self) -> dict[str, Header]:
        """The header for each upstream that can be sent to now."""
        headers = {name: keeper.header() for name, keeper in self._keepers.items()}
        return self._fixed | {name: header for name, header in headers.items() if header}

    def expiry(self) -> dict[str, float | None]:
        """When each upstream's credential ends, in seconds since 1970: never (inf) for a key; None when there is no
        token that is good.
        """
        ends: dict[str, float | None] = dict.fromkeys(self._fixed, float("inf"))
        for name, keeper in self._keepers.items():
            token = keeper.token
            ends[name] = token.expires_at if token and time.time() < token.expires_at else None
        return ends

    def note(self, pauses: dict[str, Pause]) -> None:
        """Renew the tokens of upstreams that are paused because they answered 401, and read their keys again."""
        for name, pause in pauses.items():
            if pause.cause != UNAUTHORIZED:
                continue
            if name in self._keepers:
                self._keepers[name].refused(pause)
            elif name in self._again and self._read_for.get(name) != pause.began:
                self._read_for[name] = pause.began
                self._read_again(name)

    def _read_again(self, name: str) -> None:
        try:
            header = self._again[name]()
        except Fatal as error:
            log.logger.warning("upstream %s: %s", name, error)
            return
        if header != self._fixed[name].text:
            self._fixed[name] = Header(header, time.time())
            log.logger.info("upstream %s: its key's file has another key", name)


def sources(settings: Settings, directory: str) -> tuple[dict[str, Source], str]:
    """The source of each upstream that the settings name, and FCM's project id; a command is run in that directory.
    Raises Fatal.
    """
    found: dict[str, Source] = {}
    if settings.apikey:
        found[gcm.NAME] = Source(header=f"key={settings.apikey}", again=_key_again(settings))
    project = settings.fcm_project
    if settings.credentials:
        out = ways(settings, os.environ)
        fetch, project = from_file(settings.credentials, settings.upstream_ca, project, out)
        found[fcm.NAME] = Source(fetch=fetch)
    elif settings.token_command:
        _check_command(settings.token_command, directory)
        found[fcm.NAME] = Source(fetch=from_command(settings.token_command, directory))
    elif settings.fcm_metadata:
        found[fcm.NAME] = Source(fetch=from_metadata(settings.metadata_host))
        project = project or _metadata_project(settings.metadata_host)
    if fcm.NAME in found:
        if not project:
            raise Fatal("--fcm-project is missing: the credentials do not name the project", Exit.CONFIG)
        with contextlib.suppress(ValueError):
            return found, options.project(project)
        raise Fatal(f"the project id {project[:64]!r} is malformed: give --fcm-project")
    return found, project


def _key_again(settings: Settings) -> Callable[[], str] | None:
    """What reads the key's file anew, and gives the header; None if the key is not from a file."""

    def read() -> str:
        return f"key={values.read_key(settings.apikey_file, '--apikey-file')}"

    with contextlib.suppress(Fatal):
        if settings.apikey_file and read() == f"key={settings.apikey}":
            return read
    return None


def _check_command(command: str, directory: str) -> None:
    """Raise Fatal when there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Fatal(f"--token-command cannot be split into words: {error}") from None
    program = words[0] if words else ""
    if not shutil.which(os.path.join(directory, program) if "/" in program else program):
        raise Fatal(f"--token-command: there is no program {program or 'in it'} that we may run")


def _metadata_project(host: str) -> str:
    try:
        return bounded(lambda: ask_metadata(host, "project/project-id")).decode("latin-1").strip()
    except CredentialError as error:
        raise Fatal(f"--fcm-metadata: {error}; give --fcm-project to start without", Exit.SENDER) from None
