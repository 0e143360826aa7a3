"""Calls of observers, each in isolation: an observer must never end or change a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pluggy

from bpfree import hooks
from bpfree.errors import BpfreeError
from bpfree.run import Run, RunView
from bpfree.training.hook_watch import HookWatch, is_our_own, name_of

__all__ = ["Observers"]

logger = logging.getLogger("bpfree")


class Observers:
    """The lifecycle observers of one run, in the order given; plugin modules are called last.

    Args:
        observers: objects or modules that implement lifecycle hooks.
        run: they get a read-only view of it.

    Attributes:
        watch: checks that hooks change nothing, once the run has begun.

    Raises:
        pluggy.PluginValidationError: an observer implements a hook with arguments that it does not have.
    """

    watch: HookWatch | None = None

    def __init__(self, observers: Iterable[Any], run: Run) -> None:
        self._view = RunView(run)
        self._manager = pluggy.PluginManager("bpfree")
        self._manager.add_hookspecs(hooks)
        # pluggy calls the last registered first
        for observer in reversed(list(observers)):
            self._manager.register(observer)
        self._manager.check_pending()

    def listens(self, hook: str) -> bool:
        """Tell whether any observer implements the hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every implementation that takes only these arguments; one that fails is reported once and dropped.

        Raises:
            BpfreeError: an observer may refuse the run with it (a required tracking server that is down); or one has changed something.
        """
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            if not arguments.keys() | {"run"} >= set(implementation.argnames):  # a rule, say, which a program has not
                continue
            with self._watched(hook, implementation):
                self._call(hook, implementation, arguments)

    def notify_again(self, hook: str) -> None:
        """Call the implementations of this package again, because their arguments have changed since."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            if is_our_own(implementation.plugin):
                self._call(hook, implementation, {})

    def _watched(self, hook: str, implementation: Any) -> AbstractContextManager[None]:
        harmless = is_our_own(implementation.plugin) and "rule" not in implementation.argnames
        return nullcontext() if self.watch is None or harmless else self.watch.around(hook, implementation.plugin)

    def _call(self, hook: str, implementation: Any, arguments: dict[str, Any]) -> None:
        given = {"run": self._view, **arguments}
        try:
            implementation.function(*(given[name] for name in implementation.argnames))
        except (BpfreeError, KeyboardInterrupt):
            raise
        except BaseException as error:  # also sys.exit
            name, disk = name_of(implementation.plugin), isinstance(error, OSError)
            reason = f" ({error})" if disk else ""  # whose place in the code says nothing of a disk
            logger.warning("observer %s failed in %s and is dropped; the run continues%s", name, hook, reason, exc_info=not disk)
            self._manager.unregister(implementation.plugin)
