"""Mono-forward: each layer has a projection to the classes, and learns from the cross-entropy of its own scores.

Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors. 2025, arXiv 2501.09238. With
h_l = relu(u_l), u_l = W_l h_{l-1} + b_l, and a projection M_l, (C, d_l), without bias,

    s_l = M_l h_l,   loss_l = CE(s_l, y),   dloss_l / dM_l = (p_l - y) h_l^T,   dloss_l / dW_l = (relu'(u_l) * M_l^T (p_l - y)) h_{l-1}^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Step, Streamed, TaskSpec, Trace, Traits, UsageError, always, option

__all__ = ["MonoForward", "MonoForwardConfig"]


@dataclass
class MonoForwardConfig:
    """Options of mono-forward."""

    prediction: Literal["sum", "last"] = option("sum", "scores of all layers, summed, or those of the last layer alone")


class MonoForward(Streamed):
    """Every block learns to be projected to the right class; the projections are all that predicts."""

    Config = MonoForwardConfig
    card = Card(
        "mono-forward: each layer is projected to the classes, and learns from its own cross-entropy in one forward pass",
        paper="Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors. 2025, arXiv "
        "2501.09238",
        equation="s_l = M_l h_l;  loss_l = CE(s_l, y);  class = argmax sum_l s_l, or argmax s_L",
        notes="Local classifiers without bias, of which the last layer's, or all together, stand for the readout: the network's own is "
        "left out. The paper's text was not at hand: initial projections are torch's, convolutions are projected from all their "
        "positions, and rates are ours.",
    )
    traits_of = always(
        Traits("upstream", downstream_weights=0, reverse_span=1, readout="none", targets=("classes", "soft", "multilabel"), own_loss=False)
    )
    optimizer_of = always(OptimizerConfig("adam", lr=1e-3))
    config: MonoForwardConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if spec.output_size != (spec.outputs,):
            raise UsageError(
                f"a projection gives (N, {spec.outputs}), but the task has outputs of shape {spec.output_size}",
                where=f"task {spec.name}",
                fix="choose a task with a class for each example",
            )
        sizes = {name: self.network.shapes[name].numel() for name in self.network.hidden}
        self.projections = nn.ModuleDict({name: nn.Linear(size, spec.outputs, bias=False) for name, size in sizes.items()})

    def project(self, name: str, output: Tensor) -> Tensor:
        """Return the scores (N, C) of a block's output (N, ...)."""
        scores: Tensor = self.projections[name](output.flatten(1))
        return scores

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        return self.spec.loss(self.project(trace.name, trace.output), batch)

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the sum of all layers' losses."""
        return torch.stack([self.local_loss(trace, batch, step) for trace in self.network.stream(batch.inputs)]).sum()

    def scores(self, inputs: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each block's scores (N, C) by name, from one pass."""
        for trace in self.network.stream(inputs, grad=False):
            yield trace.name, self.project(trace.name, trace.output)

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        found = [scores for _, scores in self.scores(inputs)]
        return torch.stack(found).sum(0) if self.config.prediction == "sum" else found[-1]

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return each block's own prediction, and their sum where that is not the rule's."""
        found = dict(self.scores(inputs))
        return found if self.config.prediction == "sum" else {**found, "sum": torch.stack(list(found.values())).sum(0)}
