"""Ways in which processes share the training of one rule: none (one process), by examples, or by blocks.

*Data*: each process takes its slice of every batch, with noise of its own, and ``.grad`` is summed over processes before each update.
A run in W processes with A micro-batches each is a run in one process with W A micro-batches, up to rounding.

*Blocks*: each process sees every batch and fills and updates the groups of its own blocks; process 0 also has the groups that belong to no
block. The gradients of ``Rule.shared_groups`` are summed over processes at each step; otherwise nothing is exchanged until the end of a
pass, when each sends its blocks to all. What is drawn from ``Step.generator_for`` is what one process would draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Phase, Step
from bpfree.training.accumulation import accumulate, slices
from bpfree.training.config import TrainConfig
from bpfree.training.distributed import World
from bpfree.training.updater import Updater

__all__ = ["BlockTeam", "DataTeam", "Team", "make_team"]

Sums = Mapping[str, list[float]]
"""Sums of step metrics by name: of value times examples, and of examples."""


class Team:
    """A single process, which has the whole rule; the other teams extend this class.

    Args:
        rule: what they train.
        world: who they are.
    """

    kind: Literal["none", "data", "blocks"] = "none"

    def __init__(self, rule: Rule, world: World) -> None:
        self.rule, self.world = rule, world

    @property
    def stream(self) -> tuple[object, ...]:
        """Further words of the seeds of this process's unkeyed noise."""
        return ()

    def examples(self, batch: Batch, parts: int) -> int:
        """Return how many examples of a batch that is cut into micro-batches this process learns from."""
        return len(batch)

    def update(self, batch: Batch, step: Step, parts: int) -> Metrics:
        """Take one step from micro-batches; the metrics are of this process's examples."""
        return self.rule.learn(batch, step) if parts == 1 else accumulate(self.rule, batch, step, parts)

    def check(self, phase: Phase) -> None:
        """Refuse a phase that processes cannot train together.

        Raises:
            UsageError: it ends by a clock, or is on features of blocks that lie elsewhere.
        """

    def enter(self, step: Step, updater: Updater) -> None:
        """Enter a phase, which may have made parameters: all processes take the first one's."""

    def synchronise(self) -> None:
        """Give all processes the whole network, at the end of a pass."""

    def weights(self) -> dict[str, Any]:
        """Return the whole rule's state dict, without changing anything that training depends on."""
        return self.rule.state_dict()

    def statistics(self) -> dict[str, Tensor]:
        """Return buffers by name that differ between processes within a pass: running means, for example."""
        return {}

    def optimizers(self, updater: Updater) -> dict[str, Any]:
        """Return the whole state of the optimisers."""
        return updater.state_dict()

    def own_optimizers(self, whole: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the part of the optimisers' whole state that this process needs."""
        return whole

    def merged(self, sums: Sums) -> dict[str, list[float]]:
        """Sum the step metrics over all processes."""
        return {name: list(pair) for name, pair in sums.items()}

    def joined(self, means: Mapping[str, float]) -> dict[str, float]:
        """Average the step metrics over all processes, for display."""
        return {name: total / weight for name, (total, weight) in self.merged({name: [mean, 1.0] for name, mean in means.items()}).items()}


class _Several(Team):
    """Common part of the teams of several processes."""

    def check(self, phase: Phase) -> None:
        if phase.seconds is not None:
            raise UsageError(
                f"phase {phase.name!r} ends by the clock, and each process has its own clock",
                where=f"{type(self.rule).__name__}.phases",
                fix="train in one process, or give the phase epochs",
            )

    def enter(self, step: Step, updater: Updater) -> None:
        self.world.send(self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [*self.rule.parameters(), *self.rule.buffers()]

    def merged(self, sums: Sums) -> dict[str, list[float]]:
        result: dict[str, list[float]] = {}
        for one in self.world.gathered(dict(sums)):
            for name, (total, weight) in one.items():
                known = result.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] = self._weight(name, known[1], weight)
        return result

    def _weight(self, name: str, one: float, other: float) -> float:
        return one + other


class DataTeam(_Several):
    """Team that deals the examples of each batch to the processes."""

    kind = "data"

    @property
    def stream(self) -> tuple[object, ...]:
        return ("rank", self.world.rank) if self.world.rank else ()

    def examples(self, batch: Batch, parts: int) -> int:
        own = slices(len(batch), parts, rank=self.world.rank, size=self.world.size)
        return sum(end - start for start, end in own.values())

    def update(self, batch: Batch, step: Step, parts: int) -> Metrics:
        metrics = accumulate(self.rule, batch, step, parts, rank=self.world.rank, size=self.world.size)
        share = self.examples(batch, parts) / len(batch)
        return {name: value / share for name, value in metrics.items()}

    def enter(self, step: Step, updater: Updater) -> None:
        super().enter(step, updater)
        updater.exchange = lambda parameters: self.world.add_up([p for p in parameters if p.requires_grad])

    def synchronise(self) -> None:
        self.world.average(self.statistics().values())

    def statistics(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.rule.named_buffers() if buffer.is_floating_point()}

    def weights(self) -> dict[str, Any]:
        weights = self.rule.state_dict()
        mine = {name: buffer.detach().clone() for name, buffer in self.statistics().items() if name in weights}
        self.world.average(mine.values())
        return {**weights, **mine}


class BlockTeam(_Several):
    """Team that deals the blocks to the processes, in runs of neighbours."""

    kind = "blocks"

    def check(self, phase: Phase) -> None:
        super().check(phase)
        if phase.on_features and not self.rule.fixed_features:
            raise UsageError(
                f"phase {phase.name!r} is on features, which need all blocks in one process",
                where=f"{type(self.rule).__name__}.phases",
                fix="parallel=data, or train in one process",
            )

    def enter(self, step: Step, updater: Updater) -> None:
        super().enter(step, updater)
        self._owners = self._deal()
        mine = {name for name, owner in self._owners.items() if owner == self.world.rank}
        shared = set(self.rule.shared_groups)
        step.local_groups = frozenset(mine | shared)
        others = [p for name, members in updater.groups.items() if name not in step.local_groups for p in members]
        common = {id(p) for name in shared for p in updater.groups.get(name, ())}

        def exchange(parameters: Iterable[nn.Parameter]) -> None:
            for parameter in others:
                parameter.grad = None  # of a rule that fills what is not this process's to fill
            self.world.add_up([p for p in parameters if id(p) in common and p.requires_grad])

        updater.exchange = exchange

    def _deal(self) -> dict[str, int]:
        """Return the process of each group, block and child of the rule: its block's, or the first for what belongs to no block."""
        blocks = self.rule.network.names
        of_block = {name: place * self.world.size // len(blocks) for place, name in enumerate(blocks)}
        of_parameter = {id(p): of_block[name] for name in blocks for p in self.rule.network.blocks[name].parameters()}
        owners = {name: 0 for name, _ in self.rule.named_children()} | of_block
        for name, members in self.rule.groups().items():
            holders = {of_parameter.get(id(p), of_block.get(name.rpartition(".")[2], 0)) for p in members}
            owners[name] = holders.pop() if len(holders) == 1 else 0
        return owners

    def _held(self) -> list[dict[str, Tensor]]:
        """List the parameters and buffers of each process by name: of its groups and blocks, and of local heads named as a block is."""
        place: dict[int, int] = {}
        for name, block in self.rule.network.blocks.items():  # also what is in no group, because no optimiser moves it
            place |= {id(tensor): self._owners[name] for tensor in itertools.chain(block.parameters(), block.buffers())}
        place |= {id(p): self._owners[name] for name, members in self.rule.groups().items() for p in members}
        result: list[dict[str, Tensor]] = [{} for _ in range(self.world.size)]
        for name, tensor in itertools.chain(self.rule.named_parameters(), self.rule.named_buffers()):
            kept = next((self._owners[part] for part in name.split(".")[1:2] if part in self.rule.network.blocks), 0)
            result[place.get(id(tensor), kept)][name] = tensor
        return result

    def synchronise(self) -> None:
        for rank, tensors in enumerate(self._held()):
            self.world.send(tensors.values(), source=rank)

    def weights(self) -> dict[str, Any]:
        self.synchronise()
        return self.rule.state_dict()

    def optimizers(self, updater: Updater) -> dict[str, Any]:
        mine = self._held()[self.world.rank]
        whole = updater.state_dict()
        for key, part in whole.items():
            own = {name: value for name, value in part["state"].items() if name in mine}
            part["state"] = {name: value for one in self.world.collected(own) for name, value in one.items()}
            whole[key] = part
        return whole

    def own_optimizers(self, whole: Mapping[str, Any]) -> Mapping[str, Any]:
        shared = {id(p) for name, members in self.rule.groups().items() if name in self.rule.shared_groups for p in members}
        mine = {name for name, p in self.rule.named_parameters() if id(p) in shared} | self._held()[self.world.rank].keys()
        return {key: {**part, "state": {n: value for n, value in part["state"].items() if n in mine}} for key, part in whole.items()}

    def _weight(self, name: str, one: float, other: float) -> float:
        """Combine two weights of a metric: the rule's loss is the sum over processes; anything else is a mean."""
        return max(one, other) if name == "rule/loss" else one + other


def make_team(rule: Rule, config: TrainConfig, world: World) -> Team:
    """Make the team that the configuration asks for, if the rule allows it.

    Raises:
        UsageError: it cannot be trained by several processes, or not with these settings.
    """
    if world.size == 1:
        return Team(rule, world)
    name, traits = type(rule).__name__, rule.traits
    trouble = _excluded(rule, config)
    if trouble:
        raise UsageError(f"several processes cannot train together with {trouble}", where=f"{world.size} processes", fix="train in one")
    solo = f"{name} applies its updates itself ({traits.update})" if traits.update != "grad" else ""
    coupled = solo or ("" if traits.dependence == "independent" and not rule.network.chain else f"the blocks of {name} are not independent")
    few = len(rule.network.names) < world.size
    kind = config.parallel if config.parallel != "auto" else "data" if coupled or few else "blocks"
    reason = coupled if kind == "blocks" else solo
    if reason:
        fix = "train in one process" if solo else "parallel=data"
        raise UsageError(
            f"{reason}, so several processes cannot share {'its blocks' if kind == 'blocks' else 'it'}", where="parallel", fix=fix
        )
    if kind == "data":
        return DataTeam(rule, world)
    if few:
        raise UsageError(f"{world.size} processes, but only {len(rule.network.names)} blocks", where="parallel", fix="start fewer")
    if config.clip.norm is not None and config.clip.scope == "global":
        raise UsageError("a norm over all groups needs all blocks in one process", where="clip.scope", fix="clip.scope=group")
    return BlockTeam(rule, world)


def _excluded(rule: Rule, config: TrainConfig) -> str:
    if config.budget.seconds is not None:
        return "budget.seconds: each process has its own clock"
    if config.alignment.every:
        return "alignment.every: the comparison is made in one process"
    if type(rule).end_phase is not Rule.end_phase:
        return f"{type(rule).__name__}: its end_phase needs statistics of all examples, but each process has a share"
    return ""
