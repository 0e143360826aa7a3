"""Direct random target projection: fixed random projections of the target teach the hidden blocks, without any error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, TaskSpec, Trace, Traits, always, option
from bpfree.network import evaluating, kept_buffers, recorded_calls
from bpfree_feedback.anatomy import NONLINEARITIES

__all__ = ["DRTPConfig", "DirectRandomTargetProjection"]


@dataclass
class DRTPConfig:
    """Options of direct random target projection."""

    scale: float = option(1.0, "factor on the feedback weights, which are He's uniform ones: up to sqrt(6 / units) in size", gt=0)
    place: Literal["activation", "output"] = option(
        "activation", "where targets are projected to: a block's last nonlinearity (before a pooling, as published), or its output"
    )
    readout: Literal["task", "bce"] = option(
        "task", "loss of the readout: the task's, or the published one, a sigmoid's binary cross-entropy"
    )
    hidden_lr: float | None = option(None, "learning rate of the hidden blocks (none: that of the readout)", gt=0)


class DirectRandomTargetProjection(Rule):
    """Each hidden block is pushed along a fixed random direction for each class, as soon as it has been executed."""

    Config = DRTPConfig
    card = Card(
        "direct random target projection: fixed random projections of the target, no error, no feedback path",
        paper="Frenkel, Lefebvre, Bol: Learning without feedback: Fixed random learning signals allow for feedforward training of deep "
        "neural networks. Frontiers in Neuroscience 15, 2021, arXiv 1909.01311",
        equation="delta_l = D_l y;  grad W_l = (delta_l * f'(a_l)) h_{l-1}^T",
        notes="A hidden block's signal is the same for all examples of a class and never becomes smaller, so that units saturate if their "
        "rate is not much below the readout's (rule.hidden_lr, rule.scale). The authors sum hidden updates over the batch and average the "
        "readout's; here both are means, so that their rate is that of hidden_lr over the batch size. On tasks that frozen random "
        "features solve (digits) it is no better than these.",
    )
    traits_of = always(
        Traits(
            dependence="upstream",
            downstream_weights=0,
            reverse_span=1,
            targets=("classes", "soft", "multilabel", "real"),
            inputs="real",
            own_loss=False,
        )
    )
    optimizer_of = always(OptimizerConfig("adam", lr=1e-3))
    config: DRTPConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.places = {name: self._place(name) for name in self.network.hidden}
        targets = self.network.shapes[self.network.readout or ""].numel()
        for name, shape in self._shapes().items():
            bound = self.config.scale * math.sqrt(6 / shape.numel())
            feedback = torch.empty(targets, *shape).uniform_(-bound, bound).to(self.network.dtype)
            self.register_buffer(f"feedback_{name}", feedback)

    def _place(self, name: str) -> nn.Module:
        """Return the module whose output is taught."""
        block = self.network.blocks[name]
        if self.config.place == "output" or type(block) is not nn.Sequential:
            return block
        return next((part for part in reversed(block) if isinstance(part, NONLINEARITIES)), block)

    @torch.no_grad()
    def _shapes(self) -> dict[str, torch.Size]:
        """Return the shape of what is taught, by block, from a dry run."""
        where = next((p for p in self.network.parameters()), torch.empty(0))
        with recorded_calls(*self.places.values()) as calls, kept_buffers(self.network), evaluating(self.network):
            self.network(torch.zeros(1, *self.network.input_shape, device=where.device, dtype=self.network.dtype))
        return {name: calls[place][-1].output.shape[1:] for name, place in self.places.items()}

    def group_options(self) -> dict[str, dict[str, Any]]:
        return {} if self.config.hidden_lr is None else {name: {"lr": self.config.hidden_lr} for name in self.network.hidden}

    def _taught(self, batch: Batch) -> Iterator[tuple[Trace, Tensor, Tensor | None]]:
        """Execute block by block; yield the trace, what is taught, and its signal (none for the readout), one graph at a time."""
        rows = self.spec.target_rows(batch, self.network.dtype).flatten(1) / len(batch)
        traces = self.network.stream(batch.inputs)
        for name, place in self.places.items():
            with recorded_calls(place) as calls:
                trace = next(traces)
            taught = calls[place][0].output
            yield trace, taught, (rows @ self.get_buffer(f"feedback_{name}").flatten(1)).view_as(taught)
        trace = next(traces)
        yield trace, trace.output, None

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = {}
        for trace, taught, signal in self._taught(batch):
            if signal is None:
                scores = trace.output.detach()
                metrics["loss"] = self.spec.loss(scores, batch)
                trace.backward(self._error(scores, batch))
            elif taught.requires_grad:
                taught.backward(signal.to(taught.dtype))
        return metrics

    def _error(self, scores: Tensor, batch: Batch) -> Tensor:
        if self.config.readout == "task":
            return self.spec.error(scores, batch)
        return (scores.sigmoid() - self.spec.target_rows(batch, scores.dtype)) / scores.numel()

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the sum over hidden blocks of ``<D_l y, h_l>``, a mean over examples, and the readout's loss."""
        total = torch.zeros((), device=batch.inputs.device)
        for trace, taught, signal in self._taught(batch):
            if signal is not None:
                total = total + (taught * signal).sum()
            elif self.config.readout == "task":
                total = total + self.spec.loss(trace.output, batch)
            else:
                rows = self.spec.target_rows(batch, trace.output.dtype)
                total = total + F.binary_cross_entropy_with_logits(trace.output, rows)
        return total
