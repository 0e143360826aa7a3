"""Checks of what every task must guarantee, for the tests of authors of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.errors import BpfreeError
from bpfree.saved import spec_of
from bpfree.step import Batch
from bpfree.tasks.check import check_inputs
from bpfree.tasks.spec import TaskSpec, has_own_loss
from bpfree.tasks.splits import Examples
from bpfree.tasks.task import DataSource, Task
from bpfree.tasks.trees import named_leaves, tree_map

__all__ = ["TaskCheck", "task_checks"]

FEW = 12
"""Number of examples on which losses and metrics are tried."""


@dataclass(frozen=True)
class TaskCheck:
    """A check with its name, and a function that raises ``AssertionError`` or ``BpfreeError`` if it fails."""

    name: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Run the check."""
        self.run()


def task_checks(source: DataSource | Task, config: Any = None, *, root: Path | None = None) -> list[TaskCheck]:
    """List the checks of a task, to be parametrised over: ``pytest.mark.parametrize("check", task_checks(SOURCE), ids=str)``.

    Args:
        source: a registered data set, or a task.
        config: options of the data set.
        root: folder of data sets.
    """
    made: list[Task] = []

    def task() -> Task:
        if not made:
            made.append(source if isinstance(source, Task) else Task.from_source(source, config, root=root))
        return made[0]

    def against(check: Callable[[Task], None]) -> Callable[[], None]:
        return lambda: check(task())

    checks = [TaskCheck(check.__name__.strip("_").replace("_", "-"), against(check)) for check in CHECKS]
    if isinstance(source, DataSource):
        checks.insert(0, TaskCheck("spec-without-data", lambda: _spec_without_data(source, config, root, task())))
    return checks


def _spec_without_data(source: DataSource, config: Any, root: Path | None, task: Task) -> None:
    """Check that ``spec`` describes the data that ``load`` returns, without reading them."""
    spec = source.spec(source.Config() if config is None else config, root)
    for name in ("input_shape", "outputs", "targets", "vocabulary", "structure", "output_size"):
        said, loaded = getattr(spec, name), getattr(task.spec, name)
        assert said == loaded, f"spec says {name}={said!r}, but the loaded task has {loaded!r}"


def _length_and_batches(task: Task) -> None:
    """Check that a split has a length, and returns any of its examples by their positions."""
    for name, split in _splits(task):
        count = len(split)
        assert count > 0, f"the {name} split is empty"
        places = torch.tensor([count - 1, 0]) if count > 1 else torch.tensor([0])
        inputs, targets = split.batch(places)
        batch = Batch(inputs, targets)
        assert len(batch) == len(places), f"the {name} split gives {len(batch)} inputs for {len(places)} positions"
        assert targets is None or len(targets) == len(places), f"the {name} split gives {len(targets or ())} targets"
        assert len(split.subset(places)) == len(places), f"a subset of the {name} split has another length"


def _digest(task: Task) -> None:
    """Check that the digest is the same for the same data, and differs for other examples."""
    again = Task(task.spec, task.train, task.validation, task.test)
    assert again.fingerprint() == task.fingerprint(), "the fingerprint of the same data has changed"
    if len(task.train) > 1:
        fewer = task.train.subset(torch.arange(len(task.train) - 1))
        other = Task(task.spec, fewer, task.validation, task.test)
        assert other.fingerprint() != task.fingerprint(), "the fingerprint does not notice that an example is missing"


def _dry_run_example(task: Task) -> None:
    """Check that ``spec.example`` makes inputs like those of the data, once these are normalised."""
    made = task.spec.example(2)
    seen = task.spec.normalise(task.train.batch(torch.arange(min(2, len(task.train))))[0])
    for where, (ours, theirs) in _beside(made, seen):
        assert ours.shape[1:] == theirs.shape[1:], (
            f"an example{where} has shape {tuple(ours.shape[1:])}, the data {tuple(theirs.shape[1:])}"
        )
        assert ours.is_floating_point() == theirs.is_floating_point(), f"an example{where} is {ours.dtype}, the data {theirs.dtype}"
    if not task.spec.takes_real_tensors:
        check_inputs(task.spec, made, "TaskSpec.example")


def _loss_and_error(task: Task) -> None:
    """Check that ``error`` is the derivative of ``loss``, by autograd."""
    spec = task.spec
    if not spec.is_scored:
        return
    for batch, outputs in _tried(task, 2):
        leaf = outputs.clone().requires_grad_()
        loss = spec.loss(leaf, batch)
        assert loss.dim() == 0, f"the loss has shape {tuple(loss.shape)}, but it is the mean over the batch"
        assert bool(loss.isfinite()), f"the loss of made-up outputs is {float(loss)}"
        (expected,) = torch.autograd.grad(loss, leaf)
        for name, error in (("error", spec.error(outputs, batch)), ("loss_and_error", spec.loss_and_error(outputs, batch)[1])):
            assert error.shape == outputs.shape, f"{name} has shape {tuple(error.shape)}, the outputs {tuple(outputs.shape)}"
            distance = float((error - expected).norm() / expected.norm().clamp_min(1e-12))
            assert distance < 1e-4, f"{name} is not the derivative of loss: relative distance {distance:.2g}"


def _losses_of_examples(task: Task) -> None:
    """Check that ``losses`` has ``loss`` as its mean, if the loss is defined for single examples."""
    spec = task.spec
    if not spec.is_scored or has_own_loss(spec):
        return
    for batch, outputs in _tried(task, 1):
        mean, whole = float(spec.losses(outputs, batch).double().mean()), float(spec.loss(outputs, batch))
        assert abs(mean - whole) <= 1e-4 * max(1.0, abs(whole)), f"the mean of losses is {mean:.6g}, loss is {whole:.6g}"


def _metrics_accumulate(task: Task) -> None:
    """Check that a metric of a split is the same whether its examples come in one batch or in several."""
    spec = task.spec
    (batch, outputs), *_ = list(_tried(task, 1))
    for metric in spec.metrics():
        assert metric.begin is not None, f"the metric {metric.name} cannot be measured: it has no begin"
        found = []
        for size in {len(batch), max(1, len(batch) // 3)}:
            accumulator = metric.begin(spec, lambda inputs: outputs)
            for start in range(0, len(batch), size):
                accumulator.add(outputs[start : start + size], _cut(batch, start, start + size))
            found.append(accumulator.value())
        assert max(found) - min(found) <= 1e-4 * max(1.0, *map(abs, found)), f"{metric.name} is {found} in batches of different size"
        assert not metric.share or min(found) >= 0, f"{metric.name} is said to be a share, but is {found}"


def _recorded(task: Task) -> None:
    """Check that a spec read back from a checkpoint equals the original."""
    again = spec_of(task.spec.recorded(), Path("a checkpoint"))
    assert again == task.spec, f"the spec is read back as {again}"


CHECKS: tuple[Callable[[Task], None], ...] = (
    _length_and_batches,
    _digest,
    _dry_run_example,
    _loss_and_error,
    _losses_of_examples,
    _metrics_accumulate,
    _recorded,
)


def _splits(task: Task) -> Iterator[tuple[str, Examples]]:
    yield "train", task.train
    if task.validation is not None:
        yield "validation", task.validation
    yield "test", task.test


def _tried(task: Task, draws: int) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of the task's examples, each with made-up outputs."""
    inputs, targets = task.train.batch(torch.arange(min(FEW, len(task.train))))
    batch = Batch(task.spec.normalise(inputs), targets if targets is None or not targets.is_floating_point() else targets.float())
    generator = torch.Generator().manual_seed(0)
    shape = _shape(task.spec, batch)
    for _ in range(draws):
        yield batch, torch.randn(shape, generator=generator)


def _shape(spec: TaskSpec, batch: Batch) -> tuple[int, ...]:
    if batch.targets is not None and spec.targets == "tokens":
        return (*batch.targets.shape, spec.outputs)
    if batch.targets is not None and spec.targets == "real":
        return tuple(batch.targets.shape)
    return (len(batch), *spec.output_size)


def _cut(batch: Batch, start: int, end: int) -> Batch:
    inputs = tree_map(lambda leaf: leaf[start:end], batch.inputs)
    return Batch(inputs, None if batch.targets is None else batch.targets[start:end])


def _beside(made: Any, seen: Any) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    ours, theirs = dict(named_leaves(made)), dict(named_leaves(seen))
    if ours.keys() != theirs.keys():
        raise BpfreeError(f"an example has the parts {sorted(ours)}, the data {sorted(theirs)}", fix="override TaskSpec.example")
    for place in ours:
        yield place, (ours[place], theirs[place])
