"""The task ``torchvision``: any classification set of ``torchvision.datasets``, ``task=torchvision task.dataset=EMNIST``.

The set is read by torchvision's own class from the data root, and downloaded into it only where it is not there. Arguments of the class
are ``task.options.NAME`` (``task.options.split=letters``). Sets with files of one size are known without their data; of the others the
spec is known once they are there.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.pictures import ItemPictures, PictureConfig, form_of, resized, split_of
from bpfree.tasks.splits import Examples, Split
from bpfree.tasks.task import DataSource, TaskSpec, fixed_test
from bpfree.tasks.vision import DEFAULT_ROOT, brief, quiet_network

__all__ = ["TORCHVISION", "TorchvisionSetConfig"]

WHITE = 255.0
KNOWN = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST", "QMNIST"), ((1, 28, 28), 10)),
    **dict.fromkeys(("CIFAR10", "SVHN"), ((3, 32, 32), 10)),
    "CIFAR100": ((3, 32, 32), 100),
    "STL10": ((3, 96, 96), 10),
    "USPS": ((1, 16, 16), 10),
}
"""Shape and number of classes of sets whose pictures have one size."""
EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
SPLITS: dict[str, tuple[str, str | None, str]] = {
    **dict.fromkeys(("Flowers102", "DTD", "FGVCAircraft", "RenderedSST2", "PCAM"), ("train", "val", "test")),
    "Country211": ("train", "valid", "test"),
    "OxfordIIITPet": ("trainval", None, "test"),
    "Imagenette": ("train", None, "val"),
}
"""What ``split`` is for training, validation and test; for other sets ``train`` and ``test``."""


@dataclass
class TorchvisionSetConfig(PictureConfig):
    """The data set, and how its pictures are read."""

    dataset: str = option("", "a class of torchvision.datasets, such as EMNIST or SVHN")
    options: dict[str, Any] = option(factory=dict, help="further arguments of the class, such as split for EMNIST")


def spec(config: TorchvisionSetConfig, root: Path | None) -> TaskSpec:
    """Describe shape and classes, from a table or from the training split, which is downloaded if it is missing.

    Raises:
        UsageError: no such set, or arguments that it does not take.
    """
    return _spec(config.dataset, json.dumps(config.options, sort_keys=True), tuple(config.size), config.colour, root)


@lru_cache(maxsize=16)
def _spec(dataset: str, options: str, size: tuple[int, ...], colour: Any, root: Path | None) -> TaskSpec:
    config = TorchvisionSetConfig(list(size), colour, "auto", dataset, json.loads(options))
    kind = kind_of(config)
    known = ((1, 28, 28), EMNIST_CLASSES[str(config.options.get("split"))]) if dataset == "EMNIST" else KNOWN.get(dataset)
    if known is not None:
        names, shape = names_of(kind, config), tuple(resized(torch.zeros(1, *known[0], dtype=torch.uint8), config).shape[1:])
        return TaskSpec("torchvision", shape, known[1], scale=WHITE, class_names=names if len(names) == known[1] else ())
    data = opened(kind, arguments(kind, config)["train"], root, config)
    images, targets = arrays_of(data, config)
    names = names_of(data, config)
    shape = tuple(images.shape[1:]) if images is not None else form_of(item_of(data, config)[0], config).shape
    return TaskSpec("torchvision", shape, len(names) or int(targets.max()) + 1, scale=WHITE, class_names=names)


def load(config: TorchvisionSetConfig, root: Path | None) -> tuple[Examples, Examples] | tuple[Examples, Examples | None, Examples]:
    """Load training and test examples, and validation examples where the set has them.

    Raises:
        UsageError: as for ``spec``, or items that are no pictures with a class.
        BpfreeError: the set is not there and cannot be downloaded.
    """
    kind = kind_of(config)
    parts = {name: opened(kind, given, root, config) for name, given in arguments(kind, config).items()}
    made = {name: examples(part, parts["train"], config) for name, part in parts.items()}
    if "test" not in made:
        return fixed_test(made["train"])
    if "validation" not in made:
        return made["train"], made["test"]
    return made["train"], made["validation"], made["test"]


def kind_of(config: TorchvisionSetConfig) -> Any:
    """Return the set's class.

    Raises:
        UsageError: torchvision has none of that name, or it takes other arguments.
    """
    from torchvision import datasets

    names = [name for name in datasets.__all__ if isinstance(getattr(datasets, name), type)]
    found = getattr(datasets, config.dataset, None) if config.dataset in names else None
    if found is None:
        guess = nearest(config.dataset, names)
        hint = f"did you mean {guess}?" if guess else "see torchvision.datasets; for example task.dataset=EMNIST"
        what = f"torchvision has no data set {config.dataset!r}" if config.dataset else "task torchvision needs the name of a data set"
        raise UsageError(what, where="task.dataset", fix=hint)
    if config.dataset == "EMNIST":
        if config.options.get("split") not in EMNIST_CLASSES:
            fix = f"task.options.split={'|'.join(EMNIST_CLASSES)}"
            raise UsageError(f"EMNIST has no split {config.options.get('split')!r}", where="task.options", fix=fix)
        return found
    unknown = [name for name in config.options if name not in inspect.signature(found).parameters]
    if unknown or "root" in config.options:
        takes = ", ".join(name for name in inspect.signature(found).parameters if name not in ("root", "download", "train", "transform"))
        raise UsageError(f"{config.dataset} takes no argument {(unknown or ['root'])[0]!r}", where="task.options", fix=f"it takes {takes}")
    return found


def arguments(kind: Any, config: TorchvisionSetConfig) -> Mapping[str, dict[str, Any]]:
    """Return the arguments of the class for each split; for the training split alone where the set has only one."""
    from torchvision import datasets

    known, given = inspect.signature(kind).parameters, dict(config.options)
    if "train" in known or issubclass(kind, datasets.MNIST):
        return {"train": given | {"train": True}, "test": given | {"train": False}}
    if "split" not in known:
        return {"train": given}
    train, validation, test = SPLITS.get(config.dataset, ("train", None, "test"))
    found = {"train": {"split": train} | given, "validation": {"split": validation} | given, "test": {"split": test} | given}
    return {name: each for name, each in found.items() if each["split"] is not None}


def opened(kind: Any, given: dict[str, Any], root: Path | None, config: TorchvisionSetConfig) -> Any:
    """Open a split of the set, and download it if it is missing.

    Raises:
        BpfreeError: that fails.
    """
    folder, takes = expanded(root or DEFAULT_ROOT), inspect.signature(kind).parameters
    loads = "download" in takes or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    try:
        with quiet_network():
            return kind(folder, **given, **({"download": False} if loads else {}))
    except Exception as error:  # torchvision's classes raise various errors for files that are not there
        if not loads:
            what = f"{config.dataset} is not on this machine, and torchvision does not download it ({brief(error)})"
            raise BpfreeError(what, where=str(folder), fix="put its files there, or set data.root to the folder that has them") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as place, quiet_network():
            kind(place, **given, download=True)
            for entry in sorted(Path(place).iterdir()):
                moved(entry, folder / entry.name)
            return kind(folder, **given, download=False)
    except Exception as error:  # network, disk, archive: the remedy is the same
        what = f"{config.dataset} is not on this machine, and downloading it failed ({brief(error)})"
        with contextlib.suppress(OSError):
            folder.rmdir()  # if there is nothing in it
        fix = "put its files there as torchvision has them; or set data.root or BPFREE_DATA to the folder that has them"
        raise BpfreeError(what, where=str(folder), fix=fix) from error


def moved(entry: Path, target: Path) -> None:
    """Move a downloaded file or folder to its destination, and replace what is there."""
    if target.is_dir():
        shutil.copytree(entry, target, dirs_exist_ok=True)
    else:
        shutil.move(entry, target)


def examples(data: Any, train: Any, config: TorchvisionSetConfig) -> Examples:
    """Return the examples of a split, as one tensor where torchvision has one; else in the form of the first training picture."""
    images, targets = arrays_of(data, config)
    if images is not None:
        return Split(images, targets)
    form = form_of(item_of(train, config)[0], config)
    return split_of(ItemPictures(data, 0, config.dataset, targets, form), config.keep)


def arrays_of(data: Any, config: TorchvisionSetConfig) -> tuple[Tensor | None, Tensor]:
    """Return images uint8 (N, C, H, W), ``None`` where the set holds none as an array; and classes (N,)."""
    targets = targets_of(data, config)
    images = getattr(data, "data", None)
    if images is None or isinstance(images, (list, tuple)) or len(images) != len(targets):
        return None, targets
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        return None, targets
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    return resized(images, config), targets


def targets_of(data: Any, config: TorchvisionSetConfig) -> Tensor:
    """Return classes (N,), counted from 0; read with the pictures only where the set does not list them."""
    found: Any = next((getattr(data, name) for name in ("targets", "labels", "_labels", "y") if hasattr(data, name)), None)
    if found is None or len(found) != len(data):
        found = [item_of(data, config, place)[1] for place in range(len(data))]
    targets = torch.as_tensor(found)
    if targets.dim() == 2 and config.dataset == "QMNIST":
        targets = targets[:, 0]  # the others are about the writer
    if targets.dim() != 1 or targets.is_floating_point():
        what = f"the targets of {config.dataset} are {targets.dtype} of shape {tuple(targets.shape)}, not one class for each picture"
        raise UsageError(what, where="task.dataset", fix="choose a set of classification, or give a Task of your own: bpfree.Task.of")
    return targets.long() - int(first_is_unused(data, config))


def first_is_unused(data: Any, config: TorchvisionSetConfig) -> bool:
    """Tell whether classes are counted from 1: those of EMNIST's letters."""
    return config.dataset == "EMNIST" and config.options.get("split") == "letters"


def names_of(data: Any, config: TorchvisionSetConfig) -> tuple[str, ...]:
    """Return the names of the classes, where the set or its class lists them."""
    if config.dataset == "EMNIST":
        return tuple(map(str, data.classes_split_dict[config.options["split"]]))[int(first_is_unused(data, config)) :]
    found = getattr(data, "classes", None)
    if not isinstance(found, (list, tuple)):
        return ()
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in found)


def item_of(data: Any, config: TorchvisionSetConfig, place: int = 0) -> Any:
    """Return a pair of picture and class.

    Raises:
        UsageError: the items are something else.
    """
    item = data[place]
    if not isinstance(item, tuple) or len(item) != 2 or not hasattr(item[0], "convert"):
        what = f"an item of {config.dataset} is no pair of a picture and a class"
        raise UsageError(what, where="task.dataset", fix="choose a set of classification, or give a Task of your own: bpfree.Task.of")
    return item


TORCHVISION = DataSource(spec, load, TorchvisionSetConfig, "a set of torchvision.datasets: task.dataset=EMNIST, ...", normalise="auto")
