"""Files that are replaced as a whole: readers see the old or the new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bpfree.errors import UsageError

__all__ = ["expanded", "replacing", "write_text"]


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


def expanded(path: Path) -> Path:
    """The path with the user's home for ``~``.

    Raises:
        UsageError: there is none.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError("there is no home folder", where=str(path), fix="name a folder: data.root=FOLDER, or BPFREE_DATA") from error
