"""The webhook: POSTs unregistered, replaced and invalid tokens to the application as they come, from a thread in the
front.

Promises that an entry stays in its list, on disk, until the application has answered 2xx to a request that had it: it
may arrive more than once, never less. An application that cannot be reached is tried again, less and less often, and
sending never waits for it. Requests are signed as www.standardwebhooks.com says; most languages have libraries for it.
"""

import base64
import binascii
import hashlib
import hmac
import http.client
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gocm_lib import __version__
from gocm_lib.config.proxy import ways
from gocm_lib.config.settings import Fatal, Settings
from gocm_lib.front import response
from gocm_lib.front.exchange import exchange
from gocm_lib.message.retry import backoff, parse_retry_after
from gocm_lib.monitoring.collector import Collector
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import LISTS

BATCH = 1000  # entries of each list in a request
LOOK = 1.0  # seconds between two looks at lists that were empty
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before a request is made again: doubled each time
SHORTEST = 16  # characters of a secret


class Batch(NamedTuple):
    """A request that is repeated until it is taken: its body, a unique id, and for each list the last number that is in
    it (None: nothing of that list).
    """

    body: bytes
    id: str
    upto: dict[str, int | None]


def read_secret(path: str) -> bytes:
    """The secret in a file: any text, or `whsec_` and base64, as the standard says. Raises Fatal."""
    where = f"--feedback-secret-file {path}"
    try:
        found = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Fatal(
            f"{where} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}", topic="reports"
        ) from None
    if len(found) < SHORTEST:
        raise Fatal(
            f"{where} holds no secret of {SHORTEST} characters or more, like: openssl rand -hex 32", topic="reports"
        )
    if not found.startswith("whsec_"):
        return found.encode()
    try:
        return base64.b64decode(found.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise Fatal(f"{where} begins with whsec_, but goes on with what is not base64", topic="reports") from None


def compose(entries: Mapping[str, Sequence[Any]], now: float) -> Batch:
    """The request that tells these entries of each of contract.LISTS."""
    data = {
        "notregistered": [entry.token for entry in entries["notregistered"]],
        "canonical_replacements": [{"original": old, "canonical": new} for _, old, new in entries["canonical"]],
        "invalid": [{"token": token, "reason": reason} for _, token, reason in entries["invalid"]],
        **response.of_wave(entries["notregistered"]),
    }
    upto = {which: found[-1].number if found else None for which, found in entries.items()}
    # Of what it tells, not of when: made again after a restart, it is the same, and can be known by that.
    digest = hashlib.sha256(json.dumps([upto, data]).encode()).hexdigest()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    body = json.dumps({"type": "gocm.feedback", "timestamp": stamp, "data": data}).encode()
    return Batch(body, f"gocm_{digest[:32]}", upto)


def sign(batch: Batch, secret: bytes, now: float) -> dict[str, str]:
    """The headers of a request that is made now."""
    stamp = str(int(now))
    digest = hmac.digest(secret, f"{batch.id}.{stamp}.".encode() + batch.body, "sha256")
    return {
        "Content-Type": "application/json",
        "User-Agent": f"gocm/{__version__}",
        "webhook-id": batch.id,
        "webhook-timestamp": stamp,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def wait(failures: int, retry_after: float | None, draw: float) -> float:
    """Seconds to wait after this many failures in a row. `draw`, from 0 to 1, spreads those who failed together."""
    return max(retry_after or 0.0, backoff(failures, FIRST_WAIT, LONGEST_WAIT, 0.5 + draw / 2))


class Webhook:
    """Owned by Front. One thread takes entries off the lists and tells the application."""

    def __init__(self, settings: Settings, client: Client, collector: Collector) -> None:
        """Raises Fatal when the file of the secret is unusable."""
        self._url = settings.feedback_url
        self._proxy = ways(settings, os.environ).to(settings.feedback_url)
        self._secret = read_secret(settings.feedback_secret_file)
        self._client = client
        self._collector = collector
        self._failures = 0

    def start(self) -> None:
        """Tell what there is from now on, in a thread of its own."""
        threading.Thread(target=self._run, name="feedback", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                batch = self._next()
                if batch is None:
                    time.sleep(LOOK)
                    continue
                self._post(batch)
                self._forget(batch)
            except StateUnavailable:
                time.sleep(LOOK)
            except Exception:
                log.logger.exception("feedback failed; it goes on")
                time.sleep(LONGEST_WAIT)

    def _next(self) -> Batch | None:
        entries = {which: self._client.page(which, 0, BATCH) for which in LISTS}
        return compose(entries, time.time()) if any(entries.values()) else None

    def _post(self, batch: Batch) -> None:
        """Repeat a request until it is taken."""
        while True:
            problem, retry_after = self._try(batch)
            self._collector.fed_back(not problem)
            if not problem:
                if self._failures:
                    log.logger.info("feedback reaches the application again")
                self._failures = 0
                return
            self._failures += 1
            if self._failures == 1:
                log.logger.warning(
                    "feedback does not reach %s: %s; see gocm help reports", urlsplit(self._url).hostname, problem
                )
            time.sleep(wait(self._failures, retry_after, random.random()))

    def _try(self, batch: Batch) -> tuple[str, float | None]:
        """Make the request once. Returns what went wrong ("": nothing), and after how many seconds the application asks
        us to come again.
        """
        headers = sign(batch, self._secret, time.time())
        try:
            answer = exchange("POST", self._url, batch.body, headers, self._proxy)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Not its text: that may hold the URL, which may hold a secret.
            return re.sub("(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower(), None
        if 200 <= answer.status < 300:
            return "", None
        return f"HTTP {answer.status}", parse_retry_after(answer.headers.get("Retry-After"), time.time())

    def _forget(self, batch: Batch) -> None:
        """Take what was told off the lists."""
        for which, upto in batch.upto.items():
            while upto is not None:
                try:
                    self._client.forget(which, upto)
                    break
                except StateUnavailable:
                    time.sleep(LOOK)
