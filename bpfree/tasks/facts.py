"""What a run records of its task: the spec, the type of its raw inputs, and the number of examples of each split. No data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpfree.tasks.spec import CLASS
from bpfree.tasks.splits import Split
from bpfree.tasks.task import Task

__all__ = ["CLASS", "NAMED", "facts_of", "input_dtype"]

NAMED = ("classes", "soft", "multilabel")
"""Kinds of targets whose outputs are classes or labels."""


def facts_of(task: Task) -> dict[str, Any]:
    """Describe a task without its data: ``spec``, ``dtype`` of the raw inputs where they are one tensor, and ``examples`` by split."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    tensor = task.train.inputs if isinstance(task.train, Split) and task.spec.structure is None else None
    return {
        "spec": task.spec.recorded(),
        **({} if tensor is None else {"dtype": str(tensor.dtype).removeprefix("torch.")}),
        "examples": {name: len(split) for name, split in splits.items() if split is not None},
    }


def input_dtype(spec: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the type of raw inputs: as recorded, or as the spec suggests."""
    if known := facts.get("dtype"):
        return "float32" if known in ("bfloat16", "float16") else str(known)
    return "int64" if spec.get("vocabulary") else "uint8" if spec.get("scale") == 255 else "float32"
