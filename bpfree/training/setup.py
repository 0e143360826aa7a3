"""The objects of a run, which its parts share as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.step import Budget
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.loading import Loader, Loading, Resident
from bpfree.tasks.task import Examples, Task
from bpfree.training.config import TrainConfig
from bpfree.training.distributed import World
from bpfree.training.team import Team

__all__ = ["Setup"]


@dataclass(frozen=True)
class Setup:
    """The parts of a run that stay the same objects while it trains.

    Attributes:
        rule, task, config: what is trained, on what, and how.
        budget: of the run, resolved.
        device: where it trains.
        team: the processes that train the rule together.
        run: the record of the run.
        recipe: the nested configuration that rebuilds rule and task.
        loading: how batches reach the device.
        augment: augmentations of the training batches.
        again: trains another rule from the same beginning on a task of the same kind, and returns it with its run; ``None``: not kept.
    """

    rule: Rule
    task: Task
    config: TrainConfig
    budget: Budget
    device: torch.device
    team: Team
    run: Run
    recipe: Mapping[str, Any] | None = None
    loading: Loading = Loading()
    augment: tuple[Augmentation, ...] = ()
    again: Callable[[Task], tuple[Rule, Run]] | None = None

    @property
    def world(self) -> World:
        """The processes, of which the first one evaluates, notifies observers, and writes."""
        return self.team.world

    def batches(
        self,
        split: Examples,
        batch_size: int | Literal["all"],
        *,
        seed: int | None = None,
        augment: tuple[Augmentation, ...] = (),
        share: Resident | None = None,
    ) -> Loader:
        """Make a loader of a split, in its original order without a seed; the arguments are :class:`Loader`'s."""
        return Loader(
            split,
            self.task.spec,
            batch_size=batch_size,
            device=self.device,
            seed=seed,
            augment=augment,
            views=1 if seed is None else self.rule.traits.views,
            balanced=seed is not None and self.loading.sampling == "balanced",
            resident=self.loading.resident,
            workers=self.loading.workers,
            share=share,
            dtype=self.rule.network.dtype,
        )
