"""Logging for every process of GoCM: one line per record.

Promises that logging never blocks (module logwriter) and that no message can forge a second line. Gives the only form
in which a device token may be shown.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from gocm_lib.process.logwriter import MAX_LINE, Writer

logger = logging.getLogger("gocm")

PATIENCE = 1.0  # seconds for what is left to be written when a process ends
PRIORITIES = {
    "debug": 7,
    "info": 6,
    "warning": 4,
    "error": 3,
    "critical": 2,
}  # of syslog(3), as sd-daemon(3) reads them


def one_line(message: str) -> str:
    """The message with every unprintable character escaped, line breaks included."""
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


def to_line(form: str, created: float, level: str, process: str, message: str, fields: Mapping[str, Any]) -> bytes:
    """A whole line in one of FORMATS, at most MAX_LINE bytes long."""
    while True:
        line = FORMATS[form](created, level, process, message, fields).encode("utf-8", "replace")
        if len(line) < MAX_LINE or not message:
            return line[: MAX_LINE - 1] + b"\n"
        # Cut the message, not the line: the end of a JSON line is needed. An escape is up to 12 bytes.
        message = message[: len(message) - max(1, (len(line) - MAX_LINE) // 12)]


class _LineHandler(logging.Handler):
    def __init__(self, process: str, path: str, form: str) -> None:
        super().__init__()
        self.process = process
        self.form = form
        self.writer = Writer(path, self._dropped)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        fields = getattr(record, "fields", {})
        self.writer.put(to_line(self.form, record.created, record.levelname.lower(), self.process, message, fields))

    def _dropped(self, count: int) -> bytes:
        message = f"{count} lines before this one were dropped: nobody took them"
        return to_line(self.form, time.time(), "warning", self.process, message, {})

    def reopen(self) -> None:
        self.writer.reopen(
            lambda error: logger.error(
                "the log file cannot be opened again, the old one stays in use: %s", error.strerror
            )
        )

    def flush(self) -> None:
        self.writer.flush(PATIENCE)


def resolve(form: str, path: str, environ: Mapping[str, str]) -> str:
    """The format that `auto` stands for: journal when stderr is the journal (systemd.exec(5), $JOURNAL_STREAM), else
    text.
    """
    if form != "auto":
        return form
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    stderr = os.fstat(2)
    return "journal" if not path and (device, inode) == (str(stderr.st_dev), str(stderr.st_ino)) else "text"


def start(process: str, level: str, path: str, form: str) -> None:
    """Log this process's records under its name to the file at `path`, or to stderr when `path` is empty.

    Called once in each process, because a forkserver's child inherits no logging. Raises OSError when the file cannot
    be opened.
    """
    logger.handlers[:] = [_LineHandler(process, path, resolve(form, path, os.environ))]
    logger.setLevel(level.upper())
    logger.propagate = False


def restart(level: str) -> None:
    """Log from this level on, and open the file again: it may have been renamed meanwhile."""
    logger.setLevel(level.upper())
    for handler in _handlers():
        handler.reopen()


def flush() -> None:
    """Give the writer a moment to write what was logged. Call it before a process ends by os._exit."""
    for handler in _handlers():
        handler.flush()


def dropped() -> int:
    """How many lines of this process were dropped because nobody read them."""
    return sum(handler.writer.dropped for handler in _handlers())


def _handlers() -> list[_LineHandler]:
    return [handler for handler in logger.handlers if isinstance(handler, _LineHandler)]


def token(whole: str) -> str:
    """A device token as a log may show it: enough to recognise and compare it, too little to send to it."""
    return f"{whole[: min(6, len(whole) // 2)]}...{hashlib.sha256(whole.encode('utf-8', 'replace')).hexdigest()[:8]}"
