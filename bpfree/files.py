"""Files that are replaced as a whole, so that readers never see a part; and checks of paths in records."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bpfree import system
from bpfree.errors import UsageError

__all__ = ["expanded", "inside", "remove_abandoned", "replacing", "write_text"]


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that replaces another one when the block ends; if the block fails, the old file stays.

    The content goes to a temporary file in the same folder, which is made if it does not exist. It is locked while it is written: where its
    writer is killed, :func:`remove_abandoned` knows it by that.

    Args:
        path: of the file to write or replace.
        durable: flush to the disk first, so that a power failure leaves the old or the new file too.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _temporary(path)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if system.MOVES_OPEN_FILES:  # still locked, so that no other process removes it as abandoned
                os.replace(temporary, path)
        if not system.MOVES_OPEN_FILES:
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may have become read-only: the first error says more
            temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """Open a new file beside another, locked where the file system supports it."""
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):
            system.lock(file.fileno(), wait=True)
        if temporary.exists():
            return temporary, file
        file.close()  # another process removed it as abandoned before it was locked


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove temporary files of :func:`replacing` whose writers were killed; files still being written stay.

    Args:
        folder: where to look.
        names: pattern of the files that they were to replace, such as ``*.pt``.
    """
    for path in folder.glob(f".{names}-{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if system.lock(file.fileno()):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def inside(folder: Path, name: str) -> Path | None:
    """Find a file or folder that a record names; ``None`` where it would lie outside, and must not be opened.

    A record may come from another user, and name anything: an absolute path, one with ``..``, a symbolic link that leads out.

    Args:
        folder: that the record belongs to.
        name: relative to it; what it names need not exist.
    """
    try:
        place = Path(name)
        if not place.parts or place.is_absolute() or ".." in place.parts:
            return None
        return folder / place if (folder / place).resolve().is_relative_to(folder.resolve()) else None
    except (OSError, RuntimeError, TypeError, ValueError):  # a circle of links, no text, or text that is no path
        return None


def expanded(path: Path) -> Path:
    """Return the path with the user's home for ``~``.

    Raises:
        UsageError: there is none.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError("there is no home folder", where=str(path), fix="name a folder: data.root=FOLDER, or BPFREE_DATA") from error
