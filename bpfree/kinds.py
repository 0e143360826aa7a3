"""What plugins may register, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from bpfree.network.builders import NetworkBuilder
from bpfree.rule import Card, Rule
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.protocols import EvaluationProtocol
from bpfree.tasks.task import DataSource

__all__ = ["misfit"]

TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "networks": ((NetworkBuilder,), "a NetworkBuilder"),
    "tasks": ((DataSource,), "a DataSource"),
    "augmentations": ((Augmentation,), "an Augmentation"),
    "protocols": ((EvaluationProtocol,), "an EvaluationProtocol"),
    "presets": ((Mapping,), "a mapping of settings"),
    "studies": ((str, PathLike), "a path"),
}


def misfit(kind: str, thing: Any) -> str:
    """What a registered thing of this kind must be; empty: it is."""
    if kind == "rules":
        good = isinstance(thing, type) and issubclass(thing, Rule) and isinstance(thing.card, Card)
        return "" if good else "a subclass of bpfree.Rule with a card"
    if kind == "diagnostics":
        return "" if callable(thing) else "a factory of observers"
    types, meaning = TYPES[kind]
    return "" if isinstance(thing, types) else meaning
