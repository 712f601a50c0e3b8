"""Which CPU a thread runs on.

The interpreter lock lets one thread of a process run at a time. The kernel wakes these threads now on one CPU, now on
another, and each time the lock moves between CPUs they have to talk: that cost 40 us on the virtual machine where it
was measured, 4 us on one CPU. A request to the front takes several such steps. Other processes are not bound and move
out of the way.
"""

import os
import sys


def stay() -> None:
    """Bind the calling thread, and the threads that it starts, to one of the CPUs it may use; all threads of a process
    get the same one. Does nothing where that is not possible, or where threads really run in parallel.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return
    try:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})
    except (AttributeError, OSError):  # not Linux; forbidden by a sandbox
        pass
