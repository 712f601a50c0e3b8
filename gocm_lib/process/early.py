"""What must happen before anything else: signals that arrive in the first moments are noted, and standard files that
the starter has closed are opened.

A handler only notes its signal, because the code that it interrupts may hold any lock.
"""

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

signals: list[int] = []  # noted and not dealt with yet; the supervisor goes on with it


def note(*numbers: int) -> None:
    """From now on note these signals."""
    for number in numbers:
        signal.signal(number, lambda received, _frame: signals.append(received))


def wakeup() -> "socket.socket":
    """A socket that becomes readable when a signal is noted, so that a wait for other things ends."""
    import socket  # here: most commands need none

    ours, bell = socket.socketpair()
    ours.setblocking(False)
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.detach(), warn_on_full_buffer=False)
    return ours


def listen() -> None:
    """From now on note SIGHUP, which would end the process otherwise."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup(1) has it ignored
        note(signal.SIGHUP)


def listen_no_more() -> None:
    """Let SIGHUP end the process, as it would have before `listen`: for all commands but the server."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if signal.SIGHUP in signals:  # it came meanwhile
            os.kill(os.getpid(), signal.SIGHUP)


def fill_standard_files() -> None:
    """Open stdin, stdout and stderr if the starter closed them. Otherwise the next file to be opened, a client's
    connection or the spool, would get that number, and whatever is printed or logged would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
