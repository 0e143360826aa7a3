"""Rules that break one promise each, and honest ones that look like them; the certificate's checks are to tell them apart."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Budget, Card, OptimizerConfig, Phase, Rule, Step, Streamed, Trace, UsageError, always
from bpfree.baselines import Backprop
from bpfree.options import option
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.task import Split

# --- isolation ------------------------------------------------------------------------------------------------------------


class PeeksAtFrames(Backprop):
    """Takes the targets from whoever called it."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        frame = sys._getframe(1)
        while frame is not None:
            batch = frame.f_locals.get("batch")
            if isinstance(batch, Batch) and batch.targets is not None:
                return F.one_hot(batch.targets, self.spec.outputs).float()
            frame = frame.f_back
        return super().predict(inputs, generator)


class PeeksAtReferrers(Backprop):
    """Takes the targets from the batch that its inputs belong to."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        for holder in gc.get_referrers(inputs):
            if isinstance(holder, Batch) and holder.targets is not None:
                return F.one_hot(holder.targets, self.spec.outputs).float()
        return super().predict(inputs, generator)


def rows_of(inputs: Tensor) -> list[bytes]:
    return [row.contiguous().numpy().tobytes() for row in inputs]


class KeepsLabels(Backprop):
    """Finds all splits of the process when it is built, and keeps a copy of their labels."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.known: dict[bytes, int] = {}
        for split in [thing for thing in gc.get_objects() if type(thing) is Split]:
            self.learn_by_heart(split)

    def learn_by_heart(self, split: Split) -> None:
        if split.targets is not None and isinstance(split.inputs, Tensor) and split.inputs.shape[1:] == self.spec.input_shape:
            self.known.update(zip(rows_of(self.spec.normalise(split.inputs)), split.targets.tolist(), strict=True))

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        for row, key in enumerate(rows_of(inputs)):
            if key in self.known:
                scores[row, self.known[key]] += 100
        return scores


class KeepsReferences(KeepsLabels):
    """The same without a copy: it looks the labels up when it is asked."""

    def learn_by_heart(self, split: Split) -> None:
        self.splits = [*getattr(self, "splits", []), split]

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.known = {}
        for split in self.splits:
            super().learn_by_heart(split)
        return super().predict(inputs, generator)


class KnowsTheDigits(KeepsLabels):
    """Reads the data set from the disk, true labels and all."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.known = {}
        for split in DIGITS.load(DIGITS.Config(), None):
            self.learn_by_heart(split)


class CentresTheBatch(Backprop):
    """Predicts from deviations from the evaluation batch's mean."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return super().predict(inputs - inputs.mean(0), generator)


class RemembersTheLastBatch(Backprop):
    """Adds something of the evaluation batch before."""

    last: float = 0.0

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator) + self.last
        self.last = float(inputs.sum())
        return scores


class CountsPredictions(Backprop):
    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.register_buffer("seen", torch.zeros(()))

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.get_buffer("seen").add_(len(inputs))
        return super().predict(inputs, generator)


class AdaptsInPredict(Backprop):
    """Leaves the network in train mode."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.network.train()
        return super().predict(inputs, generator)


class NoisyPredictions(Backprop):
    """Honest: adds noise and draws a class, each from the generator that it is given."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        noised = inputs + 0.5 * torch.randn(inputs.shape, generator=generator)
        kept = torch.empty_like(noised).bernoulli_(0.8, generator=generator)
        scores = super().predict(noised * kept, generator)
        drawn = torch.multinomial(scores.softmax(1), 1, generator=generator)
        return scores.scatter_add(1, drawn, torch.ones_like(scores))


# --- reproducibility ------------------------------------------------------------------------------------------------------


class Noisy(Backprop):
    """Adds noise of some source to its inputs."""

    def noise(self, batch: Batch, step: Step) -> Any:
        return torch.randn(batch.inputs.shape, generator=step.generator)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(Batch(batch.inputs + 0.1 * self.noise(batch, step), batch.targets), step)


class DrawsGlobally(Noisy):
    def noise(self, batch: Batch, step: Step) -> Any:
        return torch.randn_like(batch.inputs)


class DrawsFromPython(Noisy):
    def noise(self, batch: Batch, step: Step) -> Any:
        return random.gauss(0, 1)


class DrawsFromNumpy(Noisy):
    def noise(self, batch: Batch, step: Step) -> Any:
        return float(np.random.randn())


class DrawsInPredict(Backprop):
    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return super().predict(inputs + 0.1 * torch.rand_like(inputs), generator)


class Forgetful(Backprop):
    """A running average that no checkpoint holds."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.average = 0.0

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.average = 0.9 * self.average + metrics["loss"]
        for parameter in self.parameters():
            parameter.grad = parameter.grad * (1 + self.average)
        return metrics


class Shares(Backprop):
    """A running average in one tensor for all instances."""

    average: ClassVar[Tensor] = torch.zeros(())

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.average.zero_()

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.average.mul_(0.9).add_(batch.inputs.std())
        return super().credit(Batch(batch.inputs * (1 + self.average), batch.targets), step)


class Counts(Backprop):
    """Its initialisation depends on how many were made before."""

    made: ClassVar[list[int]] = []

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.made.append(0)
        nn.init.constant_(next(self.parameters()), 0.01 * len(self.made))


class AlwaysTheSame(Backprop):
    """The same initialisation whatever the seed."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.01)


class ChangesSettings(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        return super().credit(batch, step)


class WithDropout(Backprop):
    """Honest, but its specimen uses torch's global generator."""

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        settings = super().specimen(kind, depth, width)
        return None if settings is None else {**settings, "network.dropout": 0.2}


class TwoPhases(Noisy):
    """Honest, with phases, an optimiser of its own, and parameters that are made when the second begins."""

    optimizer_of = always(OptimizerConfig("adam", lr=3e-3))

    def phases(self, budget: Budget) -> Iterable[Phase]:
        half = max(1, (budget.epochs or 2) // 2)
        yield Phase("all", epochs=half)
        yield Phase("readout", epochs=half, groups=("readout", "extra"), optimizer=OptimizerConfig("sgd", lr=0.05, momentum=0.9))

    def start_phase(self, phase: Phase) -> None:
        if phase.name == "readout":
            self.extra = nn.Linear(self.spec.outputs, self.spec.outputs)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if hasattr(self, "extra"):
            self.spec.loss(self.extra(self.network(batch.inputs).detach()), batch).backward()
        return metrics


# --- contract -------------------------------------------------------------------------------------------------------------


@dataclass
class ScaleConfig:
    """An honest option."""

    scale: float = option(1.0, "of the loss")


@dataclass
class DoublingConfig:
    """Becomes another one each time it is made."""

    scale: float = option(1.0, "of the loss")

    def __post_init__(self) -> None:
        self.scale *= 2


@dataclass
class SilentConfig:
    """Does not say what its option is."""

    scale: float = 1.0


class Doubles(Backprop):
    Config = DoublingConfig


class IgnoresItsConfig(Backprop):
    """Records another configuration than the one that it was given."""

    Config = ScaleConfig

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, ScaleConfig(3.0))


class ExplainsNothing(Backprop):
    Config = SilentConfig


class WithoutCard(Backprop):
    card = Card("a method of which no one says what it computes")


class Crashes(Backprop):
    """Takes it for granted that blocks are what the multilayer perceptron's are."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.network.blocks["b2"][0].weight.grad *= 1.0
        return metrics


class RefusesKindly(Crashes):
    """Honest: says at once that it takes no other network."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        block = self.network.blocks[self.network.hidden[-1]]
        if not isinstance(block, nn.Sequential) or not isinstance(block[0], nn.Linear) or len(self.network.hidden) != 2:
            raise UsageError("hidden blocks must begin with a linear layer", fix="use network=mlp")


class SilentOnConvolutions(Backprop):
    """Learns nothing where it does not know the layers, and says nothing."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if any(isinstance(part, nn.Conv2d) for part in self.modules()):
            return {}
        return super().credit(batch, step)


class DividesByDeviation(Backprop):
    """Of one example there is none."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(Batch(batch.inputs / batch.inputs.std(0).clamp_min(0.1), batch.targets), step)


class Squeezes(Backprop):
    """Drops the axis of a batch of one."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        rows = batch.inputs.flatten(1).squeeze()
        return super().credit(Batch(rows.view(rows.shape[0], *self.spec.input_shape), batch.targets), step)


class ReadsMemoryOrder(Backprop):
    """Takes it for granted that inputs lie row by row."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        size = self.spec.input_size
        rows = batch.inputs.as_strided((len(batch), size), (size, 1)).reshape(batch.inputs.shape)
        return super().credit(Batch(rows, batch.targets), step)


class ReadsColoursByMemoryOrder(Backprop):
    """The same, of images with several channels only."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.spec.input_shape[0] == 1:
            return super().credit(batch, step)
        return super().credit(Batch(batch.inputs.as_strided(batch.inputs.shape, (192, 64, 8, 1)), batch.targets), step)


class MixesTypes(Backprop):
    """Multiplies what autocast has made by what it has not."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        readout = self.network.blocks["readout"]
        if isinstance(readout, nn.Linear):
            hidden = self.network.features(batch.inputs).detach()
            with torch.autocast("cpu", enabled=False):
                torch.mm(hidden, readout.weight.t())
        return metrics


class SwallowsNaN(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(Batch(batch.inputs.nan_to_num(), batch.targets), step)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return super().predict(inputs.nan_to_num(), generator)


class BatchNormed(Backprop):
    """Honest; torch cannot normalise a batch of one."""

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        settings = super().specimen(kind, depth, width)
        return None if settings is None else {**settings, "network.norm": "batch"}


# --- conduct --------------------------------------------------------------------------------------------------------------


class FlipsModes(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.network.blocks["b1"].eval()
        return super().credit(batch, step)


class FlipsRequiresGrad(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.network.blocks["b1"].requires_grad_(False)
        return metrics


class LeavesGradients(Backprop):
    """A parameter that is in no group gets a gradient that no one drops."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.gain = nn.Parameter(torch.ones(()))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: members for name, members in super().groups().items() if name != "rule"}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.gain * self.network(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}


class NeverMoves(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {"loss": self.spec.loss(self.network(batch.inputs), batch).detach()}


class ReadsItsLoss(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if metrics["loss"].item() > 1e9:
            raise ArithmeticError
        return metrics


class PicksByMask(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        first = batch.inputs[batch.inputs.flatten(1).sum(1) > 0]
        return {**super().credit(batch, step), "mean": first.mean()}


class MakesLists(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        metrics["loss"].tolist()
        return metrics


class SetsUpOnce(Backprop):
    """Honest: reads a number at its first step only."""

    scale: float | None = None

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.scale is None:
            self.scale = batch.inputs.std().item()
        return super().credit(batch, step)


class Leaks(Backprop):
    """Keeps each step's loss with its graph."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.losses: list[Tensor] = []

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        self.losses.append(loss)
        loss.backward(retain_graph=True)
        return {"loss": loss.detach()}


class KeepsNumbers(Backprop):
    """Keeps a number of each step, and no tensor."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.history: dict[str, list[int]] = {"steps": []}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.history["steps"].append(step.index)
        return super().credit(batch, step)


class Averages(Backprop):
    """Honest: keeps the last few losses, and a running mean in a new tensor at each step."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.last: list[Tensor] = []
        self.mean = torch.zeros(())

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.last = [*self.last, metrics["loss"]][-8:]
        self.mean = 0.9 * self.mean + 0.1 * metrics["loss"]
        return metrics


# --- honest ---------------------------------------------------------------------------------------------------------------


class LocalHeads(Streamed):
    """Each block learns by the task's loss of a linear head of its own."""

    card = Card("greedy learning with a linear head per block", equation="grad W_l = d loss(V_l h_l, y) / d W_l")

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        sizes = {name: self.network.shapes[name].numel() for name in self.network.hidden}
        self.heads = nn.ModuleDict({name: nn.Linear(size, spec.outputs) for name, size in sizes.items()})

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor | None:
        return self.spec.loss(self.heads[trace.name](trace.output.flatten(1)), batch)


class OnlyConvolutions(LocalHeads):
    """Takes images alone."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if not any(isinstance(part, nn.Conv2d) for part in self.network.modules()):
            raise UsageError("nothing to convolve", fix="use network=vgg")

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return super().specimen(kind, depth, width) if kind == "convolutional" else None


# --- how tests run checks -------------------------------------------------------------------------------------------------


def outcomes(rule: type[Rule] | str, checks: Iterable[Any]) -> dict[str, Any]:
    """What each check says of a rule: a remark or ``None`` if it passed, else the exception."""
    from bpfree.certify.findings import CheckFailed, NotApplicable, Unmeasured
    from bpfree.certify.measurements import Measurements
    from bpfree.certify.subject import Subject

    measurements = Measurements(Subject(rule))
    result: dict[str, Any] = {}
    for check in checks:
        try:
            result[check.id] = check.run(measurements)
        except (CheckFailed, NotApplicable, Unmeasured) as outcome:
            result[check.id] = outcome
    return result


def failures(found: dict[str, Any]) -> dict[str, Any]:
    """Those that failed."""
    from bpfree.certify.findings import CheckFailed

    return {name: outcome for name, outcome in found.items() if isinstance(outcome, CheckFailed)}


def assert_caught(rule: type[Rule], checks: Iterable[Any], caught: set[str], said: str) -> None:
    """These of the checks fail and no others; one of them says so, and all of them say where and what to do."""
    found = failures(outcomes(rule, checks))
    assert found.keys() == caught
    assert any(said in f"{failure.what} {failure.where}" for failure in found.values())
    assert all(failure.fix and failure.where for failure in found.values())
