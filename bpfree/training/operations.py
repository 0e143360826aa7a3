"""What training costs in floating-point operations: counted by the core, never declared by a rule.

Matrix products and convolutions count, with two operations for each multiplication and addition, as torch's
``FlopCounterMode`` has it; elementwise work does not. One *forward-pass equivalent* is what ``Rule.predict`` takes for one
example. A step is counted once for each kind of phase and size of batch, and costs that much ever after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bpfree.errors import BpfreeError, UsageError
from bpfree.network.network import evaluating
from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Phase, Step
from bpfree.training.distributed import World
from bpfree.training.seeds import preserved_global_state
from bpfree.training.snapshot import Snapshot
from bpfree.training.updater import Updater

__all__ = ["Operations", "counted_operations"]

logger = logging.getLogger("bpfree")


class _NoModules:
    """In place of the counter's module tracker, whose hooks on modules and gradients would be in the way of rules."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *arguments: object) -> None: ...


def _matrix_vector(matrix: Any, vector: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(matrix[0]) * int(matrix[1])


def _added_matrix_vector(added: Any, matrix: Any, vector: Any, *arguments: Any, **options: Any) -> int:
    return _matrix_vector(matrix, vector)


def _dot(one: Any, other: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(one[0])


FURTHER = {torch.ops.aten.mv: _matrix_vector, torch.ops.aten.addmv: _added_matrix_vector, torch.ops.aten.dot: _dot}
"""Products that torch's counter leaves out; the arguments are shapes."""


@contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """Count the floating-point operations inside; the function gives their number, also afterwards."""
    counter = FlopCounterMode(display=False, custom_mapping=FURTHER)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        yield lambda: int(counter.get_total_flops())


class Operations:
    """The operations of a run so far; all of it is saved in checkpoints.

    A rule that cannot be counted trains as if nobody had tried: the run is then without these numbers.

    Args:
        rule: on its device.
        updater: which applies its updates.
        device: the run's.
        world: the processes among which the training is shared; each counts its part of a step, and the sum is kept.

    Attributes:
        total: operations of all training steps, and of features that were computed for phases on features.
        forward: operations of one forward pass of ``examples`` examples; ``None`` before it is counted.
        features: the same of ``Rule.features``, where a phase is on features.
        trouble: why there are no numbers; the empty string: there are.
    """

    def __init__(self, rule: Rule, updater: Updater, device: torch.device, world: World | None = None) -> None:
        self._rule, self._updater, self._device, self._world = rule, updater, device, world or World()
        self._steps: dict[str, int] = {}
        self.total = 0
        self.forward: int | None = None
        self.features: int | None = None
        self.examples = 1
        self.trouble = ""

    # --- counting ---------------------------------------------------------------------------------------------------

    def wants(self, phase: Phase, batch: Batch) -> bool:
        """Whether a step on this batch is of a kind that was not counted yet."""
        return not self.trouble and _kind(phase, batch) not in self._steps

    def count(self, batch: Batch, step: Step, take: Callable[[Batch], Metrics]) -> Metrics:
        """Take a step and count its operations; what a count has broken is put back, and the step taken without."""
        metrics, found = self._counted(batch, step, take)
        total, failures = self._world.total(found or 0, found is None)
        if not failures:
            self._steps[_kind(step.phase, batch)] = int(total)
        elif not self.trouble:
            self._give_up(BpfreeError("another process failed"))
        return metrics

    def _counted(self, batch: Batch, step: Step, take: Callable[[Batch], Metrics]) -> tuple[Metrics, int | None]:
        try:
            before = Snapshot(self._rule, *self._updater.optimizers, step.generator, device=self._device)
        except Exception as error:  # no memory for a copy
            self._give_up(error)
            return take(batch), None
        try:
            with counted_operations() as operations:
                metrics = take(batch)
        except Exception as error:
            before.restore()
            step.part = 0
            metrics = take(batch)  # an error of the rule's own ends the run here
            self._give_up(error)
            return metrics, None
        return metrics, operations()

    def count_forward(self, inputs: Any, examples: int) -> None:
        """Count a ``predict`` that is not final on some inputs, in eval mode and without any trace in random states."""
        generator = torch.Generator(self._device).manual_seed(0)
        self.forward, self.examples = self._aside(lambda: self._rule.predict(inputs, generator)), examples
        if self.forward == 0:
            self._give_up(BpfreeError("its forward pass has no matrix product and no convolution"))

    def count_features(self, inputs: Any) -> None:
        """The same for ``features``, on the inputs that the forward pass was counted on."""
        self.features = self._aside(lambda: self._rule.features(inputs))

    def _aside(self, call: Callable[[], Tensor]) -> int | None:
        """The operations of a call, which the first process alone makes."""
        found, self.trouble = self._world.from_first(lambda: (self._count_aside(call), self.trouble))
        return found

    def _count_aside(self, call: Callable[[], Tensor]) -> int | None:
        try:
            with evaluating(self._rule), self._rule.in_passing(), torch.no_grad(), preserved_global_state(self._device):
                with counted_operations() as operations:
                    call()
                return operations()
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        reason = error.what if isinstance(error, BpfreeError) else f"{type(error).__name__}: {error}"
        self.trouble = f"the operations of {type(self._rule).__name__} cannot be counted: {reason}"
        logger.warning("%s", self.trouble)

    # --- accounts ---------------------------------------------------------------------------------------------------

    def add_step(self, phase: Phase, batch: Batch, *, features: bool) -> None:
        """A step was taken; ``features``: after its features had been computed from the inputs."""
        self.total += self._steps.get(_kind(phase, batch), 0)
        if features:
            self.add_features(len(batch))

    def add_features(self, examples: int) -> None:
        """Features of so many examples were computed."""
        self.total += round((self.features or 0) * examples / self.examples)

    @property
    def forwards(self) -> float | None:
        """Forward-pass equivalents of one example so far; ``None`` where they are not known."""
        return None if self.trouble or not self.forward else self.total * self.examples / self.forward

    def spent(self, since: int = 0) -> float:
        """Forward-pass equivalents since a total, for budgets.

        Raises:
            UsageError: they are not known.
        """
        self._must_count("budget.forwards")
        return 0.0 if self.forward is None else (self.total - since) * self.examples / self.forward

    def counted(self, since: int = 0) -> float:
        """Return the operations since a total, for budgets.

        Raises:
            UsageError: they are not known.
        """
        self._must_count("budget.operations")
        return float(self.total - since)

    def _must_count(self, where: str) -> None:
        if self.trouble:
            raise UsageError(self.trouble, where=where, fix="set budget.epochs, budget.samples or budget.seconds")

    def costs(self) -> dict[str, float]:
        """For a run's result: ``train/forwards``, ``train/operations`` and, for one example, ``forward_operations``."""
        if self.forwards is None or self.forward is None:
            return {}
        forward = self.forward / self.examples
        return {"train/forwards": self.forwards, "train/operations": float(self.total), "forward_operations": forward}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        names = ("total", "forward", "features", "examples", "trouble")
        return {name: getattr(self, name) for name in names} | {"steps": dict(self._steps)}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Inverse of :meth:`state_dict`; ``None``: of a checkpoint from before operations were counted."""
        if saved is None:
            self.trouble = "the operations of the run's first part were not counted"
            return
        self._steps = dict(saved["steps"])
        self.total, self.forward, self.features = saved["total"], saved["forward"], saved["features"]
        self.examples, self.trouble = saved["examples"], saved["trouble"]


def _kind(phase: Phase, batch: Batch) -> str:
    """Steps of the same kind cost the same."""
    return repr((phase.name, phase.groups, phase.on_features, len(batch)))
