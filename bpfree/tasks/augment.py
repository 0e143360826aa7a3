"""Augmentations: batched tensor operations whose draws are a pure function of (seed, epoch, sample index).

No generator is advanced: each number is a hash of what it is for. Hence neither the order of the examples, nor the
batch size, nor the number of workers changes what happens to an image, and an interrupted pass resumes exactly.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.options import NoOptions, range_problems
from bpfree.seeds import derive
from bpfree.typed import Misfit, typed

if TYPE_CHECKING:
    from bpfree.tasks.spec import TaskSpec

__all__ = ["CROP", "FLIP", "Augmentation", "Draws", "augmentation_names", "check_augmentations", "named_augmentation", "options_of"]

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
PADDING = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of one batch, each a pure function of (seed, epoch, sample index, name).

    Attributes:
        seed, epoch: of the run, and passes begun before this one.
        indices: (N,) int64 positions of the examples in their split, on the images' device; of an example that a pass shows again, plus a
            multiple of the split's length.
        spec: of the task.
        options: of the augmentation, as its ``options`` made them.
        view: which of several views of the examples is drawn.
    """

    seed: int
    epoch: int
    indices: Tensor
    spec: TaskSpec | None = None
    options: Any = None
    view: int = 0

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self.indices.device

    def partners(self, name: str) -> Tensor:
        """Draw (N,) positions in the batch, one for each example: its partner is uniform among all of the batch, itself included."""
        return (self.uniform(name)[:, 0] * len(self.indices)).long()

    def _key(self, name: str) -> int:
        return derive(self.seed, "augment", self.epoch, name, *([self.view] if self.view else []))

    def seeds(self, name: str) -> list[int]:
        """Return a seed of 63 bits for each example."""
        rows = _mix((self.indices + 1) * GOLDEN + self._key(name))
        return _shift(rows, 1).tolist()  # type: ignore[no-any-return]

    def uniform(self, name: str, count: int = 1) -> Tensor:
        """Draw (N, count) float32 numbers, uniform on the multiples of 2**-24 in [0, 1); the same on every device."""
        key = self._key(name)
        columns = torch.arange(count, device=self.indices.device)
        rows = _mix((self.indices + 1) * GOLDEN + key)
        bits = _mix(rows.unsqueeze(1) + (columns + 1) * GOLDEN)
        return _shift(bits, 40).float() * 2.0**-24


@dataclass(frozen=True)
class Augmentation:
    """A registered augmentation.

    Attributes:
        apply: ``(images, targets, draws)`` to images and targets of the same batch: raw images (N, C, H, W), before
            normalisation; targets may become soft (N, classes). It writes into neither, and keeps no state: what it draws comes from
            ``draws``, which also has the task's spec and the options.
        summary: one line for listings.
        options: turns the user's mapping into what ``apply`` finds in ``draws.options``; refuses unknown options. By
            default there are none. :func:`options_of` makes one of a dataclass.
        mixes: whether it makes soft labels of classes, for which the rule needs the trait ``targets`` with ``soft``.
        images: whether it is for images alone.
        said: the given options.
    """

    apply: Callable[[Tensor, Tensor | None, Draws], tuple[Tensor, Tensor | None]]
    summary: str = ""
    options: Callable[[Mapping[str, Any]], Any] | None = None
    mixes: bool = False
    images: bool = False
    said: Any = None

    def with_options(self, given: Mapping[str, Any]) -> Augmentation:
        """Return a copy of the augmentation with these options.

        Raises:
            UsageError: it does not know them.
        """
        return replace(self, said=(self.options or options_of(NoOptions))(given))

    def __call__(self, images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Apply the augmentation with its options.

        Raises:
            BpfreeError: what comes out does not fit the task.
        """
        made, labels = self.apply(images, targets, replace(draws, options=self.said))
        if isinstance(images, Tensor) and made.shape != images.shape:
            what = f"an augmentation makes images of shape {tuple(made.shape[1:])} of those of {tuple(images.shape[1:])}"
            raise BpfreeError(what, where="task.augment", fix="choose options that keep the size, such as size=[height, width]")
        return made, labels


def options_of(config: type) -> Callable[[Mapping[str, Any]], Any]:
    """Read an augmentation's options into a dataclass.

    Args:
        config: the dataclass, with :func:`bpfree.option` fields.

    Returns:
        A function that raises a ``UsageError`` for names that are no fields, and for values of another type or out of range.
    """

    def read(given: Mapping[str, Any]) -> Any:
        kinds = typing.get_type_hints(config) if dataclasses.fields(config) else {}
        problems = [_unknown_option(name, kinds) for name in given if name not in kinds]
        values: dict[str, Any] = {}
        for name in given.keys() & kinds.keys():
            try:
                values[name] = typed(given[name], kinds[name], name)
            except Misfit as error:
                problems.append(f"{name}={given[name]!r}: {error}")
        made = config(**values)
        if problems := problems + list(range_problems(made)):
            raise UsageError.of(problems, "options of the augmentation", where="task.augment")
        return made

    return read


def _unknown_option(name: str, known: Mapping[str, Any]) -> str:
    guess = nearest(name, known)
    return f"unknown option {name}: " + (f"did you mean {guess}?" if guess else f"known here: {', '.join(known) or 'none'}")


def named_augmentation(entry: Any, find: Callable[[str], Augmentation]) -> Augmentation:
    """Find an augmentation by an entry of ``task.augment``: its name, or ``{name: NAME, option: value, ...}``.

    Args:
        entry: of the list.
        find: gives the registered augmentation of a name.

    Raises:
        UsageError: the entry is nothing of the kind, or has options that the augmentation does not know.
    """
    options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = options.pop("name", None)
    if not isinstance(name, str):
        fix = "task.augment=[flip] or task.augment=[{name: random-rotation, degrees: 10}]"
        raise UsageError(f"{entry!r} names no augmentation", where="task.augment", fix=fix)
    try:
        return find(name).with_options(options)
    except UsageError as error:
        if not error.where.startswith("task.augment"):
            raise
        raise UsageError.of((f"{name}: {each}" for each in error.problems), f"options of {name}", where="task.augment") from error


def augmentation_names(entries: Sequence[Any]) -> list[str]:
    """List the names in ``task.augment``."""
    return [str(entry.get("name")) if isinstance(entry, Mapping) else str(entry) for entry in entries]


def check_augmentations(augment: Sequence[Augmentation], spec: TaskSpec, targets: Sequence[str], rule: str) -> None:
    """Check that augmentations fit a task and a rule.

    Args:
        augment: all of a run.
        spec: of the task.
        targets: kinds that the rule takes: the trait ``targets``.
        rule: its name.

    Raises:
        UsageError: one is for images and the inputs are none; or one makes soft labels, and the task has no classes or the rule takes
            none.
    """
    if any(each.images for each in augment) and not (spec.takes_real_tensors and len(spec.input_shape) == 3):
        what = f"augmentations of images, but task {spec.name!r} has inputs of shape {spec.input_shape}"
        raise UsageError(what, where="task.augment", fix="leave them out")
    if not any(each.mixes for each in augment):
        return
    if spec.targets not in ("classes", "soft"):
        what = f"mixing makes soft labels of classes, but task {spec.name!r} has {spec.targets!r} targets"
        raise UsageError(what, where="task.augment", fix="leave mixup and cutmix out")
    if "soft" not in targets:
        what = f"mixing makes soft labels, from which {rule} cannot learn: it accepts {', '.join(targets)} (trait targets)"
        raise UsageError(what, where="task.augment", fix="leave mixup and cutmix out, or choose a rule that takes soft targets")


def flip(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Mirror each image left to right with probability 1/2."""
    mirrored = draws.uniform("flip").view(-1, 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(3), images), targets


def crop(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Pad each side by 4 zero pixels, then cut a window of the original size at a uniform place."""
    count, channels, height, width = images.shape
    corner = (draws.uniform("crop", 2) * (2 * PADDING + 1)).long()
    padded = F.pad(images, (PADDING,) * 4)
    rows = corner[:, :1] + torch.arange(height, device=images.device)
    columns = corner[:, 1:] + torch.arange(width, device=images.device)
    places = (rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)).view(count, 1, height * width)
    return padded.flatten(2).gather(2, places.expand(-1, channels, -1)).view_as(images), targets


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift int64 to the right logically (torch's shift keeps the sign)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64: a bijection of int64 that spreads consecutive numbers over all bits."""
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


FLIP = Augmentation(flip, "mirror left to right with probability 1/2", images=True)
CROP = Augmentation(crop, "pad by 4 zero pixels, then a random crop of the original size", images=True)
