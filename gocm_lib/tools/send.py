"""`gocm send`: one message to many tokens, from words, a file or stdin, posted in batches to a running server.

Promises that each token is posted once, however often the same run is started: each batch has an Idempotency-Key made
of the run's name and the batch's number. After an interruption the same command with `--run NAME` goes on. All tokens
are checked before the first is sent.
"""

import csv
import io
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from gocm_lib.config.settings import Exit, Fatal, SendSettings
from gocm_lib.front import auth
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.retry import backoff
from gocm_lib.message.strict_json import read_json
from gocm_lib.process import log
from gocm_lib.tools.api_client import ApiClient, ApiError, show

PATIENCE = 120.0  # seconds in which a server that does not answer is asked again
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between two such tries
REFRESH = 0.1  # seconds between two looks of the progress bar
WIDTH = 30  # characters of the bar itself


class Found(NamedTuple):
    """A token and where it was found, for whoever must correct it."""

    token: str
    where: str


class Batch(NamedTuple):
    """A post: its number in the run, its tokens, and the message."""

    number: int
    tokens: Sequence[Found]
    message: Mapping[str, Any]

    def body(self) -> bytes:
        """The body to post. Made afresh each time: those of a whole run would take as much memory again."""
        # Escaped, so that what is no Unicode (half a surrogate pair) is told by the reader, not by the encoder.
        return json.dumps({**self.message, "tokens": [each.token for each in self.tokens]}).encode()


# ------------------------------------------------------------------------------------------------------- what to send


def read_tokens(words: Sequence[str], path: str, column: str, stdin: TextIO) -> list[Found]:
    """The tokens in the words and in a file (`-`: stdin): one a line, or in a column of CSV. A repeated token is taken
    once. Raises Fatal.
    """
    found = [Found(word, f"token {place} of the command line") for place, word in enumerate(words, 1)]
    try:
        if path == "-":
            found += _from_lines(stdin, "stdin", column)
        elif path:
            with open(path, newline="", encoding="utf-8-sig") as file:
                found += _from_lines(file, path, column or ("token" if path.lower().endswith(".csv") else ""))
    except (OSError, UnicodeDecodeError) as error:
        name = "stdin" if path == "-" else f"--file {path}"
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise Fatal(f"{name} cannot be read: {reason}") from None
    if not found:
        raise Fatal("no tokens: give some as words, or a --file that has some", Exit.USAGE)
    first: dict[str, Found] = {}
    for each in found:
        first.setdefault(each.token, each)
    return list(first.values())


def _from_lines(file: Iterable[str], name: str, column: str) -> Iterator[Found]:
    if not column:
        for number, line in enumerate(file, 1):
            if token := line.strip():
                yield Found(token, f"line {number} of {name}")
        return
    rows = csv.DictReader(file, strict=True)
    try:
        if column not in (rows.fieldnames or ()):
            there = ", ".join(rows.fieldnames or ()) or "nothing"
            raise Fatal(f"{name} has no column {column!r}: its first line has {there[:200]}; see --column")
        for row in rows:
            if token := (row[column] or "").strip():
                yield Found(token, f"line {rows.line_num} of {name}")
    except csv.Error as error:
        raise Fatal(f"{name} is no CSV after line {rows.line_num}: {error}") from None


def read_message(settings: SendSettings) -> dict[str, Any]:
    """The message, as a JSON post has it. Raises Fatal."""
    message: dict[str, Any] = dict(_pair(text, "--field") for text in settings.field)
    for name, text in message.items():
        if name in ("tokens", "payload"):
            raise Fatal(f"--field {name}: give tokens as words or by --file, the payload by --data or --payload")
        if name in job.FIELDS and name not in job.PLAIN:
            message[name] = _json(text, f"--field {name}")
    if not (settings.payload or settings.data or "message" in message):
        raise Fatal("nothing to send: give --data, --payload, or --field message={...}", Exit.USAGE)
    if settings.payload or settings.data:
        message["payload"] = _payload(settings.payload) | dict(_pair(text, "--data") for text in settings.data)
    return message


def _payload(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            payload = _json(file.read(), f"--payload {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise Fatal(f"--payload {path} cannot be read: {reason}") from None
    if not isinstance(payload, dict):
        raise Fatal(f"--payload {path} must hold a JSON object")
    return payload


def _json(text: str, what: str) -> Any:
    try:
        return read_json(text, what)
    except BadRequest as problem:
        raise Fatal(problem.error) from None


def _pair(text: str, what: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise Fatal(f"{what} {text[:64]} must be NAME=VALUE")
    return name, value


def make_batches(found: Sequence[Found], message: Mapping[str, Any], size: int) -> list[Batch]:
    """The posts of a run, all checked. Raises Fatal for what no server would take."""
    batches: list[Batch] = []
    for start in range(0, len(found), size):
        batch = Batch(len(batches) + 1, found[start : start + size], message)
        try:
            job.parse("application/json", batch.body(), size)
        except BadRequest as problem:
            raise Fatal(_blame(batch, problem)) from None
        batches.append(batch)
    return batches


def _blame(batch: Batch, problem: BadRequest) -> str:
    """The problem, named by token and place if it is about a token."""
    for each in batch.tokens if problem.field == "tokens" else ():
        try:
            job.parse("application/json", batch._replace(tokens=[each]).body(), 1)
        except BadRequest as alone:
            return f"{each.where}: {alone.error.replace('token number 1 ', 'the token ')}"
    return f"{problem.field}: {problem.error}" if problem.field else problem.error


# ------------------------------------------------------------------------------------------------------------- sending


class Bar:
    """A progress bar on a terminal; nothing where there is no terminal."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._stream = stream if stream.isatty() else None
        self._clock = clock
        self._began = clock()
        self._shown = -REFRESH
        self.done = 0

    def advance(self, count: int) -> None:
        """`count` more tokens are done."""
        self.done += count
        now = self._clock()
        if now - self._shown >= REFRESH or self.done == self._total:
            self._show(now, "")

    def note(self, text: str) -> None:
        """Show a note in the place of the remaining time."""
        self._show(self._clock(), log.one_line(text))

    def _show(self, now: float, note: str) -> None:
        self._shown = now
        if self._stream:
            self._stream.write("\r\033[K" + bar(self.done, self._total, now - self._began, note))
            self._stream.flush()

    def clear(self) -> None:
        """Remove the bar, so that other lines can be written."""
        if self._stream:
            self._stream.write("\r\033[K")
            self._stream.flush()


def bar(done: int, total: int, passed: float, note: str) -> str:
    """The bar after this many seconds, with a note or the remaining time."""
    full = WIDTH * done // total
    rate = done / passed if passed > 0 else 0.0
    rest = note or (f"{rate:,.0f}/s, {(total - done) / rate:.0f} s left" if rate else "")
    return f"[{'#' * full}{'.' * (WIDTH - full)}] {done:,} of {total:,} tokens  {rest}"


class Taken(NamedTuple):
    """The server's answer for a batch: its message's id, and whether it had been taken before."""

    job: str
    before: bool


def _post(server: ApiClient, batch: Batch, run: str, tell: Callable[[str], None]) -> Taken:
    """Post a batch until it is taken. Raises ApiError when it is refused, or nobody answers for PATIENCE seconds."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"{run}.{batch.number}"}
    deadline, failures = time.monotonic() + PATIENCE, 0
    while True:
        try:
            answer = server.post("/gcm/send", batch.body(), headers)
        except ApiError as problem:
            failures += 1
            wait = backoff(failures, FIRST_WAIT, LONGEST_WAIT)
            if time.monotonic() + wait > deadline:
                raise
            tell(f"{problem}; again in {wait:.0f} s")
            time.sleep(wait)
            continue
        if answer.status == 200 and "X-GoCM-Job" not in answer.headers:
            raise ApiError("what answers there is no GoCM")
        if answer.status == 200:
            return Taken(answer.headers["X-GoCM-Job"], "Idempotency-Replayed" in answer.headers)
        reason = answer.reason()
        if answer.status not in (503, 507):
            if answer.status == 422:
                reason = (
                    f"run {run} sent something else as message {batch.number}: the tokens, the message or --batch have"
                    " changed; put that back, or take another --run, which sends all of them"
                )
            raise ApiError(reason)
        # It holds what it has and will take more: as long as it says so, there is nothing to give up for.
        seconds = min(answer.retry_after(), LONGEST_WAIT)
        tell(f"{reason}; again in {seconds:.0f} s")
        time.sleep(seconds)
        deadline, failures = time.monotonic() + PATIENCE, 0


def command(settings: SendSettings, words: Sequence[str]) -> int:
    """`gocm send`. Raises Fatal."""
    wanted = settings.file == "-" and sys.stdin is not None  # who starts us may have closed it
    stdin = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="") if wanted else io.StringIO()
    found = read_tokens(words, settings.file, settings.column, stdin)
    batches = make_batches(found, read_message(settings), settings.batch)
    run = settings.run or secrets.token_hex(6)
    if not re.fullmatch("[A-Za-z0-9._-]{1,64}", run):
        raise Fatal("--run is a name of up to 64 letters, digits and . _ -")
    token = auth.first_token(settings.auth_token_file) if settings.auth_token_file else ""
    server = ApiClient(settings.to, token, settings.ca)
    progress, before = Bar(len(found), sys.stderr), 0
    try:
        for batch in batches:
            taken = _post(server, batch, run, progress.note)
            before += len(batch.tokens) if taken.before else 0
            progress.advance(len(batch.tokens))
            if settings.json:
                print(json.dumps({"job": taken.job, "tokens": len(batch.tokens), "before": taken.before}), flush=True)
        progress.clear()
        if not settings.json:
            show(_summary(len(found), len(batches), before, run, taken.job))
    except (ApiError, OSError, KeyboardInterrupt) as problem:
        progress.clear()
        if isinstance(problem, OSError):  # what we print cannot be written, nor need what is left of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        so_far = f"{progress.done:,} of {len(found):,} tokens were taken"
        go_on = f"go on with the same command and --run {run}"
        raise ApiError(f"{str(problem) or 'interrupted'} ({so_far}; {go_on})") from None
    return Exit.OK


def _summary(tokens: int, messages: int, before: int, run: str, last: str) -> str:
    what = f"message {last}" if messages == 1 else f"{messages:,} messages"
    known = f", {before:,} of them before" if before else ""
    return f"taken: {tokens:,} token{'' if tokens == 1 else 's'} as {what}{known}; run {run}"
