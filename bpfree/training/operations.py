"""Cost of training in floating-point operations, counted by the core, never declared by a rule.

Matrix products (in place, too) and convolutions count, with two operations for each multiplication and addition, as torch's
``FlopCounterMode`` has it, and solutions of linear systems and least squares by elimination, Cholesky's, QR and singular value
decompositions (their leading terms: Golub and Van Loan, Matrix Computations, 4th ed., 2013, ch. 3, 4, 5.2 and 8.6). Elementwise work does
not count, nor do other iterations (eigenvalues). One *forward-pass equivalent* is
what ``Rule.predict`` takes for one example. A step is counted once for each kind of phase and size of batch, and costs that much ever
after: a rule whose steps of one kind differ (a search that ends early, say) is counted by the first of them. What a rule does outside of
steps (``prepare``, ``start_phase``, ``end_phase``) is counted each time that it is done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from bpfree.devices import preserved_global_state
from bpfree.errors import BpfreeError, UsageError
from bpfree.network.network import evaluating
from bpfree.rule import Metrics
from bpfree.step import Batch, Phase, Step
from bpfree.training.distributed import World
from bpfree.training.meters import Clock
from bpfree.training.probes import Take
from bpfree.training.snapshot import Snapshot
from bpfree.training.stepper import Stepper

__all__ = ["Operations", "counted_operations", "kind_of"]

logger = logging.getLogger("bpfree")

T = TypeVar("T")


class _NoModules:
    """Replacement of the counter's module tracker, whose hooks on modules and gradients would interfere with rules."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *arguments: object) -> None: ...


def _product(left: Any, right: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(math.prod(left)) * int(right[-1])


def _added_product(added: Any, left: Any, right: Any, *arguments: Any, **options: Any) -> int:
    return _product(left, right)


def _added_outer(added: Any, left: Any, right: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(left[0]) * int(right[0])


def _matrix_vector(matrix: Any, vector: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(matrix[0]) * int(matrix[1])


def _added_matrix_vector(added: Any, matrix: Any, vector: Any, *arguments: Any, **options: Any) -> int:
    return _matrix_vector(matrix, vector)


def _dot(one: Any, other: Any, *arguments: Any, **options: Any) -> int:
    return 2 * int(one[0])


def _cubed(matrix: Any) -> int:
    return int(math.prod(matrix)) * int(matrix[-1])


def _factor(thirds: int) -> Callable[..., int]:
    """Make a counter of n^3 in thirds, for matrices (..., n, n)."""

    def count(matrix: Any, *arguments: Any, **options: Any) -> int:
        return thirds * _cubed(matrix) // 3

    return count


def _solve(matrix: Any, right: Any, *arguments: Any, **options: Any) -> int:
    """Count an LU factorisation, and two triangular systems for each column on the right."""
    columns = int(right[-1]) if len(right) == len(matrix) else 1
    return 2 * _cubed(matrix) // 3 + 2 * int(math.prod(matrix)) * columns


def _triangular(matrix: Any, right: Any, *arguments: Any, **options: Any) -> int:
    return int(math.prod(right)) * int(matrix[-1])


def _cholesky_solve(right: Any, matrix: Any, *arguments: Any, **options: Any) -> int:
    return 2 * _triangular(matrix, right)


def _qr(matrix: Any, mode: str = "reduced", *arguments: Any, **options: Any) -> int:
    """Count Householder's factorisation of matrices (..., m, n), and as much for Q, where it is formed."""
    *batch, m, n = (int(size) for size in matrix)
    least, most = min(m, n), max(m, n)
    once = 2 * least**2 * most - 2 * least**3 // 3
    return math.prod(batch) * once * (1 if mode == "r" else 2)


def _singular_values(matrix: Any, full_matrices: bool = False, compute_uv: bool = True, *arguments: Any, **options: Any) -> int:
    """Count Golub's and Reinsch's algorithm for matrices (..., m, n), with or without vectors: an estimate for the usual rounds."""
    *batch, m, n = (int(size) for size in matrix)
    least, most = min(m, n), max(m, n)
    return math.prod(batch) * (14 * most * least**2 + 8 * least**3 if compute_uv else 4 * most * least**2 - 4 * least**3 // 3)


FURTHER = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _added_matrix_vector,
    torch.ops.aten.addmv_: _added_matrix_vector,
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten.addbmm: _added_product,
    torch.ops.aten.addbmm_: _added_product,
    torch.ops.aten.addr: _added_outer,
    torch.ops.aten.addr_: _added_outer,
    torch.ops.aten.dot: _dot,
    torch.ops.aten.vdot: _dot,
    torch.ops.aten.linalg_cholesky_ex: _factor(1),
    torch.ops.aten.linalg_lu_factor_ex: _factor(2),
    torch.ops.aten.linalg_inv_ex: _factor(6),
    torch.ops.aten._linalg_solve_ex: _solve,
    torch.ops.aten.linalg_solve_triangular: _triangular,
    torch.ops.aten.cholesky_solve: _cholesky_solve,
    torch.ops.aten.linalg_qr: _qr,
    torch.ops.aten._linalg_svd: _singular_values,
}
"""Products and solutions that torch's counter leaves out; the arguments are shapes."""


@contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """Count the floating-point operations inside; the function returns their number, also afterwards."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, about 1 s

    counter = FlopCounterMode(display=False, custom_mapping=FURTHER)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        yield lambda: int(counter.get_total_flops())


class Operations:
    """The operations of a run so far; all of it is saved in checkpoints.

    A rule that cannot be counted trains as usual, but the run lacks these numbers.

    Args:
        stepper: which takes the run's steps.
        world: the processes among which the training is shared; each counts its part of a step, and the sum is kept.

    Attributes:
        total: operations of all training steps, of what is done outside of them, and of features that were computed for phases on features.
        forward: operations of one forward pass of ``examples`` examples; ``None`` before it is counted.
        features: operations of ``Rule.features``, where a phase is on features; counted again for each such phase that may change them.
        trouble: why there are no numbers; the empty string: there are.
    """

    def __init__(self, stepper: Stepper, world: World | None = None) -> None:
        self._rule, self._updater, self._device, self._world = stepper.rule, stepper.updater, stepper.device, world or World()
        self._steps: dict[str, int] = {}
        self.total = 0
        self.forward: int | None = None
        self.features: int | None = None
        self._features_of = ""
        self.examples = 1
        self.trouble = ""

    # --- counting ---------------------------------------------------------------------------------------------------

    def wants(self, batch: Batch, step: Step) -> bool:
        """Tell whether steps on a batch of this kind were not counted yet."""
        return not self.trouble and kind_of(step.phase, batch) not in self._steps

    def around(self, take: Take, clock: Clock, batch: Batch, step: Step) -> Metrics:
        """Take a step and count its operations; if counting fails, restore the state and take the step without it."""
        with clock.stopped():
            metrics, found = self._counted(lambda: take(batch, step), step)
        total, failures = self._world.total(found or 0, found is None)
        if not failures:
            self._steps[kind_of(step.phase, batch)] = int(total)
        elif not self.trouble:
            self._give_up(BpfreeError("another process failed"))
        return metrics

    def add_call(self, call: Callable[[], object], step: Step) -> None:
        """Make a call of the rule outside of steps, and add its operations; if all processes make it, the first one counts."""
        if self.trouble:
            call()
            return
        _, own = self._counted(call, step)
        found, self.trouble = self._world.from_first(lambda: (own, self.trouble))
        self.total += found or 0

    def _counted(self, call: Callable[[], T], step: Step) -> tuple[T, int | None]:
        try:
            before = Snapshot(self._rule, *self._updater.optimizers, step.generator, device=self._device)
        except Exception as error:  # no memory for a copy
            self._give_up(error)
            return call(), None
        try:
            with counted_operations() as operations:
                made = call()
        except Exception as error:
            before.restore()
            step.part = 0
            made = call()  # an error of the rule's own ends the run here
            self._give_up(error)
            return made, None
        return made, operations()

    def count_forward(self, inputs: Any, examples: int) -> None:
        """Count a ``predict`` that is not final on some inputs, in eval mode and without changing random states."""
        generator = torch.Generator(self._device).manual_seed(0)
        self.forward, self.examples = self._aside(lambda: self._rule.predict(inputs, generator)), examples
        if self.forward == 0:
            self._give_up(BpfreeError("its forward pass has no matrix product and no convolution"))

    def wants_features(self, phase: Phase) -> bool:
        """Tell whether a phase uses features that were not counted yet; a rule may have grown since the previous phase."""
        return phase.on_features and not self.trouble and self._features_of != self._kind_of_features(phase)

    def count_features(self, phase: Phase, inputs: Any) -> None:
        """Count ``features`` in a phase, on the inputs on which the forward pass was counted."""
        self.features, self._features_of = self._aside(lambda: self._rule.features(inputs)), self._kind_of_features(phase)

    def _kind_of_features(self, phase: Phase) -> str:
        return repr((phase.part,) if self._rule.fixed_features else (phase.name, phase.groups))

    def _aside(self, call: Callable[[], Tensor]) -> int | None:
        """Return the operations of a call that the first process alone makes."""
        found, self.trouble = self._world.from_first(lambda: (self._count_aside(call), self.trouble))
        return found

    def _count_aside(self, call: Callable[[], Tensor]) -> int | None:
        try:
            with evaluating(self._rule), self._rule.quick_predictions(), torch.no_grad(), preserved_global_state(self._device):
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
        """Add the operations of a step; with ``features``, also those of computing its features from the inputs."""
        self.total += self._steps.get(kind_of(phase, batch), 0)
        if features:
            self.add_features(len(batch))

    def add_features(self, examples: int) -> None:
        """Note that features of n examples were computed."""
        self.total += round((self.features or 0) * examples / self.examples)

    @property
    def forwards(self) -> float | None:
        """Forward-pass equivalents of one example so far; ``None`` where they are not known."""
        return None if self.trouble or not self.forward else self.total * self.examples / self.forward

    def spent(self, since: int = 0) -> float:
        """Return the forward-pass equivalents since a total, for budgets.

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
        """Return costs for a run's result: ``train/forwards``, ``train/operations`` and, for one example, ``forward_operations``."""
        if self.forwards is None or self.forward is None:
            return {}
        forward = self.forward / self.examples
        return {"train/forwards": self.forwards, "train/operations": float(self.total), "forward_operations": forward}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        names = ("total", "forward", "features", "examples", "trouble")
        return {name: getattr(self, name) for name in names} | {"steps": dict(self._steps), "features_of": self._features_of}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned; ``None`` for a checkpoint from before operations were counted."""
        if saved is None:
            self.trouble = "the operations of the run's first part were not counted"
            return
        self._steps = dict(saved["steps"])
        self.total, self.forward, self.features = saved["total"], saved["forward"], saved["features"]
        self.examples, self.trouble = saved["examples"], saved["trouble"]
        self._features_of = saved.get("features_of", "")


_recent: tuple[Phase, int, str] = (Phase(), 0, "")
"""The most recent kind of step, kept because each step needs it several times."""


def kind_of(phase: Phase, batch: Batch) -> str:
    """Name the kind of a step; steps of the same kind cost the same."""
    global _recent
    known, size, kind = _recent
    if known is not phase or size != len(batch):
        kind = repr((phase.name, phase.groups, phase.on_features, len(batch)))
        _recent = phase, len(batch), kind
    return kind
