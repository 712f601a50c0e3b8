"""Which CPU a thread runs on.

Of the threads of a process the interpreter lock lets one run at a time. Left to the kernel they are woken now on this
CPU, now on that, and each time the lock goes from one to the other both CPUs have to talk: where we measured it (a
virtual machine) that cost 40 us, on one CPU 4. A request to the front takes several such steps. Other processes, which
are bound to nothing, make way.
"""

import os
import sys


def stay() -> None:
    """Bind the calling thread, and those that it will start, to one CPU of those it may use; which, depends on the
    process only. Does nothing where that is not possible, or where threads do run at the same time.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return
    try:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})
    except (AttributeError, OSError):  # not Linux; forbidden by a sandbox
        pass
