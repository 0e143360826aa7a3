"""The task ``npz``: arrays of your own, ``task=npz task.path=FILE``.

The file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``; or ``x`` and ``y``, of which a fixed fifth
(stratified by class, the same for every seed) is the test split. Inputs are vectors (N, features), grey images
(N, height, width), or images (N, height, width, channels) or (N, channels, height, width). Targets are integer
classes (N,) counted from 0, soft labels (N, classes) whose rows sum to one, or real values (N,) or (N, outputs).
What can be read in two ways is refused until ``task.targets`` or ``task.scale`` says what it is.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.check import BRIGHT, SUM_TOLERANCE, WHITE, is_whole, listed, not_finite
from bpfree.tasks.task import DataSource, Split, TaskSpec, stratified_indices

__all__ = ["NPZ", "ArraysConfig"]

PAIRS = (("x_train", "y_train"), ("x_test", "y_test"))
WHOLE = (("x", "y"),)
TEST_SHARE, TEST_SEED = 0.2, 20_230_324
EXPECTED = "the file must hold x_train, y_train, x_test and y_test, or x and y"
CHANNELS = (1, 2, 3, 4)

Array = NDArray[Any]
Kind = Literal["classes", "soft", "real"]


@dataclass
class ArraysConfig:
    """Where the arrays are, and how to read them."""

    path: str = option("", "the .npz file; a relative path is looked up in the working directory, then in the data root")
    layout: Literal["auto", "nhwc", "nchw"] = option("auto", "axes of images; auto: the one of size 1 to 4 is the channels")
    targets: Literal["auto", "classes", "soft", "real"] = option("auto", "kind of the targets; auto: by values, if they leave no doubt")
    classes: int | None = option(None, "number of classes (none: that of the labels, which have no gaps)", ge=2)
    scale: float | None = option(None, "divides inputs first (none: 255 for integer images, else 1)", gt=0)
    mean: list[float] = option(
        factory=list, help="then subtracted from inputs: one, or one per channel (none: 0.5 for inputs with a scale, else 0)"
    )
    std: list[float] = option(
        factory=list, help="then divides inputs: one, or one per channel (none: 0.5 for inputs with a scale, else 1)", gt=0
    )


@dataclass(frozen=True)
class Header:
    """Shape and type of an array, from its first bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def spec(config: ArraysConfig, root: Path | None) -> TaskSpec:
    """Shapes from the arrays' headers, number and kind of outputs from the targets; no inputs are read.

    The constants of normalisation come from the configuration and never from the data, so they cost nothing.

    Raises:
        UsageError: no such file, other arrays than expected, or shapes that are ambiguous or do not fit each other.
    """
    path = locate(config, root)
    headers = read_headers(path)
    pairs = check_headers(headers, path)
    first = headers[pairs[0][0]]
    shape = input_shape(first.shape, config, path)
    kind, outputs = describe_targets(read_arrays(path, [name for _, name in pairs]), config, path)
    scale = scale_of(first, config, path)
    default = (0.0, 1.0) if scale in (None, 1.0) else (0.5, 0.5)
    return TaskSpec(
        "npz",
        shape,
        outputs,
        kind,
        mean=constants(config.mean, default[0], shape, "task.mean"),
        std=constants(config.std, default[1], shape, "task.std"),
        scale=scale,
    )


def load(config: ArraysConfig, root: Path | None) -> tuple[Split, Split]:
    """Training and test examples: uint8 as it is, other integer images of 0 to 255 int16, all else float32; images (N, C, H, W).

    Raises:
        UsageError: as for ``spec``; inputs that are not finite, or images that are all but black.
    """
    path = locate(config, root)
    pairs = check_headers(read_headers(path), path)
    arrays = read_arrays(path, [name for pair in pairs for name in pair])
    kind, _ = describe_targets({name: arrays[name] for _, name in pairs}, config, path)
    check_brightness({x: arrays[x] for x, _ in pairs}, config, path)
    splits = [Split(as_inputs(arrays[x], config, path), as_targets(arrays[y], kind)) for x, y in pairs]
    for split, (x, _) in zip(splits, pairs, strict=True):
        refuse(not_finite(split.inputs, x), str(path), "remove these rows, or fill in numbers")
    return (splits[0], splits[1]) if len(splits) == 2 else cut(splits[0])


def locate(config: ArraysConfig, root: Path | None) -> Path:
    if not config.path:
        raise UsageError("task npz needs a file of arrays", where="task.path", fix="give task.path=FILE.npz")
    path = expanded(Path(config.path))
    places = [path] if path.is_absolute() or root is None else [path, expanded(root) / path]
    for place in places:
        if place.is_file():
            return place
        if place.is_dir():
            fix = "save the images as arrays: numpy.savez('FILE.npz', x=images, y=classes), then task.path=FILE.npz"
            raise UsageError("this is a folder, not a file of arrays", where=f"task.path: {place}", fix=fix)
    raise UsageError("no such file of arrays", where=f"task.path: {' or '.join(map(str, places))}", fix="give task.path=FILE.npz")


def read_headers(path: Path) -> dict[str, Header]:
    """Shape and type of each array by name, from the first bytes of each."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        version = np.lib.format.read_magic(file)
                        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                        shape, _, dtype = read(file)
                    headers[name.removesuffix(".npy")] = Header(shape, dtype)
    except (OSError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        fix = "save it with numpy.savez('FILE.npz', x=inputs, y=targets)"
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):
            fix = f"read the table with numpy.loadtxt, then {fix}"
        raise UsageError(f"cannot read the file as arrays (.npz): {error}", where=str(path), fix=fix) from error
    return headers


def check_headers(headers: Mapping[str, Header], path: Path) -> tuple[tuple[str, str], ...]:
    """The pairs of inputs and targets that the file holds, after a look at their shapes and types."""
    found = next((pairs for pairs in (PAIRS, WHOLE) if all(name in headers for pair in pairs for name in pair)), None)
    if found is None:
        raise UsageError(f"the file holds {', '.join(sorted(headers)) or 'no arrays'}", where=str(path), fix=EXPECTED)
    for pair in found:
        for name in pair:
            if headers[name].dtype.kind not in "biuf":
                classes = "encode the classes as 0, 1, 2: y = numpy.unique(y, return_inverse=True)[1]"
                fix = classes if name.startswith("y") else "save it as an array of numbers"
                raise UsageError(f"array {name} holds no numbers but {headers[name].dtype}", where=str(path), fix=fix)
            if not math.prod(headers[name].shape or (0,)):
                raise UsageError(f"array {name} is empty: its shape is {headers[name].shape}", where=str(path), fix="give it examples")
        inputs, targets = (headers[name].shape for name in pair)
        if inputs[0] != targets[0]:
            what = f"{pair[0]} has {inputs[0]} examples and {pair[1]} has {targets[0]}: they differ in length"
            raise UsageError(what, where=str(path), fix="each input needs a target of its own")
    if len({(headers[x].shape[1:], headers[x].dtype) for x, _ in found}) > 1:
        what = "x_train and x_test differ in the shape or type of an example: " + ", ".join(
            f"{x} {headers[x].shape} {headers[x].dtype}" for x, _ in found
        )
        raise UsageError(what, where=str(path), fix="save both in the same shape and type")
    return found


def read_arrays(path: Path, names: list[str]) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the arrays: {error}", where=str(path), fix="save them again with numpy.savez") from error


def input_shape(shape: tuple[int, ...], config: ArraysConfig, path: Path) -> tuple[int, ...]:
    """Shape of one input, images with the channels first."""
    if config.layout != "auto" and len(shape) != 4:
        what = f"task.layout={config.layout} does nothing with inputs of shape {shape}, which have no axis of channels"
        raise UsageError(what, where=str(path), fix="leave it out")
    match shape[1:]:
        case (int(features),):
            return (features,)
        case (int(height), int(width)):
            return (1, height, width)
        case (int(first), int(second), int(third)):
            return (first, second, third) if layout(shape, config, path) == "nchw" else (third, first, second)
    raise UsageError(
        f"inputs of shape {shape} are neither vectors nor images",
        where=str(path),
        fix="save them as (N, features) or (N, channels, height, width)",
    )


def layout(shape: tuple[int, ...], config: ArraysConfig, path: Path) -> str:
    if config.layout != "auto":
        return config.layout
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise UsageError(f"which axis of {shape} is that of the channels?", where=str(path), fix="set task.layout=nhwc or task.layout=nchw")
    return "nchw" if first else "nhwc"


def describe_targets(targets: Mapping[str, Array], config: ArraysConfig, path: Path) -> tuple[Kind, int]:
    """Kind of the targets and number of outputs, the same for all splits."""
    where, parts = f"{path}: {', '.join(targets)}", list(targets.values())
    for name, part in targets.items():
        refuse(not_finite(tensor(part), name), where, "remove these rows, or fill in numbers")
    kind: Kind = kind_of(parts, where) if config.targets == "auto" else config.targets
    if kind == "classes":
        return kind, count_classes(parts, config.classes, where)
    if config.classes is not None:
        refuse(
            f"task.classes={config.classes} does nothing with targets of kind {kind}", where, "leave it out, or set task.targets=classes"
        )
    if len({math.prod(part.shape[1:]) for part in parts}) > 1:
        refuse("the targets of the splits differ in the number of outputs", where, "correct the file")
    if kind == "soft" and not all(is_soft(part) for part in parts):
        refuse(
            "soft labels must be (N, classes) with rows that sum to one", where, "set task.targets to what they are, or correct the file"
        )
    return kind, math.prod(parts[0].shape[1:])


def tensor(targets: Array) -> Tensor:
    return torch.from_numpy(targets.astype(np.float64 if targets.dtype.kind == "f" else np.int64))


def refuse(what: str | None, where: str, fix: str) -> None:
    if what:
        raise UsageError(what, where=where, fix=fix)


def kind_of(parts: list[Array], where: str) -> Kind:
    """What targets are by their values; their dtype alone never decides what is learned.

    Raises:
        UsageError: they can be read in several ways.
    """
    low, whole = min(part.min() for part in parts), all(is_whole(tensor(part)) for part in parts)
    integers = all(part.dtype.kind in "biu" for part in parts)
    if all(is_column(part) for part in parts):
        if integers and low < 0:
            negative, count = sum(int((part < 0).sum()) for part in parts), sum(map(len, parts))
            what = f"the labels are integers from {low}, {negative} of {count} are negative: classes are counted from 0"
            refuse(what, where, "remove or re-encode them; task.targets=real if they are numbers")
        if whole and not integers:
            refuse(
                "the targets are whole numbers stored as floats: classes or numbers?",
                where,
                "say task.targets=classes or task.targets=real",
            )
        return "classes" if integers else "real"
    if whole and low >= 0 and max(part.max() for part in parts) <= 1:
        fix = "say task.targets=classes (one-hot rows), soft, or real (each column is a number)"
        refuse("the targets are rows of 0 and 1: one class each, or several labels at once?", where, fix)
    if integers:
        refuse("the targets are rows of integers", where, "say task.targets=real if they are numbers")
    return "soft" if all(is_soft(part) for part in parts) else "real"


def count_classes(parts: list[Array], classes: int | None, where: str) -> int:
    """Number of classes: that of the labels, which are 0, 1, 2 and so on, or as many as ``task.classes`` gives."""
    if not all(is_column(part) for part in parts):
        if not all(is_one_hot(part) for part in parts) or len({part.shape[1] for part in parts}) > 1:
            refuse("classes must be integers (N,), counted from 0, or one-hot rows", where, "set task.targets to what they are")
        return int(parts[0].shape[1])
    if not all(is_whole(tensor(part)) for part in parts):
        refuse("classes must be integers, counted from 0, but some targets are fractions", where, "set task.targets to what they are")
    labels = np.unique(np.concatenate([np.unique(part) for part in parts]))
    count = int(labels[-1]) + 1 if classes is None else classes
    shown = listed(labels.astype(float).tolist())
    again = "re-encode them: y = numpy.unique(y, return_inverse=True)[1]"
    if labels[0] < 0 or labels[-1] >= count:
        refuse(f"the labels are {shown}, but {count} classes are 0 to {count - 1}, counted from 0", where, again)
    if len(labels) < 2:
        refuse(f"all labels are {shown}: there is nothing to tell apart", where, "give at least two classes")
    if classes is None and len(labels) < count:
        what = "are counted from 0" if labels[0] else "have no gaps"
        refuse(f"the labels are {shown}, but classes {what}", where, f"{again}; or say task.classes={count}, if the others exist")
    return count


def is_column(targets: Array) -> bool:
    return targets.ndim == 1 or targets.shape[1:] == (1,)


def is_one_hot(targets: Array) -> bool:
    return targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(1, dtype=np.float64) == 1).all())


def is_soft(targets: Array) -> bool:
    if targets.ndim != 2 or targets.shape[1] < 2 or (targets < 0).any():
        return False
    return np.allclose(targets.sum(1, dtype=np.float64), 1, atol=SUM_TOLERANCE)


def scale_of(header: Header, config: ArraysConfig, path: Path) -> float | None:
    """What inputs are divided by; ``None``: it depends on the values.

    Integer images are pixels of 0 to 255, whatever their type. Vectors of bytes may be pixels or tokens.
    """
    if config.scale is not None:
        return config.scale
    if len(header.shape) == 2 and header.dtype == np.uint8:
        refuse("inputs are vectors of uint8: pixels, or numbers to be taken as they are?", str(path), "say task.scale=255 or task.scale=1")
    return WHITE if len(header.shape) > 2 and header.dtype.kind in "iu" else None


def check_brightness(arrays: Mapping[str, Array], config: ArraysConfig, path: Path) -> None:
    """Refuse integer images that would be all but black as pixels of 0 to 255, unless a scale was given."""
    if config.scale is None and all(array.ndim > 2 and array.dtype.kind in "iu" for array in arrays.values()):
        largest = max(int(array.max()) for array in arrays.values())
        if 0 < largest < BRIGHT:
            what = f"the largest value of the images ({', '.join(arrays)}) is {largest}: is that white, or is 255?"
            refuse(what, str(path), f"say task.scale={largest} or task.scale=255 (or 1: taken as they are)")


def constants(given: Sequence[float], default: float, shape: tuple[int, ...], where: str) -> tuple[float, ...]:
    if len(given) not in (0, 1, shape[0]):
        raise UsageError(f"{len(given)} values for inputs of shape {shape}", where=where, fix=f"give one, or {shape[0]}")
    return tuple(given) or (default,)


def as_inputs(array: Array, config: ArraysConfig, path: Path) -> Tensor:
    # not uint8: a checkpoint from before there was a scale took other integers as they were, and is to be refused on these
    pixels = array.ndim > 2 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= WHITE
    with np.errstate(over="ignore"):  # it is infinite then, and refused
        array = array if array.dtype == np.uint8 else array.astype(np.int16 if pixels else np.float32)
    inputs = torch.from_numpy(np.ascontiguousarray(array))
    if inputs.dim() == 4 and layout(array.shape, config, path) == "nhwc":
        return inputs.permute(0, 3, 1, 2).contiguous()
    return inputs.unsqueeze(1) if inputs.dim() == 3 else inputs


def as_targets(array: Array, kind: Kind) -> Tensor:
    if kind == "classes":
        return torch.from_numpy((array.reshape(-1) if is_column(array) else array.argmax(1)).astype(np.int64))
    return torch.from_numpy(array.reshape(len(array), -1).astype(np.float32))


def cut(everything: Split) -> tuple[Split, Split]:
    """The fixed test split of a file without one."""
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[stratified_indices(everything, TEST_SHARE, TEST_SEED)] = True
    return everything.subset((~mask).nonzero().flatten()), everything.subset(mask.nonzero().flatten())


NPZ = DataSource(spec, load, ArraysConfig, "arrays of your own: task.path=FILE.npz", files=lambda config, root: [locate(config, root)])
