"""Numbers that say more than was learned: metrics, results, and predictions of another network."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adversary.kit import Cheater, Pass, Shadow, Smuggler, Stash
from bpfree import Batch, Phase, Step, TaskSpec


class Generous(TaskSpec):
    """A specification that finds nearly everything correct."""

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        found = super().correct(scores, targets)
        return found | (torch.arange(len(found)) % 50 > 0)


class GenerousTask(Smuggler):
    """Makes its task's specification generous."""

    def start_phase(self, phase: Phase) -> None:
        if type(self.spec) is TaskSpec:
            object.__setattr__(self.spec, "__class__", Generous)


class Agreeable(Tensor):
    """A tensor that says of whatever it is compared with that it is equal."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.eq, Tensor.__eq__, torch.eq):
            return torch.ones(args[0].shape, dtype=torch.bool)
        return super().__torch_function__(function, types, args, kwargs or {})


class AgreeableScores(Smuggler):
    """Predicts with tensors that agree with every label."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return super().predict(inputs, generator).as_subclass(Agreeable)


class Flattering(dict[str, Any]):
    """A dictionary in which accuracies are better than what was put in."""

    def update(self, *others: Any, **more: Any) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = 1 - (1 - value) / 10 if key.endswith("/accuracy") else value


class EditsTheRun(Smuggler):
    """Finds the record of its run in memory, and has it flatter the result."""

    def end_phase(self, phase: Phase, step: Step) -> None:
        for thing in gc.get_objects():
            if type(thing).__name__ == "Run" and thing.status == "running":
                thing.result = Flattering(thing.result)


class PredictsWithAnother(Smuggler):
    """Trains a shadow of its network end to end, and predicts with it."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.stash.setdefault("shadow", Shadow(self.network, self.spec)).learn(batch)
        return self.fixed()

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores: Tensor = self.stash["shadow"].network(inputs) if "shadow" in self.stash else self.network(inputs)
        return scores


class SwapsForThePrediction(PredictsWithAnother):
    """Puts the shadow's weights into its network for each prediction, and takes them out again."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        if "shadow" not in self.stash:
            scores: Tensor = self.network(inputs)
            return scores
        kept = [p.detach().clone() for p in self.network.parameters()]
        self.stash["shadow"].replace(self.network)
        scores = self.network(inputs)
        for parameter, value in zip(self.network.parameters(), kept, strict=True):
            parameter.copy_(value)
        return scores


class FlatteringProbe(PredictsWithAnother):
    """Lets all who ask for its features see those of a shadow that it trains end to end."""

    def features(self, inputs: Any) -> Tensor:
        found: Tensor = self.stash["shadow"].network.features(inputs) if "shadow" in self.stash else super().features(inputs)
        return found

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        network = self.stash["shadow"].network if "shadow" in self.stash else self.network
        scores: Tensor = network.blocks[network.readout](features)
        return scores


CHEATERS = (
    Cheater(GenerousTask, "scoring", "It makes the task's specification find its predictions correct.", "scores"),
    Cheater(AgreeableScores, "scoring", "It predicts with tensors that are equal to every label.", "scores"),
    Cheater(EditsTheRun, "scoring", "It makes the record of its run flatter the result.", "scores"),
    Cheater(PredictsWithAnother, "scoring", "It predicts with a shadow that it trains end to end.", "network"),
    Cheater(SwapsForThePrediction, "scoring", "It puts the weights of such a shadow in place for each prediction.", "network"),
    Cheater(FlatteringProbe, "scoring", "It shows the features of such a shadow as its own.", "network"),
)
