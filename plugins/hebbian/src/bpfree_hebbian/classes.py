"""A Hebbian network per class, and a decision by the norms of their outputs: no readout, no loss, no gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Budget, Card, Network, OptimizerConfig, Phase, Rule, Step, TaskSpec, Traits, UsageError, always, option
from bpfree.network import add_gradient
from bpfree.network.builders import NetworkBuilder
from bpfree_hebbian.networks import Activation, Pixels, UnitLength

__all__ = ["CLASSES", "ClassNetwork", "ClassesConfig", "HebbianNorm", "HebbianNormConfig", "classes"]


class ClassNetwork(nn.Module):
    """The network of one class: a linear map without bias and an activation.

    Args:
        inputs: without parameters: makes vectors (N, D) of the task's inputs.
        linear: (N, D) to (N, K).
        activation: element by element.
    """

    def __init__(self, inputs: nn.Module, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.inputs, self.linear, self.activation = inputs, linear, activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, *input_shape) to (N, K)."""
        y: Tensor = self.activation(self.linear(self.inputs(x)))
        return y


@dataclass
class ClassesConfig:
    """Options of networks with one layer for each class."""

    units: int = option(16, "of each class's network", ge=1)
    activation: Literal["identity", "relu"] = option("identity", "of its units (relu is much worse: 44 against 90 % on digits, one seed)")
    inputs: Literal["normalised", "pixels", "unit"] = option(
        "unit", "what it sees: the task's normalised inputs, pixels in [0, 1], or pixels scaled to length 1"
    )


def classes(spec: TaskSpec, config: ClassesConfig | None = None) -> Network:
    """Build blocks ``c0``, ``c1``, ..., one per class, side by side; rows of random directions and length one."""
    config = config or ClassesConfig()

    def block() -> ClassNetwork:
        parts: list[nn.Module] = [Pixels(spec)] if config.inputs != "normalised" else []
        parts.append(nn.Flatten())
        parts += [UnitLength()] if config.inputs == "unit" else []
        linear = nn.Linear(spec.input_size, config.units, bias=False)
        with torch.no_grad():
            linear.weight.copy_(F.normalize(nn.init.normal_(linear.weight), dim=1))
        return ClassNetwork(nn.Sequential(*parts), linear, Activation(config.activation))

    return Network({f"c{index}": block() for index in range(spec.outputs)}, input_shape=spec.input_shape, readout=None, chain=False)


CLASSES = NetworkBuilder(classes, ClassesConfig, "a small network without bias for each class, side by side (hebbian-norm)")


@dataclass
class HebbianNormConfig:
    """Options of the networks per class."""

    update: Literal["hebb", "oja"] = option(
        "hebb", "y x^T with rows kept at length one, or Oja's subspace rule (each class learns its principal subspace; not the paper's)"
    )


class HebbianNorm(Rule):
    """Each class's network learns from that class's examples alone; the one with the longest output names the class.

    Itoh: Rethinking Deep Learning: Non-backpropagation and Non-optimization Machine Learning Approach Using Hebbian Neural Networks.
    2024, arXiv 2411.05861.
    """

    Config = HebbianNormConfig
    card = Card(
        "a Hebbian network per class; the one whose output has the largest norm names the class",
        paper="Itoh: Rethinking Deep Learning: Non-backpropagation and Non-optimization Machine Learning Approach Using Hebbian Neural "
        "Networks. 2024, arXiv 2411.05861",
        equation="of class c, over its examples: dW_c = lr mean (y x^T), rows of W_c divided by their norms, y = f(W_c x);  "
        "score_c(x) = |f(W_c x)|_2",
        notes="The paper's text was not at hand: of the abstract and reviews we take one network per digit, Hebbian updates on that "
        "digit's examples, the norm's decision (about 75 % on MNIST). Ours are one layer of 16 linear units without bias, inputs and rows "
        "of length one. All rows of a network then tend to plus or minus the leading direction of its class, close to the class's mean, so "
        "more units or passes add little. update=oja makes of it the subspace method (Watanabe's CLAFIC), which is not the paper's: the "
        "norm is that of the projection on the class's principal components. Updates are means over the batch times the number of "
        "classes, so a rare class learns more slowly. The reported loss takes norms for logits and means little.",
    )
    brings_network = True
    traits_of = always(
        Traits(
            "independent",
            0,
            0,
            supervision="labels",
            chain=False,
            readout="none",
            targets=("classes", "soft"),
            inputs="real",
            own_loss=False,
        )
    )
    config: HebbianNormConfig

    def __init__(self, network: Any, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        blocks = list(self.network.blocks.values())
        if len(blocks) != spec.outputs or not all(isinstance(block, ClassNetwork) for block in blocks):
            raise UsageError(
                f"hebbian-norm needs a network for each of the {spec.outputs} classes",
                where=f"blocks: {', '.join(self.network.names)}",
                fix="use network=auto or hebbian-classes",
            )

    @classmethod
    def optimizer_of(cls, config: HebbianNormConfig, network: Network | None = None) -> OptimizerConfig:
        """Return the optimiser with a rate for inputs of length one; longer inputs need rates smaller by the square of the length."""
        return OptimizerConfig("sgd", lr=0.1 if config.update == "hebb" else 1.0)

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return settings of a network with ``width`` units for each class."""
        return {"network.name": "hebbian-classes", "network.units": width} if kind == "dense" else None

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        return {"name": "hebbian-classes"}

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return the only phase; the twin, which learns nothing, takes a single pass."""
        if any(network.linear.weight.requires_grad for network in self.networks):
            return super().phases(budget)
        return [Phase("untrained", epochs=1)]

    @property
    def networks(self) -> list[ClassNetwork]:
        """Networks in the order of the classes."""
        return [cast(ClassNetwork, block) for block in self.network.blocks.values()]

    def weights(self) -> Tensor:
        """Return the weights (C, K, D) of all networks, as a copy."""
        return torch.stack([network.linear.weight.detach() for network in self.networks])

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        learning = [network.linear.weight for network in self.networks if network.linear.weight.requires_grad]
        if not learning:
            return {}
        x, weights = self.networks[0].inputs(batch.inputs), self.weights()
        y = self._outputs(x, weights)
        increment = self.increment(x, y, weights, self.spec.target_rows(batch, x.dtype))
        for network, change in zip(self.networks, increment.neg_(), strict=True):
            add_gradient(network.linear.weight, change)
        return {"weight_norm": torch.linalg.vector_norm(weights, dim=2).mean()}

    def increment(self, x: Tensor, y: Tensor, weights: Tensor, membership: Tensor) -> Tensor:
        """Return (C, K, D): means over the examples of a class, if the classes have equal shares; linear in the examples.

        Args:
            x: (N, D) what the networks see.
            y: (N, C, K) their outputs.
            weights: (C, K, D).
            membership: (N, C) how much each example counts for each class. No rows are picked: shapes never depend on labels.
        """
        own = y * membership.unsqueeze(2)
        increment = (own.flatten(1).t() @ x).to(weights.dtype).view_as(weights)  # autocast may have made less of it
        if self.config.update == "oja":
            moments = own.permute(1, 2, 0) @ y.transpose(0, 1)
            increment -= moments @ weights
        return increment.mul_(self.spec.outputs / len(x))

    @torch.no_grad()
    def after_update(self, groups: Sequence[str]) -> None:
        """Scale rows to length one after Hebb's rule, which lets them grow without bound; Oja's rule does not."""
        if self.config.update == "hebb":
            moved = [cast(ClassNetwork, self.network.blocks[name]) for name in groups if name in self.network.blocks]
            for network in moved:
                weight = network.linear.weight
                if weight.requires_grad:
                    weight.copy_(F.normalize(weight, dim=1))

    def _outputs(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the outputs (N, C, K) of all networks on inputs (N, D): one product for all classes."""
        u = (x @ weights.flatten(0, 1).t()).view(len(x), *weights.shape[:2])
        y: Tensor = self.networks[0].activation(u)
        return y

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return self.read(self.features(inputs), generator)

    def representations(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs of all networks together, (N, C, K): no single one is made for telling classes apart."""
        return {"all classes": self.features(inputs)}

    def features(self, inputs: Tensor) -> Tensor:
        """Return the outputs (N, C, K) of all networks."""
        return self._outputs(self.networks[0].inputs(inputs), self.weights())

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Return the Euclidean norms (N, C) of the networks' outputs (N, C, K)."""
        norms: Tensor = torch.linalg.vector_norm(features, dim=2)
        return norms

    def pictures(self, count: int = 64) -> dict[str, Tensor]:
        """Return the weights of each class's units as pictures, if inputs are images."""
        shape = self.spec.input_shape
        if len(shape) != 3 or shape[0] not in (1, 3) or math.prod(shape) != self.weights().shape[2]:
            return {}
        return {name: weight[:count].reshape(-1, *shape) for name, weight in zip(self.network.names, self.weights(), strict=True)}
