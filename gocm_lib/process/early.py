"""What came before there was anybody to deal with it: a SIGHUP in the first moments of a process is noted."""

import signal

signals: list[int] = []  # noted so far; the supervisor goes on with it


def listen() -> None:
    """From now on a SIGHUP is noted, not deadly."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup(1) has it ignored
        signal.signal(signal.SIGHUP, lambda received, _frame: signals.append(received))
