"""Labels as a part of the input: a network with places for them, and what is written there in training and to predict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder

__all__ = ["LABEL_MLP", "LabelInputs", "LabelMLPConfig", "LabelPlace", "label_mlp"]


class LabelInputs(nn.Module):
    """Flattens inputs, with places for a label behind them.

    Args:
        inputs: numbers in one input.
        classes: places for the label.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.inputs, self.classes = inputs, classes

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.classes}"

    def forward(self, x: Tensor) -> Tensor:
        """Flatten (N, ...) to (N, inputs + classes); inputs that come without a label get zeros in its place."""
        x = x.flatten(1)
        return F.pad(x, (0, self.classes)) if x.shape[1] == self.inputs else x


@dataclass
class LabelMLPConfig:
    """A multilayer perceptron whose input has a place for a label."""

    depth: int = option(3, "number of hidden layers", ge=1, le=10_000, needs={"widths": ([],)})
    width: int = option(500, "units in each hidden layer", ge=1, needs={"widths": ([],)})
    widths: list[int] = option(factory=list, help="units of each hidden layer, in place of depth and width", ge=1)
    label: Literal["auto", "pixels", "appended"] = option(
        "auto",
        "where a label is written: over the first inputs (pixels), or into further ones, one for each class (appended); auto: pixels for "
        "images of at least 16x16, whose border says little",
    )
    init: Literal["units", "torch"] = option(
        "units", "initial weights: normal with variance 1 / units and biases of zero, as in the code for forward-forward, or torch's"
    )


def label_mlp(spec: TaskSpec, config: LabelMLPConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (linear, ReLU) and the linear block ``readout``.

    The first block takes inputs of the task's shape, and with appended labels also rows (N, inputs + classes).
    """
    config = config or LabelMLPConfig()
    appended = config.label == "appended" or (config.label == "auto" and not spec.is_image)
    size = spec.input_size + (spec.outputs if appended else 0)
    blocks: dict[str, nn.Module] = {}
    for index, units in enumerate(config.widths or [config.width] * config.depth, start=1):
        linear = nn.Linear(size, units)
        if config.init == "units":
            nn.init.normal_(linear.weight, std=1 / math.sqrt(units))
            nn.init.zeros_(linear.bias)
        first = [LabelInputs(spec.input_size, spec.outputs) if appended else nn.Flatten()] if index == 1 else []
        blocks[f"b{index}"] = nn.Sequential(*first, linear, nn.ReLU())
        size = units
    blocks["readout"] = nn.Linear(size, spec.outputs)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


LABEL_MLP = NetworkBuilder(label_mlp, LabelMLPConfig, "a multilayer perceptron whose input has a place for a label (forward-forward)")


class LabelPlace:
    """The place of labels in a network's input, and the only way in which a rule writes there.

    Where the network's first block begins with :class:`LabelInputs` the label has inputs of its own, otherwise the first C numbers of the
    input give way to it. Whatever inputs hold there, a label of their own among it, is overwritten.

    Args:
        network: a chain of blocks.
        spec: of the task.
        size: what is written for a class that is meant with certainty.

    Attributes:
        appended: whether labels have inputs of their own.

    Raises:
        UsageError: the label would leave nothing of the input.
    """

    def __init__(self, network: Network, spec: TaskSpec, size: float) -> None:
        first = network.blocks[network.hidden[0]]
        self.spec, self.size = spec, size
        self.appended = any(isinstance(part, LabelInputs) for part in first.modules())
        if not self.appended and spec.input_size <= spec.outputs:
            raise UsageError(
                f"a label of {spec.outputs} numbers would leave nothing of inputs of {spec.input_size}",
                where=f"task {spec.name}",
                fix="use network=label-mlp network.label=appended, which has inputs for it",
            )

    def write(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return what the network takes: the inputs (N, ...) with the labels' rows (N, C) times ``size``.

        Raises:
            UsageError: the inputs are not of the task's shape: they have a label already, perhaps.
        """
        self._check(inputs)
        rows = (self.size * rows).to(inputs.dtype)
        flat = inputs.flatten(1)
        if self.appended:
            return torch.cat([flat, rows], 1)
        return torch.cat([rows, flat[:, self.spec.outputs :]], 1).view_as(inputs)

    def one(self, inputs: Tensor, label: int) -> Tensor:
        """Write the same label for all inputs."""
        row = torch.zeros(1, self.spec.outputs, device=inputs.device)
        row[0, label] = 1
        return self.write(inputs, row.expand(len(inputs), -1))

    def neutral(self, inputs: Tensor) -> Tensor:
        """Write 1 / C for each class."""
        share = torch.full((1, self.spec.outputs), 1 / self.spec.outputs, device=inputs.device)
        return self.write(inputs, share.expand(len(inputs), -1))

    def none(self, inputs: Tensor) -> Tensor:
        """Write no label: zeros into places of its own, and nothing over the inputs."""
        self._check(inputs)
        if not self.appended:
            return inputs
        return F.pad(inputs.flatten(1), (0, self.spec.outputs))

    def _check(self, inputs: Any) -> None:
        if tuple(inputs.shape[1:]) != tuple(self.spec.input_shape):
            raise UsageError(
                f"inputs of shape {tuple(inputs.shape[1:])} are not those of the task, {tuple(self.spec.input_shape)}",
                where=f"task {self.spec.name}",
                fix="give inputs without a label: the rule writes labels itself, the true one in training alone",
            )
