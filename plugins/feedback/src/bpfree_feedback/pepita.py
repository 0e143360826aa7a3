"""PEPITA: a second forward pass, on inputs that the output's error has modulated, in place of a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, TaskSpec, Traits, always, option
from bpfree.network import add_gradients, kept_buffers
from bpfree.network.closed_form import parameter_gradients
from bpfree_feedback.anatomy import Seen, take_apart, watched

__all__ = ["PEPITA", "PEPITAConfig"]


@dataclass
class PEPITAConfig:
    """Options of PEPITA."""

    scale: float = option(0.05, "size of the projection of errors to inputs: its entries are uniform up to scale sqrt(6 / inputs)", gt=0)
    presynaptic: Literal["modulated", "standard"] = option(
        "modulated",
        "the pass whose inputs of a layer are multiplied with the change of its outputs: the second, as published, or the first",
    )


class PEPITA(Rule):
    """The error is added to the input by a fixed random projection; layers learn from what that changes in them."""

    Config = PEPITAConfig
    card = Card(
        "PEPITA: learning from the change of activities when the error is added to the input, without a backward pass",
        paper="Dellaferrera, Kreiman: Error-driven Input Modulation: Solving the Credit Assignment Problem without a Backward Pass. ICML "
        "2022, arXiv 2201.11665",
        equation="x' = x + B e;  grad W_l = (h_l - h'_l) h'_{l-1}^T;  grad W_L = e' h'_{L-1}^T",
        notes="For a linear hidden layer this is direct feedback alignment with D = -(W_1 B)^T at the modulated input. The size of "
        "hidden updates goes with rule.scale, that of the readout's does not. Both passes have the same dropout masks, and the second "
        "leaves running statistics alone; scales and shifts of normalisations do not learn. The authors take pixels of 0 to 1 "
        "(task.normalise=none) and layers without bias (biases learn here where there are any). Tasks that frozen random features solve, "
        "such as digits, show nothing of it.",
    )
    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=0, passes=2, inputs="real"))
    optimizer_of = always(OptimizerConfig("sgd", lr=0.01, momentum=0.9))
    waivers = {
        "hidden-blocks-needed": "at the published size of the projection, hidden layers move so little in some hundred steps of "
        "digits that predictions are those of the readout on features as they were drawn; the page says what was found on CIFAR-10",
    }
    config: PEPITAConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.layers = take_apart(self.network)
        outputs = self.network.shapes[self.network.readout or ""].numel()
        bound = self.config.scale * math.sqrt(6 / spec.input_size)
        projection = torch.empty(outputs, spec.input_size).uniform_(-bound, bound)
        self.register_buffer("projection", projection.to(self.network.dtype))
        self.drops = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in self.network.modules())

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        if spec.is_image and spec.input_shape[0] > 1:
            return {"name": "mlp", "widths": [1024], "init": "he-uniform", "dropout": 0.1}
        return {"name": "mlp", "depth": 1, "init": "he-uniform"}

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x = batch.inputs
        masks = _random_state(x.device) if self.drops else None
        first = self._execute(x)
        scores = first[-1].u
        error = self.spec.error(scores, batch).flatten(1) * len(batch)
        modulated = x + (error.to(self.get_buffer("projection").dtype) @ self.get_buffer("projection")).to(x.dtype).view_as(x)
        with kept_buffers(self.network), _drawn_again(masks, x.device):
            second = self._execute(modulated)
        for before, after in zip(first[:-1], second[:-1], strict=True):
            if before.anatomy.learns:
                self._learn(before, after, (before.response - after.response) / len(batch))
        self._learn(first[-1], second[-1], self.spec.error(second[-1].u, batch))
        return {"loss": self.spec.loss(scores, batch)}

    def _execute(self, x: Tensor) -> list[Seen]:
        with watched(self.layers) as seen:
            return [seen(layer, trace) for layer, trace in zip(self.layers, self.network.stream(x, grad=False), strict=True)]

    def _learn(self, before: Seen, after: Seen, signal: Tensor) -> None:
        source = after.source if self.config.presynaptic == "modulated" else before.source
        add_gradients(before.anatomy.site, parameter_gradients(before.anatomy.site, source, signal))


State = tuple[Tensor, Tensor | None]


def _random_state(device: torch.device) -> State:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _drawn_again(state: State | None, device: torch.device) -> Iterator[None]:
    """Let torch's global generators draw inside what they drew from ``state`` on, which leaves them where they are now."""
    if state is None:
        yield
        return
    now = _random_state(device)
    _restore(state, device)
    try:
        yield
    finally:
        _restore(now, device)


def _restore(state: State, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
