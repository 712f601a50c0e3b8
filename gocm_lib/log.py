"""Logging for every process of GoCM: one line a record, one write a line.

Promises that a line is never torn by another process's (one os.write of at most 4096 bytes to an appending
descriptor), that nothing in a message can forge a second line, and gives the only form in which a device token may
be shown.
"""

import hashlib
import logging
import os
import time

logger = logging.getLogger("gocm")

MAX_LINE = 4096  # POSIX's PIPE_BUF on Linux: a longer write to a pipe may be torn


class _LineHandler(logging.Handler):
    def __init__(self, descriptor: int, process: str) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.process = process

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} {self.process}: {one_line(message)}"
        try:
            os.write(self.descriptor, line.encode("utf-8", "replace")[: MAX_LINE - 1] + b"\n")
        except OSError:
            pass  # a full disk or closed pipe must not stop the sending


def one_line(message: str) -> str:
    """The message with every character that is not printable written as an escape, line breaks included."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def start(process: str, level: str, path: str) -> None:
    """Log this process's records under its name to the file at `path`, or to stderr when `path` is empty.

    To be called once in each process: a forkserver child inherits no logging. Raises OSError when the file cannot be
    opened.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640) if path else 2
    logger.handlers[:] = [_LineHandler(descriptor, process)]
    logger.setLevel(level.upper())
    logger.propagate = False


def token(whole: str) -> str:
    """A device token as a log may show it: enough to recognise and to compare, not enough to send to."""
    return f"{whole[: min(6, len(whole) // 2)]}...{hashlib.sha256(whole.encode('utf-8', 'replace')).hexdigest()[:8]}"
