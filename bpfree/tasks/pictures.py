"""Pictures of one size as uint8 tensors (C, H, W): decoded once and kept in memory, or read when a batch needs them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bpfree.errors import UsageError
from bpfree.options import option
from bpfree.tasks.splits import DatasetSplit, Split

__all__ = ["FilePictures", "Form", "ItemPictures", "PictureConfig", "PictureSet", "form_of", "opened", "resized", "split_of"]

KEPT = 2 * 2**30
"""Bytes of a split that are kept in memory by default, on every machine: a fingerprint depends on it."""
GREY, DEEP = ("1", "L", "LA"), ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""PIL's modes of pictures without colours, and of more than eight bits."""


@dataclass
class PictureConfig:
    """The conversion of pictures to tensors."""

    size: list[int] = option(
        factory=list, help="height and width that pictures are brought to, [32] for a square (none: all have the same)", ge=1, le=8192
    )
    colour: Literal["auto", "grey", "rgb"] = option("auto", "channels: 1 or 3 (auto: those of the first picture)")
    keep: Literal["auto", "memory", "files"] = option(
        "auto", "keep the decoded pictures in memory, or read them for each batch (auto: in memory up to 2 GiB for a split)"
    )


@dataclass(frozen=True)
class Form:
    """The common size and colours of all pictures of a task.

    Attributes:
        shape: (channels, height, width).
        resize: whether pictures of another size are resized; else they are refused.
        convert: whether coloured pictures become grey; else they are refused where there is one channel.
    """

    shape: tuple[int, int, int]
    resize: bool = False
    convert: bool = False

    def tensor(self, image: Any, where: str) -> Tensor:
        """Convert a picture of PIL to uint8 (C, H, W), by bilinear interpolation where its size is another.

        Raises:
            UsageError: another size or colours, which are not to be changed; or more than eight bits.
        """
        channels, height, width = self.shape
        if image.mode in DEEP:
            raise UsageError(
                f"a picture of mode {image.mode} has more than eight bits", where=where, fix="save it in eight bits, or use npz"
            )
        if channels == 1 and not self.convert and image.mode not in GREY and _coloured(image):
            raise UsageError("a picture has colours, but the first one is grey", where=where, fix="set task.colour=rgb or task.colour=grey")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            if not self.resize:
                what = f"a picture has {image.size[1]} x {image.size[0]} pixels, but the first one has {height} x {width}"
                raise UsageError(what, where=where, fix=f"set task.size=[{height},{width}], to which all are brought")
            from PIL import Image

            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image))  # a copy: PIL's is read-only
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _coloured(image: Any) -> bool:
    red, green, blue = np.array(image.convert("RGB")).transpose(2, 0, 1)
    return not (np.array_equal(red, green) and np.array_equal(red, blue))


def form_of(first: Any, config: PictureConfig) -> Form:
    """Find the form of a task's pictures.

    Args:
        first: picture of PIL.
        config: how they are read.

    Raises:
        UsageError: a size that is none.
    """
    if len(config.size) > 2:
        raise UsageError(f"task.size={config.size}", where="task.size", fix="give height and width, or one number for a square")
    height, width = (config.size * 2)[:2] if config.size else (first.size[1], first.size[0])
    grey = first.mode in GREY if config.colour == "auto" else config.colour == "grey"
    return Form((1 if grey else 3, height, width), bool(config.size), config.colour != "auto")


def opened(path: Path) -> Any:
    """Open a picture; its pixels are decoded at their first use.

    Raises:
        UsageError: it is none, or damaged.
    """
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the picture: {error}", where=str(path), fix="remove it, or replace it by a whole one") from error


class PictureSet(Dataset[tuple[Tensor, int]], ABC):
    """Pictures with their classes, read one by one.

    Args:
        targets: (N,) int64 classes.
        form: to which pictures are brought.
    """

    def __init__(self, targets: Tensor, form: Form) -> None:
        self.targets, self.form = targets, form

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, where = self.image(place)
        return self.form.tensor(image, where), int(self.targets[place])

    @abstractmethod
    def image(self, place: int) -> tuple[Any, str]:
        """Return a picture of PIL, and where it is from."""


class FilePictures(PictureSet):
    """Pictures in files.

    Args:
        root: folder that the names are below.
        names: of the files.
        targets, form: as :class:`PictureSet` has them.
    """

    def __init__(self, root: Path, names: Sequence[str], targets: Tensor, form: Form) -> None:
        super().__init__(targets, form)
        self.root, self.names = root, list(names)
        self._digest = ""

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(place)
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises all of these for pixels that are cut short
            where = str(self.root / self.names[place])
            raise UsageError(f"cannot read the picture: {error}", where=where, fix="remove it, or replace it by a whole one") from error

    def image(self, place: int) -> tuple[Any, str]:
        """Open the file."""
        path = self.root / self.names[place]
        return opened(path), str(path)

    def digest(self) -> str:
        """Return the SHA-256 over names, bytes and classes of all files, and the form."""
        if not self._digest:
            found = hashlib.sha256(str((self.form, self.targets.tolist())).encode())
            for name in self.names:
                found.update(name.encode() + hashlib.sha256((self.root / name).read_bytes()).digest())
            self._digest = found.hexdigest()
        return self._digest


class ItemPictures(PictureSet):
    """Pictures of PIL in the items of a data set.

    Args:
        items: the data set; ``items[i][key]`` is a picture.
        key: a place, or the name of a column.
        name: of the set, for messages.
        targets, form: as :class:`PictureSet` has them.
    """

    def __init__(self, items: Any, key: int | str, name: str, targets: Tensor, form: Form) -> None:
        super().__init__(targets, form)
        self.items, self.key, self.name = items, key, name

    def image(self, place: int) -> tuple[Any, str]:
        """Read the item from the data set."""
        return self.items[place][self.key], f"item {place} of {self.name}"


def split_of(pictures: PictureSet, keep: Literal["auto", "memory", "files"]) -> Split | DatasetSplit:
    """Decode all pictures into one tensor, or leave them in their files.

    Args:
        pictures: of a split.
        keep: as :class:`PictureConfig` has it.
    """
    size = len(pictures) * int(np.prod(pictures.form.shape))
    if keep == "files" or (keep == "auto" and size > KEPT):
        return DatasetSplit(pictures, targets=pictures.targets)
    inputs = torch.empty((len(pictures), *pictures.form.shape), dtype=torch.uint8)
    for place in range(len(pictures)):
        inputs[place] = pictures[place][0]
    return Split(inputs, pictures.targets)


def resized(images: Tensor, config: PictureConfig) -> Tensor:
    """Bring uint8 images (N, C, H, W) to the requested size and colours, in pieces."""
    from torchvision.transforms.v2 import functional

    if config.colour != "auto" and images.shape[1] != (1 if config.colour == "grey" else 3):
        images = functional.rgb_to_grayscale(images) if config.colour == "grey" else images.expand(-1, 3, -1, -1).contiguous()
    if not config.size or tuple((config.size * 2)[:2]) == tuple(images.shape[2:]):
        return images
    size = (config.size * 2)[:2]
    return torch.cat([functional.resize(part, size, antialias=True) for part in images.split(1024)])
