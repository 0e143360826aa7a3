"""Kolen-Pollack: feedback weights get the updates of the forward weights, and the decay of both brings them together.

Kolen, Pollack: Backpropagation without weight transport. 1994; Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight
transport. NeurIPS 2019, arXiv 1904.05391. What two weights have in common is added to both, so their difference only decays:

    W(t+1) - B(t+1) = (1 - lr decay) (W(t) - B(t)),

exactly, for gradient descent without momentum, and for any optimiser that gives equal gradients equal steps and decays apart from them
(AdamW, SGD with momentum is not of them: it applies the decay through its memory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Card, Network, OptimizerConfig
from bpfree_feedback.base import FeedbackRule

__all__ = ["KolenPollack"]


class KolenPollack(FeedbackRule):
    """Kolen-Pollack: feedback weights get the updates of the forward weights, and both decay."""

    learned = True
    card = Card(
        "Kolen-Pollack: feedback weights get the updates of the forward weights, and decay brings both together",
        paper="Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport. NeurIPS 2019, arXiv 1904.05391; "
        "Kolen, Pollack: Backpropagation without weight transport. 1994",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  grad B_l = grad W_l;  W - B shrinks by 1 - lr decay in each step",
        notes="Feedback weights are in the group of their block, so that rate, decay, schedule and the factor of clipping are those of the "
        "forward weights; the norm that is clipped has both. Without optimizer.weight_decay the difference stays as it is drawn. The "
        "factor is exact for SGD without momentum and for decoupled decay (adamw).",
    )

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("sgd", lr=0.02, momentum=0.9, weight_decay=1e-3)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().groups()
        groups.pop("feedback", None)
        for name in self.layers:
            groups[self.block_of(name)].append(self.feedback.get_parameter(self.feedback.keys[name]))
        return groups

    def freeze_features(self) -> None:
        super().freeze_features()
        for name in self.layers:
            if self.block_of(name) in self.network.hidden:
                self.feedback[name].requires_grad_(False)

    def before_update(self, groups: Sequence[str]) -> None:
        """Give the feedback weights the complete gradients of the forward weights."""
        for name in self.layers:
            feedback, gradient = self.feedback[name], self._weight(name).grad
            if self.block_of(name) in groups and feedback.requires_grad:
                feedback.grad = None if gradient is None else gradient.clone()

    def backward_weights(self, generator: Callable[[], torch.Generator]) -> dict[str, Tensor]:
        return {name: self.feedback[name].detach() for name in self.layers}
