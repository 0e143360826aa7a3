"""Interleaved training of layers: each learns in a window of epochs of its own, as phases of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from bpfree import Phase, UsageError
from bpfree.step import Budget

__all__ = ["check_windows", "windowed_phases"]


def check_windows(windows: Sequence[Sequence[int]], blocks: Sequence[str], where: str) -> dict[str, tuple[int, int]]:
    """Return each block's window, the first epoch in it and the first one after it.

    Raises:
        UsageError: not a window for each block, or one that is none.
    """
    if len(windows) != len(blocks):
        what = f"{len(windows)} windows for {len(blocks)} blocks"
        raise UsageError(what, where=where, fix=f"give one for each of {', '.join(blocks)}, such as [0, 5]")
    found = {}
    for name, window in zip(blocks, windows, strict=True):
        if len(window) != 2 or not 0 <= window[0] < window[1]:
            what = f"the window {list(window)} of {name} is none"
            raise UsageError(what, where=where, fix="give the first epoch, from 0, and the one after the last, such as [0, 5]")
        found[name] = (window[0], window[1])
    return found


def windowed_phases(windows: Mapping[str, tuple[int, int]], always: Sequence[str], budget: Budget) -> Iterator[Phase]:
    """Yield a phase for each stretch of epochs in which the same groups learn.

    Args:
        windows: by block.
        always: groups that learn in all of them, and to the end of the budget.
        budget: of the run. Windows that begin behind its epochs are left out.
    """
    last = budget.epochs if budget.epochs is not None else None
    cuts = sorted({0, *(edge for window in windows.values() for edge in window)})
    for begin, end in pairwise(cuts):
        end = end if last is None else min(end, last)
        groups = [name for name, (first, after) in windows.items() if first <= begin < after] + list(always)
        if groups and begin < end:
            yield Phase(f"epochs {begin} to {end - 1}", epochs=end - begin, groups=tuple(groups))
    if always and (last is None or cuts[-1] < last):
        yield Phase(f"epochs from {cuts[-1]}", epochs=None if last is None else last - cuts[-1], groups=tuple(always))
