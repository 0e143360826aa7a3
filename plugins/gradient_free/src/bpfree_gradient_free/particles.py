"""Particles: a swarm for each neuron, whose best particle becomes the neuron; and swarms over layers and the whole network as controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, BpfreeError, Card, Network, Rule, Step, TaskSpec, Traits, always, option
from bpfree_gradient_free.evaluating import follows_statistics, losses, outputs_of_stacks, searched
from bpfree_gradient_free.layers import Layer, find_layers, run
from bpfree_gradient_free.swarm import Memory, Swarms

__all__ = ["Particles", "ParticlesConfig"]

AT_ONCE = 2**22
"""Numbers of activations that are computed together at most; it does not depend on the number of processes."""
BEYOND_ANY = math.inf


@dataclass
class ParticlesConfig:
    """Options of swarms."""

    swarm: Literal["neuron", "layer", "network"] = option("neuron", "what has a swarm of its own; layer and network are controls")
    particles: int = option(10, "particles in each swarm", ge=1)
    rounds: int = option(1, "moves of each swarm on each batch", ge=1)
    inertia: float = option(0.72, "w: the share of its velocity that a particle keeps", ge=0, le=1)
    own: float = option(1.49, "c1: acceleration towards a particle's own best place", ge=0)
    common: float = option(1.49, "c2: acceleration towards the weights of the network, the swarm's best place", ge=0)
    speed: float = option(0.3, "deviation of the first velocities, times 1 / sqrt(inputs of the neuron)", gt=0)
    memory: Memory = option(
        "inflated",
        "what becomes of a remembered loss on the next batch: raised by rule.inflation, measured again (twice the evaluations), or kept",
    )
    inflation: float = option(0.02, "share by which a remembered loss is raised with each batch", ge=0, needs={"memory": ("inflated",)})
    assembly: Literal["in-turn", "together"] = option(
        "in-turn",
        "how neurons of a layer are chosen: one after the other, each beside those before it; or all beside the old ones, and the layer "
        "stays as it was if that is better",
        needs={"swarm": ("neuron",)},
    )
    together: bool = option(True, "execute the networks of particles as one batched computation", needs={"swarm": ("network",)})


class Particles(Rule):
    """Particle swarms over neurons, layers or the network; the best place of each swarm is what the network has."""

    Config = ParticlesConfig
    card = Card(
        "a swarm of particles for each neuron; the best ones are the network",
        paper="Kumar: training neural networks by swarms of particles, one for each neuron. 2024, arXiv 2412.05667 (its abstract)",
        equation="v <- w v + c1 r1 (best - x) + c2 r2 (row - x);  x <- x + v;  row <- x where that lowers the batch's loss",
        notes="Our reading of the abstract: the paper's sizes, constants and numbers could not be read, so nothing is compared with them. "
        "A particle is the weights and the bias of one neuron; its loss is that of the whole network with the other neurons as they are, "
        "on this batch. Remembered losses belong to other batches: rule.memory says what is done about that. Scales and shifts of "
        "normalisations move with rule.swarm=network alone. There is no optimiser and no rate. A batch is followed as far as it goes: "
        "take large batches of equal size.",
    )
    optimizer_keys_of = always(())
    config: ParticlesConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.layers = [] if self.config.swarm == "network" else find_layers(self.network)
        self.swarms = nn.ModuleDict({name: self._made(rows, speed) for name, rows, speed in self._beginnings()})

    def _made(self, rows: Tensor, speed: Tensor) -> Swarms:
        return Swarms(rows, self.config.particles, speed * self.config.speed)

    def _beginnings(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, rows and deviations of the first velocities of each set of swarms."""
        if self.config.swarm == "network":
            members = list(self.network.parameters())
            speed = torch.cat([p.new_full((p.numel(),), _deviation(p)) for p in members])
            yield "network", torch.cat([p.detach().flatten() for p in members])[None], speed
        for layer in self.layers:
            rows = layer.rows()
            speed = rows.new_tensor(_deviation(layer.module.weight))
            yield layer.name, rows if self.config.swarm == "neuron" else rows.view(1, -1), speed

    @classmethod
    def traits_of(cls, config: ParticlesConfig, network: Network | None = None) -> Traits:
        passes = BEYOND_ANY if network is None else cls._passes(config, network)
        return Traits("all", downstream_weights="all", reverse_span=0, update="in-place", passes=passes)

    @classmethod
    def _passes(cls, config: ParticlesConfig, network: Network) -> float:
        """Count evaluations: of each particle, of what it remembers if that is measured, and of the network as it is."""
        each = config.particles * (2 if config.memory == "measured" else 1)
        swarms, more = 1, 0
        if config.swarm != "network":
            found = [layer for layer in find_layers(network) if layer.learns]
            swarms = sum(layer.neurons for layer in found) if config.swarm == "neuron" else len(found)
            more = len(found) if config.swarm == "neuron" and config.assembly == "together" else 0
        return 1 + follows_statistics(network) + config.rounds * (swarms * each + more)

    def plan(self) -> str:
        lines = [f"{self._passes(self.config, self.network):g} evaluations of the network on each batch"]
        for name, swarms in zip(self.swarms, self._swarms(), strict=True):
            count, particles, size = swarms.position.shape
            lines.append(f"{name.replace('/', '.')}: {count} swarm(s) of {particles} particles with {size} numbers each")
        if not (self.config.inertia or self.config.own or self.config.common):
            lines.append("no particle moves, so nothing is learned: rule.inertia, rule.own and rule.common are all 0")
        return "\n".join(lines)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise BpfreeError("particles moves its swarms, so it gives no gradients", fix="call learn")

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with searched(self.network, batch.inputs):
            for swarms in self._swarms():
                if self.config.memory == "inflated":
                    swarms.age(self.config.inflation)
            start = loss = losses(self.spec, self.network(batch.inputs)[None], batch)[0]
            for index in range(self.config.rounds):
                loss = self._network_round(batch, step, index, loss) if not self.layers else self._round(batch, step, index, loss)
        speeds = [swarms.velocity.square().mean().sqrt() for swarms in self._swarms()]
        return {"loss": start, "loss_after": loss, "speed": torch.stack(speeds).mean()}

    def _swarms(self) -> Iterator[Swarms]:
        yield from self.swarms.values()  # type: ignore[misc]

    def _moved(self, name: str, rows: Tensor, step: Step, index: int) -> Swarms:
        """Move the swarms of this name, with noise of the round."""
        swarms: Any = self.swarms[name]
        config = self.config
        swarms.move(rows, config.inertia, config.own, config.common, step.generator_for(f"{name} {index}"))
        return swarms  # type: ignore[no-any-return]

    def _places(self, swarms: Swarms) -> Tensor:
        """Return what is evaluated: the particles' positions, and what they remember where that is measured, (S, P or 2 P, F)."""
        return torch.cat([swarms.position, swarms.best], 1) if self.config.memory == "measured" else swarms.position

    def _noted(self, swarms: Swarms, values: Tensor, first: int = 0) -> None:
        """Let particles remember, from the losses (M, P or 2 P) of :meth:`_places`."""
        count = self.config.particles
        if self.config.memory == "measured":
            swarms.value[first : first + len(values)] = values[:, count:]
        swarms.remember(values[:, :count], first)

    # --- swarms over neurons and layers -------------------------------------------------------------------------------------

    def _round(self, batch: Batch, step: Step, index: int, loss: Tensor) -> Tensor:
        """Visit the layers from the input on, each on the cached activations below it; return the loss then."""
        x = batch.inputs
        for layer in self.layers:
            x = run(layer.before if layer is self.layers[0] else [], x)
            u = layer.module(x)
            if layer.learns:
                swarms = self._moved(layer.name, layer.rows().view(len(self._of(layer).position), -1), step, index)
                u, loss = _Visit(self, layer, swarms, batch, x, u, loss).made()
            x = run(layer.tail, u)
        return loss

    def _of(self, layer: Layer) -> Swarms:
        return self.swarms[layer.name]  # type: ignore[return-value]

    # --- one swarm over the network -----------------------------------------------------------------------------------------

    def _network_round(self, batch: Batch, step: Step, index: int, loss: Tensor) -> Tensor:
        members = dict(self.network.named_parameters())
        row = torch.cat([p.detach().flatten() for p in members.values()])
        swarms = self._moved("network", row[None], step, index)
        places = self._places(swarms)[0]
        values = torch.cat([self._values(part, members, batch) for part in places.split(self._chunk(batch))])
        self._noted(swarms, values[None])
        chosen, loss = _better(values, places, row, loss)
        for parameter, part in zip(members.values(), _cut(chosen, members), strict=True):
            if parameter.requires_grad:
                parameter.copy_(part.view_as(parameter))
        return loss

    def _values(self, places: Tensor, members: dict[str, nn.Parameter], batch: Batch) -> Tensor:
        """Return the losses (M,) of networks (M, numbers); parameters that do not learn are the network's."""
        parts = zip(members.items(), _cut(places, members), strict=True)
        stacks = {name: part.reshape(-1, *p.shape) for (name, p), part in parts if p.requires_grad}
        outputs = outputs_of_stacks(self.network, stacks, batch.inputs, together=self.config.together)
        return losses(self.spec, outputs, batch)

    def _chunk(self, batch: Batch) -> int:
        widest = max((shape.numel() for shape in self.network.shapes.values()), default=1)
        return max(1, AT_ONCE // max(len(batch) * widest, sum(p.numel() for p in self.network.parameters())))


class _Visit:
    """One layer's turn: all candidates of its neurons as one product, and their losses through what lies behind.

    Args:
        rule: whose options count.
        layer: the layer.
        swarms: of the layer, moved already.
        batch: whose loss counts.
        x: (N, ...) the layer's input.
        u: (N, ...) its pre-activations.
        loss: of the network as it is.
    """

    def __init__(self, rule: Particles, layer: Layer, swarms: Swarms, batch: Batch, x: Tensor, u: Tensor, loss: Tensor) -> None:
        self.rule, self.layer, self.swarms, self.batch, self.x, self.u, self.loss = rule, layer, swarms, batch, x, u, loss
        self.places = rule._places(swarms)
        self.v = layer.next(run(layer.tail, u)) if rule.config.swarm == "neuron" and layer.is_pointwise and u.dim() == 2 else None

    def made(self) -> tuple[Tensor, Tensor]:
        """Set the layer to the best places; return its new pre-activations and the loss."""
        if self.rule.config.swarm == "layer":
            self._as_a_whole()
        elif self.rule.config.assembly == "together":
            self._together()
        else:
            self._in_turn()
        return self.u, self.loss

    def _candidates(self, first: int, last: int) -> Tensor:
        """Return the pre-activations of all candidates of neurons first to last: (neurons, candidates, N, ...)."""
        places = self.places[first:last]
        found = self.layer.execute(self.x, places.flatten(0, 1))
        return found.movedim(self.layer.axis, 0).unflatten(0, places.shape[:2])  # type: ignore[no-any-return]

    def _per_chunk(self) -> int:
        """Return how many neurons have their candidates computed together."""
        return max(1, AT_ONCE // (self.places.shape[1] * self.u.numel() // self.layer.neurons))

    def _in_turn(self) -> None:
        rows, size = self.layer.rows(), self._per_chunk()
        for first in range(0, len(rows), size):
            candidates = self._candidates(first, first + size)
            found = []
            for offset, candidate in enumerate(candidates):
                neuron = first + offset
                values, v = self._losses(neuron, candidate)
                found.append(values)
                rows[neuron], self.loss, index, better = _choose(values, self.places[neuron], rows[neuron], self.loss)
                column = self.u.select(self.layer.axis, neuron)
                column.copy_(torch.where(better, candidate.index_select(0, index)[0], column))
                if self.v is not None and v is not None:
                    self.v = torch.where(better, v.index_select(0, index)[0], self.v)
            self.rule._noted(self.swarms, torch.stack(found), first)
        self.layer.write(rows)

    def _together(self) -> None:
        rows, size = self.layer.rows(), self._per_chunk()
        assembled = rows.clone()
        for first in range(0, len(rows), size):
            candidates = self._candidates(first, first + size)
            values = torch.stack([self._losses(first + offset, candidate)[0] for offset, candidate in enumerate(candidates)])
            self.rule._noted(self.swarms, values, first)
            for offset, each in enumerate(values):
                assembled[first + offset] = _choose(each, self.places[first + offset], rows[first + offset], self.loss)[0]
        u = self.layer.execute(self.x, assembled)
        value = self._through(u[None])[0]
        better = value < self.loss
        self.u, self.loss = torch.where(better, u, self.u), torch.where(better, value, self.loss)
        self.layer.write(torch.where(better, assembled, rows))

    def _as_a_whole(self) -> None:
        rows, neurons = self.layer.rows(), self.layer.neurons
        places = self.places[0].unflatten(1, rows.shape)  # (candidates, neurons, numbers)
        found = []
        for part in places.split(max(1, AT_ONCE // self.u.numel())):
            u = self.layer.execute(self.x, part.flatten(0, 1)).unflatten(self.layer.axis, (-1, neurons))
            found.append(self._through(u.movedim(self.layer.axis - (self.layer.axis < 0), 0)))
        values = torch.cat(found)
        self.rule._noted(self.swarms, values[None])
        row, self.loss, _, better = _choose(values, self.places[0], rows.flatten(), self.loss)
        self.layer.write(row.view_as(rows))
        self.u = torch.where(better, self.layer.module(self.x), self.u)

    def _losses(self, neuron: int, candidates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the losses of a neuron's candidates (M, N, ...), and the next layer's pre-activations with each where these are known."""
        if self.v is not None:
            # one column changes, so behind a pointwise function the next layer changes by a product of a column and a row
            old = run(self.layer.tail, self.u[:, neuron])
            change = (run(self.layer.tail, candidates) - old)[..., None] * self.layer.next.weight[:, neuron]
            v = self.v + change
            behind = self.layer.behind[len(self.layer.tail) + 1 :]
            return losses(self.rule.spec, run(behind, v.flatten(0, 1)).unflatten(0, v.shape[:2]), self.batch), v
        u = self.u.expand(len(candidates), *self.u.shape).clone()
        u.select(self.layer.axis + (self.layer.axis > 0), neuron).copy_(candidates)
        return torch.cat([self._through(part) for part in u.split(max(1, AT_ONCE // self.u.numel()))]), None

    def _through(self, u: Tensor) -> Tensor:
        """Return the losses (M,) of pre-activations (M, N, ...) of the whole layer."""
        outputs = run(self.layer.behind, u.flatten(0, 1))
        return losses(self.rule.spec, outputs.unflatten(0, u.shape[:2]), self.batch)


def _choose(values: Tensor, places: Tensor, row: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the better of a row and the best of M places, with its loss; and which place it would be, and whether it is better."""
    index = values.nan_to_num(nan=math.inf, posinf=math.inf).argmin().view(1)
    value = values.index_select(0, index)[0]
    better = value < loss
    return torch.where(better, places.index_select(0, index)[0], row), torch.where(better, value, loss), index, better


def _better(values: Tensor, places: Tensor, row: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return _choose(values, places, row, loss)[:2]


def _cut(rows: Tensor, members: dict[str, nn.Parameter]) -> tuple[Tensor, ...]:
    return rows.split([p.numel() for p in members.values()], -1)  # type: ignore[no-any-return]


def _deviation(parameter: Tensor) -> float:
    """Return 1 / sqrt(inputs) of a weight; of a bias or scale, 1 / sqrt(its size)."""
    return 1 / math.sqrt(parameter[0].numel() if parameter.dim() > 1 else parameter.numel())
