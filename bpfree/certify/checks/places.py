"""Where in a rule's source something happens: from the stack, from a traceback, or from a method."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterable
from types import FrameType

from bpfree.rule import Rule

__all__ = ["is_inside", "is_own", "line_of", "place_now", "place_of", "place_of_error"]

LEADS_TO = {"learn": ("learn", "credit", "local_loss", "signals")}
EXAMINERS = ("bpfree.certify", "bpfree.training")


def line_of(module: str, line: int, name: str) -> str:
    """Format a line as ``package/module.py:12 (Class.method)``, without the folder, which differs between machines."""
    return f"{module.replace('.', '/')}.py:{line} ({name})"


def place_of(rule: type[Rule], name: str) -> str:
    """Name where a method is defined; for the contract's own, the method that it leads to."""
    for candidate in LEADS_TO.get(name, (name,)):
        found = inspect.unwrap(getattr(rule, candidate, Rule.learn))
        code = getattr(found, "__code__", None)
        if code is not None and found.__module__ != Rule.__module__:
            return line_of(found.__module__, code.co_firstlineno, found.__qualname__)
    return f"{rule.__module__.replace('.', '/')}.py ({rule.__qualname__}.{name}, which is inherited)"


def place_now(rule: type[Rule]) -> str:
    """Name the innermost line of the rule's own source on the stack; else of what it calls outside torch."""
    return _choose(traceback.walk_stack(sys._getframe(1)), rule)


def place_of_error(error: BaseException, rule: type[Rule]) -> str:
    """Name the innermost line of the rule's own source in an exception's traceback; else of what it calls outside torch."""
    return _choose(reversed(list(traceback.walk_tb(error.__traceback__))), rule)


def _choose(frames: Iterable[tuple[FrameType, int]], rule: type[Rule]) -> str:
    """Args: frames, the innermost first."""
    lines = [(str(frame.f_globals.get("__name__", "?")), line, frame.f_code.co_qualname) for frame, line in frames]
    inside = (found for found in lines if is_own(rule, found[0]))
    outside = (found for found in lines if _is_in(found[0], "bpfree") and not any(_is_in(found[0], part) for part in EXAMINERS))
    found = next(inside, None) or next(outside, None)
    return line_of(*found) if found else place_of(rule, "learn")


def is_own(rule: type[Rule], module: str) -> bool:
    """Tell whether a module is the rule's, a base class's, or of their packages; of the core, the modules alone."""
    modules = {base.__module__ for base in rule.__mro__ if issubclass(base, Rule) and base.__module__ != Rule.__module__}
    return any(_is_in(module, own if _is_in(own, "bpfree") else own.partition(".")[0]) for own in modules)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_inside(package: str) -> bool:
    """Tell whether the stack leads through a package."""
    return any(_is_in(str(frame.f_globals.get("__name__")), package) for frame, _ in traceback.walk_stack(None))
