"""The spool's file: made, locked, checked and opened.

Promises that only one GoCM at a time has it, and that a file that is damaged, foreign or from another version is
refused and left untouched: starting with an empty one would lose what had been accepted. Knows how much room there is
on the disk and keeps a reserve: a disk that other programs fill must not keep us from recording what was sent.
"""

import contextlib
import fcntl
import os
import sqlite3
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.state.contract import Broken, Full, Passing
from gocm_lib.state.sqlite import keys, notes, report, spool, upgrade

Database = sqlite3.Connection
SCHEMA_VERSION = 11
APPLICATION_ID = 0x476F434D  # "GoCM", in the file's header: file(1) and we can tell the spool from other databases


LAYOUT = f"{spool.SCHEMA} {report.SCHEMA} {keys.SCHEMA} {notes.SCHEMA}"
FINISH = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
BESIDE = (
    "-wal",
    "-shm",
    "-journal",
    ".lock",
    ".reserve",
    ".upgrade",
    ".upgrade-wal",
    ".upgrade-shm",
)  # what files of a spool are called
START_PATIENCE, PATIENCE = 30_000, 1000  # milliseconds to wait for a lock that another program holds on the spool
LOG = 8 * 1024 * 1024  # bytes to which SQLite's log is cut when it is begun anew; it is twice what it needs mostly
RESERVE = 8 * 1024 * 1024  # bytes: twice what SQLite's log grows to between two checkpoints
SHRUNK, WORTH_SHRINKING = 4 * 1024 * 1024, 8 * 1024 * 1024  # bytes


def _lock(path: str) -> int:
    # A file of its own and flock, not the spool and fcntl: closing any descriptor of a file drops the fcntl locks that
    # SQLite holds on it, and with them SQLite's protection against other programs.
    try:
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Fatal(f"cannot write the spool {path}: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise Fatal(
            f"another GoCM runs on the spool {path}: stop it, or give this one its own --spool", Exit.SPOOL_IN_USE
        ) from None
    return descriptor


def _create(path: str) -> None:
    """Make an empty spool under another name and rename it: a spool exists whole or not at all."""
    fresh = path + ".new"
    Path(fresh).unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(fresh, isolation_level=None)
    _lay_out(db)
    db.close()
    os.rename(fresh, path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _lay_out(db: sqlite3.Connection) -> None:
    db.executescript(f"BEGIN; {LAYOUT} {FINISH} COMMIT;")


def _check_owner(path: str) -> None:
    """Refuse a spool if one of its files belongs to another user, is readable by everybody, or is a link: it holds
    tokens, and SQLite uses whatever files it finds.
    """
    for name in (path, *(path + suffix for suffix in BESIDE)):
        try:
            found = os.stat(name) if name == path else os.lstat(name)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise Fatal(f"{name} is no regular file: move it away", Exit.SPOOL_UNWRITABLE)
        if found.st_uid != os.geteuid():
            problem = f"{name} belongs to user {found.st_uid}, and tokens are in it: run as that user, or chown it"
            raise Fatal(problem, Exit.SPOOL_UNWRITABLE)
        if found.st_mode & 0o007:
            problem = f"everybody here may read or write {name}, and tokens are in it: chmod o= {path}*"
            raise Fatal(problem, Exit.SPOOL_UNWRITABLE)


def _inspect(path: str) -> int:
    """The format of a spool. Refuses a file that is none, by its header (sqlite.org/fileformat.html), before SQLite
    touches it.
    """
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise Fatal(f"the spool {path} is damaged (no SQLite header): move it away to start empty", Exit.SPOOL_DAMAGED)
    version, application = struct.unpack(">I", header[60:64])[0], struct.unpack(">I", header[68:72])[0]
    if application != APPLICATION_ID:
        raise Fatal(f"{path} is a database, but not a GoCM spool: give another --spool", Exit.SPOOL_DAMAGED)
    if version not in (SCHEMA_VERSION, *upgrade.KNOWN):
        raise Fatal(
            f"the spool {path} has format {version}, this GoCM knows {SCHEMA_VERSION}: run the version that wrote it",
            Exit.SPOOL_DAMAGED,
        )
    return int(version)


def _upgrade(path: str, version: int) -> None:
    """Make a spool of an older format one of ours. Raises Fatal, and then it is as it was."""
    try:
        if version in upgrade.ADDED:
            upgrade.add(path, version)
        else:
            upgrade.convert(path, LAYOUT, FINISH)
    except upgrade.Spoiled as problem:
        raise Fatal(f"cannot convert the spool {path}: {problem}", Exit.SPOOL_UNWRITABLE) from None


def _connect(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        if path == ":memory:":
            _lay_out(db)
            return db
        # Patient while we start: somebody who looks into the spool may have locked it for a moment.
        db.execute(f"PRAGMA busy_timeout = {START_PATIENCE}")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check found damage")
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise sqlite3.DatabaseError("no WAL possible")
        # FULL fsyncs the log at each commit. NORMAL does not, and loses acknowledged commits at a power cut.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_autocheckpoint = 1000")
        db.execute(f"PRAGMA journal_size_limit = {LOG}")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA secure_delete = ON")  # tokens that are forgotten are gone from the file, too
        # Written although nothing changes: better to find out now than with the first message that this cannot be done.
        checkpoint(db)  # the log may hold all the room that is left
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute(f"PRAGMA busy_timeout = {PATIENCE}")  # longer, and our callers are told to come again
    except sqlite3.OperationalError as error:
        db.close()
        raise Fatal(f"cannot write the spool {path}: {error}", Exit.SPOOL_UNWRITABLE) from None
    except sqlite3.DatabaseError as error:
        db.close()
        raise _damaged(path, error) from None
    return db


def open_spool(path: str) -> tuple[sqlite3.Connection, int]:
    """Open the spool at `path`, or make it; returns the connection and the descriptor of the lock. Raises Fatal."""
    if path == ":memory:":
        return _connect(path), -1
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        os.umask(0o077)
        _check_owner(path)
        version = _inspect(path) if os.path.exists(path) else SCHEMA_VERSION
        held = _lock(path)
    except OSError as error:
        raise Fatal(f"cannot write the spool {path}: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
    try:
        return _open_locked(path, version), held
    except BaseException:
        os.close(held)
        raise


def _open_locked(path: str, version: int) -> sqlite3.Connection:
    try:
        DiskSpace(path).use_reserve()  # a start on a full disk needs it; it is taken again when there is room
        if not os.path.exists(path):
            _create(path)
        if version != SCHEMA_VERSION:
            _upgrade(path, version)
    except OSError as error:
        raise Fatal(f"cannot write the spool {path}: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
    except sqlite3.OperationalError as error:
        raise Fatal(f"cannot write the spool {path}: {error}", Exit.SPOOL_UNWRITABLE) from None
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from None
    before = _open_files()
    db = _connect(path)
    try:
        _check_opened(path, before)
    except Fatal:
        db.close()
        raise
    _guard(path)
    return db


def _damaged(path: str, error: sqlite3.DatabaseError) -> Fatal:
    return Fatal(
        f"the spool {path} is damaged ({error}): restore it, or move it away to start empty", Exit.SPOOL_DAMAGED
    )


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _check_opened(path: str, before: set[str]) -> None:
    """Refuse the spool if any file opened since `before` belongs to another user. SQLite opens files by name, and where
    others may rename, the name may lead to another file by then.
    """
    for name in _open_files() - before:
        try:
            found = os.fstat(int(name))
        except OSError:
            continue  # it was for the listing
        if stat.S_ISREG(found.st_mode) and found.st_uid != os.geteuid():
            problem = f"user {found.st_uid} puts other files in the place of {path}: give it a directory of its own"
            raise Fatal(problem, Exit.SPOOL_UNWRITABLE)


def _guard(path: str) -> None:
    """From now on only SQLite may open the spool's files in this process. Closing any descriptor of a file drops all
    locks that this process holds on it (POSIX), SQLite's too. Then the next program that looks into the spool would
    delete the WAL under us, and what was accepted with it. (sqlite.org/howtocorrupt.html, section 2.2)
    """
    files = {os.path.abspath(path + suffix) for suffix in ("", "-wal", "-shm")}

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and os.path.abspath(arguments[0]) in files:
            raise RuntimeError(f"{arguments[0]} may be opened by SQLite only")

    sys.addaudithook(refuse)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise SQLite's errors in this block as the contract's errors."""
    try:
        yield
    except sqlite3.Error as error:
        raise _KINDS.get(_code(error), Broken)(str(error)) from error


_KINDS: dict[int, type[Exception]] = {sqlite3.SQLITE_FULL: Full, sqlite3.SQLITE_BUSY: Passing}


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def usage(db: sqlite3.Connection) -> tuple[int, int]:
    """How many bytes of the spool hold something, and how many bytes in its file are free for use."""
    [[size]], [[pages]], [[unused]] = (
        db.execute(f"PRAGMA {count}") for count in ("page_size", "page_count", "freelist_count")
    )
    return size * (pages - unused), size * unused


def checkpoint(db: sqlite3.Connection) -> None:
    """Write the WAL into the spool's file, as far as readers and the disk allow, so that it can start afresh."""
    try:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_FULL:
            raise


def cut_log(db: sqlite3.Connection) -> None:
    """Truncate the WAL, unless somebody is reading in it."""
    db.execute("PRAGMA busy_timeout = 0")
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.execute(f"PRAGMA busy_timeout = {PATIENCE}")


def shrink(db: sqlite3.Connection) -> None:
    """Give the disk back what a backlog has left free in the spool's file, if that is much and little else is in it:
    then it takes a moment. (SQLite's auto_vacuum would do it bit by bit, but costs a fifth more for each message.)
    """
    used, unused = usage(db)
    if used < SHRUNK and unused > WORTH_SHRINKING:
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class DiskSpace:
    """The room on the spool's disk, and our reserve of it. For `:memory:` there is always enough."""

    def __init__(self, path: str) -> None:
        self._directory = "" if path == ":memory:" else os.path.dirname(os.path.abspath(path))
        self._reserve = path + ".reserve"
        self._log = path + "-wal"

    def free(self) -> int:
        """Free bytes on the disk beyond the reserve; negative while there is no room for the reserve."""
        if not self._directory:
            return sys.maxsize
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize - (0 if os.path.exists(self._reserve) else RESERVE)

    def keep_reserve(self, least: int) -> bool:
        """Take the reserve, unless that would leave less than `least` bytes. Returns whether it is there now."""
        if not self._directory or os.path.exists(self._reserve):
            return True
        if self.free() < least:
            return False
        descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE)
            return True
        except OSError:
            os.unlink(self._reserve)
            return False
        finally:
            os.close(descriptor)

    def wal_excess(self) -> int:
        """By how many bytes the WAL is longer than it should be: it grows while somebody reads in the spool."""
        try:
            return max(0, os.stat(self._log).st_size - LOG) if self._directory else 0
        except FileNotFoundError:
            return 0

    def use_reserve(self) -> bool:
        """Give up the reserve. Returns whether there was one."""
        try:
            os.unlink(self._reserve)
        except OSError:
            return False
        return True
