"""Channel-wise competition (CwComp): each class has channels of its own in every layer, and the strongest group names the class.

Papachristodoulou, Kyrkou, Timotheou, Theocharides: Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm. AAAI
2024, arXiv 2312.12668. With the output y of a block, and S_c the channels of class c,

    g_c = mean of y^2 over channels in S_c and positions,   loss = CE(g, class).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Phase, Step, Streamed, TaskSpec, Trace, Traits, UsageError, always, option
from bpfree.step import Budget
from bpfree_local_losses.windows import check_windows, windowed_phases

__all__ = ["ChannelCompetition", "ChannelCompetitionConfig", "goodness"]


@dataclass
class ChannelCompetitionConfig:
    """Options of channel-wise competition."""

    prediction: Literal["goodness", "softmax"] = option(
        "goodness", "the class whose channels are strongest in the last block, or a softmax readout of that block's output"
    )
    windows: list[list[int]] = option(
        factory=list,
        help="for each block the epochs in which it learns, [first, first after], such as [[0,2],[0,3],[0,4],[0,5]] (interleaved layer "
        "training; empty: all blocks learn throughout)",
    )
    groups: list[int] = option(
        factory=list,
        help="groups of channels of each block: fewer than there are classes for groups of consecutive classes (empty: a group for each)",
        ge=1,
    )
    readout_lr: float | None = option(
        None, "learning rate of the softmax readout (none: that of the blocks)", gt=0, needs={"prediction": ("softmax",)}
    )


class ChannelCompetition(Streamed):
    """The channels of the right class learn to be strong in every block, those of the others to be weak."""

    Config = ChannelCompetitionConfig
    card = Card(
        "channel-wise competition: every layer has channels for each class, and those of the right one are to be the strongest",
        paper="Papachristodoulou, Kyrkou, Timotheou, Theocharides: Convolutional Channel-wise Competitive Learning for the Forward-Forward "
        "Algorithm. AAAI 2024, arXiv 2312.12668, and its code",
        equation="g_c = mean of y^2 over the channels of class c and positions;  loss = CE(g, class);  class = argmax_c g_c (last block)",
        notes="No negative examples. The channels (units, in a dense network) of each block are divided into equal groups. Where the "
        "published code trains layers in windows of epochs (rule.windows), these are phases here: blocks below the first that "
        "learns are in eval mode, where the code keeps normalising by the batch. The published readout takes a softmax of a "
        "softmax; ours is a plain one.",
    )
    traits_of = always(
        Traits("upstream", downstream_weights=0, reverse_span=1, readout="none", targets=("classes", "soft"), inputs="real", own_loss=False)
    )
    config: ChannelCompetitionConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        hidden = self.network.hidden
        self.group_counts = dict(zip(hidden, self._counts(hidden), strict=True))
        for name, count in self.group_counts.items():
            self._check(name, count)
        self.windows = check_windows(self.config.windows, hidden, "rule.windows") if self.config.windows else {}
        self.classifier: nn.Linear | None = None
        if self.config.prediction == "softmax":
            self.classifier = nn.Linear(self.network.shapes[hidden[-1]].numel(), spec.outputs)
        elif self.group_counts[hidden[-1]] != spec.outputs:
            raise UsageError(
                f"the last block has {self.group_counts[hidden[-1]]} groups of channels for {spec.outputs} classes, which it is to name",
                where="rule.groups",
                fix=f"let its entry be {spec.outputs}, or rule.prediction=softmax",
            )

    def _counts(self, hidden: list[str]) -> list[int]:
        counts = list(self.config.groups) or [self.spec.outputs] * len(hidden)
        if len(counts) != len(hidden):
            what = f"{len(counts)} numbers of groups for {len(hidden)} blocks"
            raise UsageError(what, where="rule.groups", fix=f"give one for each of {', '.join(hidden)}")
        return counts

    def _check(self, name: str, count: int) -> None:
        channels = self.network.shapes[name][0]
        if self.spec.outputs % count:
            raise UsageError(
                f"{self.spec.outputs} classes cannot be divided into {count} groups",
                where="rule.groups",
                fix="use a divisor of their number",
            )
        if channels % count:
            raise UsageError(
                f"the {channels} channels of block {name!r} cannot be divided among {count} groups",
                where=f"task {self.spec.name}, {self.spec.outputs} classes",
                fix=f"give it {count * max(1, round(channels / count))}, or use network=channel-groups, which has channels for each group",
            )

    @classmethod
    def optimizer_of(cls, config: ChannelCompetitionConfig, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=0.01)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: ChannelCompetitionConfig) -> dict[str, Any]:
        """Choose convolutions for images of any size, and otherwise layers of 16 units for each class."""
        if len(spec.input_shape) != 3:
            return {"name": "mlp", "widths": [16 * spec.outputs] * 3, "norm": "batch"}
        side = min(spec.input_shape[1:])
        found: dict[str, Any] = {"name": "channel-groups", "groups": list(config.groups)}
        return found if side >= 4 else {**found, "pool_after": []}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return settings of layers whose units, or channels, can be divided among 5 and among 10 classes."""
        whole = 10 * -(-width // 10)
        found = super().specimen(kind, depth, whole) or {}
        return {**found, "network.activation": "relu"}

    def group_options(self) -> dict[str, dict[str, Any]]:
        return {} if self.classifier is None or self.config.readout_lr is None else {"classifier": {"lr": self.config.readout_lr}}

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return a phase for each stretch of epochs in which the same blocks learn; a twin that learns nothing takes a single pass."""
        readout = [] if self.classifier is None else ["classifier"]
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return [Phase("untrained", epochs=1)]
        return windowed_phases(self.windows, readout, budget) if self.windows else super().phases(budget)

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        scores = goodness(trace.output, self.group_counts[trace.name])
        return F.cross_entropy(scores, self._wanted(batch, scores))

    def _wanted(self, batch: Batch, scores: Tensor) -> Tensor:
        """Return the groups (N,) of classes, or how much each group is meant by soft labels (N, G)."""
        together = self.spec.outputs // scores.shape[1]
        if batch.targets is not None and batch.targets.dim() == 1 and not batch.targets.is_floating_point():
            return batch.targets // together
        rows = self.spec.target_rows(batch, scores.dtype)
        return rows.view(len(rows), scores.shape[1], together).sum(2)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for trace in self.network.stream(batch.inputs):
            loss = self.local_loss(trace, batch, step)
            if loss.requires_grad:
                loss.backward()
            metrics[f"{trace.name}/loss"] = loss.detach()
            if self.classifier is not None and trace.name == self.network.hidden[-1]:
                read = self.spec.loss(self.classifier(trace.output.detach().flatten(1)), batch)
                if read.requires_grad:
                    read.backward()
                metrics["loss"] = read.detach()
        return metrics

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the sum of the blocks' losses and the readout's."""
        losses = []
        for trace in self.network.stream(batch.inputs):
            losses.append(self.local_loss(trace, batch, step))
        if self.classifier is not None:
            losses.append(self.spec.loss(self.classifier(trace.output.detach().flatten(1)), batch))
        return torch.stack(losses).sum()

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        output = self.network(inputs)
        if self.classifier is not None:
            scores: Tensor = self.classifier(output.flatten(1))
            return scores
        return goodness(output, self.spec.outputs)

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the goodness of each block that has a group for each class."""
        found = {}
        for trace in self.network.stream(inputs, grad=False):
            if self.group_counts[trace.name] == self.spec.outputs:
                found[trace.name] = goodness(trace.output, self.spec.outputs)
        return found

    def plan(self) -> str:
        lines = []
        for name, count in self.group_counts.items():
            first, after = self.windows.get(name, (0, 0))
            window = f", learns in epochs {first} to {after - 1}" if after else ""
            lines.append(f"{name}: {self.network.shapes[name][0]} channels in {count} groups{window}")
        return "\n".join(lines)


def goodness(output: Tensor, groups: int) -> Tensor:
    """Return the mean square (N, G) of each group of channels, of an output (N, K, ...) whose channels are divided in order."""
    y = output if output.dtype == torch.float64 else output.float()
    squares: Tensor = y.unflatten(1, (groups, -1)).flatten(2).square()
    return squares.mean(2)
