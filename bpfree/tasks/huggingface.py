"""The task ``hf``: a data set of Hugging Face that is on this machine, ``task=hf task.path=DIR``. Needs the extra ``hf``.

``task.path`` is a folder that ``save_to_disk`` wrote, or the name of a set in the cache; nothing is downloaded. A column of pictures, or
one of arrays of numbers, is the input; a column of class labels, whole numbers or numbers is the target.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.pictures import Form, ItemPictures, PictureConfig, form_of, split_of
from bpfree.tasks.spec import TargetKind
from bpfree.tasks.splits import Examples, Split
from bpfree.tasks.task import DataSource, TaskSpec, fixed_test

__all__ = ["HF", "HuggingFaceConfig"]

WHITE = 255.0
NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
PICTURE, LABEL, ARRAYS = "Image", "ClassLabel", ("Sequence", "List", "LargeList", "Array2D", "Array3D")
"""Names of the classes of features."""


@dataclass
class HuggingFaceConfig(PictureConfig):
    """The data set, and which of its columns to use."""

    path: str = option("", "a folder that save_to_disk wrote, or the name of a set in the cache of Hugging Face")
    configuration: str = option("", "of a set with several configurations (none: its only one)")
    input: str = option("", "column of the inputs (none: the only one of pictures or arrays)")
    target: str = option("", "column of the targets (none: the only one of class labels)")


def spec(config: HuggingFaceConfig, root: Path | None) -> TaskSpec:
    """Read the columns from the features of the set, and the shape from the first example.

    Raises:
        BpfreeError: the library or the set is not there.
        UsageError: columns of which it is not clear what they are.
    """
    train = splits_in(config, root)["train"]
    source, target = columns_of(train, config)
    feature = train.features[target]
    kind, outputs, names = describe(feature, train, target)
    if type(train.features[source]).__name__ == PICTURE:
        return TaskSpec("hf", form_of(train[0][source], config).shape, outputs, kind, scale=WHITE, class_names=names)
    return TaskSpec("hf", tuple(np.asarray(train[0][source]).shape), outputs, kind, class_names=names)


def load(config: HuggingFaceConfig, root: Path | None) -> tuple[Examples, Examples] | tuple[Examples, Examples | None, Examples]:
    """Load training, validation and test examples.

    Raises:
        BpfreeError: as for ``spec``.
        UsageError: as for ``spec``, or splits with other columns.
    """
    parts = splits_in(config, root)
    source, target = columns_of(parts["train"], config)
    pictures = type(parts["train"].features[source]).__name__ == PICTURE
    form = form_of(parts["train"][0][source], config) if pictures else None
    made = {name: examples(part, source, target, form, config) for name, part in parts.items()}
    if "test" not in made:
        return fixed_test(made["train"])
    if "validation" not in made:
        return made["train"], made["test"]
    return made["train"], made["validation"], made["test"]


def library() -> Any:
    """Import the library ``datasets``.

    Raises:
        BpfreeError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise BpfreeError("task hf needs the library datasets", where=str(error), fix="pip install 'bpfree[hf]'") from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the library from using the network, which it does even for sets in its cache; restore its settings afterwards."""
    before: list[tuple[Any, str, Any]] = []
    for module in map(sys.modules.get, ("datasets.config", "huggingface_hub.constants")):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if hasattr(module, name):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def splits_in(config: HuggingFaceConfig, root: Path | None) -> Mapping[str, Any]:
    """Open the splits: ``train``, and perhaps ``validation`` and ``test``.

    Raises:
        BpfreeError: there is no such set here.
    """
    if not config.path:
        raise UsageError("task hf needs a data set", where="task.path", fix="give a folder that save_to_disk wrote, or a name in the cache")
    datasets, path = library(), expanded(Path(config.path))
    places = [path] if path.is_absolute() or root is None else [path, expanded(root) / path]
    folder = next((place for place in places if place.is_dir()), None)
    try:
        if folder is not None:
            found = datasets.load_from_disk(str(folder))
        else:
            with offline():
                found = datasets.load_dataset(config.path, config.configuration or None)
    except Exception as error:  # the library raises various errors for what is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "save it where the network is: datasets.load_dataset(NAME).save_to_disk(DIR), then task.path=DIR"
        raise BpfreeError(f"there is no such data set on this machine: {reason}", where=f"task.path: {config.path}", fix=fix) from error
    if not isinstance(found, Mapping):
        return {"train": found}
    chosen = {ours: found[theirs] for ours, names in NAMES.items() for theirs in names if theirs in found}
    if "train" not in chosen:
        raise UsageError(f"the set has the splits {', '.join(found)}, but no train", where=config.path, fix="save it with a split train")
    if "test" not in chosen and "validation" in chosen:
        chosen["test"] = chosen.pop("validation")
    return chosen


def columns_of(data: Any, config: HuggingFaceConfig) -> tuple[str, str]:
    """Return the names of the columns of inputs and targets.

    Raises:
        UsageError: there are none or several that could be meant.
    """
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    target = config.target or only(kinds, (LABEL,), "", "target", config)
    source = config.input or only(kinds, (PICTURE, *ARRAYS), target, "input", config)
    for key, name in (("input", source), ("target", target)):
        if name not in kinds:
            raise UsageError(f"there is no column {name!r}", where=f"task.{key}", fix=f"one of {', '.join(kinds)}")
    if kinds[source] not in (PICTURE, *ARRAYS):
        what = f"the column {source} holds {kinds[source]}, neither pictures nor arrays of numbers"
        raise UsageError(what, where="task.input", fix="choose another, or make numbers of it and give bpfree.Task.of(train, test)")
    return source, target


def only(kinds: Mapping[str, str], wanted: tuple[str, ...], other: str, key: str, config: HuggingFaceConfig) -> str:
    found = [name for name, kind in kinds.items() if kind in wanted and name != other]
    if len(found) != 1:
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UsageError(f"which column is the {key}? The set has {shown}", where=config.path, fix=f"set task.{key}=COLUMN")
    return found[0]


def describe(feature: Any, data: Any, name: str) -> tuple[TargetKind, int, tuple[str, ...]]:
    """Return the kind of the targets, the number of outputs, and the names of the classes."""
    if type(feature).__name__ == LABEL:
        return "classes", len(feature.names), tuple(map(str, feature.names))
    if type(feature).__name__ == "Value" and feature.dtype.startswith(("float", "double")):
        return "real", 1, ()
    if type(feature).__name__ == "Value" and feature.dtype.startswith(("int", "uint")):
        return "classes", int(max(data[name])) + 1, ()
    what = f"the column {name} holds {type(feature).__name__}, neither classes nor numbers"
    raise UsageError(what, where="task.target", fix="choose another")


def examples(data: Any, source: str, target: str, form: Form | None, config: HuggingFaceConfig) -> Examples:
    targets = targets_of(data, target)
    if form is None:
        return Split(torch.from_numpy(np.asarray(list(data[source]), dtype=np.float32)), targets)
    return split_of(ItemPictures(data, source, config.path, targets, form), config.keep)


def targets_of(data: Any, name: str) -> Tensor:
    values = np.asarray(list(data[name]))
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))[:, None]
    if values.dtype.kind not in "iu" or values.min() < 0:
        raise UsageError(
            f"the column {name} holds targets that are no classes from 0", where="task.target", fix="remove rows without a class"
        )
    return torch.from_numpy(values.astype(np.int64))


HF = DataSource(spec, load, HuggingFaceConfig, "a data set of Hugging Face, saved or cached: task.path=DIR", normalise="auto")
