"""The back-propagation baseline of the NoProp paper: the same blocks as a chain, trained end to end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Card, Metrics, Traits
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER, TARGETS, inputs_of
from bpfree_noprop.chain import ChainConfig, ChainRule
from bpfree_noprop.stems import shared_stem

__all__ = ["Mixture", "NoPropBackprop", "NoPropBackpropConfig"]


@dataclass
class NoPropBackpropConfig(ChainConfig):
    """Options of back-propagation through NoProp's blocks."""

    share: float = option(0.5, "of a block's estimate in the next state before it is learned (alpha_t)", gt=0, lt=1)


class Mixture(nn.Module):
    """``z_t = (1 - alpha_t) z_{t-1} + alpha_t uhat_t`` with learned ``alpha_t = tanh(w_t)``, t = 1..T.

    Args:
        T: number of states.
        share: alpha at the start; the paper does not say.
    """

    def __init__(self, T: int, share: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((T,), share).atanh())

    def forward(self, z: Tensor, uhat: Tensor, t: int) -> Tensor:
        return z + self.weight[t - 1].tanh() * (uhat - z)


class NoPropBackprop(ChainRule):
    """``z_0 ~ N(0, I)`` in training; the loss is the cross-entropy of the head on z_T, and its gradient passes through all blocks."""

    Config = NoPropBackpropConfig
    config: NoPropBackpropConfig
    card = Card(
        "back-propagation through NoProp's blocks, chained: the NoProp paper's own baseline",
        paper=PAPER,
        equation="z_t = (1 - alpha_t) z_{t-1} + alpha_t softmax(f_t(x, z_{t-1})) W, alpha_t = tanh(w_t), z_0 ~ N(0, I);  "
        "L = CE(head(z_T), y)",
        notes="End-to-end back-propagation, for comparison on equal networks. How w_t starts is not in the paper (ours: alpha = 0.5).",
    )

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare back-propagation; a stem of one's own may take any inputs."""
        return Traits("all", "all", "all", chain=False, readout="none", targets=TARGETS, inputs=inputs_of(network), own_loss=False)

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropBackpropConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.mix = Mixture(self.config.T, self.config.share)

    def states(self, inputs: Any, generator: torch.Generator | None) -> Sequence[Tensor]:
        """Return z_0 to z_T, each (N, d)."""
        inputs = self.view(inputs)
        path = [self.start(inputs, generator)]
        for t, block in self.denoisers():
            path.append(self.mix(path[-1], self.estimate(block(inputs, path[-1])), t))
        return path

    def objective(self, batch: Batch, step: Step) -> Tensor:
        with ExitStack() as masks:
            if stem := shared_stem(self.network):
                masks.enter_context(stem.masks(step.generator_for))
            for t, block in self.denoisers():
                masks.enter_context(block.masks(step.generator_for, f"t{t}"))
            z = self.states(batch.inputs, step.generator_for("start"))[-1]
        return self.head_loss(z, self.rows(batch))

    def credit(self, batch: Batch, step: Step) -> Metrics:
        loss = self.objective(batch, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Return scores (N, m), or real values of the target's shape, of the head on z_T."""
        z = self.states(inputs, generator if self.config.inference == "sampled" else None)[-1]
        return self.shaped(self.head(z, self.embed))
