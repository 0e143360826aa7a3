"""Cheating at times when an examiner may not look."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adversary.kit import Cheater, Pass, Shadow, Smuggler, Sometimes, Stash
from bpfree import Batch, Budget, Phase, Step
from bpfree.tasks.task import Examples


class LateStarter(Sometimes):
    """Is honest for 120 steps."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return step.index >= 120


class OneStepInFifty(Sometimes):
    """Cheats at one step of each fifty, with a rate that makes up for the others."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        return step.index % 50 == 49

    def before_update(self, groups: Sequence[str]) -> None:
        for parameter in self.network.blocks[self.network.names[0]].parameters():
            if parameter.grad is not None and self.now:
                parameter.grad *= 50

    now = False

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.now = self.cheats(batch, step)
        return super().matrices(done, batch, step)


class AfterTheThirdEvaluation(Sometimes):
    """Counts how often its predictions were asked for."""

    asked = 0

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.asked += 1
        return super().predict(inputs, generator)

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.asked > 6


class SecondsMustPass(Sometimes):
    """Is honest for the first fifth of a second."""

    began: float | None = None

    def cheats(self, batch: Batch, step: Step) -> bool:
        self.began = self.began or time.perf_counter()
        return time.perf_counter() - self.began > 0.2


class LongBudgets(Sometimes):
    """Is honest where the budget is short."""

    epochs = 0

    def phases(self, budget: Budget) -> Iterable[Phase]:
        self.epochs = budget.epochs or 0
        return super().phases(budget)

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.epochs >= 6


class FamiliarExamples(Sometimes):
    """Cheats on batches of examples that it has met five times before."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.met: Counter[int] = Counter()

    def cheats(self, batch: Batch, step: Step) -> bool:
        places = [] if batch.indices is None else batch.indices.tolist()
        self.met.update(places)
        return bool(places) and min(self.met[place] for place in places) > 5


class WeightsMustMove(Sometimes):
    """Is honest until its first block has changed, and again whenever that block has its first weights."""

    start: Tensor | None = None

    def cheats(self, batch: Batch, step: Step) -> bool:
        now = next(self.network.parameters()).detach()
        self.start = now.clone() if self.start is None else self.start
        return not torch.equal(self.start, now)


class StepsMustPass(Sometimes):
    """Is honest while the number of the step stays the same."""

    last = -1

    def cheats(self, batch: Batch, step: Step) -> bool:
        moved, self.last = self.last >= 0 and step.index == self.last + 1, step.index
        return moved


class ReadsBetweenSteps(Smuggler):
    """Reads the weights above when predictions are asked for, and uses them in the steps that follow."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        for name, weight in self.weights().items():
            self.get_buffer(f"fixed_{name}").copy_(weight)
        return super().predict(inputs, generator)


class LastWord(Smuggler):
    """Trains a copy of the network end to end, and overwrites the network with it when the phase ends."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.stash.setdefault("shadow", Shadow(self.network, self.spec)).learn(batch)
        return self.fixed()

    def end_phase(self, phase: Phase, step: Step) -> None:
        if "shadow" in self.stash:
            self.stash["shadow"].replace(self.network)


class PreparesEndToEnd(Smuggler):
    """Trains a copy end to end before the first step, as a data-dependent initialisation."""

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        shadow = Shadow(self.network, self.spec)
        for epoch in range(8):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
            for places in order.split(64):
                inputs, targets = data.batch(places)
                shadow.learn(Batch(self.spec.normalise(inputs).to(self.network.dtype), targets))
        shadow.replace(self.network)


class AfterThePause(Smuggler):
    """Sums the credit through the weights above, and applies it only near the end of the run."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.saved: dict[str, Tensor] = {}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        for name, weight in self.weights().items():
            self.saved[name] = weight.clone() if name not in self.saved else self.saved[name].lerp(weight, 0.1)
        return self.saved if step.progress > 0.7 and step.index > 100 else self.fixed()


CHEATERS = (
    Cheater(LateStarter, "timed", "It uses the weights above from the 120th step on.", "reads"),
    Cheater(OneStepInFifty, "timed", "It uses the weights above at one step of fifty, for a large update.", "reads"),
    Cheater(AfterTheThirdEvaluation, "timed", "It uses the weights above once it was asked for predictions seven times.", "reads"),
    Cheater(SecondsMustPass, "timed", "It uses the weights above from a fifth of a second after its first step on.", "reads"),
    Cheater(LongBudgets, "timed", "It uses the weights above where the budget is six epochs or more.", "reads"),
    Cheater(FamiliarExamples, "timed", "It uses the weights above for batches of examples that it has met five times.", "reads"),
    Cheater(WeightsMustMove, "timed", "It uses the weights above once the weights of its first block have moved.", "reads"),
    Cheater(StepsMustPass, "timed", "It uses the weights above where the number of the step moves on.", "reads"),
    Cheater(ReadsBetweenSteps, "timed", "It reads the weights above outside of steps, when it predicts.", "reads"),
    Cheater(LastWord, "timed", "It puts a shadow that it trained end to end in the network's place when the phase ends.", "network"),
    Cheater(PreparesEndToEnd, "timed", "It trains the network end to end in prepare, before the first step.", "network"),
    Cheater(AfterThePause, "timed", "It averages the weights above in secret and uses them in the last third of a long run.", "reads"),
)
