"""The task ``npz``: arrays of your own, ``task=npz task.path=FILE``.

The file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``; or ``x`` and ``y``, of which a fixed fifth
(stratified by class, the same for every seed) is the test split. Inputs are vectors (N, features), grey images
(N, height, width), images (N, height, width, channels) or (N, channels, height, width), sequences (N, length, features),
or tokens (N, ...). Targets are integer classes (N,) counted from 0, soft labels (N, classes) whose rows sum to one,
several labels at once (N, labels) of 0 and 1, tokens (N, ...), or real values (N,) or (N, outputs).
What can be read in two ways is refused until ``task.layout``, ``inputs``, ``targets`` or ``scale`` says what it is.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.check import BRIGHT, WHITE, not_finite
from bpfree.tasks.npz_targets import Array, as_targets, describe_targets, refuse
from bpfree.tasks.task import DataSource, Split, TaskSpec, fixed_test

__all__ = ["NPZ", "ArraysConfig"]

PAIRS = (("x_train", "y_train"), ("x_test", "y_test"))
WHOLE = (("x", "y"),)
EXPECTED = "the file must hold x_train, y_train, x_test and y_test, or x and y"
CHANNELS = (1, 2, 3, 4)


@dataclass
class ArraysConfig:
    """The file of the arrays, and how to read them."""

    path: str = option("", "the .npz file; a relative path is looked up in the working directory, then in the data root")
    inputs: Literal["numbers", "tokens"] = option("numbers", "what inputs are; tokens: integers of a vocabulary, which are not normalised")
    vocabulary: int | None = option(None, "how many tokens there are (none: the largest and one)", ge=1, needs={"inputs": ("tokens",)})
    layout: Literal["auto", "image", "sequence", "nhwc", "nchw"] = option(
        "auto",
        "axes of inputs after the first: image: height, width; sequence: length, features; nhwc, nchw: of images with channels; "
        "auto: two of integers are an image, and of three the one of size 1 to 4 is the channels",
        unless={"inputs": ("tokens",)},
    )
    targets: Literal["auto", "classes", "multilabel", "soft", "real", "tokens"] = option(
        "auto", "kind of the targets; auto: by values, if they leave no doubt"
    )
    classes: int | None = option(None, "number of classes or of tokens to predict (none: those of the targets)", ge=2)
    scale: float | None = option(None, "divides inputs first (none: 255 for integer images, else 1)", gt=0, unless={"inputs": ("tokens",)})


@dataclass(frozen=True)
class Header:
    """Shape and type of an array, read from its first bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def spec(config: ArraysConfig, root: Path | None) -> TaskSpec:
    """Read shapes from the arrays' headers, and kind and number of outputs from the targets; of inputs, read only tokens, to count them.

    Raises:
        UsageError: no such file, other arrays than expected, or shapes that are ambiguous or do not fit each other.
    """
    path = locate(config, root)
    headers = read_headers(path)
    pairs = check_headers(headers, path)
    first = headers[pairs[0][0]]
    targets = read_arrays(path, [name for _, name in pairs])
    kind, outputs = describe_targets(targets, config.targets, config.classes, str(path))
    rows = (*next(iter(targets.values())).shape[1:], outputs) if kind == "tokens" else None
    if config.inputs == "tokens":
        count = config.vocabulary or vocabulary(read_arrays(path, [name for name, _ in pairs]), path)
        return TaskSpec("npz", first.shape[1:], outputs, kind, vocabulary=count, output_shape=rows)
    scale = scale_of(first, config, path)
    constant = (0.0, 1.0) if scale in (None, 1.0) else (0.5, 0.5)
    shape = input_shape(first, config, path)
    return TaskSpec("npz", shape, outputs, kind, mean=constant[:1], std=constant[1:], scale=scale, output_shape=rows)


def load(config: ArraysConfig, root: Path | None) -> tuple[Split, Split]:
    """Load training and test examples: uint8 as it is, other integer images of 0 to 255 int16, all else float32; images (N, C, H, W).

    Raises:
        UsageError: as for ``spec``; inputs that are not finite, or images that are all but black.
    """
    path = locate(config, root)
    pairs = check_headers(read_headers(path), path)
    arrays = read_arrays(path, [name for pair in pairs for name in pair])
    kind, _ = describe_targets({name: arrays[name] for _, name in pairs}, config.targets, config.classes, str(path))
    if config.inputs == "tokens":
        pieces = [Split(torch.from_numpy(arrays[x].astype(np.int64)), as_targets(arrays[y], kind)) for x, y in pairs]
        return (pieces[0], pieces[1]) if len(pieces) == 2 else fixed_test(pieces[0])
    check_brightness({x: arrays[x] for x, _ in pairs}, config, path)
    splits = [Split(as_inputs(arrays[x], config, path), as_targets(arrays[y], kind)) for x, y in pairs]
    for split, (x, _) in zip(splits, pairs, strict=True):
        refuse(not_finite(split.inputs, x), str(path), "remove these rows, or fill in numbers")
    return (splits[0], splits[1]) if len(splits) == 2 else fixed_test(splits[0])


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
    """Read shape and type of each array by name, from the first bytes of each."""
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
    """Return the pairs of inputs and targets that the file holds, after a check of their shapes and types."""
    found = next((pairs for pairs in (PAIRS, WHOLE) if all(name in headers for pair in pairs for name in pair)), None)
    if found is None:
        raise UsageError(f"the file holds {', '.join(sorted(headers)) or 'no arrays'}", where=str(path), fix=EXPECTED)
    for pair in found:
        for name in pair:
            if headers[name].dtype.kind not in "biuf":
                classes = "encode the classes as 0, 1, 2: y = numpy.unique(y, return_inverse=True)[1]"
                fix = classes if name.startswith("y") else "save it as an array of numbers"
                raise UsageError(f"array {name} has dtype {headers[name].dtype}, expected numbers", where=str(path), fix=fix)
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


def vocabulary(arrays: Mapping[str, Array], path: Path) -> int:
    """Return one more than the largest token of the inputs."""
    for name, array in arrays.items():
        if array.dtype.kind not in "iu" or array.min() < 0:
            what = f"{name} holds {array.dtype if array.dtype.kind not in 'iu' else 'negative numbers'}, but tokens are integers from 0"
            raise UsageError(what, where=f"{path}, task.inputs=tokens", fix="leave task.inputs out if they are numbers")
    return 1 + max(int(array.max()) for array in arrays.values())


def input_shape(header: Header, config: ArraysConfig, path: Path) -> tuple[int, ...]:
    """Return the shape of one input, images with the channels first."""
    shape, axes = header.shape, {"nhwc": 4, "nchw": 4, "image": 3, "sequence": 3}.get(config.layout)
    if axes not in (None, len(shape)):
        lacks = "no axis of channels" if axes == 4 else "not two axes after the first"
        what = f"task.layout={config.layout} does nothing with inputs of shape {shape}, which have {lacks}"
        raise UsageError(what, where=str(path), fix="leave it out")
    match shape[1:]:
        case (int(features),):
            return (features,)
        case (int(first), int(second)):
            return (first, second) if is_sequence(header, config, path) else (1, first, second)
        case (int(first), int(second), int(third)):
            return (first, second, third) if layout(shape, config, path) == "nchw" else (third, first, second)
    raise UsageError(
        f"inputs of shape {shape} are neither vectors nor images",
        where=str(path),
        fix="save them as (N, features) or (N, channels, height, width)",
    )


def is_sequence(header: Header, config: ArraysConfig, path: Path) -> bool:
    """Tell whether inputs with two axes are sequences: integers count as pixels of grey images, unless the options differ."""
    if config.layout == "auto" and header.dtype.kind not in "iu":
        what = f"inputs of shape {header.shape} and type {header.dtype}: grey images, or sequences of (length, features)?"
        raise UsageError(what, where=str(path), fix="set task.layout=image or task.layout=sequence")
    return config.layout == "sequence"


def layout(shape: tuple[int, ...], config: ArraysConfig, path: Path) -> str:
    if config.layout != "auto":
        return config.layout
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise UsageError(f"which axis of {shape} is that of the channels?", where=str(path), fix="set task.layout=nhwc or task.layout=nchw")
    return "nchw" if first else "nhwc"


def scale_of(header: Header, config: ArraysConfig, path: Path) -> float | None:
    """Return the number that inputs are divided by; ``None`` if it depends on the values.

    Integer images are pixels of 0 to 255, whatever their type. Vectors of bytes may be pixels or tokens.
    """
    if config.scale is not None:
        return config.scale
    if len(header.shape) == 2 and header.dtype == np.uint8:
        refuse(
            "inputs are vectors of uint8: pixels, or numbers to be taken as they are?",
            str(path),
            "set task.scale=255 or task.scale=1, or task.inputs=tokens",
        )
    return WHITE if config.layout != "sequence" and len(header.shape) > 2 and header.dtype.kind in "iu" else None


def check_brightness(arrays: Mapping[str, Array], config: ArraysConfig, path: Path) -> None:
    """Refuse integer images that would be all but black as pixels of 0 to 255, unless a scale was given."""
    if (
        config.scale is None
        and config.layout != "sequence"
        and all(array.ndim > 2 and array.dtype.kind in "iu" for array in arrays.values())
    ):
        largest = max(int(array.max()) for array in arrays.values())
        if 0 < largest < BRIGHT:
            what = f"the largest value of the images ({', '.join(arrays)}) is {largest}: is that white, or is 255?"
            refuse(what, str(path), f"set task.scale={largest} or task.scale=255 (or 1: taken as they are)")


def as_inputs(array: Array, config: ArraysConfig, path: Path) -> Tensor:
    # not uint8: a checkpoint from before there was a scale took other integers as they were, and is to be refused on these
    pixels = array.ndim > 2 and config.layout != "sequence" and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= WHITE
    with np.errstate(over="ignore"):  # it is infinite then, and refused
        array = array if array.dtype == np.uint8 else array.astype(np.int16 if pixels else np.float32)
    inputs = torch.from_numpy(np.ascontiguousarray(array))
    if inputs.dim() == 4 and layout(array.shape, config, path) == "nhwc":
        return inputs.permute(0, 3, 1, 2).contiguous()
    return inputs.unsqueeze(1) if inputs.dim() == 3 and config.layout != "sequence" else inputs


NPZ = DataSource(spec, load, ArraysConfig, "arrays of your own: task.path=FILE.npz", files=lambda config, root: [locate(config, root)])
