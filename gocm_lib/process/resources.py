"""What a process of ours may use: open files, a core dump, heaps, the garbage collector's time. Each is set once."""

import contextlib
import ctypes
import gc
import resource
import sys

M_ARENA_MAX = -8  # glibc's malloc.h


def forbid_core_dumps() -> None:
    """Forbid core files of this process and its children: keys and messages would be in them."""
    # 1, not 0: a limit of 0 does not keep the kernel from piping a core to a program, and 1 does (fs/coredump.c).
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def raise_file_limit() -> int:
    """Allow this process and its children as many open files as the hard limit permits: each connection is one, and the
    usual soft limit is 1,024. Returns how many that is for each process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def collect_seldom() -> None:
    """Keep the garbage collector away from what exists now, and let it look at the rest seldom. Hardly any object of
    ours refers to itself, and looking through thousands of messages in hand again and again took 5 % of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def keep_one_heap() -> None:
    """Have all threads allocate from one heap. The GNU C library would give each thread its own (mallopt(3)), and each
    heap keeps what its thread once needed: 30 readers of large pages left 400 MB behind, with one heap 50 MB.
    """
    with contextlib.suppress(AttributeError):  # another C library has no such call
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
