"""What process 1 of a container has to do: bury whatever is left to it, and hand signals on.

A command that fetches tokens may leave children behind; they become process 1's. So that nothing of ours has to tell
them from its own, GoCM runs as a child of this.
"""

import os
import signal

FIRST = 1  # pid_namespaces(7)
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def step_aside() -> int | None:
    """Go on in a child if this is process 1, and return None there, as in any other process. Here, bury all that end,
    until that child does: its exit code, as a shell has it.
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
