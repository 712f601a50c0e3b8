"""The private directory of a run, for the sockets between its processes.

Promises that no other GoCM removes it while this one lives, in whatever container: it is locked, and locks work across
PID namespaces, unlike /proc. A directory without our mark is never removed, and ours is made again when it was removed.
$TMPDIR may be a directory where other users can rename: a path in it could then lead into their directory. So
multiprocessing's own sockets are reached through our descriptor, and Client checks who listens.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
from multiprocessing import current_process
from pathlib import Path

from gocm_lib.process import log

LONGEST = 85  # bytes: of the 107 of a socket's path (unix(7)) multiprocessing's names in it need up to 20
MARK = ".gocm-run"  # a file in each of ours
SEMAPHORES = Path("/dev/shm")  # where the GNU C library keeps named ones (sem_overview(7))


class RunDirectory:
    """A new directory that only our user may enter. Raises OSError."""

    def __init__(self) -> None:
        self.path, self._lock = make()
        if len(os.fsencode(self.path)) > LONGEST:
            self.remove()
            raise OSError(errno.ENAMETOOLONG, f"{self.path} is longer than the {LONGEST} bytes that sockets allow")
        self._use()

    def _use(self) -> None:
        """Have multiprocessing use the directory."""
        ours = current_process()._config  # type: ignore[attr-defined]
        ours["tempdir"] = f"/proc/self/fd/{self._lock}"
        # A semaphore has a name that outlives whoever is killed; this one tells whose it was.
        ours["semprefix"] = f"/{os.path.basename(self.path)}"

    def restore(self) -> bool:
        """Make the directory again if it was removed. Returns whether it was. Raises OSError."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self._lock)):
                return False
            os.rename(self.path, f"{self.path}.not-ours")  # somebody has put something else there
        os.mkdir(self.path, 0o700)
        os.close(self._lock)
        self._lock = _take(Path(self.path))
        self._use()
        return True

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def make() -> tuple[str, int]:
    """A new directory that only our user may enter, and a descriptor: once that is closed, by death too, the next start
    of a GoCM removes the directory if it is left. Raises OSError.
    """
    _sweep(Path(tempfile.gettempdir()))
    path = tempfile.mkdtemp(prefix=f"gocm-{os.getpid()}-")
    try:
        return path, _take(Path(path))
    except OSError:
        os.rmdir(path)
        raise


def _take(path: Path) -> int:
    """Mark a directory as ours, and lock it for as long as the returned descriptor is open."""
    # The directory itself: systemd-tmpfiles(8), too, leaves alone what is locked.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (path / MARK).touch()  # only now: what is marked and not locked is taken for left
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the directories of killed runs."""
    for path in parent.glob("gocm-*-*"):
        with contextlib.suppress(OSError):  # it is not ours, or somebody lives there, or it is gone
            _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or not (path / MARK).is_file():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        for name in SEMAPHORES.glob(f"sem.{glob.escape(path.name)}-*"):
            name.unlink(missing_ok=True)
        log.logger.info("removed %s, the directory of a GoCM that was killed: no message was in it", path)
    finally:
        os.close(descriptor)
