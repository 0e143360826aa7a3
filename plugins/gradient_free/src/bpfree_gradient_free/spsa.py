"""Simultaneous perturbation: two evaluations along a random direction tell how far to go along it. In place, as MeZO does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, Traits, option
from bpfree.network import add_gradient
from bpfree_gradient_free.evaluating import follows_statistics, searched

__all__ = ["SPSA", "SPSAConfig"]

SLICE = 2**14
"""Numbers of noise that exist at a time. They are drawn slice by slice, so that a step takes no memory of the parameters' size."""
Pieces = list[tuple[list[int], list[tuple[int, Tensor]]]]
"""Groups of parts of tensors: their sizes, and each part with the place of its tensor. A group's noise is drawn at once."""
Use = Callable[[str, nn.Parameter, Tensor, Tensor], None]
"""Takes a group, a parameter of it, places in the parameter and the derivatives there."""


@dataclass
class SPSAConfig:
    """Options of simultaneous perturbation."""

    directions: int = option(16, "K: directions, or coordinates, of each step; MeZO has 1", ge=1)
    noise: Literal["rademacher", "gaussian", "coordinates"] = option(
        "rademacher",
        "random directions, with a pair of evaluations each (gaussian: MeZO), or coordinates with one each (DeepZero)",
    )
    epsilon: float = option(1e-3, "distance of the evaluations from the weights; DeepZero: 5e-3", gt=0)
    in_place: bool = option(True, "move the weights at once, from a seed alone; false: fill .grad for any optimiser")
    decay: float = option(0.0, "decay of matrices and kernels, times the rate", ge=0, needs={"in_place": (True,)})


class SPSA(Rule):
    """Differences of the loss between weights on both sides, in place; only seeds are kept of the directions."""

    Config = SPSAConfig
    card = Card(
        "simultaneous perturbation in place (MeZO), or single coordinates (DeepZero): differences of losses in place of gradients",
        paper="Malladi, Gao, Nichani, Damian, Lee, Chen, Arora: Fine-tuning language models with just forward passes (MeZO). NeurIPS 2023, "
        "arXiv 2305.17333; Spall: Multivariate stochastic approximation using a simultaneous perturbation gradient approximation. 1992; "
        "Chen et al.: DeepZero: Scaling up zeroth-order optimization for deep model training. ICLR 2024, arXiv 2310.02025 (coordinates)",
        equation="g = 1/K sum_k (L(W + eps z_k) - L(W - eps z_k)) / (2 eps) z_k;  coordinates: g_i = (L(W + eps e_i) - L(W)) / eps",
        notes="Two evaluations for each direction, in eval mode. Rademacher directions have a smaller second moment than MeZO's gaussian "
        "ones: d |g|^2 instead of (d + 2) |g|^2. With one direction, noise=gaussian and epsilon=1e-3 a step is MeZO's. Coordinates are "
        "a new set in each step, drawn evenly; DeepZero keeps a set for five epochs and chooses it by ZO-GraSP. The default step size fits "
        "small networks: it has to go down with the number of weights.",
    )
    config: SPSAConfig

    @classmethod
    def traits_of(cls, config: SPSAConfig, network: Network | None = None) -> Traits:
        passes = config.directions + 1 if config.noise == "coordinates" else 2 * config.directions
        more = network is not None and follows_statistics(network)
        return Traits(
            "all", downstream_weights="all", reverse_span=0, update="in-place" if config.in_place else "grad", passes=passes + more
        )

    @classmethod
    def optimizer_of(cls, config: SPSAConfig, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("sgd", lr=0.03)

    def plan(self) -> str:
        count = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        kind = "coordinates" if self.config.noise == "coordinates" else f"{self.config.noise} directions"
        return f"{count:,} weights learn from {self.config.directions} {kind} on each batch: {self.traits.passes:g} evaluations"

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with searched(self.network, batch.inputs):
            if self.config.noise == "coordinates":
                return self._coordinates(batch, step, _add)
            learning = [parameter for _, parameter in self._learning()]
            before = [parameter.clone() for parameter in learning]
            slopes, metrics = self._slopes(batch, step)
            for parameter, value in zip(learning, before, strict=True):
                parameter.copy_(value)
                add_gradient(parameter, torch.zeros_like(parameter, requires_grad=False))
            gradients = _pieces([parameter.grad for parameter in learning if parameter.grad is not None])
            for index, slope in enumerate(slopes):
                self._along(gradients, step, index, slope / len(slopes))
        return metrics

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if not self.config.in_place:
            return super().learn(batch, step)
        with searched(self.network, batch.inputs):
            rates = {name: step.lr(name) for name in self.groups()}
            self._decay(rates)
            if self.config.noise == "coordinates":
                return self._coordinates(batch, step, partial(_move, rates))
            slopes, metrics = self._slopes(batch, step)
            learning = list(self._learning())
            pieces, each = _pieces([parameter for _, parameter in learning]), [rates[name] for name, _ in learning]
            for index, slope in enumerate(slopes):
                self._along(pieces, step, index, -slope / len(slopes), each)
        return metrics

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the learning parameters of the network with the names of their groups, in the order in which noise is drawn."""
        for name, members in self.groups().items():
            yield from ((name, parameter) for parameter in members if parameter.requires_grad)

    def _decay(self, rates: Mapping[str, float]) -> None:
        """Shrink matrices and kernels, but not biases and scales, by rate times decay."""
        for name, parameter in self._learning() if self.config.decay else ():
            if parameter.dim() > 1:
                parameter.mul_(1 - rates[name] * self.config.decay)

    # --- directions -----------------------------------------------------------------------------------------------------------

    def _slopes(self, batch: Batch, step: Step) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the derivative of the loss along each direction; the weights are as before, up to rounding."""
        epsilon, slopes, middles = self.config.epsilon, [], []
        pieces = _pieces([parameter for _, parameter in self._learning()])
        for index in range(self.config.directions):
            self._along(pieces, step, index, epsilon)
            above = self._loss(batch)
            self._along(pieces, step, index, -2 * epsilon)
            below = self._loss(batch)
            self._along(pieces, step, index, epsilon)
            slopes.append((above - below) / (2 * epsilon))
            middles.append((above + below) / 2)
        return slopes, {"loss": torch.stack(middles).mean(), "slope": torch.stack(slopes).abs().mean()}

    def _loss(self, batch: Batch) -> Tensor:
        return self.spec.loss(self.network(batch.inputs), batch)

    def _along(self, pieces: Pieces, step: Step, index: int, size: float | Tensor, rates: Sequence[float] = ()) -> None:
        """Add a multiple of a direction, which is drawn from its seed.

        Args:
            pieces: what it is added to, of :func:`_pieces`.
            step: whose generator for this direction is used.
            index: of the direction.
            size: the multiple.
            rates: of each tensor, by which the multiple is multiplied; empty: 1.
        """
        generator = step.generator_for(f"direction {index}")
        for sizes, group in pieces:
            noise = self._drawn(sum(sizes), group[0][1], generator).mul_(size)
            for (place, part), own in zip(group, noise.split(sizes), strict=True):
                part.add_(own, alpha=rates[place] if rates else 1)

    def _drawn(self, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
        noise = like.new_empty(count)
        if self.config.noise == "gaussian":
            return noise.normal_(generator=generator)
        return noise.random_(0, 2, generator=generator).mul_(2).sub_(1)

    # --- coordinates ----------------------------------------------------------------------------------------------------------

    def _coordinates(self, batch: Batch, step: Step, use: Use) -> dict[str, Tensor]:
        """Estimate single derivatives from the difference to the loss as it is; blocks below a weight are not executed again.

        Args:
            batch: whose loss it is.
            step: the step.
            use: what is done with the entries of a parameter and their derivatives.
        """
        inputs = self._inputs_of_blocks(batch)
        loss = self._loss(batch)
        found = [
            (name, parameter, places, self._derivatives(parameter, places, inputs, batch, loss))
            for name, parameter, places in self._drawn_places(step)
        ]
        for name, parameter, places, derivatives in found:
            use(name, parameter, places, derivatives)
        return {"loss": loss}

    def _inputs_of_blocks(self, batch: Batch) -> dict[str, Tensor]:
        """Return the input of each block."""
        found, x = {}, batch.inputs
        for name, block in self.network.blocks.items():
            found[name] = x
            x = block(x)
        return found

    def _drawn_places(self, step: Step) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Draw coordinates evenly from all learning weights; yield each parameter's, in the order of its memory."""
        learning = list(self._learning())
        sizes = [parameter.numel() for _, parameter in learning]
        device = learning[0][1].device if learning else torch.device("cpu")
        drawn = torch.randperm(sum(sizes), generator=step.generator_for("coordinates"), device=device)[: self.config.directions]
        drawn, start = drawn.sort().values.cpu(), 0
        for (name, parameter), size in zip(learning, sizes, strict=True):
            inside = drawn[(drawn >= start) & (drawn < start + size)] - start
            start += size
            if len(inside):
                yield name, parameter, inside

    def _derivatives(self, parameter: nn.Parameter, places: Tensor, inputs: dict[str, Tensor], batch: Batch, loss: Tensor) -> Tensor:
        flat, epsilon = _in_memory_order(parameter), self.config.epsilon
        first = next(name for name, block in self.network.blocks.items() if any(p is parameter for p in block.parameters()))
        names = self.network.names
        found = []
        for place in places.tolist():
            entry = flat[place : place + 1]
            before = entry.clone()
            entry.add_(epsilon)
            x = inputs[first]
            for name in names[names.index(first) :]:
                x = self.network.blocks[name](x)
            found.append((self.spec.loss(x, batch) - loss) / epsilon)
            entry.copy_(before)
        return torch.stack(found)


def _add(name: str, parameter: nn.Parameter, places: Tensor, derivatives: Tensor) -> None:
    add_gradient(parameter, torch.zeros_like(parameter, requires_grad=False))
    assert parameter.grad is not None
    _in_memory_order(parameter.grad).index_add_(0, places.to(parameter.device), derivatives.to(parameter.dtype))


def _move(rates: Mapping[str, float], name: str, parameter: nn.Parameter, places: Tensor, derivatives: Tensor) -> None:
    moves = derivatives.to(parameter.dtype) * -rates[name]
    _in_memory_order(parameter).index_add_(0, places.to(parameter.device), moves)


def _pieces(tensors: Sequence[Tensor]) -> Pieces:
    """Cut tensors into parts, and gather parts of one dtype that have ``SLICE`` numbers or fewer together, for one draw each."""
    found: Pieces = []
    room = 0
    for place, tensor in enumerate(tensors):
        for part in _in_memory_order(tensor).split(SLICE):
            if not found or len(part) > room or part.dtype != found[-1][1][0][1].dtype:
                found.append(([], []))
                room = SLICE
            found[-1][0].append(len(part))
            found[-1][1].append((place, part))
            room -= len(part)
    return found


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return all entries as one axis, without a copy, for tensors of any layout that have no gaps."""
    whole = tensor.detach()
    return whole.view(-1) if whole.is_contiguous() else whole.as_strided((whole.numel(),), (1,))
