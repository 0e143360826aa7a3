"""Alignment of a rule's credit with gradients by reverse mode, measured without changing any bit of the run.

On a sampled step, before the step itself, the batch is used several times: by reverse mode through the task's loss of
the whole network, by reverse mode through the rule's own ``objective`` where it has one, and by the rule. All use the same
weights and, through torch's global generators, the same dropout masks; afterwards everything is put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bpfree.options import option
from bpfree.rule import Metrics
from bpfree.step import Batch, Step
from bpfree.training.accumulation import gather
from bpfree.training.meters import Clock
from bpfree.training.probes import Take
from bpfree.training.snapshot import Snapshot
from bpfree.training.stepper import Stepper

__all__ = ["Alignment", "AlignmentConfig"]

Vectors = dict[str, Tensor]
"""A flat gradient for each block."""


@dataclass
class AlignmentConfig:
    """Options of the comparison of a rule's credit with true gradients, which does not count as training time."""

    every: int = option(0, "steps between comparisons of the rule's credit with true gradients; 0: never", ge=0)
    draws: int = option(
        0,
        "estimates of one batch, each with different noise, for the variance; 0 or 1: no variance",
        ge=0,
        unless={"every": (0,)},
    )


class Alignment:
    """Compares a rule's estimate with true gradients, block by block.

    The estimate is what ``credit`` leaves in ``.grad``. For a rule that applies updates itself it is the sum of what each
    ``step.apply`` consumes while the rule takes its step (which is undone), and for a block that it moves in place, minus the
    change: then the ratio of norms contains the size of the step. Only parameters that learn in the current phase count.

    Args:
        stepper: which takes the run's steps.
        config: how often and how many draws.
        parts: micro-batches per update; both estimate and gradients are accumulated over them.
    """

    def __init__(self, stepper: Stepper, config: AlignmentConfig, *, parts: int = 1) -> None:
        self._stepper, self._rule, self._updater = stepper, stepper.rule, stepper.updater
        self._config, self._parts = config, parts

    def wants(self, batch: Batch, step: Step) -> bool:
        """Tell whether this step is sampled; no step of a phase on features is, because the blocks below do not learn in it."""
        return self._config.every > 0 and step.index % self._config.every == 0 and not step.phase.on_features

    def around(self, take: Take, clock: Clock, batch: Batch, step: Step) -> Metrics:
        """Measure the alignment of a step, then take the step."""
        with clock.stopped():
            metrics = self.measure(batch)
        return metrics | take(batch, step)

    def measure(self, batch: Batch) -> Metrics:
        """Return detached scalars on the device for each block to which the rule gives credit (``alignment/NAME/...``).

        ``cosine``, ``norm_ratio``: between the estimate and the gradient of the task's loss, where the network is a chain
        with a readout that takes the task's inputs; norm of the estimate over norm of the gradient.
        ``objective_cosine``, ``objective_norm_ratio``: cosine and ratio with the gradient of the rule's ``objective``.
        Blocks whose true gradient is zero (below a head that still is) have no direction to compare with, and are left out.
        ``variance``: with M >= 2 draws g_m, ``sum_m |g_m - mean|^2 / (M - 1)`` over the squared norm of the objective's
        gradient; without an objective, of the task's; without either, of the mean of the draws. The draws differ in the
        rule's own noise alone, not in dropout.

        Args:
            batch: of the step that is about to be taken.
        """
        optimizers = [] if self._rule.traits.update == "grad" else self._updater.optimizers
        aside = partial(self._aside, Snapshot(self._rule, *optimizers, device=self._stepper.device), batch)
        task = _not_zero(aside(self._descend(self._task_loss))) if self._has_task_loss(batch) else {}
        objective = _not_zero(aside(self._descend(self._rule.objective)))
        estimate = aside(self._estimate)
        metrics = {**_compare(estimate, task, ""), **_compare(estimate, objective, "objective_")}
        if self._config.draws > 1:
            draws = itertools.chain([estimate], (aside(self._estimate, draw=draw) for draw in range(1, self._config.draws)))
            metrics |= _relative_variance(draws, objective or task)
        return {f"alignment/{name}": value for name, value in metrics.items()}

    # --- executions that leave nothing behind -----------------------------------------------------------------------

    def _aside(self, before: Snapshot, batch: Batch, fill: Callable[[Batch, Step], object], draw: int = 0) -> Vectors:
        """Return the blocks' gradients that ``fill`` leaves in ``.grad``, and restore the state of the run."""
        try:
            self._updater.zero_grad()
            fill(batch, self._stepper.aside(draw))
            return dict(self._gradients())
        finally:
            before.restore()

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the blocks with a gradient, at least in single precision; a parameter without one counts as zero."""
        for name, parameters in self._blocks():
            if any(p.grad is not None for p in parameters):
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                flat = torch.cat([part.detach().flatten() for part in parts])
                yield name, flat.to(torch.promote_types(flat.dtype, torch.float32))

    def _blocks(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        for name, block in self._rule.network.blocks.items():
            yield name, [p for p in block.parameters() if p.requires_grad]

    # --- true gradients ---------------------------------------------------------------------------------------------

    def _descend(self, loss: Callable[[Batch, Step], Tensor | None]) -> Callable[[Batch, Step], object]:
        """Make a function that fills ``.grad`` with the gradient of a loss by reverse mode."""

        def credit(batch: Batch, step: Step) -> Metrics:
            with torch.enable_grad():
                value = loss(batch, step)
                if value is not None and value.requires_grad:
                    value.backward()
            return {}

        return lambda batch, step: gather(credit, self._rule, batch, step, self._parts)

    def _has_task_loss(self, batch: Batch) -> bool:
        network = self._rule.network
        whole = network.chain and network.readout is not None and network.input_shape == self._rule.spec.input_shape
        return whole and batch.targets is not None

    def _task_loss(self, batch: Batch, step: Step) -> Tensor:
        return self._rule.spec.loss(self._rule.network(batch.inputs), batch)

    # --- the rule's estimate ----------------------------------------------------------------------------------------

    def _estimate(self, batch: Batch, step: Step) -> None:
        if self._rule.traits.update == "grad":
            gather(self._rule.credit, self._rule, batch, step, self._parts)
        else:
            self._estimate_by_step(batch, step)

    def _estimate_by_step(self, batch: Batch, step: Step) -> None:
        """Let the rule take its step, since later parts of it may see what earlier ones moved, and note what was applied."""
        applied: dict[nn.Parameter, Tensor] = {}

        def apply(*names: str) -> None:
            for parameter in itertools.chain.from_iterable(self._updater.groups.get(name, ()) for name in names or self._updater.groups):
                if parameter.grad is not None:
                    applied[parameter] = applied[parameter] + parameter.grad if parameter in applied else parameter.grad.clone()
            self._updater.apply(*names)

        step.apply = apply
        before = {p: p.detach().clone() for _, parameters in self._blocks() for p in parameters}
        self._rule.learn(batch, step)
        for _, parameters in self._blocks():
            in_place = self._rule.traits.update == "in-place" and not any(p in applied for p in parameters)
            for parameter in parameters:
                parameter.grad = before[parameter] - parameter.detach() if in_place else applied.get(parameter)


def _not_zero(gradients: Vectors) -> Vectors:
    """Keep the gradients that are not zero; this waits for the device, but a sampled step is not timed."""
    return {name: value for name, value in gradients.items() if bool(value.any())}


def _compare(estimate: Vectors, reference: Vectors, prefix: str) -> Metrics:
    """Return cosine and ratio of norms for each block that is in both; a cosine with zero is zero."""
    metrics = {}
    for name in (name for name in estimate if name in reference):
        ours, true = estimate[name], reference[name]
        tiny = torch.finfo(true.dtype).tiny
        norm, length = ours.norm(), true.norm()
        metrics[f"{name}/{prefix}cosine"] = (ours / norm.clamp_min(tiny)) @ (true / length.clamp_min(tiny))
        metrics[f"{name}/{prefix}norm_ratio"] = norm / length.clamp_min(tiny)
    return metrics


def _relative_variance(draws: Iterator[Vectors], reference: Vectors) -> Metrics:
    """Return the unbiased variance of the draws over the squared norm of the reference, else of their mean; Welford's recurrence."""
    first = next(draws)
    mean = {name: value.clone() for name, value in first.items()}
    squares = {name: value.new_zeros(()) for name, value in first.items()}
    count = 1
    for count, vectors in enumerate(draws, start=2):
        for name, centre in mean.items():
            change = vectors.get(name, torch.zeros_like(centre)) - centre
            centre += change / count
            squares[name] += change @ (vectors.get(name, torch.zeros_like(centre)) - centre)
    scale = {name: value.square().sum() for name, value in (reference or _not_zero(mean)).items() if name in squares}
    return {f"{name}/variance": squares[name] / (count - 1) / value for name, value in scale.items()}
