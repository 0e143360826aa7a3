"""What the Hebbian rules share: phases, accumulation, the readout, the own-prediction twin, metrics."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import (
    Batch,
    Budget,
    Examples,
    Network,
    OptimizerConfig,
    Phase,
    Rule,
    ScheduleConfig,
    Step,
    TaskSpec,
    Traits,
    UsageError,
    always,
    option,
)
from bpfree.network import add_gradient, evaluating
from bpfree.network.closed_form import is_batch_norm
from bpfree.network.statistics import cumulative_statistics
from bpfree_hebbian.layer import Layer, fit, layers_of, per_unit
from bpfree_hebbian.networks import each

__all__ = ["HALVINGS", "Defaults", "Hebbian", "HebbianConfig", "Response"]

HALVINGS = ScheduleConfig("milestones", milestones=[0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9], gamma=0.5)
"""The readout's schedule of Journe et al."""

STATISTICS_FROM = 2000
"""Training examples from which a twin's batch norms take their statistics."""


@dataclass
class HebbianConfig:
    """Options of every Hebbian rule with a readout."""

    lr: list[float] = option(
        factory=list, help="Hebbian rates of the blocks, the last one repeats (none: the rule's); optimizer.* is the readout's", gt=0
    )
    feature_epochs: int | None = option(None, "passes without labels, out of budget.epochs; the rest trains the readout", ge=1)
    feature_batch_size: int | None = option(None, "examples per Hebbian update (none: the rule's)", ge=1)
    order: Literal["simultaneous", "successive"] = option(
        "simultaneous", "the blocks learn together, or one after the other with feature_epochs passes each"
    )
    init: Literal["auto", "gaussian", "positive", "network"] = option(
        "auto", "weights ~ N(0, radius^2/fan-in), or their absolute values; network: as the network was made; auto: the rule's"
    )
    radius: float | None = option(None, "expected norm of a row at initialisation (none: the rule's)", gt=0, unless={"init": ("network",)})
    readout_schedule: Literal["halving", "run"] = option(
        "halving", "halve the readout's rate at 20, 35, 50, 60, 70, 80 and 90 % of its phase, or the run's schedule"
    )


@dataclass(frozen=True)
class Defaults:
    """Defaults of a rule for options that the configuration leaves out.

    Attributes:
        lr: Hebbian rates of the blocks; the last rate applies to all further blocks.
        radius: expected norm of a row at initialisation.
        init: kind of initialisation.
        feature_epochs: passes of the unsupervised phase; ``None``: half of the budget.
        feature_batch_size: examples per Hebbian update; ``None``: the run's.
        schedule: of the Hebbian rates over each unsupervised phase.
        readout_lr: of Adam; ``None``: 0.4 / sqrt(features), for a readout that standardises them.
    """

    lr: list[float]
    radius: float = 1.0
    init: str = "gaussian"
    feature_epochs: int | None = None
    feature_batch_size: int | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    readout_lr: float | None = None


@dataclass(frozen=True)
class Response:
    """What a layer's units learn from a batch.

    Attributes:
        y: (N, K, ...) the post-synaptic factors of the input; overwritten.
        decay: (K,), or (K, K), of the weights: a sum over the examples (linear in them).
        metrics: by name.
    """

    y: Tensor
    decay: Tensor
    metrics: dict[str, Tensor]


class Hebbian(Rule):
    """Hidden blocks learn without labels, by increments of their own activity; then the readout learns from labels.

    Two phases (``features``, or one per block, then ``readout``). A subclass gives the increment of a layer.
    """

    Config = HebbianConfig
    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1, supervision="readout", inputs="real"))
    config: Any

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.layers = layers_of(self.network)
        if not self.layers:
            raise UsageError(f"{type(self).__name__} has nothing to learn: the network has no hidden blocks")
        self.rates = dict(zip(self.layers, each(self.config.lr, self.defaults.lr, len(self.layers), "rule.lr"), strict=True))
        self.frozen = False
        for layer in self.layers.values():
            fit(layer)
            self._initialise(layer)

    @classmethod
    def defaults_of(cls, config: Any, network: Network) -> Defaults:
        """Return the rule's defaults on this network for options that are not set."""
        return Defaults([0.01])

    @property
    def defaults(self) -> Defaults:
        """:meth:`defaults_of` this rule's options and network."""
        return self.defaults_of(self.config, self.network)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        if spec.is_image and spec.input_shape[0] > 1:
            return {"name": "hebbian-cnn"}
        return {"name": "hebbian-mlp", "widths": [2000 if spec.input_size >= 256 else 16]}  # few, or random features suffice

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return settings of the plugin's dense network, made for these rules; other kinds use the contract's own networks."""
        if kind != "dense":
            return super().specimen(kind, depth, width)
        return {"network.name": "hebbian-mlp", "network.widths": [width] * depth, "network.standardise": True}

    @torch.no_grad()
    def _initialise(self, layer: Layer) -> None:
        init = self.defaults.init if self.config.init == "auto" else self.config.init
        if init == "network":
            return
        weight = layer.weight
        nn.init.normal_(weight, std=(self.config.radius or self.defaults.radius) / math.sqrt(weight[0].numel()))
        if init == "positive":
            weight.abs_()

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        """Return the readout's optimiser."""
        if network is None:
            return OptimizerConfig("adam")
        features = network.shapes[network.hidden[-1]].numel()
        return OptimizerConfig("adam", lr=cls.defaults_of(config, network).readout_lr or 0.4 / math.sqrt(features))

    def plan(self) -> str:
        size = self.config.feature_batch_size or self.defaults.feature_batch_size
        order = "together" if self.config.order == "simultaneous" else "one after the other"
        when = "never: the twin's stay as they are" if self.frozen else f"{order}, in updates of {size or 'batch_size'} examples"
        lines = [f"features, without labels ({when}):"]
        for name, layer in self.layers.items():
            details = "; ".join(filter(None, [f"rate {self.rates[name]:.3g}", self.describe(layer)]))
            lines.append(f"  {name}: {layer.units} units of {layer.weight[0].numel()} inputs; {details}")
        shape = "x".join(map(str, self.network.shapes[list(self.layers)[-1]]))
        schedule = "halved seven times" if self.config.readout_schedule == "halving" else "the run's schedule"
        lines.append(f"readout, with labels: on {shape} features, computed once and kept; {schedule}")
        return "\n".join(lines)

    def describe(self, layer: Layer) -> str:
        """Describe in the plan what concerns a layer beyond its size and rate."""
        return ""

    # --- phases -----------------------------------------------------------------------------------------------------

    def layers_in(self, groups: Sequence[str]) -> list[Layer]:
        """List the layers among the groups of an update."""
        return [layer for name, layer in self.layers.items() if name in groups]

    def group_options(self) -> dict[str, dict[str, Any]]:
        return {name: {"lr": rate} for name, rate in self.rates.items()}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Group the layers' weights without their biases, which stay zero, and the readout."""
        readout = self.network.readout or ""
        groups = {name: [layer.weight] for name, layer in self.layers.items()}
        return {**groups, readout: list(self.network.blocks[readout].parameters())}

    def phases(self, budget: Budget) -> Iterable[Phase]:
        stages = [(name,) for name in self.layers] if self.config.order == "successive" else [tuple(self.layers)]
        readout = Phase(
            "readout",
            groups=(self.network.readout or "",),
            schedule=HALVINGS if self.config.readout_schedule == "halving" else None,
            on_features=True,
        )
        if budget.epochs is None:  # half of the seconds, forward passes or operations, which are measured and not planned
            kind = next(name for name in ("seconds", "forwards", "operations") if getattr(budget, name) is not None)
            if self.config.feature_epochs is not None:
                raise UsageError(
                    f"rule.feature_epochs={self.config.feature_epochs} does nothing with budget.{kind}, half of which learns features",
                    where="rule.feature_epochs",
                    fix="leave it out, or set budget.epochs",
                )
            share = (1.0 if self.frozen else 0.5) * getattr(budget, kind)  # a twin has no pass of features to pay for
            stages_of = [_features(self, groups, **{kind: share / len(stages)}) for groups in stages]
            return [*([] if self.frozen else stages_of), replace(readout, **{kind: share})]
        passes = self._feature_epochs(budget.epochs, len(stages))
        left = budget.epochs - passes * len(stages)
        if left < 1:
            raise UsageError(
                f"{passes * len(stages)} of {budget.epochs} epochs learn features, so none is left for the readout",
                where="rule.feature_epochs",
                fix="a larger budget.epochs, or fewer of them",
            )
        return [*([] if self.frozen else [_features(self, groups, epochs=passes) for groups in stages]), replace(readout, epochs=left)]

    def _feature_epochs(self, epochs: int, stages: int) -> int:
        return int(self.config.feature_epochs or self.defaults.feature_epochs or max(1, epochs // (2 * stages)))

    def freeze_features(self) -> None:
        """Make the twin: the same network, untouched, and the same readout phase."""
        super().freeze_features()
        self.frozen = True

    @torch.no_grad()
    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """Set the batch norms of a twin, which has no pass of its own to take statistics in, from some examples."""
        if not self.frozen or not any(is_batch_norm(part) for part in self.network.modules()):
            return
        chosen = torch.randperm(len(data), generator=generator, device=generator.device)[:STATISTICS_FROM].cpu()
        x = self.spec.normalise(data.batch(chosen)[0].to(generator.device))
        for name in self.network.hidden:
            block = self.network.blocks[name]
            parts = x.chunk(-(-len(x) // 250))  # of about the same size, since they count the same
            with cumulative_statistics(block):
                for part in parts:
                    block(part)
            with evaluating(block):
                x = torch.cat([block(part) for part in parts])

    # --- credit -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def respond(self, layer: Layer, source: Tensor, u: Tensor) -> Response:
        """Return a layer's increment from one execution: the raw ``sum y x^T - decay W``, linear in the examples.

        Args:
            layer: whose weight it is for.
            source: (N, ...) the linear map's input.
            u: (N, K, ...) its output.
        """

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.phase.on_features:
            return self._readout_credit(batch.inputs, batch)
        metrics: dict[str, Tensor] = {}
        readout = self.network.blocks[self.network.readout or ""]
        read = any(p.requires_grad for p in readout.parameters())
        x = batch.inputs
        learning = [name for name, layer in self.layers.items() if layer.learns]
        for name, layer in self.layers.items():
            if not learning and not read:
                break
            x, source, u = layer.execute(x)
            if layer.learns:
                learning.remove(name)
                metrics |= {f"{name}/{key}": value for key, value in self.learn_layer(layer, source, u).items()}
        return metrics | (self._readout_credit(x, batch) if read else {})

    @torch.no_grad()
    def learn_layer(self, layer: Layer, source: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Add a layer's raw increment to ``.grad``, negative and as a mean over the examples; returns metrics."""
        norms = layer.measure()
        response = self.respond(layer, source, u)
        weight, share = layer.weight, -1.0 / len(u)
        descent = layer.product(source, response.y.mul_(share))
        decay = response.decay.to(weight.dtype).mul(-share)  # autocast may have made less of it
        if decay.dim() == 1:
            descent.addcmul_(weight, per_unit(decay, weight))
        else:
            descent = descent.contiguous()  # or flatten would copy
            descent.flatten(1).addmm_(decay, weight.flatten(1))
        add_gradient(weight, descent)
        return {"weight_norm": norms.mean(), "rows_near_unit": ((norms - 1).abs() <= 0.05).float().mean(), **response.metrics}

    def _readout_credit(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        with torch.enable_grad():
            loss = self.spec.loss(self.network.blocks[self.network.readout or ""](features), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}


def _features(rule: Hebbian, groups: tuple[str, ...], **end: Any) -> Phase:
    name = "features" if len(groups) == len(rule.layers) else f"features {groups[0]}"
    # everything said, so that nothing of the readout's optimiser is taken over; the rates are those of the groups
    plain = OptimizerConfig("sgd", lr=1.0, weight_decay=0.0, momentum=0.0, options={"nesterov": False, "dampening": 0.0, "maximize": False})
    size = rule.config.feature_batch_size or rule.defaults.feature_batch_size
    return Phase(name, groups=groups, batch_size=size, optimizer=plain, schedule=rule.defaults.schedule, evaluate=False, **end)
