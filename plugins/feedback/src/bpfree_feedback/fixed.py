"""Feedback alignment: credit through fixed random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bpfree import Card
from bpfree_feedback.base import FeedbackRule

__all__ = ["FeedbackAlignment"]


class FeedbackAlignment(FeedbackRule):
    """Feedback alignment: credit goes down through fixed random weights."""

    card = Card(
        "feedback alignment: errors go down through fixed random weights, to which the forward weights come to align",
        paper="Lillicrap, Cownden, Tweed, Akerman: Random synaptic feedback weights support error backpropagation for deep learning. "
        "Nature Communications 7 (2016)",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  grad W_l = delta_l h_{l-1}^T;  B fixed",
        notes="Every linear layer and convolution has feedback weights, the readout too, as in BioTorch (rule.exact excepts some). "
        "Normalisations pass credit exactly.",
    )

    def backward_weights(self, generator: Callable[[], torch.Generator]) -> dict[str, Tensor]:
        return {name: self.feedback[name] for name in self.layers}
