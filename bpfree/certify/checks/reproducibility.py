"""The same seed gives the same bits: when repeated, after an interruption, beside others, and for the caller."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.certify import training_runs
from bpfree.certify.checks.check import Check
from bpfree.certify.checks.draws import changed, first_draw, states
from bpfree.certify.checks.guard import guarded
from bpfree.certify.checks.places import place_of
from bpfree.certify.findings import CheckFailed, NotApplicable, Unmeasured
from bpfree.certify.loop import Loop, predict, small_rule, trained
from bpfree.certify.measurements import Measurements
from bpfree.hooks import hookimpl
from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.seeds import seeded
from bpfree.step import Batch, Step
from bpfree.tasks.task import Task
from bpfree.training.trainer import Interrupted, Trainer

__all__ = ["CHECKS"]

EXAMPLES, EPOCHS = 96, 4
"""Three batches per pass; rules with two phases spend half of the passes on each."""
INTERRUPTED_IN = (0, 2)
"""Passes in which the run is interrupted, counted from 0: one in each half."""
EACH = 4


def _batches(m: Measurements, seed: int = 1) -> list[Batch]:
    return m.batches(16, EACH, seed=seed)


def _weights(rule: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in rule.state_dict().items() if isinstance(value, Tensor)}


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Name the first tensor that is not bit-identical, and by how much it differs; empty if there is none."""
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other:
            return f"{name}, which only one of them has"
        a, b = one[name], other[name]
        if a.shape != b.shape or not bool(((a == b) | ((a != a) & (b != b))).all()):
            return f"{name}{f', by up to {float((a.double() - b.double()).abs().max()):.2g}' if a.shape == b.shape else ''}"
    return ""


# --- seeds ----------------------------------------------------------------------------------------------------------------


def same_seed(m: Measurements) -> str | None:
    """Check that weights, buffers and a prediction are the same after a few steps of each phase."""
    given = _batches(m)

    def bits(seed: int) -> dict[str, Tensor]:
        rule = trained(m.build(seed=seed), given, each=EACH, seed=seed)
        with seeded(seed):
            return {**_weights(rule), "the prediction": predict(rule, given[0].inputs)}

    first = bits(0)
    difference = _difference(first, bits(0))
    if difference:
        raise CheckFailed(
            f"two runs from the same seed differ in {difference}",
            where=place_of(m.subject.rule, "learn"),
            fix="draw from step.generator or step.generator_for(name), and keep nothing between instances",
        )
    if not _difference(first, bits(1)):
        raise CheckFailed(
            "runs from different seeds are the same, so errors over seeds would mean nothing",
            where=place_of(m.subject.rule, "__init__"),
            fix="initialise parameters from torch's global generator in __init__, which the run has seeded",
        )
    return None


# --- resuming -------------------------------------------------------------------------------------------------------------


class _Stop:
    """Asks the trainer to stop after the second step of a pass."""

    def __init__(self, epoch: int) -> None:
        self.trainer: Trainer | None = None
        self.place = ""
        self._epoch, self._steps = epoch, 0

    @hookimpl
    def step_end(self, run: Run, step: Step) -> None:
        self._steps += step.epoch == self._epoch
        if self._steps == 2 and self.trainer is not None and not self.place:
            self.place = f"after step {step.index}, in phase {step.phase.name!r}"
            self.trainer.stop("the certificate asked")


def _trainer(m: Measurements, task: Task, **options: Any) -> Trainer:
    return training_runs.trainer(m.subject, task, rule=small_rule(m.subject, m.kind, task.spec), epochs=EPOCHS, **options)


def _interrupted(m: Measurements, task: Task, epoch: int, folder: Path) -> str | None:
    """Say where the run was interrupted; ``None`` if it ended before."""
    watch = _Stop(epoch)
    watch.trainer = _trainer(m, task, folder=folder, observers=[watch])
    with seeded(1):
        try:
            watch.trainer.fit()
        except Interrupted:
            return watch.place
    return None


def _resumed(m: Measurements, task: Task, folder: Path) -> tuple[dict[str, Tensor], float]:
    trainer = _trainer(m, task, folder=folder)
    with seeded(2):
        run = trainer.fit(folder / "checkpoints" / "last.pt")
    return _weights(trainer.rule), run.result["test/loss"]


def resume(m: Measurements) -> str | None:
    """Compare a run that was interrupted in the middle of a pass and resumed by a fresh trainer with one that was not."""
    task = training_runs.cut(training_runs.task_of(m.subject), EXAMPLES)
    straight = _trainer(m, task)
    loss = straight.fit().result["test/loss"]
    found = []
    for epoch in INTERRUPTED_IN:
        with tempfile.TemporaryDirectory(prefix="bpfree-certify-") as folder:
            place = _interrupted(m, task, epoch, Path(folder))
            if place is not None:
                found.append(place)
                _compare(m, _weights(straight.rule), loss, place, _resumed(m, task, Path(folder)))
    if not found:
        raise Unmeasured("the run was over before it could be interrupted")
    return f"interrupted {' and '.join(found)}"


def _compare(m: Measurements, weights: dict[str, Tensor], loss: float, place: str, resumed: tuple[dict[str, Tensor], float]) -> None:
    difference = _difference(weights, resumed[0])
    if not difference and resumed[1] != loss and loss == loss:
        difference = f"the test loss, {resumed[1]:.6g} and not {loss:.6g}"
    if difference:
        raise CheckFailed(
            f"a run that was interrupted {place} and resumed ends with a different {difference}",
            where=_attributes(m) or place_of(m.subject.rule, "learn"),
            fix="keep what must outlive a step in a buffer or parameter (made in __init__ or start_phase), which checkpoints hold",
        )


def _attributes(m: Measurements) -> str:
    """Return the plain attributes that training changes and that a checkpoint does not hold."""
    rule = m.build()
    before = {name: repr(value) for name, value in _plain(rule).items()}
    trained(rule, _batches(m), each=2)
    moved = [name for name, value in _plain(rule).items() if before.get(name) != repr(value)]
    return f"changed by training, and in no checkpoint: {', '.join(moved)}" if moved else ""


def _plain(rule: Rule) -> dict[str, Any]:
    """Return the attributes of the rule and its submodules that are no parameters, buffers or modules."""
    return {
        f"{path}.{name}" if path else f"{type(rule).__name__}.{name}": value
        for path, part in rule.named_modules()
        for name, value in vars(part).items()
        if name != "training" and name not in vars(nn.Module())
    }


# --- other instances ------------------------------------------------------------------------------------------------------


def two_instances(m: Measurements) -> str | None:
    """Compare an instance alone with one beside another instance that takes a step after each of its own."""
    given, others = _batches(m), _batches(m, seed=7)
    alone = _weights(trained(m.build(), given, each=EACH))
    one, other = Loop(m.build()), Loop(m.build(seed=3), seed=3)
    for batch, foreign in zip(one.turns(given, each=EACH), other.turns(others, each=EACH), strict=False):
        other.take(foreign)
        one.take(batch)
        with torch.random.fork_rng(devices=[]):
            predict(other.rule, others[0].inputs)
    difference = _difference(alone, _weights(one.rule))
    if difference:
        raise CheckFailed(
            f"an instance that learns beside another one of its class ends with a different {difference}",
            where=_shared(type(one.rule)) or place_of(type(one.rule), "learn"),
            fix="make it in __init__, as a buffer of each instance",
        )
    return None


def _shared(rule: type[Rule]) -> str:
    """Return the class attributes that can be changed, of the rule's own classes."""
    kinds = (Tensor, list, dict, set, nn.Module, torch.Generator)
    own = [base for base in rule.__mro__ if issubclass(base, Rule) and base is not Rule and base.__module__ != Rule.__module__]
    names = [
        f"{base.__qualname__}.{name}"
        for base in own
        for name, value in vars(base).items()
        if isinstance(value, kinds) and not name.startswith("__") and name not in ("waivers", "Config")
    ]
    return f"shared by all instances: {', '.join(names)}" if names else ""


# --- the caller's generators and settings ---------------------------------------------------------------------------------


def _is_untouched(rule: Rule, name: str, call: Callable[[], object]) -> None:
    """Raise CheckFailed if the call moves a global generator; the call is then repeated, to see where."""
    before = states()
    call()
    moved = changed(before)
    if moved:
        raise CheckFailed(
            f"{name} draws from the global generator of {' and '.join(moved)}",
            where=first_draw(type(rule), call) or place_of(type(rule), name),
            fix="draw from the generator it is given: step.generator or step.generator_for(name) in learn, the argument in predict",
        )


@torch.no_grad()
def _predict_directly(rule: Rule, batch: Batch) -> None:
    with evaluating(rule):
        rule.predict(batch.inputs, torch.Generator().manual_seed(0))


def global_generators(m: Measurements) -> str | None:
    """Check the states of the generators of torch, Python and numpy around ``learn`` and ``predict``."""
    given = _batches(m)
    rule = m.build()
    dropouts = [name for name, part in rule.named_modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0]
    if dropouts:
        raise NotApplicable(f"its specimen has dropout, which draws from torch's global generator ({', '.join(dropouts)})")
    loop = Loop(rule)
    with seeded(0):
        for batch in loop.turns(given, each=2):
            _is_untouched(rule, "learn", lambda batch=batch: rule.learn(batch, loop.step))  # type: ignore[misc]
        _is_untouched(rule, "predict", lambda: _predict_directly(rule, given[0]))
    return None


def _settings() -> dict[str, object]:
    return {
        "torch's global generator": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
    }


def caller_state(m: Measurements) -> str | None:
    """Compare the process's settings before and after a run."""
    task = training_runs.cut(training_runs.task_of(m.subject), EXAMPLES)
    trainer = _trainer(m, task)
    before = _settings()
    trainer.fit()
    after = _settings()
    left = [name for name, value in before.items() if after[name] != value]
    if left:
        raise CheckFailed(
            f"a run leaves the caller's state changed: {', '.join(left)}",
            where=place_of(type(trainer.rule), "learn"),
            fix="change settings of the process in a with block only, which puts them back",
        )
    return None


CHECKS = [
    Check("same-seed", "the same seed gives the same bits, another seed others", guarded(same_seed), waivable=False),
    Check("resume", "a run that was interrupted and resumed ends with the same bits", guarded(resume), waivable=False),
    Check("two-instances", "two instances do not influence each other", guarded(two_instances), waivable=False),
    Check("global-generators", "learn and predict leave the global generators alone", guarded(global_generators), waivable=False),
    Check("caller-state", "a run gives back the caller's state", guarded(caller_state), waivable=False),
]
