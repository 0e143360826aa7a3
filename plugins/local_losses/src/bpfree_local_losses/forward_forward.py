"""Forward-forward: each layer learns to be active for real examples and silent for false ones.

Hinton: The Forward-Forward Algorithm: Some Preliminary Investigations. 2022, arXiv 2212.13345. With z_l = relu(W_l x_l + b_l) on the
normalised activities x_l of the layer below, the goodness g_l = sum z_l^2 - d_l is the logit of "this example is real":

    loss_l = mean BCE(g_l, t),   dloss_l / dW_l = mean (sigma(g_l) - t) 2 z_l x_l^T,   x_{l+1} = z_l / rms(z_l),

where t is 1 for the image with its label and 0 for the image with another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Phase, Rule, Step, TaskSpec, Trace, Traits, UsageError, option
from bpfree.network import kept_buffers
from bpfree.step import Budget
from bpfree_local_losses.full_gradient import full_gradients
from bpfree_local_losses.label_inputs import LabelPlace
from bpfree_local_losses.labels import inputs_alone, labels_to_write
from bpfree_local_losses.negatives import hard_labels, hybrids, wrong_labels

__all__ = ["ForwardForward", "ForwardForwardConfig"]


@dataclass
class ForwardForwardConfig:
    """Options of forward-forward."""

    negatives: Literal["wrong", "hard", "unsupervised"] = option(
        "wrong",
        "false examples: images with a wrong label, each alike (wrong) or as likely as the readout finds it (hard), or mixtures of two "
        "images without labels (unsupervised)",
    )
    prediction: Literal["goodness", "readout"] = option(
        "goodness",
        "of the label with which the layers are most active, C passes (goodness), or by a linear readout of their activities for a neutral "
        "label, one pass (readout)",
    )
    goodness: Literal["sum", "mean"] = option("sum", "of the squared activities of a layer's units")
    threshold: float = option(1.0, "goodness per unit at which an example is as likely real as false", ge=0)
    label_size: float = option(
        3.0,
        "what is written for a label, where normalised inputs have a mean square of 1 (published: 1, where pixels are between 0 and 1)",
        gt=0,
        unless={"negatives": ("unsupervised",)},
    )
    first: int = option(2, "the first layer, counted from 1, that predictions use; a network of fewer layers uses its last", ge=1)
    peer: float = option(0.03, "weight of the peer normalisation, which keeps units from being always or never active; 0: none", ge=0)
    peer_momentum: float = option(0.9, "of the running means of activities to which it applies", ge=0, lt=1, unless={"peer": (0.0,)})
    gradient: Literal["true", "full"] = option(
        "true", "of nn.ReLU: its own, or one that passes where a unit is silent too (full, as in the code; the peer normalisation feels it)"
    )
    blurs: int = option(6, "how often the random masks of mixtures are blurred", ge=0, needs={"negatives": ("unsupervised",)})
    readout_lr: float | None = option(None, "learning rate of the readout (none: that of the layers)", gt=0)
    readout_decay: float | None = option(None, "weight decay of the readout (none: that of the layers)", ge=0)


class ForwardForward(Rule):
    """Each block is a detector of real examples; nothing is sent down."""

    Config = ForwardForwardConfig
    card = Card(
        "forward-forward: layers are active for images with their label and silent for images with another one",
        paper="Hinton: The Forward-Forward Algorithm: Some Preliminary Investigations. 2022, arXiv 2212.13345; settings as in the "
        "re-implementation loeweX/Forward-Forward",
        equation="loss_l = mean BCE(sum z_l^2 - d_l, t);  x_{l+1} = z_l / rms(z_l);  class = argmax_c sum_{l >= 2} |z_l(c)|^2",
        notes="The label is written over the first C inputs (the border of an image), or into C further ones (network=label-mlp). To "
        "predict, each label is tried: C passes. A readout on neutral labels takes one pass, but on easy tasks reads untrained "
        "layers nearly as well, so judge the rule by goodness: its own-prediction twin is at chance. Scores are sums of squares "
        "and no logits: the task's loss of them means little. The full gradient changes the peer normalisation alone: goodness "
        "has the derivative 2 z, which is zero where a ReLU is.",
    )
    config: ForwardForwardConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.supervised = self.config.negatives != "unsupervised"
        if not self.supervised and self.config.prediction == "goodness":
            raise UsageError(
                "layers that learned without labels have no goodness for each label", where="rule.prediction", fix="rule.prediction=readout"
            )
        if self.config.negatives == "wrong" and spec.outputs < 2:
            raise UsageError(
                "there is no wrong label where there is one class", where=f"task {spec.name}", fix="use a task of more classes"
            )
        self.place = LabelPlace(self.network, spec, self.config.label_size)
        hidden = self.network.hidden
        self.read_layers = hidden[min(self.config.first, len(hidden)) - 1 :]
        self.classifier: nn.Linear | None = None
        if self.config.prediction == "readout" or self.config.negatives == "hard":
            size = sum(self.network.shapes[name].numel() for name in self.read_layers)
            self.classifier = nn.Linear(size, spec.outputs, bias=False)
            nn.init.zeros_(self.classifier.weight)
        if self.config.peer:
            for name in hidden:
                self.register_buffer(f"activity_{name}", torch.full((self.network.shapes[name].numel(),), 0.5))

    @classmethod
    def traits_of(cls, config: ForwardForwardConfig, network: Network | None = None) -> Traits:
        """Hard negatives are chosen by the readout, and so by all layers."""
        return Traits(
            "all" if config.negatives == "hard" else "upstream",
            downstream_weights=0,
            reverse_span=1,
            supervision="readout" if config.negatives == "unsupervised" else "labels",
            passes=2 if config.prediction == "goodness" and config.negatives == "wrong" else 3,
            readout="none",
            targets=("classes",),
            inputs="real",
            own_loss=False,
        )

    @classmethod
    def optimizer_of(cls, config: ForwardForwardConfig, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=3e-3)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: ForwardForwardConfig) -> dict[str, Any]:
        return {"name": "label-mlp"}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        if kind == "dense":
            return {"network.name": "label-mlp", "network.depth": depth, "network.width": width}
        return super().specimen(kind, depth, width)

    def group_options(self) -> dict[str, dict[str, Any]]:
        chosen = {"lr": self.config.readout_lr, "weight_decay": self.config.readout_decay}
        own = {key: value for key, value in chosen.items() if value is not None}
        return {"classifier": own} if own and self.classifier is not None else {}

    def phases(self, budget: Budget) -> Any:
        """Return the only phase; the twin without a readout, which learns nothing, takes a single pass."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            return super().phases(budget)
        return [Phase("untrained", epochs=1)]

    # --- learning -------------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        read = self._read_neutral(batch.inputs)
        metrics: dict[str, Tensor] = {}
        with full_gradients(self.network) if self.config.gradient == "full" else nullcontext():
            for name, loss in self._losses(batch, step, read, learning=True):
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                metrics[f"{name}/loss"] = loss.detach()
        if self.classifier is not None and read is not None:
            loss = self.spec.loss(self.classifier(read), batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            metrics["loss"] = loss.detach()
        return metrics

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the sum of the blocks' losses and the readout's; with ``gradient=true`` credit is its gradient."""
        read = self._read_neutral(batch.inputs)
        total = sum((loss for _, loss in self._losses(batch, step, read, learning=False)), torch.zeros((), device=batch.inputs.device))
        if self.classifier is not None and read is not None:
            total = total + self.spec.loss(self.classifier(read), batch)
        return total

    def _read_neutral(self, inputs: Tensor) -> Tensor | None:
        """Return what the readout reads, (N, F), without a graph; ``None`` where there is no readout."""
        if self.classifier is None:
            return None
        with torch.no_grad(), kept_buffers(self.network):
            return self.features(inputs)

    def _losses(self, batch: Batch, step: Step, read: Tensor | None, *, learning: bool) -> Iterator[tuple[str, Tensor]]:
        """Execute block by block, on real and false examples in one batch, and yield each block's loss with a graph of this block alone."""
        real = len(batch)
        for trace in self.network.stream(self._examples(batch, step, read), hand_over=lambda trace: unit(trace.output.detach())):
            logits = self.logits(trace)
            loss = F.binary_cross_entropy_with_logits(logits, (torch.arange(len(logits), device=logits.device) < real).to(logits))
            if self.config.peer:
                loss = loss + self.config.peer * self._peer_loss(trace, real, learning=learning)
            yield trace.name, loss

    def _examples(self, batch: Batch, step: Step, read: Tensor | None) -> Tensor:
        """Make the first block's input (2N, ...): the real examples, then the false ones."""
        generator = step.generator_for("negatives")
        if not self.supervised:
            mixed = hybrids(batch.inputs, self.config.blurs, generator)
            return unit(self.place.none(torch.cat([batch.inputs, mixed])))
        targets = labels_to_write(batch, self)
        if self.config.negatives == "hard" and self.classifier is not None and read is not None:
            wrong = hard_labels(targets, self.classifier(read).detach(), generator)
        else:
            wrong = wrong_labels(targets, self.spec.outputs, generator)
        rows = F.one_hot(torch.cat([targets, wrong]), self.spec.outputs)
        return unit(self.place.write(torch.cat([batch.inputs, batch.inputs]), rows))

    def logits(self, trace: Trace) -> Tensor:
        """Return for each example (N,) the goodness of a block's activities less the threshold."""
        z = activities(trace)
        if self.config.goodness == "mean":
            return z.square().mean(1) - self.config.threshold
        return z.square().sum(1) - self.config.threshold * z.shape[1]

    def _peer_loss(self, trace: Trace, real: int, *, learning: bool) -> Tensor:
        """Return the variance over units of their mean activity on real examples, a running mean of which this batch is a part."""
        kept = self.get_buffer(f"activity_{trace.name}")
        momentum = self.config.peer_momentum
        running = momentum * kept + (1 - momentum) * activities(trace)[:real].mean(0)
        if learning and running.requires_grad:
            with torch.no_grad():
                kept.copy_(running)
        return (running.mean() - running).square().mean()

    # --- predicting -----------------------------------------------------------------------------------------------------

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Predict from inputs alone: whatever stands in the place of the label is overwritten."""
        inputs = inputs_alone(inputs, "forward-forward")
        if self.config.prediction == "readout":
            return self.read(self.features(inputs), generator)
        return self._summed(self.goodness_of_labels(inputs))

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the predictions of single layers by goodness, and the one of the two ways that is not the rule's own."""
        found: dict[str, Tensor] = {}
        if self.supervised:
            found = self.goodness_of_labels(inputs)
            if self.config.prediction == "readout":
                found["goodness"] = self._summed(found)
        if self.classifier is not None and self.config.prediction == "goodness":
            found["readout"] = self.classifier(self.features(inputs))
        return found

    def goodness_of_labels(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the goodness of each label (N, C) in each block: C passes, each with one label written to all inputs."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.network.hidden}
        for label in range(self.spec.outputs):
            for trace in self._stream(self.place.one(inputs, label)):
                found[trace.name].append(self.logits(trace))
        return {name: torch.stack(scores, 1) for name, scores in found.items()}

    def _summed(self, found: dict[str, Tensor]) -> Tensor:
        return torch.stack([found[name] for name in self.read_layers]).sum(0)

    def _stream(self, x: Tensor) -> Iterator[Trace]:
        return self.network.stream(unit(x), grad=False, hand_over=lambda trace: unit(trace.output))

    def features(self, inputs: Tensor) -> Tensor:
        """Return the normalised activities (N, F) of the layers that predict, for a neutral label, or for none where they learn without."""
        found = self.representations(inputs)
        return torch.cat([unit(found[name]).flatten(1) for name in self.read_layers], 1)

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Return the readout's scores (N, C).

        Raises:
            UsageError: the rule has no readout.
        """
        if self.classifier is None:
            raise UsageError("a prediction by goodness reads no features", where="rule.prediction", fix="rule.prediction=readout")
        scores: Tensor = self.classifier(features)
        return scores

    def representations(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return each block's output for a neutral label, or for none where the layers learn without."""
        x = self.place.neutral(inputs) if self.supervised else self.place.none(inputs)
        return {trace.name: trace.output for trace in self._stream(x)}

    def plan(self) -> str:
        where = f"into {self.spec.outputs} further inputs" if self.place.appended else f"over the first {self.spec.outputs} inputs"
        lines = [f"labels are written {where}" if self.supervised else "no labels are written: negatives are mixtures of two examples"]
        how = f"goodness, {self.spec.outputs} passes" if self.config.prediction == "goodness" else "a linear readout, one pass"
        return "\n".join([*lines, f"predictions are made by {how}, of: {', '.join(self.read_layers)}"])

    def pictures(self, count: int = 64) -> dict[str, Tensor]:
        """Return receptive fields; of the first block alone where labels have inputs of their own."""
        shape = self.spec.input_shape
        if not self.place.appended:
            return super().pictures(count)
        first = next(part for part in self.network.blocks[self.network.hidden[0]].modules() if isinstance(part, nn.Linear))
        if len(shape) != 3 or shape[0] not in (1, 3):
            return {}
        return {self.network.hidden[0]: first.weight[:count, : self.spec.input_size].reshape(-1, *shape)}


def activities(trace: Trace) -> Tensor:
    """Return a block's activities, (N, units), in single precision at least."""
    z = trace.output.flatten(1)
    return z if z.dtype == torch.float64 else z.float()


def unit(x: Tensor) -> Tensor:
    """Scale each example (N, ...) to a mean square of one."""
    size = x.flatten(1).square().mean(1).sqrt() + 1e-8
    return x / size.view(-1, *[1] * (x.dim() - 1))
