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

from bpfree.certify.checks.places import place_now
from bpfree.rule import Rule

__all__ = ["changed", "first_draw", "states"]


def states() -> dict[str, Any]:
    """Of the global generators, by name."""
    return {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": np.random.get_state(legacy=False)}


def changed(before: dict[str, Any]) -> list[str]:
    """Names of the generators that have moved since."""
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


@contextmanager
def _calls_of_hosts(rule: type[Rule], found: list[str]) -> Iterator[None]:
    """Notes calls of the methods of Python's and numpy's hidden instances."""
    owners = (getattr(random, "_inst", None), getattr(np.random.mtrand, "_rand", None))

    def note(frame: FrameType, event: str, called: Any) -> None:
        owner = getattr(called, "__self__", None) if event == "c_call" else None
        if owner is not None and any(owner is known for known in owners):
            found.append(f"{place_now(rule)}: {called.__name__}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def first_draw(rule: type[Rule], call: Callable[[], object]) -> str | None:
    """The line of the rule's source where the call first draws from a global generator, with the operation."""
    draws = _Draws(rule)
    with _calls_of_hosts(rule, draws.found), draws:
        call()
    return next(iter(draws.found), None)
