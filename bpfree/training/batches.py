"""Batches of a run: raw examples, or the features that the readout takes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from bpfree.errors import BpfreeError, unknown_name
from bpfree.step import Phase
from bpfree.tasks.loading import Loader, Resident
from bpfree.tasks.task import Examples, Split
from bpfree.training.evaluation import Evaluator
from bpfree.training.features import FeatureLoader, feature_loader, feature_split
from bpfree.training.guards import only_read
from bpfree.training.meters import Clock
from bpfree.training.setup import Setup

__all__ = ["Batches"]

logger = logging.getLogger("bpfree")

Look = Callable[[float], None]


class Batches:
    """The batches of a run's phases; loaders of different sizes share the examples.

    Args:
        setup: the run's; features that do not fit into the memory are kept in its folder.
        evaluator: validates on features as long as a phase does.
    """

    def __init__(self, setup: Setup, evaluator: Evaluator) -> None:
        self._setup, self._rule, self._evaluator = setup, setup.rule, evaluator
        self._loaders: dict[int | Literal["all"], Loader] = {}
        self._positions: Tensor | None = None
        self._part: str | None = None
        self._on_features: Loader | FeatureLoader | None = None
        self._features_of: tuple[str | None, int | str | None] | None = None

    def begin_stage(self, positions: Tensor | None) -> None:
        """Take the batches from the training examples at these positions from now on; ``None``: from all."""
        self._positions = positions
        self._loaders = {}
        self._drop_features()

    def _begin_part(self, part: str | None) -> None:
        """Release the loaders of another part of the training split."""
        if part != self._part:
            self._part, self._loaders = part, {}

    def examples(self, phase: Phase) -> Examples:
        """Return the training examples that a phase uses.

        Raises:
            UsageError: the task has no such part.
        """
        task = self._setup.task
        if phase.part is None:
            return task.train if self._positions is None else task.train.subset(self._positions)
        if phase.part not in task.parts:
            raise unknown_name("part of the training split", phase.part, list(task.parts))
        return task.train.subset(task.parts[phase.part])

    @property
    def resident(self) -> Resident | None:
        """The training split on the device, if it is kept there."""
        return next((loader.resident for loader in self._loaders.values()), None)

    def batches(self, phase: Phase, clock: Clock, look: Look) -> Loader | FeatureLoader:
        """Return the batches of a phase's passes; features are computed at their first use, on the run's clock.

        Args:
            phase: the current one.
            clock: of training; it stands still.
            look: called with the share of the features that is done; what it raises ends the computation.

        Raises:
            BpfreeError: the phase is on features, but what makes them learns in it.
        """
        self._begin_part(phase.part)
        if not phase.on_features:
            self._drop_features()
            return self._raw(phase)
        if self._on_features is None or self._features_of != (phase.part, phase.batch_size):
            self._drop_features()
            self._check(phase)
            self._features_of = (phase.part, phase.batch_size)
            self._on_features = FeatureLoader(self._rule, self._raw(phase)) if self._setup.augment else self._kept(phase, clock, look)
        return self._on_features

    def _check(self, phase: Phase) -> None:
        network = self._rule.network
        if not network.chain:  # whose rule knows itself what its features depend on
            return
        below = {id(p) for name in network.hidden for p in network.blocks[name].parameters()}
        groups = self._rule.groups()
        learning = [name for name, members in groups.items() if any(p.requires_grad and id(p) in below for p in members)]
        if learning:
            raise BpfreeError(
                f"phase {phase.name!r} is on features, which change while {', '.join(learning)} learn",
                where=f"{type(self._rule).__name__}.phases",
                fix="name the readout's group alone in Phase.groups",
            )

    def _kept(self, phase: Phase, clock: Clock, look: Look) -> Loader:
        raw = self._raw(phase)
        with only_read(self._rule, "features"):
            clock.start()
            examples = self.examples(phase)
            train = self.features(self._evaluator.raw(examples, raw.resident), look)
            clock.stop()
            if examples is self._setup.task.train:
                self._evaluator.take_features(train, lambda batches: self.features(batches, look))
        return feature_loader(train, raw.spec, batch_size=raw.batch_size, device=raw.device, seed=raw.seed, balanced=raw.balanced)

    def features(self, batches: Loader, look: Look) -> Split:
        """Compute the rule's features of a split."""
        return feature_split(self._rule, batches, precision=self._setup.config.precision, folder=self._setup.run.folder, look=look)

    def end_phase(self) -> None:
        """Release the features of the phase, unless they stay the same in the next."""
        if not self._rule.fixed_features:
            self._drop_features()

    def _drop_features(self) -> None:
        if self._on_features is not None:
            self._on_features = None
            self._evaluator.drop_features()

    def _raw(self, phase: Phase) -> Loader:
        setup, size = self._setup, phase.batch_size or self._setup.config.batch_size
        if size not in self._loaders:
            train, seed = self.examples(phase), setup.config.seed
            self._loaders[size] = setup.batches(train, size, seed=seed, augment=setup.augment, share=self.resident)
            if self._loaders[size].left_out:
                logger.warning("the last batch of one example is left out of each epoch: batch_size=%d", self._loaders[size].batch_size)
        return self._loaders[size]
