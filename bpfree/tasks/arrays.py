"""The task ``npz``: anybody's arrays, ``task=npz task.path=FILE``.

The file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``; or ``x`` and ``y``, of which a fixed fifth
(stratified by class, the same for every seed) is the test split. Inputs are vectors (N, features), grey images
(N, height, width), or images (N, height, width, channels) or (N, channels, height, width). Targets are integer
classes (N,) counted from 0, soft labels (N, classes) whose rows sum to one, or real values (N,) or (N, outputs).
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
from bpfree.options import option
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
    targets: Literal["auto", "classes", "soft", "real"] = option("auto", "kind of the targets; auto: by type and values")
    mean: list[float] = option(
        factory=list, help="subtracted from inputs: one, or one per channel (none: 0.5 for uint8, which is scaled to [0, 1]; else 0)"
    )
    std: list[float] = option(factory=list, help="divides inputs: one, or one per channel (none: 0.5 for uint8, else 1)", gt=0)


@dataclass(frozen=True)
class Header:
    """What an array's first bytes say of it."""

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
    default = (0.5, 0.5) if first.dtype == np.uint8 else (0.0, 1.0)
    return TaskSpec(
        "npz",
        shape,
        outputs,
        kind,
        mean=constants(config.mean, default[0], shape, "task.mean"),
        std=constants(config.std, default[1], shape, "task.std"),
    )


def load(config: ArraysConfig, root: Path | None) -> tuple[Split, Split]:
    """Training and test examples: uint8 as it is, all else float32; images (N, C, H, W).

    Raises:
        UsageError: as for ``spec``.
    """
    path = locate(config, root)
    pairs = check_headers(read_headers(path), path)
    arrays = read_arrays(path, [name for pair in pairs for name in pair])
    kind, _ = describe_targets({name: arrays[name] for _, name in pairs}, config, path)
    splits = [Split(as_inputs(arrays[x], config, path), as_targets(arrays[y], kind)) for x, y in pairs]
    return (splits[0], splits[1]) if len(splits) == 2 else cut(splits[0])


def locate(config: ArraysConfig, root: Path | None) -> Path:
    if not config.path:
        raise UsageError("task npz needs a file of arrays", where="task.path", fix="give task.path=FILE.npz")
    path = Path(config.path).expanduser()
    places = [path] if path.is_absolute() or root is None else [path, root.expanduser() / path]
    for place in places:
        if place.is_file():
            return place
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
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the file: {error}", where=str(path), fix="save it with numpy.savez") from error
    return headers


def check_headers(headers: Mapping[str, Header], path: Path) -> tuple[tuple[str, str], ...]:
    """The pairs of inputs and targets that the file holds, after a look at their shapes and types."""
    found = next((pairs for pairs in (PAIRS, WHOLE) if all(name in headers for pair in pairs for name in pair)), None)
    if found is None:
        raise UsageError(f"the file holds {', '.join(sorted(headers)) or 'no arrays'}", where=str(path), fix=EXPECTED)
    for pair in found:
        for name in pair:
            if headers[name].dtype.kind not in "biuf":
                raise UsageError(f"array {name} holds no numbers but {headers[name].dtype}", where=str(path), fix=EXPECTED)
        inputs, targets = (headers[name].shape for name in pair)
        if inputs[:1] != targets[:1] or math.prod(inputs or (0,)) == 0:
            raise UsageError(f"{pair[0]} {inputs} and {pair[1]} {targets} differ in length, or are empty", where=str(path))
    if len({(headers[x].shape[1:], headers[x].dtype) for x, _ in found}) > 1:
        raise UsageError("x_train and x_test differ in the shape or type of an example", where=str(path))
    return found


def read_arrays(path: Path, names: list[str]) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the arrays: {error}", where=str(path), fix="save them anew with numpy.savez") from error


def input_shape(shape: tuple[int, ...], config: ArraysConfig, path: Path) -> tuple[int, ...]:
    """Shape of one input, images with the channels first."""
    match shape[1:]:
        case (int(features),):
            return (features,)
        case (int(height), int(width)):
            return (1, height, width)
        case (int(first), int(second), int(third)):
            return (first, second, third) if layout(shape, config, path) == "nchw" else (third, first, second)
    raise UsageError(f"inputs of shape {shape} are neither vectors nor images", where=str(path))


def layout(shape: tuple[int, ...], config: ArraysConfig, path: Path) -> str:
    if config.layout != "auto":
        return config.layout
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise UsageError(f"which axis of {shape} is that of the channels?", where=str(path), fix="set task.layout=nhwc or task.layout=nchw")
    return "nchw" if first else "nhwc"


def describe_targets(targets: Mapping[str, Array], config: ArraysConfig, path: Path) -> tuple[Kind, int]:
    """Kind of the targets and number of outputs, the same for all splits."""
    parts = list(targets.values())
    kind: Kind = kind_of(parts) if config.targets == "auto" else config.targets
    problem = None
    if kind == "classes":
        if not all(is_classes(part) for part in parts):
            problem = "classes must be integers (N,), counted from 0"
    elif len({math.prod(part.shape[1:]) for part in parts}) > 1:
        problem = "the targets of the splits differ in the number of outputs"
    elif kind == "soft" and not all(is_soft(part) for part in parts):
        problem = "soft labels must be (N, classes) with rows that sum to one"
    if problem:
        raise UsageError(problem, where=f"{path}: {', '.join(targets)}", fix="set task.targets to what they are, or mend the file")
    return kind, 1 + max(int(part.max()) for part in parts) if kind == "classes" else math.prod(parts[0].shape[1:])


def kind_of(parts: list[Array]) -> Kind:
    if all(is_classes(part) for part in parts):
        return "classes"
    return "soft" if all(is_soft(part) for part in parts) else "real"


def is_classes(targets: Array) -> bool:
    column = targets.ndim == 1 or targets.shape[1:] == (1,)
    return column and targets.dtype.kind in "biu" and int(targets.min()) >= 0


def is_soft(targets: Array) -> bool:
    if targets.ndim != 2 or targets.shape[1] < 2 or (targets < 0).any():
        return False
    return np.allclose(targets.sum(1, dtype=np.float64), 1, atol=1e-3)


def constants(given: Sequence[float], default: float, shape: tuple[int, ...], where: str) -> tuple[float, ...]:
    if len(given) not in (0, 1, shape[0]):
        raise UsageError(f"{len(given)} values for inputs of shape {shape}", where=where, fix=f"give one, or {shape[0]}")
    return tuple(given) or (default,)


def as_inputs(array: Array, config: ArraysConfig, path: Path) -> Tensor:
    inputs = torch.from_numpy(np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32)))
    if inputs.dim() == 4 and layout(array.shape, config, path) == "nhwc":
        return inputs.permute(0, 3, 1, 2).contiguous()
    return inputs.unsqueeze(1) if inputs.dim() == 3 else inputs


def as_targets(array: Array, kind: Kind) -> Tensor:
    if kind == "classes":
        return torch.from_numpy(array.reshape(-1).astype(np.int64))
    return torch.from_numpy(array.reshape(len(array), -1).astype(np.float32))


def cut(everything: Split) -> tuple[Split, Split]:
    """The fixed test split of a file without one."""
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[stratified_indices(everything, TEST_SHARE, TEST_SEED)] = True
    return everything.subset((~mask).nonzero().flatten()), everything.subset(mask.nonzero().flatten())


NPZ = DataSource(spec, load, ArraysConfig, "arrays of your own: task.path=FILE.npz", files=lambda config, root: [locate(config, root)])
