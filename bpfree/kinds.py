"""What plugins may register, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from bpfree.network.builders import NetworkBuilder
from bpfree.options import NoOptions, describe
from bpfree.rule import Card, Rule
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.protocols import EvaluationProtocol
from bpfree.tasks.task import DataSource

__all__ = ["misfit"]

TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "networks": ((NetworkBuilder,), "a NetworkBuilder, whose Config is a dataclass"),
    "tasks": ((DataSource,), "a DataSource, whose Config is a dataclass"),
    "augmentations": ((Augmentation,), "an Augmentation"),
    "protocols": ((EvaluationProtocol,), "an EvaluationProtocol"),
    "studies": ((str, PathLike), "a path"),
}


def misfit(kind: str, thing: Any) -> str:
    """What a registered thing of this kind must be; empty: it is."""
    if kind == "rules":
        good = isinstance(thing, type) and issubclass(thing, Rule) and isinstance(thing.card, Card) and _has_options(thing)
        return "" if good else "a subclass of bpfree.Rule with a card, whose Config is a dataclass"
    if kind == "presets":
        return "" if isinstance(thing, Mapping) and all(isinstance(key, str) for key in thing) else "a mapping of settings by their keys"
    if kind == "diagnostics":
        return "" if callable(thing) else "a factory of observers"
    types, meaning = TYPES[kind]
    return "" if isinstance(thing, types) and _has_options(thing) else meaning


def _has_options(thing: Any) -> bool:
    """Whether its options, if it has any, can be listed."""
    config = getattr(thing, "Config", NoOptions)
    try:
        return isinstance(config, type) and all(True for _ in describe(config))
    except (TypeError, NameError, AttributeError):  # no dataclass, or types that mean nothing
        return False
