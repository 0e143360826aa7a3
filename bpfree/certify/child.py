"""Work in a child process with an empty home and without a network, where an examined rule finds nothing of earlier runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bpfree.errors import BpfreeError

__all__ = ["Isolated", "in_child"]

Result = TypeVar("Result")
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
"""Flags of unshare(2), which Python has from 3.12 on."""
PLACES = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR", "MPLCONFIGDIR")
SECRET = ("BPFREE_DATA", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
LENGTH = struct.Struct("!Q")
LONGEST = 3600.0


@dataclass(frozen=True)
class Isolated(Generic[Result]):
    """What the work returned, and where it was done.

    Attributes:
        result: of the work.
        open: what could not be shut off, in words; empty: nothing.
    """

    result: Result
    open: tuple[str, ...]


def in_child(work: Callable[[], Result], *, seconds: float = LONGEST, stay: bool = False, threads: int = 1) -> Isolated[Result]:
    """Do some work in a forked process, which is killed with all that it started when it has answered.

    Args:
        work: returns something that can be pickled.
        seconds: after which it is given up.
        stay: keep the working folder, where a run's configuration names files by relative paths.
        threads: of torch that the work uses. Work of several is done in this process: a forked one lacks the threads that OpenMP has
            started here, and would wait for them without end.

    Raises:
        BpfreeError: what the work raised, that the process died, or that it took longer.
    """
    if sys.platform != "linux":  # elsewhere a fork of a process that has loaded torch may crash, or there is none
        return Isolated(work(), ("the caller's process: the examination has one of its own on Linux alone",))
    if threads > 1:
        return Isolated(work(), (f"the caller's process: a run of {threads} threads is not repeated in a forked one",))
    read, write = os.pipe()
    home = tempfile.mkdtemp(prefix="bpfree-home-")
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the work uses no thread of this process
        pid = os.fork()
    if not pid:
        _live(work, write, home, stay)
    os.close(write)
    try:
        answer = _answer(read, time.monotonic() + seconds)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        shutil.rmtree(home, ignore_errors=True)
    if answer is None:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
        raise BpfreeError(f"the process of the examination ended without an answer ({how})", fix="correct the rule")
    kind, value, open_ways = answer
    if kind == "error":
        raise value
    return Isolated(value, open_ways)


def _live(work: Callable[[], Any], write: int, home: str, stay: bool) -> None:
    """Do the work in the child, and never return."""
    code = 1
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)  # the output of examined runs is dropped
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        open_ways = _shut_off(home, stay)
        try:
            answer: tuple[str, Any, tuple[str, ...]] = ("result", work(), open_ways)
            content = pickle.dumps(answer)
        except BpfreeError as error:
            content = pickle.dumps(("error", BpfreeError(error.what, where=error.where, fix=error.fix), open_ways))
        except BaseException as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            content = pickle.dumps(("error", BpfreeError(said, fix="correct the rule"), open_ways))
        with os.fdopen(write, "wb") as file:
            file.write(LENGTH.pack(len(content)) + content)
        code = 0
    finally:
        os._exit(code)


def _shut_off(home: str, stay: bool) -> tuple[str, ...]:
    """Leave the user's files and the network behind; returns what stays open."""
    for name in SECRET:
        os.environ.pop(name, None)
    for name in PLACES:
        os.environ[name] = home
    tempfile.tempdir = None
    if not stay:
        os.chdir(home)
    left = ["files that this user may read, by their full paths", "the bundled digits, which are a part of scikit-learn"]
    if not _leave_network():
        left.append("the network: this system does not let a process leave it")
    return tuple(left)


def _leave_network() -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        system = ctypes.CDLL(None)
        return bool(system.unshare(NEW_NETWORK) == 0 or system.unshare(NEW_USER | NEW_NETWORK) == 0)
    return False


def _answer(read: int, until: float) -> tuple[str, Any, tuple[str, ...]] | None:
    """Read the child's answer; ``None`` if it died. A process that it started may still hold the pipe, so its end is not waited for."""
    header = _bytes(read, LENGTH.size, until)
    content = None if header is None else _bytes(read, LENGTH.unpack(header)[0], until)
    return None if content is None else pickle.loads(content)


def _bytes(read: int, count: int, until: float) -> bytes | None:
    parts = b""
    while len(parts) < count:
        ready, _, _ = select.select([read], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise BpfreeError("the examination takes too long", where="whole runs", fix="give the rule smaller defaults")
        part = os.read(read, min(1 << 20, count - len(parts)))
        if not part:
            return None
        parts += part
    return parts
