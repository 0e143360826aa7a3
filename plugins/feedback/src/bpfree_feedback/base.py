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
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, Step, TaskSpec, Traits, UsageError, option
from bpfree.network import Traces, evaluating, feedback_weights, replaced_backward
from bpfree.network.initialisation import INITIALISATIONS, Initialisation
from bpfree_feedback import agreement

__all__ = ["FeedbackConfig", "FeedbackRule", "FeedbackWeights", "draw"]


@dataclass
class FeedbackConfig:
    """Options of all rules whose layers have feedback weights."""

    init: Initialisation = option("xavier-uniform", "distribution of the feedback weights (torch: as torch draws weights of its layers)")
    scale: float = option(1.0, "factor on the feedback weights as they are drawn", gt=0)
    exact: list[str] = option(
        factory=list,
        help="layers that pass credit through their forward weights, by name or pattern, such as readout or '*.downsample.*'",
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
    """

    def __init__(self, drawn: Mapping[str, Tensor], *, learned: bool) -> None:
        super().__init__()
        self._keys = {name: name.replace(".", "__") for name in drawn}
        for name, value in drawn.items():
            if learned:
                self.register_parameter(self._keys[name], nn.Parameter(value))
            else:
                self.register_buffer(self._keys[name], value)

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = getattr(self, self._keys[name])
        return value


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
        self.layers = layers_of(self.network, self.config.exact)
        drawn = {name: draw(self._weight(name), self.config.init, self.config.scale) for name in self.layers}
        self.feedback = FeedbackWeights(drawn, learned=self.learned)
        self._check_layers()

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        return Traits("all", downstream_weights="all" if config.exact else 0, reverse_span=1)

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=1e-3)

    @abstractmethod
    def backward_weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the weights through which credit passes in this step, by the layer's name.

        Args:
            generator: of draws for this step alone.
        """

    def _weight(self, name: str) -> nn.Parameter:
        return self.network.get_parameter(self.layers[name])

    def _check_layers(self) -> None:
        """Refuse layers that would keep their exact backward pass without being named in ``exact``."""
        example = self.network.example if self.network.example is not None else self.spec.example(2)
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        example = torch.utils._pytree.tree_map(lambda leaf: leaf.to(device), example)
        feedback = self._by_weight({name: self.feedback[name] for name in self.layers})
        with torch.no_grad(), evaluating(self.network), replaced_backward(self.network, feedback) as replaced:
            self.network(example)
        unmet = {name: reason for name, reason in replaced.unmet.items() if not _is_exact(_short(name, self.network), self.config.exact)}
        if unmet:
            name, reason = next(iter(unmet.items()))
            raise UsageError(
                f"{type(self).__name__} cannot send credit through other weights in {_short(name, self.network)}: {reason}",
                where=f"{len(unmet)} weights of the network",
                fix=f"let them pass credit exactly: rule.exact=[{','.join(sorted({_short(name, self.network) for name in unmet}))}]",
            )

    def _by_weight(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.layers[name]: value for name, value in found.items()}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        backward = self.backward_weights(step.generator_for("feedback"))
        with replaced_backward(self.network, self._by_weight(backward)):
            traces = self.traces(batch.inputs)
        scores = traces[-1].output.detach()
        loss, signal = self.spec.loss_and_error(scores, batch)
        send_down(traces, signal)
        metrics = {"loss": loss}
        if self.config.measure_every and step.index % self.config.measure_every == 0 and step.part == 0:
            metrics |= agreement.metrics({name: (self._weight(name), value) for name, value in backward.items()})
        return metrics

    def traces(self, x: Any) -> Traces:
        """Execute all blocks; those above the lowest one that learns return the cotangent of their input."""
        traces = Traces()
        learning = False
        for name, block in self.network.blocks.items():
            trace = self.network.trace(name, x, input_grad=learning)
            learning = learning or any(p.requires_grad for p in block.parameters())
            traces.append(trace)
            x = trace.output
        return traces

    def feedback_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return forward and feedback weights of each layer, by the layer's name."""
        device = next(self.network.parameters()).device
        backward = self.backward_weights(torch.Generator(device).manual_seed(0))
        return {name: (self._weight(name), value) for name, value in backward.items()}

    def plan(self) -> str:
        exact = [_short(name, self.network) for name in feedback_weights(self.network) if name not in self.layers.values()]
        lines = [f"credit passes through feedback weights in {len(self.layers)} layers: {', '.join(self.layers)}"]
        return "\n".join([*lines, *([f"through the forward weights in: {', '.join(exact)}"] if exact else [])])


def send_down(traces: Traces, signal: Tensor) -> None:
    """Send the error down from block to block; each adds to its gradients."""
    cotangent: Tensor | None = signal
    for trace in reversed(traces):
        if cotangent is not None:
            cotangent = trace.backward(cotangent)


def layers_of(network: Network, exact: list[str]) -> dict[str, str]:
    """Return the weights to which feedback weights belong, by the name of the layer: of its block, where that has no other layer.

    Raises:
        UsageError: an entry of ``exact`` that names no layer.
    """
    names = {_short(weight, network): weight for weight in feedback_weights(network)}
    every = {_short(name, network) for name, _ in network.named_parameters()}
    for entry in exact:
        if not any(_is_exact(name, [entry]) for name in every):
            raise UsageError(f"rule.exact names no layer: {entry!r}", where="rule.exact", fix=f"layers are: {', '.join(names)}")
    blocks = [name.split(".")[0] for name in names]
    return {
        name if blocks.count(name.split(".")[0]) > 1 else name.split(".")[0]: weight
        for name, weight in names.items()
        if not _is_exact(name, exact)
    }


def _short(weight: str, network: Network) -> str:
    """Name a layer by its place in the network's blocks."""
    return weight.removeprefix("blocks.").rpartition(".")[0]


def _is_exact(name: str, exact: list[str]) -> bool:
    """Tell whether a layer is named, itself or by something that it is in, or meets a pattern."""
    return any(name == entry or name.startswith(f"{entry}.") or fnmatchcase(name, entry) for entry in exact)
