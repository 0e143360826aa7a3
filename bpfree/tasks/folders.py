"""The task ``folder``: pictures of your own, ``task=folder task.path=DIR``, with a folder for each class.

``DIR/CLASS/picture.png``; or ``DIR/train/CLASS/...`` with ``DIR/test`` and perhaps ``DIR/val`` beside it. Without a folder ``test`` the
folder ``val`` is the test split; without both, a fixed stratified fifth is. Classes are the names of the folders in alphabetical order,
as torchvision's ``ImageFolder`` has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bpfree.errors import UsageError
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.pictures import FilePictures, Form, PictureConfig, form_of, opened, split_of
from bpfree.tasks.splits import Examples
from bpfree.tasks.task import DataSource, TaskSpec, fixed_test

__all__ = ["FOLDER", "FolderConfig"]

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Names of folders, and the splits that they are."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
WHITE = 255.0


@dataclass
class FolderConfig(PictureConfig):
    """The folder of the pictures, and how to read them."""

    path: str = option("", "the folder; a relative path is looked up in the working directory, then in the data root")


def spec(config: FolderConfig, root: Path | None) -> TaskSpec:
    """Read the classes from the names of the folders, and the shape from the first picture; nothing else is read.

    Raises:
        UsageError: no such folder, or none with a folder for each class.
    """
    parts = splits_in(located(config, root))
    classes, shape = classes_of(parts["train"]), form(parts["train"], config).shape
    return TaskSpec("folder", shape, len(classes), scale=WHITE, class_names=classes)


def load(config: FolderConfig, root: Path | None) -> tuple[Examples, Examples] | tuple[Examples, Examples | None, Examples]:
    """Load training, validation and test pictures.

    Raises:
        UsageError: as for ``spec``; a class that only another split has; or a picture that is damaged, or has another form.
    """
    parts = splits_in(located(config, root))
    classes, known = classes_of(parts["train"]), form(parts["train"], config)
    made: dict[str, Examples] = {}
    for name, folder in parts.items():
        names, targets = listed_pictures(folder, classes)
        made[name] = split_of(FilePictures(folder, names, torch.tensor(targets), known), config.keep)
    if "test" not in made:
        return fixed_test(made["train"])
    if "validation" not in made:
        return made["train"], made["test"]
    return made["train"], made["validation"], made["test"]


def files(config: FolderConfig, root: Path | None) -> list[Path]:
    """List all pictures."""
    parts = splits_in(located(config, root))
    return [folder / name for folder in parts.values() for name in listed_pictures(folder, classes_of(parts["train"]))[0]]


def located(config: FolderConfig, root: Path | None) -> Path:
    if not config.path:
        raise UsageError("task folder needs a folder of pictures", where="task.path", fix="give task.path=DIR")
    path = expanded(Path(config.path))
    places = [path] if path.is_absolute() or root is None else [path, expanded(root) / path]
    for place in places:
        if place.is_dir():
            return place
    what = "no such folder" if not any(place.exists() for place in places) else "this is a file, not a folder of pictures"
    raise UsageError(what, where=f"task.path: {' or '.join(map(str, places))}", fix="give task.path=DIR, which has a folder for each class")


def splits_in(folder: Path) -> Mapping[str, Path]:
    """Find the folders of the splits: of ``train``, and perhaps of ``validation`` and ``test``.

    Raises:
        UsageError: folders that are splits beside others that are none, or two for one split.
    """
    names = subfolders(folder)
    if "train" not in names or (not subfolders(folder / "train") and not set(names) <= SPLITS.keys()):
        return {"train": folder}
    if others := [name for name in names if name not in SPLITS]:
        what = f"beside train there is {', '.join(others[:8])}: a split, or a class?"
        raise UsageError(what, where=str(folder), fix="name the folders of splits train, val and test, or those of classes otherwise")
    found: dict[str, Path] = {}
    for name in names:
        if SPLITS[name] in found:
            raise UsageError(f"both {found[SPLITS[name]].name} and {name} are the validation split", where=str(folder), fix="keep one")
        found[SPLITS[name]] = folder / name
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found


def classes_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders, in alphabetical order.

    Raises:
        UsageError: there are fewer than two.
    """
    names = subfolders(folder)
    if len(names) < 2:
        what = f"{len(names)} folders, but there must be one for each class, and two classes or more"
        raise UsageError(what, where=str(folder), fix="sort the pictures into folders: DIR/CLASS/picture.png")
    return tuple(names)


def subfolders(folder: Path) -> list[str]:
    """List the folders, without hidden ones and those that archives leave behind."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__")))


def form(folder: Path, config: FolderConfig) -> Form:
    """Return the form of the first picture, or that of the options."""
    for name in classes_of(folder):
        if (first := next(pictures_in(folder / name), None)) is not None:
            with opened(first) as image:
                return form_of(image, config)
    fix = f"known are files that end with {', '.join(SUFFIXES)}"
    raise UsageError("the folders of the classes hold no picture", where=str(folder), fix=fix)


def listed_pictures(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """List the names of all pictures below a split's folder, and their classes.

    Raises:
        UsageError: a class that is not among the given ones, or has no picture.
    """
    names: list[str] = []
    targets: list[int] = []
    for name in subfolders(folder):
        if name not in classes:
            raise UsageError(
                f"the class {name} is not in the training split", where=str(folder), fix="give it training pictures, or remove it"
            )
        found = [path.relative_to(folder).as_posix() for path in pictures_in(folder / name)]
        if not found:
            raise UsageError(f"the class {name} has no picture", where=str(folder / name), fix="remove the folder, or give it pictures")
        names += found
        targets += [classes.index(name)] * len(found)
    return names, targets


def pictures_in(folder: Path) -> Iterator[Path]:
    """Yield the pictures in a folder and in those below it, in alphabetical order."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place) / name


FOLDER = DataSource(spec, load, FolderConfig, "pictures of your own, a folder for each class: task.path=DIR", files=files, normalise="auto")
