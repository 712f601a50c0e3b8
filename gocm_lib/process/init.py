"""What process 1 of a container has to do: reap every orphan, and pass signals on.

A command that fetches tokens may leave children behind; process 1 inherits them. GoCM runs as a child of process 1, so
that it never has to tell those orphans from its own children.
"""

import os
import signal

FIRST = 1  # pid_namespaces(7)
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def step_aside() -> int | None:
    """As process 1, fork: return None in the child, and in the parent reap every process until that child ends, then
    return its exit code as a shell would. As any other process, return None at once.
    """
    if os.getpid() != FIRST:
        return None
    # Until we can hand them on they wait, in us and in the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    ours = os.fork()
    if not ours:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return None
    for number in HANDED_ON:
        signal.signal(number, lambda received, _frame: os.kill(ours, received))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while True:
        pid, status = os.wait()
        if pid == ours:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
