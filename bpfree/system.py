"""What operating systems do differently: locks on open files, processors, alarms, processes that inherit a connection.

Linux is tested. Everything else has only to import, and to do what its standard library has: a lock, an alarm or a pool of processes that
a system lacks is left out, or refused where it is asked for.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

if sys.platform == "win32":
    import msvcrt
else:
    try:
        import fcntl
    except ImportError:  # neither Unix nor Windows
        fcntl = None  # type: ignore[assignment]

__all__ = ["HAS_ALARMS", "HAS_POOLS", "MOVES_OPEN_FILES", "lock", "processors"]

HAS_ALARMS = hasattr(signal, "setitimer")
"""Whether a timer can interrupt code that looks at no clock."""

HAS_POOLS = hasattr(os, "fork")
"""Whether a process hands an open connection to one that it starts."""

MOVES_OPEN_FILES = sys.platform != "win32"
"""Whether a file that is open can be renamed."""

BEYOND = 1 << 30
"""Place of the byte that is locked on Windows, where a locked byte cannot be read: no file is that long."""


def lock(file: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed, or its process ends; ``False`` if another one has locked it.

    Args:
        file: its descriptor.
        shared: with others that share it; on Windows a lock is always exclusive.
        wait: until the file is free; on Windows for ten seconds.

    Raises:
        OSError: the file system, or the system, has no locks.
    """
    try:
        if sys.platform == "win32":
            before = os.lseek(file, 0, os.SEEK_CUR)
            os.lseek(file, BEYOND, os.SEEK_SET)
            try:
                msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file, before, os.SEEK_SET)
        elif fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no locks on files")
        else:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if isinstance(error, BlockingIOError) or (sys.platform == "win32" and error.errno in (errno.EACCES, errno.EDEADLK)):
            return False
        raise
    return True


def processors() -> int:
    """Count the processors that this process may use."""
    if sys.platform == "linux" and hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
