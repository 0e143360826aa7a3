"""Standard image sets, read by torchvision's own classes: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100.

The data root is the one that torchvision would be given. A missing set is downloaded into a temporary folder
and moved into place file by file when it is complete, so a download that fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import BpfreeError
from bpfree.files import expanded
from bpfree.options import NoOptions
from bpfree.tasks.task import DataSource, Split, TaskSpec

__all__ = ["CIFAR10", "CIFAR100", "DEFAULT_ROOT", "FASHION_MNIST", "MNIST"]

DEFAULT_ROOT = Path("~/.cache/bpfree/data")
TIMEOUT = 20.0  # seconds without an answer, for each connection of a download
log = logging.getLogger(__name__)

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch", "batches.meta")


@dataclass(frozen=True)
class VisionSet:
    """The files of a set in torchvision's layout, and the known facts about it.

    Attributes:
        spec: of the task; mean and deviation are those of the official training images.
        reader: name of the class in ``torchvision.datasets``.
        folder, files: below the root.
        single: a file in the root that stands for all of them: arrays ``x_train``, ``y_train``, ``x_test``,
            ``y_test``, images uint8 (N, height, width, channels).
    """

    spec: TaskSpec
    reader: str
    folder: str
    files: tuple[str, ...]
    single: str = ""

    def present(self, root: Path) -> bool:
        """Tell whether all of torchvision's files exist."""
        return all((root / self.folder / name).is_file() for name in self.files)


def files(known: VisionSet, config: NoOptions, root: Path | None) -> list[Path]:
    """List the files that :func:`load` reads."""
    root = expanded(root or DEFAULT_ROOT)
    if known.single and (root / known.single).is_file() and not known.present(root):
        return [root / known.single]
    return [root / known.folder / name for name in known.files]


def load(known: VisionSet, config: NoOptions, root: Path | None) -> tuple[Split, Split]:
    """Load training and test examples: uint8 (N, C, H, W) and int64 (N,).

    Raises:
        BpfreeError: if the files are missing and cannot be downloaded, or are damaged.
    """
    root = expanded(root or DEFAULT_ROOT)
    if not known.present(root):
        if known.single and (root / known.single).is_file():
            return read_single(root / known.single)
        download(known, root)
    try:
        return read(known, root, train=True), read(known, root, train=False)
    except Exception as error:  # torchvision, struct and pickle raise various errors on damaged files
        reason = str(error) or type(error).__name__
        raise BpfreeError(
            f"the files of {known.spec.name} are damaged: {reason}",
            where=str(root / known.folder),
            fix="delete that folder, or put the official files there",
        ) from error


def read(known: VisionSet, root: Path, *, train: bool) -> Split:
    """Read one split, by torchvision's class, which checks its files."""
    import torchvision

    data = getattr(torchvision.datasets, known.reader)(root, train=train, download=False)
    return Split(channels_first(data.data), torch.as_tensor(data.targets).long())


def read_single(path: Path) -> tuple[Split, Split]:
    """Read both splits from a file of arrays."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = [(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "test")]
    except (OSError, KeyError, ValueError) as error:
        fix = "it must hold x_train, y_train, x_test and y_test"
        raise BpfreeError(f"cannot read the arrays: {error}", where=str(path), fix=fix) from error
    train, test = (Split(channels_first(images), torch.from_numpy(labels).long()) for images, labels in parts)
    return train, test


def channels_first(images: Tensor | Any) -> Tensor:
    """Convert (N, H, W) or (N, H, W, C), a tensor or an array, to uint8 (N, C, H, W)."""
    images = torch.as_tensor(images)
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def download(known: VisionSet, root: Path) -> None:
    """Fetch a set, all or nothing.

    Raises:
        BpfreeError: if that fails, for any reason.
    """
    import torchvision

    log.info("downloading %s into %s", known.spec.name, root)
    fresh = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as place:
            with quiet_network():
                getattr(torchvision.datasets, known.reader)(place, download=True)
            for name in known.files:
                target = root / known.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(place) / known.folder / name, target)
    except Exception as error:  # network, disk, archive: the remedy is the same
        if fresh:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise BpfreeError(
            f"{known.spec.name} is not on this machine, and downloading it failed ({brief(error)})",
            where=str(root),
            fix=f"{where_to_put(known)}; or set data.root or BPFREE_DATA to the folder that has them",
        ) from error


@contextlib.contextmanager
def quiet_network() -> Iterator[None]:
    """Set a time limit for connections, and hide progress bars."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def brief(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def where_to_put(known: VisionSet) -> str:
    single = f", or the file {known.single}," if known.single else ""
    return f"put the files {known.folder}/{{{', '.join(known.files)}}}{single} there"


def _source(known: VisionSet, summary: str) -> DataSource:
    return DataSource(lambda config, root: known.spec, partial(load, known), summary=summary, files=partial(files, known))


CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FINE = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
    hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - a list would take a hundred lines
)
"""Names of classes, in the order of their numbers, as the authors of the sets give them."""

MNIST = _source(
    VisionSet(TaskSpec("mnist", (1, 28, 28), 10, mean=(0.1307,), std=(0.3081,), scale=255.0), "MNIST", "MNIST/raw", IDX),
    "handwritten digits, 28x28 grey, 60,000 + 10,000, 10 classes",
)
FASHION_MNIST = _source(
    VisionSet(
        TaskSpec("fashion-mnist", (1, 28, 28), 10, mean=(0.2860,), std=(0.3530,), scale=255.0, class_names=CLOTHES),
        "FashionMNIST",
        "FashionMNIST/raw",
        IDX,
    ),
    "articles of clothing, 28x28 grey, 60,000 + 10,000, 10 classes",
)
CIFAR10 = _source(
    VisionSet(
        TaskSpec(
            "cifar10",
            (3, 32, 32),
            10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            scale=255.0,
            class_names=OBJECTS,
        ),
        "CIFAR10",
        "cifar-10-batches-py",
        BATCHES,
    ),
    "objects and animals, 32x32 colour, 50,000 + 10,000, 10 classes",
)
CIFAR100 = _source(
    VisionSet(
        TaskSpec(
            "cifar100",
            (3, 32, 32),
            100,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            scale=255.0,
            class_names=FINE,
        ),
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        single="cifar100.npz",
    ),
    "objects and animals, 32x32 colour, 50,000 + 10,000, 100 classes",
)
