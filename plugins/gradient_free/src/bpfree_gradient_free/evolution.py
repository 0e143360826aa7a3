"""Evolution strategies: a population of perturbed networks, and a step along their noise, weighted by how well they do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, TaskSpec, Traits, option
from bpfree.errors import UsageError
from bpfree.network import add_gradient
from bpfree_gradient_free.evaluating import follows_statistics, losses, searched
from bpfree_gradient_free.perturbing import Noise, draw, mirrored, outputs, thin_layers, weighted
from bpfree_gradient_free.shaping import Shaping, recombination, shaped

__all__ = ["Evolution", "EvolutionConfig"]

AT_ONCE = 2**22
"""Numbers of noise and of activations that exist together at most, where ``rule.chunk`` is not set."""
StepSize = Literal["fixed", "separable", "path"]


@dataclass
class EvolutionConfig:
    """Options of evolution strategies."""

    population: int = option(64, "members of each step", ge=2)
    sigma: float = option(0.05, "deviation of the noise on weights; of the first, where it adapts", gt=0)
    antithetic: bool = option(True, "members in pairs with opposite noise")
    shaping: Shaping = option(
        "ranks", "weights of members: centred ranks, utilities of NES, or losses as they are", needs={"step_size": ("fixed",)}
    )
    step_size: StepSize = option(
        "fixed",
        "separable: a deviation for each weight, learned by its natural gradient (SNES); path: one for all, by the length of the path that "
        "the mean has gone (CMA-ES). Both take optimizer=sgd at a rate of 1",
    )
    sigma_lr: float | None = option(
        None, "rate of the deviations; none: (3 + log d) / (5 sqrt d) for d weights", gt=0, needs={"step_size": ("separable",)}
    )
    rank: int = option(0, "rank of the noise on matrices and kernels; 0: full", ge=0)
    chunk: int | None = option(None, "members that are evaluated together; none: as many as 4 million numbers allow", ge=1)
    together: bool = option(True, "execute members with full noise as one batched computation")


class Evolution(Rule):
    """Evolution strategies with antithetic members, shaped losses, adapting deviations and noise of low rank."""

    Config = EvolutionConfig
    card = Card(
        "evolution strategies: antithetic, by ranks, perhaps with adapting deviations or noise of low rank",
        paper="Salimans, Ho, Chen, Sidor, Sutskever: Evolution strategies as a scalable alternative to reinforcement learning. 2017, arXiv "
        "1703.03864; Wierstra et al.: Natural evolution strategies. JMLR 2014 (utilities, SNES); Hansen: The CMA evolution strategy: a "
        "tutorial. 2016, arXiv 1604.00772 (path); Sarkar et al.: Evolution strategies at the hyperscale (EGGROLL). 2025, arXiv 2511.16652 "
        "(low rank)",
        equation="g = sum_i u(L_i) E_i / sigma, L_i = L(W + sigma E_i);  E = A B^T / sqrt(r) with rule.rank=r",
        notes="With rule.shaping=none the estimate is unbiased for the smoothed loss, and equals central differences along gaussian "
        "directions where members are antithetic. Utilities, and adapting deviations, make the natural step: sigma sum_i u_i E_i, in units "
        "of the weights, so that a rate of 1 is the published one. With several processes each ranks the members on its own examples. "
        "Weights of EGGROLL's noise are not normalised by its paper's size of layers.",
    )
    config: EvolutionConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self._check()
        self.thin = thin_layers(self.network) if self.config.rank else {}
        members = list(self.network.parameters())
        count = sum(p.numel() for p in members)
        if self.config.step_size == "separable":
            start = torch.full((count,), math.log(self.config.sigma), dtype=members[0].dtype)
            self.log_sigma = nn.Parameter(start)
        if self.config.step_size == "path":
            self.register_buffer("sigma", torch.tensor(self.config.sigma, dtype=members[0].dtype))
            self.register_buffer("path", torch.zeros(count, dtype=members[0].dtype))

    def _check(self) -> None:
        config = self.config
        if config.antithetic and config.population % 2:
            raise UsageError("members come in pairs", where=f"rule.population={config.population}", fix="take an even number")
        if config.rank and config.step_size == "separable":
            fix = "set rule.rank=0, or rule.step_size=fixed or path"
            raise UsageError("noise of low rank has no deviation for each weight", where=f"rule.rank={config.rank}", fix=fix)

    @classmethod
    def traits_of(cls, config: EvolutionConfig, network: Network | None = None) -> Traits:
        passes = config.population + (network is not None and follows_statistics(network))
        return Traits("all", downstream_weights="all", reverse_span=0, passes=passes)

    @classmethod
    def optimizer_of(cls, config: EvolutionConfig, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=0.01) if config.step_size == "fixed" else OptimizerConfig("sgd", lr=1.0)

    def group_options(self) -> dict[str, dict[str, Any]]:
        if self.config.step_size != "separable":
            return {}
        count = len(self.log_sigma)
        own = self.config.sigma_lr
        return {"rule": {"lr": (3 + math.log(count)) / (5 * math.sqrt(count)) if own is None else own}}

    def plan(self) -> str:
        count = sum(p.numel() for p in self._learning().values())
        noise = f"rank {self.config.rank}" if self.config.rank else "full rank"
        place = "in the layers" if self.thin else "in weights that are made for each member"
        return f"{count:,} weights, {self.config.population} members with noise of {noise} {place}, {self._chunk(1)} or fewer at a time"

    def _learning(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    # --- one step -------------------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        learning = self._learning()
        if not learning:
            return {}
        with searched(self.network, batch.inputs):
            scales = self._scales(learning)
            drawn = list(self._chunks(batch))
            kept: list[Noise] = []
            found = []
            for index, count in drawn:
                noise = self._noise(learning, index, count, step)
                found.append(losses(self.spec, self._outputs(noise, scales, batch), batch))
                kept = [noise] if len(drawn) == 1 else []
            values = torch.cat([torch.stack(each.chunk(2)) if self.config.antithetic else each[None] for each in found], 1).flatten()
            self._add(learning, scales, values, step, drawn, kept)
        return {"loss": values.mean(), "loss_best": values.min()}

    def _chunks(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Yield number and size of each chunk, in noise vectors: pairs of members, or members."""
        total = self.config.population // (2 if self.config.antithetic else 1)
        size = self._chunk(len(batch))
        for index, first in enumerate(range(0, total, size)):
            yield index, min(size, total - first)

    def _chunk(self, examples: int) -> int:
        """Return how many noise vectors are evaluated together, which depends on sizes alone."""
        each = 2 if self.config.antithetic else 1
        if self.config.chunk is not None:
            return max(1, self.config.chunk // each)
        widest = max((shape.numel() for shape in self.network.shapes.values()), default=1)
        weights = 0 if self.thin else sum(p.numel() for p in self.network.parameters())
        return max(1, min(self.config.population // each, AT_ONCE // (each * max(examples * widest, weights, 1))))

    def _noise(self, learning: dict[str, nn.Parameter], index: int, count: int, step: Step) -> Noise:
        return draw(learning, count, self.config.rank, step.generator_for(f"members {index}"))

    def _outputs(self, noise: Noise, scales: dict[str, Tensor], batch: Batch) -> Tensor:
        members = mirrored(noise) if self.config.antithetic else noise
        return outputs(self.network, members, scales, batch.inputs, self.thin, self.config.together)

    def _scales(self, learning: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the deviation of the noise on each parameter: a number, or a tensor of its shape."""
        if self.config.step_size == "separable":
            parts = self._by_parameter(self.log_sigma.detach().exp())
            return {name: parts[name] for name in learning}
        sigma = self.get_buffer("sigma") if self.config.step_size == "path" else None
        return {name: p.new_tensor(self.config.sigma) if sigma is None else sigma for name, p in learning.items()}

    def _by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a vector of all weights of the network into their shapes."""
        members = dict(self.network.named_parameters())
        parts = flat.split([p.numel() for p in members.values()])
        return {name: part.view_as(p) for (name, p), part in zip(members.items(), parts, strict=True)}

    def _add(
        self,
        learning: dict[str, nn.Parameter],
        scales: dict[str, Tensor],
        values: Tensor,
        step: Step,
        drawn: list[tuple[int, int]],
        kept: list[Noise],
    ) -> None:
        """Add the estimates to ``.grad``, from noise that is kept or drawn again, chunk by chunk."""
        weights = self._weights(values)
        natural = self.config.step_size != "fixed" or self.config.shaping == "utilities"
        both = weights.unflatten(0, (-1, len(weights) // (2 if self.config.antithetic else 1)))
        odd = both[0] - both[1] if self.config.antithetic else both[0]
        even = both.sum(0)
        first = 0
        for index, count in drawn:
            noise = kept[0] if kept else self._noise(learning, index, count, step)
            part = slice(first, first + count)
            for name, p in learning.items():
                estimate = weighted(noise[name], odd[part])
                add_gradient(p, estimate * scales[name] if natural else estimate / scales[name])
            if self.config.step_size == "separable":
                self._add_deviations(noise, even[part])
            first += count

    def _weights(self, values: Tensor) -> Tensor:
        if self.config.step_size == "path":
            return -recombination(values)[0]
        return shaped(values, self.config.shaping if self.config.step_size == "fixed" else "utilities")

    def _add_deviations(self, noise: Noise, weights: Tensor) -> None:
        """Add the natural gradient of the logarithms of deviations: half the weighted sum of squared noise less 1."""
        total = weights.sum()
        found = torch.zeros_like(self.log_sigma)
        parts = self._by_parameter(found)
        for name, each in noise.items():
            assert isinstance(each, Tensor)
            parts[name].copy_((weights @ each.flatten(1).square()).sub_(total).mul_(0.5).view_as(parts[name]))
        add_gradient(self.log_sigma, found)

    # --- the path of the mean ---------------------------------------------------------------------------------------------------

    def before_update(self, groups: Sequence[str]) -> None:
        """Follow the path of the mean, and adapt the deviation to its length (cumulative step-size adaptation)."""
        learning = self._learning()
        if self.config.step_size != "path" or any(p.grad is None for p in learning.values()):
            return
        with torch.no_grad():
            self._follow(learning)

    def _follow(self, learning: dict[str, nn.Parameter]) -> None:
        sigma, path = self.get_buffer("sigma"), self.get_buffer("path")
        worth = recombination(torch.arange(self.config.population, dtype=torch.float64))[1]
        count = sum(p.numel() for p in learning.values())
        share = (worth + 2) / (count + worth + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((worth - 1) / (count + 1)) - 1) + share
        expected = math.sqrt(count) * (1 - 1 / (4 * count) + 1 / (21 * count**2))
        path.mul_(1 - share)
        for name, part in self._by_parameter(path).items():
            if name in learning:
                gradient = learning[name].grad
                assert gradient is not None
                part.sub_(gradient / sigma, alpha=math.sqrt(share * (2 - share) * worth))
        sigma.mul_(torch.exp((path.norm() / expected - 1) * (share / damping)))
