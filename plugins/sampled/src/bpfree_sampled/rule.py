"""The rule ``sampled``: hidden units from pairs of data points, the readout by one linear solve; nothing descends.

Bolager, Burak, Datar, Sun, Dietrich: Sampling weights of deep neural networks, NeurIPS 2023, arXiv 2306.16830.
Rahma, Datar, Dietrich: Training Hamiltonian neural networks without backpropagation, 2024, arXiv 2411.17511.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpfree import Batch, Budget, Card, Network, Phase, Solved, Step, TaskSpec, Traits, UsageError, option
from bpfree.rule import Metrics
from bpfree.tasks.spec import has_own_loss
from bpfree.tasks.task import Examples
from bpfree_sampled import layers, pairs
from bpfree_sampled.least_squares import QRSums
from bpfree_sampled.network import DTYPES, DualLayer, EnergyReadout
from bpfree_sampled.task import HamiltonianSpec

__all__ = ["Sampled", "SampledConfig"]

PENALTIES = tuple(10.0**power for power in range(-8, 1))
"""Of features between -1 and 1, per example."""
AT_ONCE = 1 << 24
"""Numbers of features that are computed at a time."""


@dataclass
class SampledConfig:
    """How hidden units are sampled, and how the readout is solved for."""

    sampling: Literal["u-swim", "swim", "a-swim", "elm"] = option(
        "u-swim",
        "pairs of data points: uniform ones; likelier where the targets change steeply; where those of a first fit do; elm: no pairs, but "
        "normal weights and uniform biases. Of Hamiltonian systems swim is given the true energies, which data do not have",
    )
    scale: float = option(1.0, "factor of normal weights and their biases", gt=0, needs={"sampling": ("elm",)})
    control: Literal["none", "rotated", "permuted"] = option(
        "none", "of what pairs are good for: weights in random directions, or biases of other units", unless={"sampling": ("elm",)}
    )
    points: int = option(20_000, "training examples, at most, from which pairs are drawn (those that come first in a stream)", ge=2)
    penalties: list[float] = option(
        factory=list,
        help="of the readout's weights, per example, of which one is chosen; []: 1e-8, 1e-7, ..., 1, or 0 for Hamiltonian systems",
        ge=0,
    )
    choose: Literal["leave-one-out", "generalised", "validation"] = option(
        "leave-one-out",
        "the penalty: by the squared error of each row that is left out, exactly; by generalised cross-validation, which needs sums "
        "alone; or on the validation split",
    )
    cutoff: float = option(1e-13, "singular values below this share of the largest are left out", ge=0, lt=1)
    streamed: bool = option(False, "learn from batches in one pass, in memory that does not grow with the data; else from all data at once")
    precision: Literal["float64", "float32"] = option("float64", "of sampling and solving; weights have the network's")


class Sampled(Solved):
    """Sample the hidden layers, first to last, before training; then solve for the readout at the end of one pass."""

    Config = SampledConfig
    config: SampledConfig
    card = Card(
        "hidden units from pairs of data points (SWIM), the readout by one linear solve",
        paper="Bolager, Burak, Datar, Sun, Dietrich: Sampling weights of deep neural networks. NeurIPS 2023, arXiv 2306.16830; "
        "Rahma, Datar, Dietrich: Training Hamiltonian neural networks without backpropagation. 2024, arXiv 2411.17511",
        equation="w = s1 (x_j - x_i) / |x_j - x_i|^2, b = -w x_i - s2; (i, j) ~ |f(x_j) - f(x_i)| / |x_j - x_i|; a = argmin |A a - y|^2",
        notes="Different pairs are drawn, and the penalty is chosen; the constant of an energy is solved for apart. Against normal weights "
        "(elm) compare at the best rule.scale: their usual scale of 1 is what they lose by on wide boxes.",
    )

    factors: QRSums
    chosen: Tensor
    weights: Tensor
    biases: Tensor

    waivers: ClassVar[dict[str, str]] = {
        "no-host-sync": "a run has one step, which solves; it reads a few numbers, such as the error of each penalty, once a run",
    }

    @classmethod
    def traits_of(cls, config: SampledConfig, network: Network | None = None) -> Traits:
        """Declare that no update depends on weights: all are made of data. Streamed, they are made outside of steps, layer upon layer."""
        return Traits(
            "upstream" if config.streamed else "independent",
            downstream_weights=0,
            reverse_span=0,
            update="in-place",
            supervision="labels" if config.sampling in ("swim", "a-swim") else "readout",
            targets=("classes", "multilabel", "soft", "real"),
            inputs="real",
        )

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        """Choose one wide layer: of tanh units, or of an energy."""
        if isinstance(spec, HamiltonianSpec):
            return {"name": "hnn"}
        return {"name": "mlp", "depth": 1, "width": 500, "activation": "tanh"}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return a small multilayer perceptron; there is none with convolutions."""
        return super().specimen(kind, depth, width) if kind == "dense" else None

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: SampledConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.energy = isinstance(spec, HamiltonianSpec)
        self._check()
        units, outputs = self._readout.in_features, 1 if self.energy else self._readout.out_features
        self.dtype = DTYPES[self.config.precision]
        self.penalties = tuple(self.config.penalties) or ((0.0,) if self.energy else PENALTIES)
        self.factors = QRSums(units, outputs, constant=not self.energy, dtype=self.dtype)
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))
        kept = len(self.penalties) if self.calibrates else 0
        self.register_buffer("weights", torch.zeros(kept, outputs, units, dtype=self.network.dtype))
        self.register_buffer("biases", torch.zeros(kept, outputs, dtype=self.network.dtype))

    def _check(self) -> None:
        spec, config = self.spec, self.config
        if not self._layers:
            raise UsageError("Sampled needs a hidden layer", where="network", fix="network.depth=1, or rule=linear")
        if has_own_loss(spec) and not self.energy:
            what = f"Sampled solves least squares, but the task brings a loss of its own: {type(spec).__name__}"
            raise UsageError(what, where=f"task {spec.name}", fix="choose a rule that learns from any loss")
        if not self.energy and len(spec.output_size) != 1:
            what = f"Sampled solves for vectors, but the task's outputs have shape {spec.output_size}"
            raise UsageError(what, where=f"task {spec.name}", fix="choose another rule")
        if config.streamed and config.sampling == "a-swim":
            what = "a-swim fits twice, which takes the data twice"
            raise UsageError(what, where="rule.streamed", fix="rule.streamed=false, or rule.sampling=u-swim")
        if config.streamed and config.choose == "leave-one-out" and len(config.penalties or PENALTIES) > 1 and not self.energy:
            what = "leaving rows out needs them once more, but a stream is read once"
            raise UsageError(what, where="rule.choose", fix="rule.choose=generalised, or validation; or a single one in rule.penalties")
        if self.energy and config.choose == "validation" and len(config.penalties) > 1:
            what = "of an energy the penalty is chosen by leaving rows out"
            raise UsageError(what, where="rule.choose", fix="rule.choose=leave-one-out, or generalised")

    @property
    def _layers(self) -> list[tuple[str, nn.Linear, str]]:
        """Hidden layers: name, linear map, and name of the activation."""
        return [_layer_of(name, self.network.blocks[name], first=place == 0) for place, name in enumerate(self.network.hidden)]

    @property
    def _readout(self) -> nn.Linear:
        return _readout_of(self.network.blocks[str(self.network.readout)])

    @property
    def calibrates(self) -> bool:
        """Whether the penalty is chosen on validation."""
        return self.config.choose == "validation" and len(self.penalties) > 1

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return one pass, in batches if the data are streamed."""
        return [Phase("accumulate", epochs=1, batch_size=None if self.config.streamed else "all")]

    def plan(self) -> str:
        """Say what is sampled and what is solved."""
        lines = [f"{name}: {linear.out_features} {activation} units, {self._how()}" for name, linear, activation in self._layers]
        rows = "energies' derivatives" if self.energy else "outputs"
        return "\n".join([*lines, f"{self.network.readout}: solved for {rows}, {len(self.penalties)} penalties, {self.config.choose}"])

    def _how(self) -> str:
        if self.config.sampling == "elm":
            return f"normal weights times {self.config.scale:g}"
        return f"from pairs ({self.config.sampling}{'' if self.config.control == 'none' else ', ' + self.config.control})"

    # --- sampling -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """Sample the hidden layers of a rule that is streamed to; without streaming its only step does it."""
        if not self.config.streamed:
            return
        inputs, targets = self._seen(data, generator)
        points = self.spec.normalise(inputs.to(generator.device), self.dtype).flatten(1)
        rows = None
        if self.config.sampling == "swim" and targets is not None:
            rows = self._target_rows(Batch(points, targets.to(generator.device)))
        self._sample(points, self._values(rows), generator)

    def _target_rows(self, batch: Batch) -> Tensor:
        """Return targets (N, C) as they are solved for: one-hot classes, real values, or energies and fields."""
        assert batch.targets is not None
        return batch.targets.to(self.dtype) if self.energy else self.spec.target_rows(batch, self.dtype)

    def _values(self, rows: Tensor | None) -> Tensor | None:
        """Return the function (N, C) along which pairs are drawn, where the sampling is given it beforehand."""
        if self.config.sampling != "swim" or rows is None:
            return None
        return rows[:, :1] if self.energy else rows

    def _seen(self, data: Examples, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Read the examples from which pairs are drawn: a random part of those that can be read in any order, else the first ones."""
        count = min(len(data), self.config.points)
        if count == len(data) or not hasattr(data, "passes"):
            order = torch.randperm(len(data), generator=generator, device=generator.device)[:count].sort().values.cpu()
            return data.batch(order)
        return data.batch(torch.arange(count))

    def _sample(self, points: Tensor, values: Tensor | None, generator: torch.Generator) -> None:
        """Sample layer after layer from points (K, D), each from their images; layers that do not learn, as in a twin, stay."""
        classes = self.spec.targets in ("classes", "multilabel") and self.config.sampling == "swim"
        known = self._layers
        for place, (_, linear, activation) in enumerate(known):
            if not linear.weight.requires_grad or len(points) < 2:  # one example has no pair
                pass
            elif self.config.sampling == "elm":
                # The published range of biases is that of the box; further layers have the range of their inputs.
                box = isinstance(self.spec, HamiltonianSpec) and not place
                ends = self.spec.box if box else (float(points.min()), float(points.max()))  # type: ignore[attr-defined]
                made = pairs.normal_layer(points, linear.out_features, generator, scale=self.config.scale, low=min(ends), high=max(ends))
                _fill(linear, made.weight, made.bias)
            else:
                made = pairs.pair_layer(points, linear.out_features, activation, generator, values, classes=classes)
                made = pairs.rotated(made, points, activation, generator) if self.config.control == "rotated" else made
                made = pairs.permuted(made, generator) if self.config.control == "permuted" else made
                _fill(linear, made.weight, made.bias)
            if place + 1 < len(known):
                points = layers.image(points, *self._weights(linear), activation)

    def _weights(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return linear.weight.to(self.dtype), linear.bias.to(self.dtype)

    # --- solving ------------------------------------------------------------------------------------------------------------

    def accumulate(self, batch: Batch, step: Step) -> Metrics:
        """Add a batch's rows to the triangular factor; or learn all there is to learn, where the batch is all data."""
        inputs, rows = batch.inputs.to(self.dtype).flatten(1), self._target_rows(batch)
        if self.config.streamed:
            self._add(inputs, rows)
        else:
            self._learn(inputs, rows, step.generator)
        return {}

    def _learn(self, inputs: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Sample and solve; for ``a-swim`` sample once more by the first fit, and solve again."""
        some = torch.randperm(len(inputs), generator=generator, device=inputs.device)[: self.config.points]
        values = self._values(rows)
        self._sample(inputs[some], None if values is None else values[some], generator)
        self._fit(inputs, rows)
        if self.config.sampling == "a-swim":
            self._sample(inputs[some], self._fitted(inputs[some]), generator)
            self._fit(inputs, rows)

    def _fit(self, inputs: Tensor, rows: Tensor) -> None:
        self.factors.clear()
        self._add(inputs, rows)
        self._solve(self._rows(inputs, rows))

    def _add(self, inputs: Tensor, targets: Tensor) -> None:
        for rows, values in self._rows(inputs, targets):
            self.factors.add(rows, values)

    def _rows(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of the linear system and their targets, a part at a time."""
        per_example = inputs.shape[1] if self.energy else 1
        size = max(1, self.factors.rows_at_once // per_example)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            if self.energy:
                duals = self._duals(x)[:, 1:]  # (N, D, M): by q, then by p
                by_q, by_p = duals.chunk(2, dim=1)
                yield torch.cat([by_p, -by_q], dim=1).flatten(0, 1), y[:, 1:].reshape(-1, 1)
            else:
                yield self._images(x), y

    def _images(self, points: Tensor) -> Tensor:
        for _, linear, activation in self._layers:
            points = layers.image(points, *self._weights(linear), activation)
        return points

    def _duals(self, points: Tensor) -> Tensor:
        (_, linear, activation), *further = self._layers
        made = layers.first_duals(points, *self._weights(linear), activation)
        for _, linear, activation in further:
            made = layers.dual_layer(made, *self._weights(linear), activation)
        return made

    def solve(self, step: Step) -> None:
        """Solve for the readout at the end of a stream."""
        if self.config.streamed:
            self._solve(iter(()))

    def _fitted(self, inputs: Tensor) -> Tensor:
        """Return the outputs (N, C) of the first fit, or its energies (N, 1)."""
        size = max(1, AT_ONCE // self.factors.features)
        weight, bias = self._weights(self._readout)
        return torch.cat([F.linear(self._images(x), weight, bias) for x in inputs.split(size)])

    def _solve(self, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Write the readout of the chosen penalty; ``parts`` are the rows that were added, once more, to leave each out."""
        made = self.factors.decompose()
        cutoff = self.config.cutoff
        best = 0
        if len(self.penalties) > 1:
            if self.config.choose == "leave-one-out":
                errors = made.left_out(parts, self.penalties, cutoff)
            else:
                errors = made.generalised(self.penalties, cutoff)
            best = min(range(len(errors)), key=errors.__getitem__)
        self.chosen.fill_(best)
        for place in range(len(self.weights)):
            weight, bias = made.solve(self.penalties[place], cutoff)
            self.weights[place], self.biases[place] = weight, bias
        weight, bias = made.solve(self.penalties[best], cutoff)
        if self.energy:
            bias = bias + self._constant(weight)
        if self._readout.weight.requires_grad:
            _fill(self._readout, weight, bias)

    def _constant(self, weight: Tensor) -> Tensor:
        """Return what the energy of the state x = 0 lacks: the published system has it as its last row, which no other row opposes."""
        assert isinstance(self.spec, HamiltonianSpec)
        origin = torch.zeros(1, self.spec.input_size, dtype=self.dtype, device=weight.device)
        return self.spec.origin_energy - (self._images(origin) @ weight.T)[0]

    # --- predicting ---------------------------------------------------------------------------------------------------------

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Predict; where the penalty is chosen on validation, by the readout of the penalty."""
        return self.read(self.features(inputs), generator)

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Predict from features, by the readout of the chosen penalty."""
        if not self.calibrates:
            scores: Tensor = self.network.blocks[str(self.network.readout)](features)
            return scores
        place = int(self.chosen)
        return F.linear(features, self.weights[place], self.biases[place])

    @torch.no_grad()
    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Choose the penalty with the smallest squared error on the validation split; all of them come from one decomposition."""
        sums = torch.zeros(len(self.penalties), dtype=torch.float64)
        for places in torch.arange(len(data)).split(4096):
            inputs, targets = data.batch(places)
            points = self.spec.normalise(inputs.to(generator.device), self.network.dtype)
            rows = self.spec.target_rows(Batch(points, None if targets is None else targets.to(generator.device)), self.network.dtype)
            made = torch.einsum("nm,pcm->pnc", self.features(points), self.weights) + self.biases[:, None]
            sums += (made - rows).square().sum((1, 2), dtype=torch.float64).cpu()
        self.chosen.fill_(int(sums.argmin()))
        return {"penalty": self.penalties[int(self.chosen)]}


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _layer_of(name: str, block: nn.Module, *, first: bool) -> tuple[str, nn.Linear, str]:
    """Return a hidden block's linear map and the name of its activation.

    Raises:
        UsageError: it is no linear map with a bias and tanh or ReLU.
    """
    if isinstance(block, DualLayer):
        return name, block.linear, block.activation
    parts = [part for part in (block.children() if isinstance(block, nn.Sequential) else [block]) if not isinstance(part, nn.Identity)]
    if first and parts and isinstance(parts[0], nn.Flatten):
        parts = parts[1:]
    kinds = {nn.Tanh: "tanh", nn.ReLU: "relu"}
    if len(parts) == 2 and isinstance(parts[0], nn.Linear) and parts[0].bias is not None and type(parts[1]) in kinds:
        return name, parts[0], kinds[type(parts[1])]
    fix = "use network=mlp network.activation=tanh (or relu), without normalisation and dropout; or network=hnn"
    held = ", ".join(type(part).__name__ for part in parts)
    raise UsageError(f"Sampled samples layers of tanh or ReLU units, but {name} consists of {held}", where="network", fix=fix)


def _readout_of(block: nn.Module) -> nn.Linear:
    if isinstance(block, EnergyReadout):
        return block.linear
    if isinstance(block, nn.Linear) and block.bias is not None:
        return block
    what = f"Sampled solves for a linear readout with a bias, not for a {type(block).__name__}"
    raise UsageError(what, where="network", fix="use network=mlp, or hnn")
