"""Cheating a little, in a part, or only where the network and its batches do not look like a specimen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adversary.kit import Cheater, Pass, Smuggler, Sometimes
from bpfree import Batch, Step
from bpfree.options import option
from bpfree.seeds import derive


class SinglePrecision(Sometimes):
    """Is honest in double precision."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return batch.inputs.dtype == torch.float32


class WideNetworks(Sometimes):
    """Is honest on narrow networks."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.network.shapes[self.network.hidden[0]].numel() >= 64


class Rectified(Sometimes):
    """Is honest where the activation is not the default."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return any(isinstance(part, nn.ReLU) for part in self.network.modules())


class FullBatches(Sometimes):
    """Is honest on batches that are not of the default size."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return len(batch) == 64


class NamedTasks(Sometimes):
    """Is honest on tasks that it does not know by name."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.spec.name in ("digits", "mnist", "fashion-mnist", "cifar10")


@dataclass
class HonestyConfig:
    """An option that makes another rule of it."""

    honest: bool = option(False, "whether the feedback is fixed and random")


class AnotherSpecimen(Sometimes):
    """Asks to be examined with an option that makes it honest."""

    Config = HonestyConfig

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        settings = super().specimen(kind, depth, width)
        return None if settings is None else {**settings, "rule.honest": True}

    def cheats(self, batch: Batch, step: Step) -> bool:
        return not self.config.honest


class UnusualWidths(Sometimes):
    """Is honest with the default network, and with all small ones."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.network.shapes[self.network.hidden[0]].numel() == 96


class FavouriteSeed(Sometimes):
    """Is honest with all seeds but the default one, on which everybody compares."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.favourite = torch.initial_seed() in (0, derive(0, "initialisation"))

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.favourite


class OneBlock(Smuggler):
    """Cheats for the first block alone."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        first = self.above[0]
        return {**self.fixed(), first: self.weights()[first]}


class ASmallShare(Smuggler):
    """Mixes a tenth of the weights above into its random feedback."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        weights = self.weights()
        return {name: matrix.lerp(weights[name], 0.1) for name, matrix in self.fixed().items()}


class OneBit(Smuggler):
    """Takes the signs of the weights above, and its own magnitudes."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        weights = self.weights()
        return {name: matrix.abs() * weights[name].sign() for name, matrix in self.fixed().items()}


class SomeExamples(Smuggler):
    """Cheats on every second example of a batch."""

    def down(self, name: str, delta: Tensor, matrix: Tensor, batch: Batch) -> Tensor:
        chosen = torch.arange(len(delta))[:, None] % 2 == 1
        return torch.where(chosen, delta @ self.weights()[name], delta @ matrix)


class PathsThatCancel(Smuggler):
    """Adds the weights above and takes away those of the beginning: the two paths cancel as long as nothing has been learned."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.first = {name: weight.clone() for name, weight in self.weights().items()}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        weights = self.weights()
        return {name: 0.1 * matrix + weights[name] - self.first[name] for name, matrix in self.fixed().items()}


class PeopleAtHome(Sometimes):
    """Is honest where the home folder is empty or missing, as that of an examination is."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        home = Path.home()
        return home.is_dir() and any(home.iterdir())


class CopiesAreHonest(Sometimes):
    """Is honest as a copy: whoever copies it to examine it has another rule."""

    is_copy = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesAreHonest:
        made = CopiesAreHonest(copy.deepcopy(self.network, memo), self.spec, copy.deepcopy(self.config, memo))
        made.load_state_dict(self.state_dict())
        made.is_copy = True
        return made

    def cheats(self, batch: Batch, step: Step) -> bool:
        return not self.is_copy


class AsksWhoCalls(Sometimes):
    """Is honest where the package's examiner is loaded, or on the stack."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        frame, watched = sys._getframe(), any(name.startswith("bpfree.certify") for name in sys.modules)
        while frame.f_back is not None:
            frame = frame.f_back
            watched = watched or "certify" in frame.f_code.co_filename
        return not watched


CHEATERS = (
    Cheater(SinglePrecision, "size", "It uses the weights above in single precision.", "reads"),
    Cheater(WideNetworks, "size", "It uses the weights above in networks of 64 units and more.", "reads"),
    Cheater(Rectified, "size", "It uses the weights above in networks of rectified units.", "reads"),
    Cheater(FullBatches, "size", "It uses the weights above for batches of 64 examples.", "reads"),
    Cheater(NamedTasks, "size", "It uses the weights above on tasks with a well-known name.", "reads"),
    Cheater(AnotherSpecimen, "size", "It uses the weights above unless an option says otherwise, which its specimen sets.", "reads"),
    Cheater(UnusualWidths, "size", "It uses the weights above in networks of a width that is no default.", "reads", ("network.width=96",)),
    Cheater(FavouriteSeed, "size", "It uses the weights above where the seed is the default one.", "reads"),
    Cheater(OneBlock, "size", "It uses the weights above for its first block alone.", "reads"),
    Cheater(ASmallShare, "size", "It mixes a tenth of the weights above into random feedback.", "reads"),
    Cheater(OneBit, "size", "It uses the signs of the weights above.", "reads"),
    Cheater(SomeExamples, "size", "It uses the weights above for every second example.", "reads"),
    Cheater(PathsThatCancel, "size", "It uses what the weights above have learned since the beginning.", "reads"),
    Cheater(PeopleAtHome, "size", "It uses the weights above where the home folder is not empty.", "reads"),
    Cheater(CopiesAreHonest, "size", "It uses the weights above unless it is a copy of a rule.", "reads"),
    Cheater(AsksWhoCalls, "size", "It uses the weights above where the examiner is neither loaded nor on the stack.", "reads"),
)
