"""The kinds of objects that plugins may register."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch.optim import Optimizer

from bpfree.addons import AddonKind
from bpfree.metric import Metric
from bpfree.network.builders import NetworkBuilder
from bpfree.options import NoOptions, describe
from bpfree.program import Program
from bpfree.rule import Card, Rule
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.protocols import EvaluationProtocol
from bpfree.tasks.task import DataSource

__all__ = ["Maker", "misfit"]

ADDRESS = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True)
class Maker:
    """The maker of a tracker or an executor, which is called when one is requested.

    Attributes:
        make: a class or function, or its address, ``module:name``, which is imported on the first use. Of a tracker it is called with the
            run and the options ``tracking.*`` (:class:`bpfree.Tracker`), of an executor with the request and its own options, of which its
            ``Config`` is the dataclass, if it has any (:class:`bpfree.Executor`).
        summary: one line for listings.
    """

    make: Callable[..., Any] | str
    summary: str = ""

    @property
    def target(self) -> Callable[..., Any]:
        """The class or function itself.

        Raises:
            ImportError: the address leads nowhere, or what is there needs a library that is missing.
        """
        if not isinstance(self.make, str):
            return self.make
        try:
            return pkgutil.resolve_name(self.make)  # type: ignore[no-any-return]
        except AttributeError as error:
            raise ImportError(f"there is no {self.make}") from error

    @property
    def options(self) -> type:
        """Dataclass of the options of what it makes."""
        return getattr(self.target, "Config", NoOptions)

    @property
    def is_sound(self) -> bool:
        """Whether the target is callable, or an address of something to call."""
        return ADDRESS.fullmatch(self.make) is not None if isinstance(self.make, str) else callable(self.make)

    def __call__(self, *arguments: Any) -> Any:
        """Call the target."""
        return self.target(*arguments)


TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "networks": ((NetworkBuilder,), "a NetworkBuilder, whose Config is a dataclass"),
    "tasks": ((DataSource,), "a DataSource, whose Config is a dataclass"),
    "programs": ((Program,), "a bpfree.Program, whose Config is a dataclass"),
    "augmentations": ((Augmentation,), "an Augmentation"),
    "addons": ((AddonKind,), "an AddonKind, whose Config is a dataclass"),
    "metrics": ((Metric,), "a bpfree.Metric that can be measured (with begin)"),
    "protocols": ((EvaluationProtocol,), "an EvaluationProtocol"),
    "studies": ((str, PathLike), "a path"),
}


def misfit(kind: str, thing: Any) -> str:
    """Say what a registered object of this kind must be; the empty string if it is that."""
    if kind == "rules":
        good = isinstance(thing, type) and issubclass(thing, Rule) and isinstance(thing.card, Card) and _has_options(thing)
        return "" if good else "a subclass of bpfree.Rule with a card, whose Config is a dataclass"
    if kind == "presets":
        return "" if isinstance(thing, Mapping) and all(isinstance(key, str) for key in thing) else "a mapping of settings by their keys"
    if kind in ("trackers", "executors"):
        return "" if isinstance(thing, Maker) and thing.is_sound else "a bpfree.Maker of something callable, or of its address, module:name"
    if kind == "optimizers":
        return "" if isinstance(thing, type) and issubclass(thing, Optimizer) else "a subclass of torch.optim.Optimizer"
    if kind == "diagnostics":
        return "" if callable(thing) else "a factory of observers"
    if kind == "metrics" and isinstance(thing, Metric) and thing.begin is None:
        return TYPES[kind][1]
    types, meaning = TYPES[kind]
    return "" if isinstance(thing, types) and _has_options(thing) else meaning


def _has_options(thing: Any) -> bool:
    """Tell whether the object's options, if it has any, can be listed."""
    config = getattr(thing, "Config", NoOptions)
    try:
        return isinstance(config, type) and all(True for _ in describe(config))
    except (TypeError, NameError, AttributeError):  # no dataclass, or types that cannot be resolved
        return False
