"""Callbacks: functions, and objects with methods named as lifecycle hooks, as observers of a run.

A function is called after each epoch. Functions and methods name what they want among their parameters: what their hook is called with
(:mod:`bpfree.hooks`), and ``stop``, a function that ends the training after the epoch in progress; then the run is tested as usual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bpfree.errors import UsageError
from bpfree.hooks import hookimpl

__all__ = ["observers_of"]

STOP = "stop"


def observers_of(callbacks: Iterable[Any], end: Callable[[str], None]) -> list[Any]:
    """Make an observer of each callback; one whose methods are marked with ``bpfree.hookimpl`` is one already.

    Args:
        callbacks: of the user.
        end: ends the training early, for a reason.

    Raises:
        UsageError: one is neither a function nor has a method named as a hook, or asks for what its hook does not have.
    """
    if isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Iterable):
        raise UsageError(f"callbacks must be a list, not a {type(callbacks).__name__}", where="callbacks", fix="callbacks=[my_function]")
    return [_observer(callback, end) for callback in callbacks]


def _observer(callback: Any, end: Callable[[str], None]) -> Any:
    if isinstance(callback, type):
        name = callback.__name__
        raise UsageError(f"the callback {name} is a class", where="callbacks", fix=f"give an object: callbacks=[{name}()]")
    methods = {hook: getattr(callback, hook) for hook in GIVEN if callable(getattr(callback, hook, None))}
    if any(hasattr(method, "bpfree_impl") for method in methods.values()):
        return callback
    if not methods and not callable(callback):
        what = f"a {type(callback).__name__} is neither a function nor has a method named as a hook"
        raise UsageError(what, where="callbacks", fix=f"name a method {', '.join(GIVEN)}")
    methods = methods or {"epoch_end": callback}
    name = getattr(callback, "__name__", type(callback).__name__)
    # of the callback's own module, so that it is watched like any observer that is not ours
    members = {"__module__": getattr(callback, "__module__", None) or "__main__", **{hook: vars(_Hooks)[hook] for hook in methods}}
    return type(name, (_Called,), members)(name, methods, end)


class _Called:
    """Calls a callback's methods with what they ask for."""

    def __init__(self, name: str, methods: Mapping[str, Callable[..., Any]], end: Callable[[str], None]) -> None:
        self._name, self._methods, self._end = name, methods, end
        self._wanted = {hook: _wanted(method, name, hook) for hook, method in methods.items()}

    def _call(self, hook: str, **given: Any) -> None:
        known = {**given, STOP: self._stop}
        self._methods[hook](**{name: known[name] for name in self._wanted[hook]})

    def _stop(self, reason: str = "") -> None:
        """End the training after the epoch in progress."""
        self._end(reason or f"{self._name} ended it")


class _Hooks(_Called):
    """Implements each hook, with all that it is called with."""

    @hookimpl
    def run_start(self, run: Any) -> None:
        self._call("run_start", run=run)

    @hookimpl
    def phase_start(self, run: Any, phase: Any) -> None:
        self._call("phase_start", run=run, phase=phase)

    @hookimpl
    def step_end(self, run: Any, step: Any) -> None:
        self._call("step_end", run=run, step=step)

    @hookimpl
    def epoch_end(self, run: Any, metrics: Any, rule: Any) -> None:
        self._call("epoch_end", run=run, metrics=metrics, rule=rule)

    @hookimpl
    def progress(self, run: Any, metrics: Any) -> None:
        self._call("progress", run=run, metrics=metrics)

    @hookimpl
    def checkpoint_saved(self, run: Any, path: Any) -> None:
        self._call("checkpoint_saved", run=run, path=path)

    @hookimpl
    def phase_end(self, run: Any, phase: Any) -> None:
        self._call("phase_end", run=run, phase=phase)

    @hookimpl
    def run_end(self, run: Any) -> None:
        self._call("run_end", run=run)


GIVEN = {name: tuple(inspect.signature(each).parameters)[1:] for name, each in vars(_Hooks).items() if hasattr(each, "bpfree_impl")}
"""What each hook is called with."""


def _wanted(method: Callable[..., Any], name: str, hook: str) -> list[str]:
    """List what a method asks for, all of it if it takes any keyword.

    Raises:
        UsageError: its hook does not have it.
    """
    known = (*GIVEN[hook], STOP)
    parameters = inspect.signature(method).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return list(known)
    unknown = [each.name for each in parameters if each.name not in known and each.default is each.empty]
    if unknown:
        what = f"the callback {name} asks for {', '.join(unknown)}, but {hook} has {', '.join(known)}"
        raise UsageError(what, where="callbacks", fix="name its parameters like these; any of them may be left out")
    return [each.name for each in parameters if each.name in known]
