"""BurstCCN: event rates carry activity upwards and burst probabilities carry errors downwards, at the same time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Batch, Budget, Card, Network, OptimizerConfig, Phase, Rule, Step, TaskSpec, Traits, UsageError
from bpfree.network import add_gradients
from bpfree.network.closed_form import linear_input_gradient, parameter_gradients
from bpfree_feedback import agreement
from bpfree_feedback.anatomy import RATES, Anatomy, Seen, pulled, take_apart, watched
from bpfree_feedback.burst_network import ReLURMS
from bpfree_feedback.burst_options import BurstCCNConfig

__all__ = ["BurstCCN"]

GAIN = 3.6
"""Of Xavier's normal forward weights, with which sigmoid units are in their steep range."""
REST = "rest"


class Feedback(nn.Module):
    """Feedback weights of one layer, in the shape of the forward weights of the layer above: Y takes its bursts, Q its events.

    Args:
        weight: the forward weights.
        config: of the rule; what does not learn is a buffer.
    """

    Y: Tensor
    Q: Tensor

    def __init__(self, weight: Tensor, config: BurstCCNConfig) -> None:
        super().__init__()
        self.config = config
        self._hold("Y", self._first_y(weight), config.Y != "tied" and config.Y_learning != "none")
        self._hold("Q", self._first_q(weight), config.Q != "tied" and config.Q_learning != "none")

    def _hold(self, name: str, value: Tensor, learns: bool) -> None:
        if learns:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _first_y(self, weight: Tensor) -> Tensor:
        config = self.config
        if config.Y != "random":
            return weight.detach() * (config.Y_scale or 1.0)
        return torch.randn_like(weight) * (config.Y_std or (config.Y_scale or 3.0) * _xavier(weight.shape))

    def _first_q(self, weight: Tensor) -> Tensor:
        config = self.config
        if config.Q in ("symmetric", "tied"):
            return config.p0 * self.Y.detach()
        if config.Q == "forward":
            return weight.detach() * (config.p0 * config.Q_scale)
        return torch.randn_like(weight) * (config.p0 * config.Q_scale * _xavier(weight.shape))

    @property
    def at_rest(self) -> Tensor | None:
        """``p0 Y - Q``, through which events are heard where nothing teaches; ``None``: zero, by the regime."""
        config = self.config
        learns = any(isinstance(part, nn.Parameter) for part in (self.Y, self.Q))
        if config.Q == "tied" or (config.Q == "symmetric" and config.Y != "tied" and not learns):
            return None
        return config.p0 * self.Y.detach() - self.Q.detach()

    @torch.no_grad()
    def tie(self, weight: Tensor) -> None:
        """Copy what is tied."""
        if self.config.Y == "tied":
            self.Y.copy_(weight).mul_(self.config.Y_scale or 1.0)
        if self.config.Q == "tied":
            self.Q.copy_(self.Y).mul_(self.config.p0)


def _xavier(shape: Sequence[int]) -> float:
    """Return the deviation of Xavier's normal weights, with the gain of this rule's networks."""
    field = math.prod(shape[2:])
    return GAIN * math.sqrt(2 / ((shape[0] + shape[1]) * field))


class BurstCCN(Rule):
    """Bursts multiplex an error signal with the activity: two kinds of feedback cancel unless a layer above bursts unusually."""

    Config = BurstCCNConfig
    card = Card(
        "bursting units: event rates for the activity and burst probabilities for the error, in one phase",
        paper="Greedy, Zhu, Pemberton, Mellor, Costa: Single-phase deep learning in cortico-cortical networks. NeurIPS 2022, arXiv "
        "2206.11769",
        equation="e_l = f(W_l e_{l-1});  a_l = Y_l^T (p_{l+1} e_{l+1}) - Q_l^T e_{l+1};  p_l = 2 p0 sigmoid(2 a_l (1 - e_l) / p0);  "
        "p_L = p0 (1 + s (y - e_L) (1 - e_L));  grad W_l = -((p_l - p0) e_l) e_{l-1}^T",
        notes="Where Q = p0 Y the feedback is silent unless something above bursts more or less than usual, and what is heard is "
        "Y^T (p - p0) e, to first order the credit of feedback alignment with Y, or of back-propagation of the squared error with Y = W. "
        "Its size decides how fast hidden layers learn: a sigmoid's slope is at most 1/4, so feedback of the size of the forward weights "
        "fades with depth; the authors' is three times as large (rule.Y_scale; rule.Y_std=0.5 is their notebook's). Apical learning makes "
        "Q cancel Y and does not align Y with W, and it is slow: of a random Q enough is heard for very long to drown the teacher, even "
        "after rule.rest_epochs. Kolen-Pollack learning aligns all three, if they decay (optimizer.weight_decay). For other "
        "nonlinearities than a sigmoid, a (1 - e) is a f'(u) / e. Updates carry p0 times error_scale unless rule.updates=gradient. Y and Q "
        "of convolutions learn from the apical potential, too, which the published code lacks. Scales and shifts of normalisations do not "
        "learn. Not here: the spiking and the continuous-time model, and populations of one sign each (Dale's law).",
    )
    config: BurstCCNConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.layers = _layers(self.network)
        if not self.layers[:-1]:
            raise UsageError("BurstCCN has nothing to teach: the network has no hidden blocks", fix="network.depth=1 or more")
        scales = self.config.local_scales or [1.0]
        if len(scales) > len(self.layers) - 1:
            raise UsageError(f"{len(scales)} scales for {len(self.layers) - 1} hidden blocks", where="rule.local_scales", fix="give fewer")
        self.scales = [scales[min(place, len(scales) - 1)] for place in range(len(self.layers) - 1)]
        above = zip(self.layers[:-1], self.layers[1:], strict=True)
        self.feedback = nn.ModuleDict({one.name: Feedback(next_.site.weight, self.config) for one, next_ in above})

    @classmethod
    def traits_of(cls, config: BurstCCNConfig, network: Network | None = None) -> Traits:
        copies = config.Y != "random" or config.Q == "forward"
        plain = network is not None and all(layer.plain for layer in _layers(network))
        return Traits(
            dependence="all",
            downstream_weights="all" if copies else 0,
            reverse_span=0 if plain else 1,
            targets=("classes", "soft", "multilabel"),
            inputs="real",
            own_loss=False,
        )

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        """Return SGD at the authors' 0.3 for 500 units: rates are positive, so that steps that are stable go with one over their number."""
        widest = 0 if network is None else max(layer.site.weight[0].numel() for layer in _layers(network)[1:])
        return OptimizerConfig("sgd", lr=150 / widest if widest else None)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        if spec.is_image and spec.input_shape[0] > 1:
            return {"name": "burst-cnn"}
        return {"name": "mlp", "depth": 3, "activation": "sigmoid", "init": "xavier-normal", "init_gain": GAIN}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        settings = super().specimen(kind, depth, width) or {}
        return settings | {"network.activation": "sigmoid", "network.init": "xavier-normal", "network.init_gain": GAIN}

    # --- groups -------------------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Group weights by block; Y and Q that learn as the weights above do are in their group, so that both are clipped alike."""
        groups = {name: list(block.parameters()) for name, block in self.network.blocks.items()}
        for below, layer in zip(self.layers[:-1], self.layers[1:], strict=True):
            for kind, parameter in self.feedback[below.name].named_parameters():
                name = layer.name if self._learning(kind) == "kolen-pollack" else f"{kind}.{below.name}"
                groups.setdefault(name, []).append(parameter)
        return groups

    def group_options(self) -> dict[str, dict[str, Any]]:
        rates = {"Y": self.config.Y_lr, "Q": self.config.Q_lr}
        own = [name for name in self.groups() if name[:2] in ("Y.", "Q.")]
        return {name: {"lr": rates[name[0]], "weight_decay": 0.0, "momentum": 0.0} for name in own}

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Begin with epochs at rest, in which feedback weights alone learn, if any are asked for."""
        rest = self.config.rest_epochs
        own = tuple(self.group_options())
        if not rest or not any(p.requires_grad for p in self.feedback.parameters()):  # or a twin
            return super().phases(budget)
        if not own:
            raise UsageError(
                f"rule.rest_epochs={rest} does nothing: no feedback learns from the apical potential",
                where="rule.rest_epochs",
                fix="rule.Q_learning=apical, or leave it out",
            )
        if budget.epochs is not None and budget.epochs <= rest:
            what = f"{rest} of {budget.epochs} epochs are at rest, so none is left for learning"
            raise UsageError(what, where="rule.rest_epochs", fix="a larger budget.epochs")
        left = replace(budget, epochs=budget.epochs and budget.epochs - rest)
        return [Phase(REST, epochs=rest, groups=own), *super().phases(left)]

    def _learning(self, kind: str) -> str:
        return self.config.Y_learning if kind == "Y" else self.config.Q_learning

    def freeze_features(self) -> None:
        super().freeze_features()
        self.feedback.requires_grad_(False)

    def after_update(self, groups: Sequence[str]) -> None:
        for below, layer in zip(self.layers[:-1], self.layers[1:], strict=True):
            self._feedback(below).tie(layer.site.weight)

    def _feedback(self, layer: Anatomy) -> Feedback:
        return self.feedback[layer.name]  # type: ignore[return-value]

    def feedback_pairs(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the forward weights and Y of each block above a hidden one, by that block's name."""
        above = zip(self.layers[:-1], self.layers[1:], strict=True)
        return {layer.name: (layer.site.weight, self._feedback(below).Y) for below, layer in above}

    def plan(self) -> str:
        config, lines = self.config, ["feedback:"]
        for below, layer in zip(self.layers[:-1], self.layers[1:], strict=True):
            part = self._feedback(below)
            how = f"Y {config.Y}, deviation {float(part.Y.detach().std()):.3g}" + _learns(config.Y != "tied" and config.Y_learning)
            how += f"; Q {config.Q}" + _learns(config.Q != "tied" and config.Q_learning)
            lines.append(f"  {layer.name} to {below.name}: {how}; {'closed form' if layer.plain else 'local derivatives by autograd'}")
        return "\n".join(lines)

    # --- credit -------------------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        seen = self._execute(batch.inputs, step)
        scores = seen[-1].u.detach()
        taught = self._is_taught(step)
        with torch.no_grad():
            metrics = {"loss": self.spec.loss(scores, batch)}
            measures = self._measures(step)
            self._descend(seen, self._output(scores, batch, taught), taught, metrics if measures else None)
            return metrics | (agreement.metrics(self.feedback_pairs()) if measures else {})

    def _is_taught(self, step: Step) -> bool:
        every = self.config.rest_every
        return step.phase.name != REST and (not every or (step.index + 1) % every != 0)

    def _measures(self, step: Step) -> bool:
        return self.config.measure_every > 0 and step.index % self.config.measure_every == 0

    def _execute(self, x: Tensor, step: Step) -> list[Seen]:
        found = []
        with watched(self.layers) as seen:
            for layer in self.layers:
                if self.config.noise:
                    noise = torch.randn(x.shape, generator=step.generator_for(f"noise.{layer.name}"), device=x.device, dtype=x.dtype)
                    x = x.detach() + self.config.noise * noise
                with torch.set_grad_enabled(not layer.plain):
                    trace = self.network.trace(layer.name, x, input_grad=not layer.plain)
                found.append(seen(layer, trace))
                x = trace.output.detach()
        return found

    def _output(self, scores: Tensor, batch: Batch, taught: bool) -> tuple[Tensor, Tensor]:
        """Return the output's event rates, and by how much its burst rates differ from those at rest: ``(p - p0) e``."""
        config = self.config
        rate = self._rates(scores)
        if not taught:
            return rate, torch.zeros_like(rate)
        error = config.error_scale * (self.spec.target_rows(batch, rate.dtype) - rate)
        if config.output == "sigmoid":
            return rate, config.p0 * error * (1 - rate) * rate
        coded = rate + config.output_shift if config.output_shift else rate.clamp_min(1e-8)
        return rate, config.p0 * torch.tanh(error / coded) * coded

    def _rates(self, scores: Tensor) -> Tensor:
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        return scores.sigmoid() if self.config.output == "sigmoid" else scores.softmax(1)

    def _descend(self, seen: Sequence[Seen], output: tuple[Tensor, Tensor], taught: bool, metrics: dict[str, Tensor] | None) -> None:
        """Go from the output down to the lowest block of which anything learns."""
        config = self.config
        (rate, change), size = output, 1.0
        if config.updates == "gradient":
            size = config.p0 * config.error_scale
        lowest = self._lowest()
        gradients = self._learn(seen[-1], change, size) if taught else {}
        for place in range(len(seen) - 2, lowest - 1, -1):
            above, here = seen[place + 1], seen[place]
            loud, silent = self._hear(here.anatomy, above, rate, change)
            apical = loud if silent is None else loud + silent
            self._learn_feedback(here.anatomy, above, rate, change, apical, gradients)
            potential = _downwards(above, here, apical) * self.scales[place]
            rate_above, rate = rate, here.rate.detach()
            change = config.p0 * torch.tanh(self._drive(here, potential) / config.p0) * rate
            if config.updates == "gradient":
                size *= self.scales[place]
            gradients = self._learn(here, change, size) if taught else {}
            if metrics is not None:
                metrics |= _measured(here.anatomy.name, rate, change, potential, config.p0)
                metrics[f"{here.anatomy.name}/rest"] = self._loudness(here.anatomy, above, rate_above, silent)

    def _lowest(self) -> int:
        """Return the place of the lowest layer that learns, or whose feedback does."""
        learning = [
            layer.learns or (place < len(self.layers) - 1 and any(p.requires_grad for p in self.feedback[layer.name].parameters()))
            for place, layer in enumerate(self.layers)
        ]
        return learning.index(True) if True in learning else len(learning)

    def _hear(self, below: Anatomy, above: Seen, rate: Tensor, change: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what Y and Q bring from the layer above, at its input: of unusual bursts, and of what is there at rest.

        ``Y^T (p e) - Q^T e = Y^T ((p - p0) e) + (p0 Y - Q)^T e``, of which the second part is zero, exactly, where Q is p0 Y.
        """
        part, site, source = self._feedback(below), above.anatomy.site, above.source
        loud = linear_input_gradient(site, source, change, part.Y)
        at_rest = part.at_rest
        return loud, None if at_rest is None else linear_input_gradient(site, source, rate.to(change.dtype), at_rest)

    def _loudness(self, below: Anatomy, above: Seen, rate: Tensor, silent: Tensor | None) -> Tensor:
        """Return the root mean square of what is heard at rest over that of what would be heard without Q: 0 is silence."""
        if silent is None:
            return torch.zeros((), device=rate.device)
        part, site = self._feedback(below), above.anatomy.site
        alone = linear_input_gradient(site, above.source, rate.to(silent.dtype) * self.config.p0, part.Y)
        rest: Tensor = silent.norm() / alone.norm()
        return rest.float()

    def _drive(self, here: Seen, apical: Tensor) -> Tensor:
        """Return ``a f'(u) / e``: a sigmoid's ``a (1 - e)``."""
        rate = here.rate.detach()
        if isinstance(here.anatomy.activation, nn.Sigmoid) and here.anatomy.plain:
            return apical * (1 - rate)
        slope = pulled(here.rate, here.u, apical)
        active = rate > 0
        if self.config.ramp and not isinstance(here.anatomy.activation, nn.Sigmoid):
            return slope * torch.where(active, (1 / rate.clamp_min(1e-30)).clamp_max(self.config.ramp), 0.0)
        return torch.where(active, slope / torch.where(active, rate, 1.0), 0.0)

    def _learn(self, here: Seen, change: Tensor, size: float) -> dict[str, Tensor]:
        """Add to ``.grad`` of a block's weights, and return what was added."""
        gradients = parameter_gradients(here.anatomy.site, here.source.detach(), change * (-1 / (size * len(change))))
        add_gradients(here.anatomy.site, gradients)
        return gradients

    def _learn_feedback(
        self, below: Anatomy, above: Seen, rate: Tensor, change: Tensor, apical: Tensor, gradients: Mapping[str, Tensor]
    ) -> None:
        """Add to ``.grad`` of Y and Q that learn.

        Args:
            below: the layer that hears the feedback.
            above: the layer that it is from.
            rate, change: event rates of that layer, and of its burst rates the part that is unusual.
            apical: what is heard, at the input of the layer above.
            gradients: of the weights above; empty in a step without teacher.
        """
        part, config = self._feedback(below), self.config
        learning = {kind: self._learning(kind) for kind, parameter in part.named_parameters() if parameter.requires_grad}
        alike = [kind for kind, how in learning.items() if how == "kolen-pollack" and gradients]
        found = {kind: gradients["weight"] * (1.0 if kind == "Y" else config.p0) for kind in alike}
        site, rate = above.anatomy.site, rate.to(apical.dtype)
        if learning.get("Q") == "apical":
            found["Q"] = parameter_gradients(site, apical, rate * (-1 / len(rate)))["weight"]
        if learning.get("Y", "").startswith("apical"):
            found["Y"] = self._silencing(part, above, rate, config.p0 * rate + change, apical)
        add_gradients(part, found)

    def _silencing(self, part: Feedback, above: Seen, rate: Tensor, bursts: Tensor, apical: Tensor) -> Tensor:
        """Return the gradient of half the squared apical potential by Y, in which each branch silences its own (N, ...) potential."""
        site, count = above.anatomy.site, rate.shape[1]
        learned_from = (rate if self.config.Y_learning == "apical-events" else bursts) / len(rate)
        shares = torch.arange(count, device=rate.device).tensor_split(min(self.config.branches, count))
        if len(shares) == 1:
            return parameter_gradients(site, apical, learned_from)["weight"]
        total = torch.zeros_like(site.weight)
        for share in shares:
            own = torch.zeros(count, *[1] * (rate.dim() - 2), device=rate.device, dtype=rate.dtype)
            own[share] = 1.0
            heard = linear_input_gradient(site, above.source, bursts * own, part.Y)
            heard = heard - linear_input_gradient(site, above.source, rate * own, part.Q)
            total += parameter_gradients(site, heard, learned_from * own)["weight"] * math.sqrt(count / len(share))
        return total

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return what the updates descend where feedback is tied, silent at rest and weak: the squared error or cross-entropy, scaled."""
        scores = self.network(batch.inputs)
        rows = self.spec.target_rows(batch, scores.dtype)
        size = 1.0 if self.config.updates == "gradient" else self.config.p0 * self.config.error_scale
        squared = self.config.output == "sigmoid"
        energy = 0.5 * (rows - scores.sigmoid()).square() if squared else -rows * scores.log_softmax(1)
        total: Tensor = size * energy.sum() / len(scores)
        return total


def _layers(network: Network) -> list[Anatomy]:
    """Take the network apart, and refuse hidden layers whose outputs are no event rates."""
    layers = take_apart(network, (ReLURMS,))
    for layer in layers[:-1]:
        if not isinstance(layer.activation, (*RATES, ReLURMS)):
            what = "no nonlinearity" if layer.activation is None else type(layer.activation).__name__
            raise UsageError(
                f"block {layer.name!r} has {what}, but event rates are never negative", where="BurstCCN", fix="network.activation=sigmoid"
            )
    return layers


def _learns(how: str | bool) -> str:
    return "" if how in ("none", False) else f", learns ({how})"


def _downwards(above: Seen, here: Seen, apical: Tensor) -> Tensor:
    """Bring a potential from the input of the site above to the rates below, through reshapes, poolings and dropout."""
    below, source = above.trace.input, above.source
    apical = apical.reshape(below.shape) if above.anatomy.plain else pulled(source, below, apical)
    return apical.reshape(here.rate.shape) if here.anatomy.plain else pulled(here.trace.output, here.rate, apical)


def _measured(name: str, rate: Tensor, change: Tensor, apical: Tensor, p0: float) -> dict[str, Tensor]:
    """Return metrics of a hidden block, each a scalar.

    ``apical``: root mean square of its potential. ``event_rate``, ``burst_rate``: means. ``burst_change``: root mean square of ``p e -
    p0 e``.
    """
    found = {
        "apical": apical.square().mean().sqrt(),
        "event_rate": rate.mean(),
        "burst_rate": p0 * rate.mean() + change.mean(),
        "burst_change": change.square().mean().sqrt(),
    }
    return {f"{name}/{key}": value.float() for key, value in found.items()}
