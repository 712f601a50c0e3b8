"""The threads of the front: for work that blocks, never for waiting for a client.

Each kind of work has threads of its own, so that none keeps another waiting: the quick looks that everybody may ask
for, all other routes, those that wait for somebody else's server, large bodies (of which only one can be parsed at a
time anyhow, and each grows tenfold), and what is done after an answer was written.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gocm_lib.config.settings import Exit
from gocm_lib.process import child, log

KINDS = {"quick": 4, "route": 64, "outward": 32, "parse": 1, "after": 1}  # and how many threads each has

Result = TypeVar("Result")


class Workers:
    """`call` has a function called in the loop's thread."""

    def __init__(self, call: Callable[[Callable[[], None]], None]) -> None:
        self._call = call
        self._threads = {kind: ThreadPoolExecutor(most, kind) for kind, most in KINDS.items()}

    def do(self, kind: str, work: Callable[[], Result], done: Callable[[Result], None]) -> None:
        """Do some work in a thread of this kind; the loop is told its result. The work raises nothing."""

        def run() -> None:
            try:
                result = work()
            except BaseException:  # the pool of threads would swallow it, and a client would wait for ever
                log.logger.critical("a worker failed", exc_info=True)
                child.leave(Exit.FAILED)
            self._call(lambda: done(result))

        self._threads[kind].submit(run)
