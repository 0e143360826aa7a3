"""Files that are replaced as a whole: readers see the old or the new one, never a part; and places that a record may name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["inside", "replacing", "write_text"]


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of another when the block ends; if it fails, the old one stays.

    The content goes to a temporary file in the same folder, which is made if it does not exist.

    Args:
        path: of the file to write or replace.
        durable: flush to the disk first, so that a power failure leaves the old or the new file too.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def inside(folder: Path, name: str) -> Path | None:
    """Find a file or folder that a record names; ``None`` where it would lie outside, so that nothing of it is to be opened.

    A record may be somebody else's, and name anything: an absolute path, one with ``..``, a symbolic link that leads out.

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
