"""The module search path of processes that this one starts, without the folder in which a command is given."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["search_path"]


def search_path() -> list[str]:
    """Return the module search path for a process that this one starts.

    It is this one's without the current folder (``""``), in which a file ``random.py`` would be taken for Python's own. Folders that
    were named, as in ``PYTHONPATH``, stay.
    """
    named = [place for place in sys.path if place]
    return named if len(named) == len(sys.path) else [*named, str(Path(__file__).parents[1])]  # where bpfree itself may have been found
