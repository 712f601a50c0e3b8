"""The forkserver, from which every child is forked, and the private directory of this run's sockets.

The forkserver imports the children's modules once, for all of them, while this process imports its own. Promises that
children run the same code as this process, and that another child can be started whatever others remove or kill.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, MutableMapping
from multiprocessing import forkserver, get_context, resource_tracker
from typing import Any

import gocm_lib
from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.process import log
from gocm_lib.process.child import Child
from gocm_lib.process.run_directory import RunDirectory


class Forkserver:
    """Made in the main thread before any other thread, and used in that thread only."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        """Start it. `modules` has for each kind of child the module whose `main` it runs. Raises Fatal."""
        self._modules = modules
        try:
            self._directory = RunDirectory()
        except OSError as error:
            reason = f"{error.strerror or error}: give another $TMPDIR"
            raise Fatal(f"no directory for our sockets can be made: {reason}", Exit.CONFIG) from None
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([*modules.values()])
        _ensure()

    def place(self, name: str) -> str:
        """The path of this run's socket `name`."""
        return os.path.join(self._directory.path, name)

    def spawn(self, kind: str, name: str, *arguments: object) -> Child:
        """Start a child. Raises OSError."""
        self.look_after_directory()
        _ensure()
        return Child(self.context, kind, self._modules[kind], name, *arguments)

    def look_after_directory(self) -> None:
        """Make the directory again if it was removed."""
        try:
            if self._directory.restore():
                log.logger.error("somebody removed %s, where our sockets were: made anew", self._directory.path)
        except OSError as error:
            log.logger.error("%s, where our sockets were, is gone: %s", self._directory.path, error.strerror)

    def close(self) -> None:
        """End the forkserver, after its children have ended. It may still be importing, with our standard error open,
        and a program that reads that to its end would wait.
        """
        if pid := _ours()._forkserver_pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._directory.remove()


def _ours() -> Any:
    return forkserver._forkserver


def _ensure() -> None:
    """Have the forkserver run, and ignore SIGTERM: it is the only witness of the children's deaths."""
    # Blocked, not ignored: it inherits the mask, and a SIGTERM to us meanwhile is kept for us. The resource tracker
    # goes first, because its start unblocks.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with same_code(os.environ):
        # Where its socket is gone, a new one starts the children; the old one goes on watching those that it started.
        if _ours()._forkserver_address and not os.path.exists(_ours()._forkserver_address):
            _ours()._forkserver_pid = None
        forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


@contextlib.contextmanager
def same_code(environ: MutableMapping[str, str]) -> Iterator[None]:
    """While the forkserver is started in this block, it finds the code that this process runs, in a folder or in the
    single file. Pythons before 3.12.8 and 3.13.1 pass no path to it (CPython issue 117378), so it would preload
    nothing, or another installed GoCM. The real path, not a link: the link may point to another version tomorrow.
    """
    before = environ.get("PYTHONPATH")
    ours = os.path.realpath(os.path.dirname(os.path.dirname(gocm_lib.__file__)))
    environ["PYTHONPATH"] = os.pathsep.join([ours, before] if before else [ours])
    try:
        yield
    finally:
        # Else other programs that we start, which may be Python's too, would import ours.
        if before is None:
            del environ["PYTHONPATH"]
        else:
            environ["PYTHONPATH"] = before
