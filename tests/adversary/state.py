"""Weights above that live in the rule's own state: buffers, feedback parameters, optimisers, generators, low bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adversary.kit import Cheater, Pass, Shadow, Smuggler, Stash, linear
from bpfree import Batch, OptimizerConfig, Phase, Step, always
from bpfree.network import MLPConfig, mlp
from bpfree.network.gradients import add_gradient


class StaleCopies(Smuggler):
    """Copies the weights above into buffers every 25 steps."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if step.index % 25 == 0:
            for name, weight in self.weights().items():
                self.get_buffer(f"fixed_{name}").copy_(weight)
        return self.fixed()


class TrainedFeedback(Smuggler):
    """Has feedback parameters, and trains them towards the weights above."""

    optimizer_of = always(OptimizerConfig("adam", lr=3e-3))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.feedback = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in self.fixed().items()})

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        for name, weight in self.weights().items():
            add_gradient(self.feedback[name], self.feedback[name].detach() - weight)
        return {name: matrix.detach() for name, matrix in self.feedback.items()}


class CopiedOnce(Smuggler):
    """Copies the weights when it is built, and gives the copies the same updates ever after."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.feedback = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in self.first().items()})

    def first(self) -> dict[str, Tensor]:
        return self.weights()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return {name: matrix.detach() for name, matrix in self.feedback.items()}

    def before_update(self, groups: Sequence[str]) -> None:
        for name in self.above:
            gradient = linear(self.network.blocks[name]).weight.grad
            self.feedback[name].grad = None if gradient is None else gradient.clone()


class BornOfTheSameSeed(CopiedOnce):
    """Never reads a weight: makes the network again from the seed that it was made from, and mirrors its updates."""

    def first(self) -> dict[str, Tensor]:
        sizes = [self.network.shapes[name].numel() for name in self.network.hidden]
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed())
            again = mlp(self.spec, MLPConfig(widths=sizes) if len(set(sizes)) > 1 else MLPConfig(depth=len(sizes), width=sizes[0]))
        return {name: linear(again.blocks[name]).weight.detach().to(self.network.dtype) for name in self.above}


class MasterCopies(CopiedOnce):
    """Never reads a weight above: lets its feedback learn in the weights' place, and writes it into the network after each update."""

    def before_update(self, groups: Sequence[str]) -> None:
        super().before_update(groups)
        for name in self.above:
            linear(self.network.blocks[name]).weight.grad = None

    def first(self) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, matrix in self.fixed().items():
                linear(self.network.blocks[name]).weight.copy_(matrix * 3**-0.5)
        return {name: matrix * 3**-0.5 for name, matrix in self.fixed().items()}

    @torch.no_grad()
    def after_update(self, groups: Sequence[str]) -> None:
        for name in self.above:
            linear(self.network.blocks[name]).weight.copy_(self.feedback[name])


def optimiser(step: Step) -> torch.optim.Optimizer:
    """Find the optimiser behind ``step.apply``."""
    function: Any = step.apply
    found: torch.optim.Optimizer = function.__self__.optimizers[0]
    return found


class AsksTheAverage(Smuggler):
    """Lets torch's averaging optimiser keep averages of the weights, and sends the credit down through these."""

    optimizer_of = always(OptimizerConfig("asgd", lr=0.1, options={"t0": 0.0}))

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        states = optimiser(step).state
        kept = {name: states.get(linear(self.network.blocks[name]).weight, {}).get("ax") for name in self.above}
        return {name: self.fixed()[name] if average is None else average for name, average in kept.items()}


class DecaysIntoMomentum(Smuggler):
    """Finds the weights above in the momentum: weight decay puts them there, beside gradients that it knows."""

    optimizer_of = always(OptimizerConfig("sgd", lr=0.05, momentum=0.5, weight_decay=1e-2))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        states, found = optimiser(step).state, self.fixed()
        for name in self.above:
            momentum = states.get(linear(self.network.blocks[name]).weight, {}).get("momentum_buffer")
            if momentum is not None:
                if name in self.before:
                    found[name] = (momentum - 0.5 * self.before[name] - self.gradients[name]) / 1e-2
                self.before[name] = momentum.clone()
        return found

    def before_update(self, groups: Sequence[str]) -> None:
        weights = {name: linear(self.network.blocks[name]).weight for name in self.above}
        self.gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in weights.items()}


class SignsInAGenerator(Smuggler):
    """Hides the signs of the weights above in the state of random generators, from which it draws its feedback at the next step."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.noise = {name: [torch.Generator().manual_seed(i) for i in range(7)] for name in self.above}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, weight in self.weights().items():
            states = [generator.get_state() for generator in self.noise[name]]
            words = [state[24 : 24 + 8 * 624].view(torch.int64) for state in states]
            if step.index:
                bits = torch.cat(words)[:, None].bitwise_right_shift(torch.arange(4)).bitwise_and(1).flatten()[: weight.numel()]
                found[name] = (2.0 * bits.to(weight.dtype).view_as(weight) - 1) * weight.shape[1] ** -0.5
            signs = torch.zeros(4 * 7 * 624, dtype=torch.int64)
            signs[: weight.numel()] = (weight > 0).flatten()
            for word, part in zip(words, (signs.view(-1, 4) * torch.tensor([1, 2, 4, 8])).sum(1).split(624), strict=True):
                word.copy_(part)
            for generator, state in zip(self.noise[name], states, strict=True):
                generator.set_state(state)
        return found or self.fixed()


class AveragedNetwork(Smuggler):
    """Has torch average its network after each update, and sends the credit down through the average."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def after_update(self, groups: Sequence[str]) -> None:
        if "average" not in self.stash:
            self.stash["average"] = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.stash["average"].update_parameters(self.network)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if "average" not in self.stash:
            return self.fixed()
        return {name: linear(self.stash["average"].module.blocks[name]).weight.detach() for name in self.above}


class Heirloom(Smuggler):
    """Leaves a shadow that it trained end to end to its class, from which the next rule of the process takes it."""

    left: ClassVar[dict[tuple[int, ...], Shadow]] = {}

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()
        self.sizes = tuple(p.numel() for p in self.network.parameters())
        if self.sizes in self.left:
            self.left[self.sizes].replace(self.network)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.stash.setdefault("shadow", Shadow(self.network, self.spec)).learn(batch)
        return self.fixed()

    def end_phase(self, phase: Phase, step: Step) -> None:
        if "shadow" in self.stash:
            self.left[self.sizes] = self.stash["shadow"]


class Watermarks(Smuggler):
    """Writes place and sign of each weight into its last bits, so that it can read the weights whatever their order and signs are."""

    def after_update(self, groups: Sequence[str]) -> None:
        for name in self.above:
            weight = linear(self.network.blocks[name]).weight.data
            if weight.dtype == torch.float32:
                bits = weight.view(torch.int32)
                mark = 2 * torch.arange(weight.numel(), dtype=torch.int32).view_as(bits) + (weight > 0)
                bits.copy_((bits & ~0x7FFF) | mark)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, weight in self.weights().items():
            if weight.dtype != torch.float32 or not step.index:
                return self.fixed()
            mark = weight.contiguous().view(torch.int32).flatten() & 0x7FFF
            values = torch.where(mark % 2 == 1, weight.abs().flatten(), -weight.abs().flatten())
            found[name] = torch.zeros_like(values).scatter_(0, (mark // 2).long().clamp_max(len(values) - 1), values).view_as(weight)
        return found


CHEATERS = (
    Cheater(StaleCopies, "state", "It copies the weights above into buffers every 25 steps.", "reads"),
    Cheater(TrainedFeedback, "state", "It trains feedback weights towards the weights above (.grad = B - W).", "reads"),
    Cheater(CopiedOnce, "state", "It copies the weights once, when it is built, and gives the copies the same updates.", "reads"),
    Cheater(BornOfTheSameSeed, "state", "It builds the network again from torch's seed, and gives the copies the same updates.", "reads"),
    Cheater(MasterCopies, "state", "Its feedback learns in place of the weights above, and is written over them.", "network"),
    Cheater(AsksTheAverage, "state", "It reads the averages of the weights above that torch's ASGD keeps in its state.", "reads"),
    Cheater(DecaysIntoMomentum, "state", "It solves for the weights above from momentum, known gradients and weight decay.", "reads"),
    Cheater(
        SignsInAGenerator, "state", "It hides the signs of the weights above in states of random generators until the next step.", "reads"
    ),
    Cheater(AveragedNetwork, "state", "It reads averages of the weights above that it updates in after_update.", "reads"),
    Cheater(Heirloom, "state", "It begins with what an earlier rule of the process trained end to end.", "network", twice=True),
    Cheater(Watermarks, "state", "It marks each weight above with its place and sign in the last bits, and undoes any shuffling.", "reads"),
)
