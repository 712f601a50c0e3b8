"""From an API key or Google credentials to Authorization headers, renewed in time. One owner for all senders.

Lives in the front process. The feeder puts the current header on what it feeds, so a renewed token is used by the next
request. A token is renewed before it ends; while renewing fails, the old token is used as long as it is good. Promises
that keys and tokens appear in no log, argv or error text.
"""

import contextlib
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gocm_lib.config import settings as options
from gocm_lib.config import upstreams, values
from gocm_lib.config.proxy import ways
from gocm_lib.config.settings import Exit, Fatal, Settings, UpstreamSettings
from gocm_lib.message import gcm
from gocm_lib.message.outcome import UNAUTHORIZED
from gocm_lib.message.retry import backoff
from gocm_lib.process import log
from gocm_lib.senders.access_token import (
    CredentialError,
    Token,
    ask_metadata,
    bounded,
    from_command,
    from_file,
    from_metadata,
)
from gocm_lib.state.contract import Pause

RENEW_BEFORE = 300.0  # seconds before a token's end; Google's live an hour
RETRY_FIRST, RETRY_LONGEST = 1.0, 60.0  # seconds until a failed renewal is tried again
LONGEST_REST = 3600.0  # seconds between two looks at all tokens


class Header(NamedTuple):
    """An Authorization header, and since when it is in use: an upstream that refused an older one may be asked."""

    text: str
    since: float


def renewal(token: Token) -> float:
    """When to renew a token: well before its end, but not at once when it is short-lived."""
    return max(token.expires_at - RENEW_BEFORE, token.fetched_at + (token.expires_at - token.fetched_at) / 2)


class Keeper:
    """Keeps the access token of one upstream fresh, if somebody calls `look` now and then, which returns at once."""

    def __init__(self, name: str, fetch: Callable[[float], Token], ring: Callable[[], None]) -> None:
        """`ring` has `look` called soon."""
        self.name = name
        self.fetch = fetch
        self.token: Token | None = None
        self._ring = ring
        self._failures = 0  # to get a token, in a row
        self._renewed_for: Pause | None = None  # the last pause that made us renew it
        self._fetching = False
        self._due = 0.0  # when to fetch the next token (monotonic)

    def header(self) -> Header | None:
        """The current Authorization header; None while there is no valid token."""
        token = self.token
        return Header(f"Bearer {token.value}", token.fetched_at) if token and time.time() < token.expires_at else None

    def renew(self) -> None:
        """Fetch a new token soon: the old one was refused, or the credentials have changed."""
        self._due = 0.0
        self._ring()

    def refused(self, pause: Pause) -> None:
        """The upstream is paused because it refuses our token. Renew the token, unless it is newer than the pause, or
        renewing already fails, or was tried in this pause. When renewing does not help, it is tried once for each
        length of pause, and as seldom as the longest.
        """
        last = self._renewed_for
        tried = last and last.delay == pause.delay and 0 <= pause.began - last.began < pause.delay
        if self.token and self.token.fetched_at < pause.began and not tried and not self._failures:
            self._renewed_for = pause
            self.renew()

    def look(self, now: float) -> float:
        """Fetch a token if that is due, in a thread of its own: a token server may take its time. Returns when to look
        again (monotonic, as `now`).
        """
        if self._fetching:
            return float("inf")  # the thread rings
        if now < self._due:
            return self._due
        self._due = float("inf")
        self._fetching = True
        threading.Thread(target=self._fetch, name=f"credentials-{self.name}", daemon=True).start()
        return float("inf")

    def _fetch(self) -> None:
        fetch = self.fetch
        try:
            token = bounded(lambda: fetch(time.time()))
        except CredentialError as error:
            self._failures += 1
            wait = backoff(self._failures, RETRY_FIRST, RETRY_LONGEST)
            log.logger.error(
                "upstream %s: %s; trying again in %.0f s; see gocm help credentials", self.name, error, wait
            )
        else:
            self.token, self._failures = token, 0
            log.logger.info("upstream %s: new access token, good for %.0f s", self.name, token.expires_at - time.time())
            wait = max(1.0, renewal(token) - time.time())
        self._due = min(self._due, time.monotonic() + wait) if self._due else 0.0  # 0: renew was called meanwhile
        self._fetching = False
        self._ring()


@dataclass(frozen=True)
class Source:
    """Where an upstream's Authorization comes from: a fixed header, which may be read `again`, or a function that
    fetches tokens.
    """

    header: str = ""
    again: Callable[[], str] | None = None
    fetch: Callable[[float], Token] | None = None


class Credentials:
    """The Authorization headers of every upstream. One thread looks after all tokens."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        # Replaced as a whole, never changed: several threads read them.
        self._fixed: Mapping[str, Header] = {}
        self._again: Mapping[str, Callable[[], str]] = {}
        self._keepers: Mapping[str, Keeper] = {}
        self._read_for: dict[str, float] = {}  # the pauses, by when they began, for which a key was read again
        self._hurry = threading.Event()
        self.replace(sources)
        threading.Thread(target=self._run, name="credentials", daemon=True).start()

    def replace(self, sources: Mapping[str, Source]) -> None:
        """Use these sources, and no others, from now on (SIGHUP). A token in use stays in use until the new source has
        given one.
        """
        fixed, again, keepers = {}, {}, {}
        for name, source in sources.items():
            if source.fetch is None:
                fixed[name] = Header(source.header, time.time())
                if source.again:
                    again[name] = source.again
                continue
            keepers[name] = known = self._keepers.get(name) or Keeper(name, source.fetch, self._hurry.set)
            known.fetch = source.fetch
            known.renew()
        self._fixed, self._again, self._keepers = fixed, again, keepers

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            soonest = min([each.look(now) for each in self._keepers.values()], default=float("inf"))
            self._hurry.wait(min(LONGEST_REST, max(0.0, soonest - now)))
            self._hurry.clear()

    def __len__(self) -> int:
        return len(self._fixed) + len(self._keepers)

    @property
    def upstreams(self) -> set[str]:
        """The upstreams that have credentials, valid or not."""
        return {*self._fixed, *self._keepers}

    def ready(self) -> dict[str, Header]:
        """The headers of all upstreams that can be sent to now."""
        headers = {name: keeper.header() for name, keeper in self._keepers.items()}
        return {**self._fixed, **{name: header for name, header in headers.items() if header}}

    def header(self, upstream: str) -> str:
        """The header of an upstream's requests now; "": there is none."""
        header = self.ready().get(upstream)
        return header.text if header else ""

    def expiry(self) -> dict[str, float | None]:
        """When the credential of each upstream ends, in seconds since 1970: inf for a key, None while there is no valid
        token.
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
            self._fixed = {**self._fixed, name: Header(header, time.time())}
            log.logger.info("upstream %s: its key's file has another key", name)


def sources(settings: Settings, directory: str) -> tuple[dict[str, Source], Settings]:
    """The Source of each upstream that the settings name; and the settings with the projects that credentials tell. A
    token command runs in `directory`. Raises Fatal.
    """
    found: dict[str, Source] = {}
    projects: dict[str, str] = {}
    for name, each in upstreams.described(settings).items():
        try:
            if each.dialect == gcm.NAME:
                found[name] = Source(header=f"key={each.apikey}", again=_key_again(each))
            else:
                found[name], projects[name] = _with_tokens(each, settings.metadata_host, directory)
        except Fatal as error:
            if name in settings.upstream:
                told = re.sub("--(?:fcm-)?(?=credentials|project|token-command|apikey-file)", "", str(error))
                raise Fatal(f"upstream {name}: {told}", error.code, "upstreams") from None
            raise
    return found, upstreams.with_projects(settings, projects)


def _with_tokens(found: UpstreamSettings, metadata_host: str, directory: str) -> tuple[Source, str]:
    """The Source of an upstream of FCM v1, and its project id. Raises Fatal."""
    project = found.project
    if found.credentials:
        fetch, project = from_file(found.credentials, found.ca, project, ways(found, os.environ))
    elif found.token_command:
        _check_command(found.token_command, directory)
        fetch = from_command(found.token_command, directory)
    else:
        fetch = from_metadata(metadata_host)
        project = project or _metadata_project(metadata_host)
    if not project:
        raise Fatal(
            "--fcm-project is missing: the credentials do not name the project", Exit.CONFIG, topic="credentials"
        )
    with contextlib.suppress(ValueError):
        return Source(fetch=fetch), options.project(project)
    raise Fatal(f"the project id {project[:64]!r} is malformed: give --fcm-project", topic="credentials")


def _key_again(found: UpstreamSettings) -> Callable[[], str] | None:
    """A function that reads the key's file again and returns the header; None if the key is not from a file."""

    def read() -> str:
        return f"key={values.read_key(found.apikey_file, '--apikey-file')}"

    with contextlib.suppress(Fatal):
        if found.apikey_file and read() == f"key={found.apikey}":
            return read
    return None


def _check_command(command: str, directory: str) -> None:
    """Raise Fatal when the command's program does not exist."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Fatal(f"--token-command cannot be split into words: {error}", topic="credentials") from None
    program = words[0] if words else ""
    if not shutil.which(os.path.join(directory, program) if "/" in program else program):
        raise Fatal(f"--token-command: there is no program {program or 'in it'} that we may run", topic="credentials")


def _metadata_project(host: str) -> str:
    try:
        return bounded(lambda: ask_metadata(host, "project/project-id")).decode("latin-1").strip()
    except CredentialError as error:
        raise Fatal(f"--fcm-metadata: {error}; give --fcm-project to start without", Exit.SENDER) from None
