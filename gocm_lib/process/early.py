"""What must be done before anything else: a SIGHUP in the first moments of a process is noted, and files that whoever
started it has closed are opened.
"""

import os
import signal

signals: list[int] = []  # noted so far; the supervisor goes on with it


def listen() -> None:
    """From now on a SIGHUP is noted, not deadly."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup(1) has it ignored
        signal.signal(signal.SIGHUP, lambda received, _frame: signals.append(received))


def fill_standard_files() -> None:
    """Whoever started us may have closed stdin, stdout or stderr: else the next file that is opened, a client's
    connection or the spool, would take its number, and what is printed or logged would be written there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
