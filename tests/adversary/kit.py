"""What the cheating rules share: their description, a chain rule whose upward weights come from anywhere, and networks on the side."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Phase, Rule, Step, Traits, always
from bpfree.network import Call, add_gradient, recorded_calls
from bpfree.network.trace import Traces

Truth = Literal["reads", "executes", "labels", "network", "scores", "patches"]
LOCAL = Traits(dependence="all", downstream_weights=0, reverse_span=1, passes=1)


@dataclass(frozen=True)
class Cheater:
    """A rule that says it is local, and what it truly does.

    Attributes:
        rule: its class.
        family: which of the ten families it belongs to: the name of its module.
        how: one sentence on how it cheats.
        truth: ``reads``: its updates are functions of the weights above; ``executes``: it learns of these by executing blocks;
            ``labels``: it uses labels in predictions, or of test data; ``network``: the network is elsewhere, or one block;
            ``scores``: it falsifies metrics; ``patches``: it reaches into the examining process or the operating system.
        settings: words ``KEY=VALUE`` of ``rule.`` or ``network.`` with which it cheats.
        twice: whether only a second run, with the files of a first one, shows it.
    """

    rule: type[Rule]
    family: str
    how: str
    truth: Truth
    settings: tuple[str, ...] = ()
    twice: bool = False


@dataclass(frozen=True)
class Pass:
    """An ordinary forward pass, with the calls of its linear layers by the names of their blocks."""

    traces: Traces
    calls: Mapping[str, Call]


def linear(block: nn.Module) -> nn.Linear:
    """Return a block's linear layer."""
    return next(part for part in block.modules() if isinstance(part, nn.Linear))


def leaf(layer: nn.Linear) -> Tensor:
    """Return the parameter behind a layer's weight, which may have a parametrization."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight  # type: ignore[union-attr, return-value]


class Smuggler(Rule):
    """The chain rule by hand: credit goes down through ``matrices``, which are fixed and random if nobody cheats (feedback alignment)."""

    card = Card(
        "feedback alignment: the error goes down through fixed random weights", equation="delta_l = B_{l+1}^T delta_{l+1} * f'(a_l)"
    )
    traits_of = always(LOCAL)

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for name in self.above:
            weight = linear(self.network.blocks[name]).weight
            self.register_buffer(f"fixed_{name}", torch.randn(weight.shape).to(weight.dtype) / weight.shape[1] ** 0.5)

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return super().specimen(kind, depth, width) if kind == "dense" else None

    @property
    def above(self) -> list[str]:
        """Names of the blocks above the first."""
        return self.network.names[1:]

    def fixed(self) -> dict[str, Tensor]:
        """Return the random feedback weights: what an honest rule uses."""
        return {name: self.get_buffer(f"fixed_{name}") for name in self.above}

    def weights(self) -> dict[str, Tensor]:
        """Return the true weights above, which a local rule may not use."""
        return {name: linear(self.network.blocks[name]).weight.detach() for name in self.above}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        """Return, for each block above the first, the matrix through which its credit goes down."""
        return self.fixed()

    def execute(self, batch: Batch, step: Step) -> Pass:
        """Execute all blocks once, each with a graph of its own."""
        layers = {name: linear(block) for name, block in self.network.blocks.items()}
        with recorded_calls(*layers.values()) as calls:
            traces = self.network.traces(batch.inputs)
        return Pass(traces, {name: calls[layer][0] for name, layer in layers.items()})

    def down(self, name: str, delta: Tensor, matrix: Tensor, batch: Batch) -> Tensor:
        """Carry the credit of a block's pre-activations down to its input."""
        return delta @ matrix

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        done = self.execute(batch, step)
        scores = done.traces[-1].output.detach()
        signal = self.spec.error(scores, batch)
        matrices = self.matrices(done, batch, step)
        for trace in reversed(done.traces):
            if not trace.output.requires_grad:
                break
            call, layer = done.calls[trace.name], linear(trace.block)
            (delta,) = torch.autograd.grad(trace.output, call.output, signal)
            add_gradient(leaf(layer), delta.T @ call.input.detach())
            add_gradient(layer.bias, delta.sum(0))
            if trace.index:
                signal = self.down(trace.name, delta, matrices[trace.name], batch)
        return {"loss": self.spec.loss(scores, batch)}


class Sometimes(Smuggler):
    """Uses the weights above at moments of its choice."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        """Tell whether to cheat now."""
        return True

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.weights() if self.cheats(batch, step) else self.fixed()


class Shadow:
    """A copy of a network that learns end to end, and that no module owns."""

    def __init__(self, network: nn.Module, spec: Any, lr: float = 3e-3) -> None:
        self.network, self.spec = copy.deepcopy(network).train(), spec
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)

    def learn(self, batch: Batch) -> None:
        """Take a step of back-propagation."""
        with torch.enable_grad():
            self.optimizer.zero_grad()
            self.spec.loss(self.network(batch.inputs), batch).backward()
            self.optimizer.step()

    @torch.no_grad()
    def replace(self, network: nn.Module) -> None:
        """Overwrite the weights of a network with the shadow's."""
        for own, other in zip(network.parameters(), self.network.parameters(), strict=True):
            own.copy_(other)


class Stash(dict[str, Any]):
    """A dictionary in which a rule hides modules and other objects: its copy is empty."""

    def __deepcopy__(self, memo: Any) -> Stash:
        return Stash()


def whole_gradient(rule: Rule, batch: Batch) -> dict[nn.Parameter, Tensor]:
    """Return the true gradient of the task's loss, end to end."""
    parameters = [p for p in rule.network.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = rule.spec.loss(rule.network(batch.inputs), batch)
        return dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))


__all__ = ["LOCAL", "Cheater", "Pass", "Phase", "Shadow", "Smuggler", "Sometimes", "Stash", "linear", "whole_gradient"]
