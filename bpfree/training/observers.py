"""Calling observers: each in isolation, because an observer must never end or change a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pluggy

from bpfree import hooks
from bpfree.errors import BpfreeError

__all__ = ["Observers"]

logger = logging.getLogger("bpfree")


class Observers:
    """The lifecycle observers of one run, in the order given; plugin modules are asked last.

    Args:
        observers: objects or modules that implement lifecycle hooks.

    Raises:
        pluggy.PluginValidationError: an observer implements a hook with arguments that it does not have.
    """

    def __init__(self, observers: Iterable[Any]) -> None:
        self._manager = pluggy.PluginManager("bpfree")
        self._manager.add_hookspecs(hooks)
        # pluggy calls the last registered first
        for observer in reversed(list(observers)):
            self._manager.register(observer)
        self._manager.check_pending()

    def listens(self, hook: str) -> bool:
        """Whether anybody implements the hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every implementation. One that fails is reported once and dropped.

        Raises:
            BpfreeError: an observer may refuse the run with it (a required tracking server that is down).
        """
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except BpfreeError:
                raise
            except Exception:
                name = type(implementation.plugin).__name__
                logger.warning("observer %s failed in %s and is dropped; the run goes on", name, hook, exc_info=True)
                self._manager.unregister(implementation.plugin)
