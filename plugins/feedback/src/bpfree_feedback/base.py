"""Layers that pass credit through weights of their own: what feedback alignment and its relatives share.

Lillicrap, Cownden, Tweed, Akerman: Random synaptic feedback weights support error backpropagation for deep learning. Nature
Communications 7 (2016). With u_l = W_l h_{l-1} + b_l and h_l = f(u_l),

    delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l),   grad W_l = delta_l h_{l-1}^T,

where back-propagation has B = W. Everything that is no linear layer or convolution (normalisations, poolings, residual sums) passes credit
exactly. The rules differ in where B comes from.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, Step, TaskSpec, Traits, UsageError, option
from bpfree.network import evaluating, feedback_layers, feedback_weights, replaced_backward
from bpfree.network.closed_form import is_linear
from bpfree.network.initialisation import INITIALISATIONS, Initialisation
from bpfree_feedback import agreement

__all__ = ["FeedbackConfig", "FeedbackRule", "FeedbackWeights", "draw", "passes_scales"]


MOST_NAMED = 4


@dataclass
class FeedbackConfig:
    """Options of all rules whose layers have feedback weights."""

    init: Initialisation = option("xavier-uniform", "distribution of the feedback weights (torch: as torch draws weights of its layers)")
    scale: float = option(1.0, "factor on the feedback weights as they are drawn", gt=0)
    exact: list[str] = option(
        factory=list,
        help="layers that pass credit through their forward weights, by name or pattern, such as readout or '*.downsample.*'",
    )
    output: Literal["task", "logistic"] = option(
        "task", "whose error is sent down: the task's loss, or logistic outputs, one for each class (the binary cross-entropies' sum)"
    )
    measure_every: int = option(
        100, "steps between measurements of angle and norm ratio of feedback and forward weights, as metrics; 0: never", ge=0
    )


def draw(like: Tensor, init: Initialisation, scale: float) -> Tensor:
    """Draw feedback weights of this shape, type and device from torch's generator."""
    drawn = torch.empty_like(like, requires_grad=False)
    if init == "torch":
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    else:
        INITIALISATIONS[init](drawn)
    return drawn.mul_(scale)


class FeedbackWeights(nn.Module):
    """Feedback weights by the name of their layer: buffers, or parameters where an optimiser moves them.

    Args:
        drawn: by the layer's name.
        learned: whether they are parameters.

    Attributes:
        keys: the layer's name to the name of its tensor here, which may have no dots.
    """

    def __init__(self, drawn: Mapping[str, Tensor], *, learned: bool) -> None:
        super().__init__()
        self.keys = {name: name.replace(".", "__") for name in drawn}
        for name, value in drawn.items():
            if learned:
                self.register_parameter(self.keys[name], nn.Parameter(value))
            else:
                self.register_buffer(self.keys[name], value)

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = getattr(self, self.keys[name])
        return value


def of_whole_step(step: Step, name: str) -> torch.Generator:
    """Make a generator keyed by (seed, name, step index): the same draws in all micro-batches of a step and in all processes."""
    part, step.part = step.part, 0
    try:
        return step.generator_for(name)
    finally:
        step.part = part


class FeedbackRule(Rule):
    """Base of the rules: layers, credit block by block, and how far feedback and forward weights agree.

    Attributes:
        layers: the layer's name to the name of its weight in the network, for all layers that have feedback weights.
        feedback: the feedback weights as they are kept.
    """

    Config: ClassVar[type[FeedbackConfig]] = FeedbackConfig
    learned: ClassVar[bool] = False
    """Whether an optimiser moves the feedback weights."""
    config: Any

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if self.config.output == "logistic" and spec.targets not in ("classes", "soft", "multilabel"):
            raise UsageError(f"logistic outputs cannot learn from targets of kind {spec.targets!r}", fix="use rule.output=task")
        self._found = feedback_layers(self.network)
        self.layers = self._layers(layers_of(self.network, self.config.exact))
        drawn = {name: value for name in self.layers if (value := self.drawn(name)) is not None}
        self.feedback = FeedbackWeights(drawn, learned=self.learned)

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Without a network: on one whose parameters are those of linear layers and convolutions."""
        transported = bool(config.exact) or (network is not None and passes_scales(network))
        return Traits("all", downstream_weights="all" if transported else 0, reverse_span=1)

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=1e-3)

    @abstractmethod
    def backward_weights(self, generator: Callable[[], torch.Generator]) -> dict[str, Tensor]:
        """Return the weights through which credit passes in this step, by the layer's name.

        Args:
            generator: makes the generator of draws for this step alone.
        """

    def drawn(self, name: str) -> Tensor | None:
        """Draw the feedback weights that are kept for a layer; ``None``: it needs none."""
        return draw(self._weight(name), self.config.init, self.config.scale)

    def block_of(self, name: str) -> str:
        """Name the block that a layer is in."""
        return name.partition(".")[0]

    def _weight(self, name: str) -> nn.Parameter:
        return self.network.get_parameter(self.layers[name])

    def _layers(self, layers: dict[str, str]) -> dict[str, str]:
        """Leave out layers below which no credit goes, as a pass with an example shows.

        Raises:
            UsageError: others would keep their exact backward pass without being named in ``exact``.
        """
        with torch.enable_grad(), evaluating(self.network), replaced_backward(self.network, self._given(layers)) as replaced:
            self.network(self._example())
        unmet = {_short(name): reason for name, reason in replaced.unmet.items() if not _is_exact(_short(name), self.config.exact)}
        if unmet:
            name, reason = next(iter(unmet.items()))
            outer = [one for one in unmet if not any(one.startswith(f"{other}.") for other in unmet)]
            more = f", and {len(outer) - MOST_NAMED} more" if len(outer) > MOST_NAMED else ""
            raise UsageError(
                f"{type(self).__name__} cannot send credit through other weights in {name or 'the network'}: {reason}",
                where=f"{len(outer)} layers of the network",
                fix=f"let them pass credit exactly, by name or pattern: rule.exact=[{','.join(outer[:MOST_NAMED])}]{more}",
            )
        return {name: weight for name, weight in layers.items() if weight in replaced.used}

    def _given(self, layers: Mapping[str, str]) -> dict[str, Tensor]:
        return {weight: self.network.get_parameter(weight) for weight in layers.values()}

    def _example(self) -> Any:
        """Return inputs of two examples, as the network takes them."""
        parameter = next(self.network.parameters())
        example = self.network.example if self.network.example is not None else self.spec.example(2)

        def there(leaf: Tensor) -> Tensor:
            return leaf.to(parameter.device, parameter.dtype) if leaf.is_floating_point() else leaf.to(parameter.device)

        return torch.utils._pytree.tree_map(there, example)

    def _by_weight(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.layers[name]: value for name, value in found.items()}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        backward = self.backward_weights(lambda: of_whole_step(step, "feedback"))
        with replaced_backward(self.network, self._by_weight(backward), self._found):
            traces = self.network.traces(batch.inputs, input_grad="needed")
        scores = traces[-1].output.detach()
        loss, signal = self.loss_and_error(scores, batch)
        traces.send_down(signal)
        metrics = {"loss": loss}
        if self.config.measure_every and step.index % self.config.measure_every == 0:
            metrics |= agreement.metrics(self._pairs(backward))
        return metrics

    def loss_and_error(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, and its derivative by the scores, (N, C), with the 1/N of the mean."""
        if self.config.output == "task":
            return self.spec.loss_and_error(scores, batch)
        return self._logistic(scores, batch), (scores.sigmoid() - self._rows(scores, batch)) / len(batch)

    def _rows(self, scores: Tensor, batch: Batch) -> Tensor:
        return self.spec.target_rows(batch, scores.dtype)

    def _logistic(self, scores: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, self._rows(scores, batch), reduction="sum") / len(batch)

    def objective(self, batch: Batch, step: Step) -> Tensor | None:
        return None if self.config.output == "task" else self._logistic(self.network(batch.inputs), batch)

    def feedback_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return forward and feedback weights of each layer, by the layer's name."""
        device = next(self.network.parameters()).device
        return self._pairs(self.backward_weights(lambda: torch.Generator(device).manual_seed(0)))

    def _pairs(self, backward: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (self._weight(name), value) for name, value in backward.items()}

    def plan(self) -> str:
        exact = [name for name in map(_short, feedback_weights(self.network)) if _is_exact(name, self.config.exact)]
        lines = [f"credit passes through feedback weights in {len(self.layers)} layers: {', '.join(self.layers)}"]
        return "\n".join([*lines, *([f"through the forward weights in: {', '.join(exact)}"] if exact else [])])


def layers_of(network: Network, exact: list[str]) -> dict[str, str]:
    """Return the weights to which feedback weights belong, by the name of the layer: of its block, where that has no other layer.

    Raises:
        UsageError: an entry of ``exact`` that names no layer.
    """
    names = {_short(weight): weight for weight in feedback_weights(network)}
    every = {_short(name) for name, _ in network.named_parameters()}
    for entry in exact:
        if not any(_is_exact(name, [entry]) for name in every):
            raise UsageError(f"rule.exact names no layer: {entry!r}", where="rule.exact", fix=f"layers are: {', '.join(names)}")
    blocks = [name.partition(".")[0] for name in names]
    return {
        name.partition(".")[0] if blocks.count(name.partition(".")[0]) == 1 else name: weight
        for name, weight in names.items()
        if not _is_exact(name, exact)
    }


def passes_scales(network: Network) -> bool:
    """Tell whether credit on its way down meets parameters of other layers, such as the scales of normalisations, which pass it exactly."""
    above = list(network.blocks.values())[1:]
    owners = [owner for block in above for owner in block.modules() if next(owner.parameters(recurse=False), None) is not None]
    return not all(is_linear(owner) for owner in owners)


def _short(weight: str) -> str:
    """Name a layer by its place in the network's blocks, from the name of its weight."""
    return weight.removeprefix("blocks.").rpartition(".")[0]


def _is_exact(name: str, exact: list[str]) -> bool:
    """Tell whether a layer is named, itself or by something that it is in, or meets a pattern."""
    return any(name == entry or name.startswith(f"{entry}.") or fnmatchcase(name, entry) for entry in exact)
