"""Who draws from global generators: torch's, Python's and numpy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.certify.checks.places import is_own, line_of, place_now
from bpfree.rule import Rule

__all__ = ["changed", "first_draw", "states"]


def states() -> dict[str, Any]:
    """Return the states of the global generators, by name."""
    return {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": np.random.get_state(legacy=False)}


def changed(before: dict[str, Any]) -> list[str]:
    """Name the generators whose state has changed since."""
    now = states()
    numpy = [before["numpy"]["state"], now["numpy"]["state"]]
    same = {
        "torch": torch.equal(before["torch"], now["torch"]),
        "random": before["random"] == now["random"],
        "numpy": numpy[0]["pos"] == numpy[1]["pos"] and bool((numpy[0]["key"] == numpy[1]["key"]).all()),
    }
    return [name for name, unmoved in same.items() if not unmoved]


class _Draws(TorchDispatchMode):
    """Notes random operations that were given no generator."""

    def __init__(self, rule: type[Rule]) -> None:
        super().__init__()
        self._rule = rule
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if torch.Tag.nondeterministic_seeded in func.tags and not any(isinstance(value, torch.Generator) for value in given):
            self.found.append(f"{place_now(self._rule)}: {func.overloadpacket}")
        return func(*args, **(kwargs or {}))


class _Lines:
    """Follows the lines of the rule's own source, and notes those after which Python's or numpy's generator has changed."""

    def __init__(self, rule: type[Rule], found: list[str]) -> None:
        self._rule, self._found = rule, found
        self._line, self._before = "", states()

    def _look(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        """Trace a function: called at its begin and end and before each of its lines."""
        module = str(frame.f_globals.get("__name__"))
        if not is_own(self._rule, module):
            return None
        moved = [name for name in changed(self._before) if name != "torch"]
        if moved:
            self._found.append(f"{self._line}: {' and '.join(moved)}")
            self._before = states()
        self._line = line_of(module, frame.f_lineno, frame.f_code.co_qualname)
        return self._look

    @contextmanager
    def followed(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._look)
        try:
            yield
        finally:
            sys.settrace(before)


def first_draw(rule: type[Rule], call: Callable[[], object]) -> str | None:
    """Name the line of the rule's source where the call first draws from a global generator, with the operation."""
    draws = _Draws(rule)
    with _Lines(rule, draws.found).followed(), draws:
        call()
        call()  # normal numbers are made in pairs: every other call may use the second one of a pair
    return next(iter(draws.found), None)
