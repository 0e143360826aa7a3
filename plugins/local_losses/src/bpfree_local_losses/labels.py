"""What keeps labels out of predictions, for rules that write them into an input or a stream of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bpfree import Batch, BpfreeError, UsageError

__all__ = ["inputs_alone", "labels_to_write"]


def inputs_alone(inputs: Any, rule: str) -> Any:
    """Return the inputs of a prediction, and refuse labels that come with them.

    Args:
        inputs: what ``predict`` was called with.
        rule: its name, for the message.

    Raises:
        UsageError: ``inputs`` is a batch, or a pair of inputs and targets.
    """
    if isinstance(inputs, Batch) or (isinstance(inputs, (tuple, list)) and len(inputs) == 2):
        raise UsageError(
            f"{rule} predicts from inputs alone: a label would go into the network, and come out as its prediction",
            where="predict",
            fix="call it with batch.inputs",
        )
    return inputs


def labels_to_write(batch: Batch, rule: Any) -> Tensor:
    """Return the labels (N,) that a rule may write into an input or a stream: those of a batch that it learns from.

    Raises:
        BpfreeError: the rule is in eval mode, as in a prediction, or the batch has no labels.
    """
    name = type(rule).__name__
    if not rule.training:
        raise BpfreeError(f"{name} writes labels into its network in training alone", where="eval mode", fix="call rule.train() to learn")
    if batch.targets is None:
        raise BpfreeError(f"{name} learns from labels, and the batch has none", where="batch.targets", fix="give the batch its targets")
    return batch.targets
