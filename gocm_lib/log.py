"""Logging for every process of GoCM: one line a record, one write a line.

Promises that a line is never torn by another process's (one os.write of at most 4096 bytes to an appending
descriptor), that nothing in a message can forge a second line, and gives the only form in which a device token may
be shown.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("gocm")

MAX_LINE = 4096  # POSIX's PIPE_BUF on Linux: a longer write to a pipe may be torn
PRIORITIES = {
    "debug": 7,
    "info": 6,
    "warning": 4,
    "error": 3,
    "critical": 2,
}  # of syslog(3), as sd-daemon(3) reads them


def one_line(message: str) -> str:
    """The message with every character that is not printable written as an escape, line breaks included."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


# The three formats: from when, a level, a process, a message and fields with their values to a line.


def _stamp(created: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(created % 1 * 1000):03d}Z"


def _words(message: str, fields: Mapping[str, Any]) -> str:
    return " ".join([message, *(f"{name}={value}" for name, value in fields.items())])


def _text(created: float, level: str, process: str, message: str, fields: Mapping[str, Any]) -> str:
    return f"{_stamp(created)} {level} {process}: {one_line(_words(message, fields))}"


def _journal(created: float, level: str, process: str, message: str, fields: Mapping[str, Any]) -> str:
    return f"<{PRIORITIES[level]}>{process}: {one_line(_words(message, fields))}"


def _json(created: float, level: str, process: str, message: str, fields: Mapping[str, Any]) -> str:
    record = {"ts": _stamp(created), "level": level, "process": process, "message": message, **fields}
    # Escaped to ASCII, so no line separator of Unicode's is left for a reader to take for the end of the line.
    return json.dumps(record, separators=(",", ":"))


FORMATS: dict[str, Callable[[float, str, str, str, Mapping[str, Any]], str]] = {
    "text": _text,
    "json": _json,
    "journal": _journal,
}


class _LineHandler(logging.Handler):
    def __init__(self, process: str, path: str, form: str) -> None:
        super().__init__()
        self.process = process
        self.path = path
        self.form = FORMATS[form]
        self.descriptor = _open(path)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        fields = getattr(record, "fields", {})
        level = record.levelname.lower()
        while True:
            line = self.form(record.created, level, self.process, message, fields).encode("utf-8", "replace")
            if len(line) < MAX_LINE or not message:
                break
            # Cut the message, not the line: the end of a JSON line is needed. An escape is up to 12 bytes.
            message = message[: len(message) - max(1, (len(line) - MAX_LINE) // 12)]
        try:
            os.write(self.descriptor, line[: MAX_LINE - 1] + b"\n")
        except OSError:
            pass  # a full disk or closed pipe must not stop the sending

    def reopen(self) -> None:
        """Go on in the file that is at our path now: the old one was renamed by who rotates it. Raises OSError."""
        if self.path:
            fresh = _open(self.path)
            os.dup2(fresh, self.descriptor, inheritable=False)
            os.close(fresh)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640) if path else 2


def resolve(form: str, path: str, environ: Mapping[str, str]) -> str:
    """The format that `auto` stands for: journal when stderr is the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    if form != "auto":
        return form
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    stderr = os.fstat(2)
    return "journal" if not path and (device, inode) == (str(stderr.st_dev), str(stderr.st_ino)) else "text"


def start(process: str, level: str, path: str, form: str) -> None:
    """Log this process's records under its name to the file at `path`, or to stderr when `path` is empty.

    To be called once in each process: a forkserver child inherits no logging. Raises OSError when the file cannot be
    opened.
    """
    logger.handlers[:] = [_LineHandler(process, path, resolve(form, path, os.environ))]
    logger.setLevel(level.upper())
    logger.propagate = False


def restart(level: str) -> None:
    """Log from this level on, and open the file again: it may have been renamed meanwhile."""
    logger.setLevel(level.upper())
    for handler in logger.handlers:
        if isinstance(handler, _LineHandler):
            try:
                handler.reopen()
            except OSError as error:
                logger.error("the log file cannot be opened again, the old one stays in use: %s", error.strerror)


def token(whole: str) -> str:
    """A device token as a log may show it: enough to recognise and to compare, not enough to send to."""
    return f"{whole[: min(6, len(whole) // 2)]}...{hashlib.sha256(whole.encode('utf-8', 'replace')).hexdigest()[:8]}"
