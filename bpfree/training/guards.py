"""Checks during training: fixed parameters stay, learning ones move, and an evaluation only reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.errors import BpfreeError, UsageError
from bpfree.rule import Rule
from bpfree.step import Phase
from bpfree.tasks.spec import has_own_loss
from bpfree.tasks.task import Task
from bpfree.training.distributed import World

__all__ = ["LearningWatch", "Values", "check_fit", "check_made_to_learn", "kind_of", "named_tensors", "only_read", "version"]

logger = logging.getLogger("bpfree")

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that change with the data even if nothing learns."""


class Values:
    """Copies of tensors by name, on their device, to be compared with later.

    What a version does not show (a write through ``.data``, another tensor of the same name) is seen here. Bits are compared, so that
    NaN equals itself.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: tensor.detach().clone() for name, tensor in tensors.items() if _has_values(tensor)}

    def changed(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of tensors that were added, removed or changed; waits for the device once."""
        present = {name: tensor.detach() for name, tensor in tensors.items() if _has_values(tensor)}
        alike = [name for name, copy in self._copies.items() if name in present and _kind(copy) == _kind(present[name])]
        flags = [(_bits(self._copies[name]) != _bits(present[name])).any() for name in alike]
        equal = {name for name, other in zip(alike, torch.stack(flags).tolist() if flags else [], strict=True) if not other}
        return [name for name in {**self._copies, **present} if name not in equal]


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not torch.nn.parameter.is_lazy(tensor)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(WORDS[tensor.element_size()])


def named_tensors(rule: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(rule.named_parameters()), **dict(rule.named_buffers())}


def kind_of(rule: nn.Module, name: str) -> str:
    """Return ``the parameter NAME`` or ``the buffer NAME``."""
    return f"the {'buffer' if name in dict(rule.named_buffers()) else 'parameter'} {name}"


def check_fit(rule: Rule, task: Task) -> None:
    """Check that a rule was built for a task.

    Raises:
        UsageError: its spec has other inputs, outputs or targets; or the readout gives outputs of another shape than the targets have.
    """
    for name in ("input_shape", "outputs", "targets", "vocabulary", "structure"):
        built, given = getattr(rule.spec, name), getattr(task.spec, name)
        if (tuple(built) if name == "input_shape" else built) != (tuple(given) if name == "input_shape" else given):
            raise UsageError(
                f"the rule was built for {name}={built!r}, but the task has {given!r}",
                where=f"{type(rule).__name__} for task {rule.spec.name}, trained on task {task.spec.name}",
                fix="build network and rule with the task's spec",
            )
    shape, targets = rule.network.shapes.get(rule.network.readout or ""), task.train.targets
    if shape is None or targets is None or task.spec.targets != "real" or has_own_loss(task.spec):
        return
    if tuple(targets.shape[1:]) != tuple(shape):
        raise UsageError(
            f"the readout gives outputs of shape {tuple(shape)}, but the targets have {tuple(targets.shape[1:])}",
            where=f"task {task.spec.name}",
            fix="give both the same shape",
        )


def check_made_to_learn(rule: nn.Module) -> None:
    """Refuse tensors that no step can change.

    Raises:
        UsageError: the rule was made under ``torch.inference_mode``.
    """
    name = next((name for name, tensor in named_tensors(rule).items() if tensor.is_inference()), None)
    if name is not None:
        raise UsageError(
            f"{kind_of(rule, name)} was made under torch.inference_mode, so it can never change",
            where=type(rule).__name__,
            fix="make network and rule outside of it",
        )


@contextmanager
def only_read(rule: Rule, *methods: str) -> Iterator[None]:
    """Compare the parameters, by value, before and after methods of the rule that may only read them; also a decorator.

    A method may put back what it has written, such as averaged weights for a prediction; buffers may change.

    Args:
        rule: whose methods are called inside.
        methods: their names.

    Raises:
        BpfreeError: a parameter has changed; names those of the methods that the rule itself defines, or the first.
    """
    before = Values(dict(rule.named_parameters()))
    yield
    changed = before.changed(dict(rule.named_parameters()))
    if changed:
        own = [name for name in methods if getattr(type(rule), name) is not getattr(Rule, name)] or methods[:1]
        raise BpfreeError(
            f"{' or '.join(own)} changed the parameter {changed[0]}, but evaluation may only read parameters",
            where=f"{type(rule).__name__}.{own[0]}",
            fix="write into parameters in learn and its hooks only, or put back the same values before the method returns",
        )


def version(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to in the ordinary way, or gets other storage; this does not wait for the device."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


class LearningWatch:
    """Checks that fixed parameters stay and learning ones move: by version after a phase's first step, else by value.

    *Fixed* are the parameters of groups that a phase does not name, and those of the own-prediction twin that do not learn. *Learning* are
    those of a phase's groups that require a gradient; where there is one, also a real-valued buffer that is no running statistic counts
    as moved, because closed-form rules solve into such.

    Args:
        rule: that is watched.
        world: the processes that train it, all of which reach the same result.
        twin: whether the rule is its own-prediction twin.

    Attributes:
        moved: whether anything that learns has moved over the run; ``expected``: whether there was anything that should.
    """

    def __init__(self, rule: Rule, world: World, *, twin: bool) -> None:
        self._rule, self._world, self._twin = rule, world, twin
        self.moved, self.expected = False, False
        self._phase, self._groups, self._step = Phase(), dict[str, list[nn.Parameter]](), 0
        self._fixed: dict[str, nn.Parameter] = {}
        self._learning: list[str] = []
        self._compared: list[str] = []
        self._versions: list[tuple[int, int]] | None = None
        self._fixed_values = self._start = None  # type: Values | None

    def prepared(self, before: Values) -> None:
        """Note that ``prepare`` has run: what it filled has moved."""
        names = [*self._names_learning(), *self._names_solved()]
        self._note(bool(set(before.changed(named_tensors(self._rule))) & set(names)))

    def begin_phase(self, phase: Phase, groups: Mapping[str, list[nn.Parameter]], step: int) -> None:
        """Note that a phase begins after n steps; its groups have ``requires_grad`` already."""
        self._phase, self._groups, self._step = phase, dict(groups), step
        others = [] if phase.groups is None else [p for name, members in groups.items() if name not in phase.groups for p in members]
        fixed = {id(p) for p in others} | {id(p) for p in self._rule.parameters() if self._twin and not p.requires_grad}
        self._fixed = {name: p for name, p in self._rule.named_parameters() if id(p) in fixed}
        self._fixed_values = Values(self._fixed) if self._fixed else None
        self._versions = [version(p) for p in self._fixed.values()] if self._fixed else None
        self._learning = self._names_learning()
        self._compared = [*self._learning, *self._names_solved()]
        self._start = Values(self._select(self._compared)) if self._learning else None

    def after_step(self) -> None:
        """Look at the fixed parameters after the first step of the phase."""
        if self._versions is not None:
            before, self._versions = self._versions, None
            if before != [version(p) for p in self._fixed.values()]:  # a rule may perturb weights and put them back
                self.check_fixed()

    def check_fixed(self) -> None:
        """Compare the parameters that a phase declares fixed with their values at its beginning.

        Raises:
            BpfreeError: it has changed.
        """
        if self._fixed_values is None:
            return
        changed = self._fixed_values.changed(self._select(self._fixed))
        if changed:
            rule, more = type(self._rule).__name__, f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            reason = "this is the own-prediction twin" if self._twin else "its group is not among Phase.groups"
            raise BpfreeError(
                f"the parameter {changed[0]}{more} is declared fixed in phase {self._phase.name!r}, but changed ({reason})",
                where=rule,
                fix="in learn and its hooks write only into parameters with requires_grad, or name the group in Phase.groups",
            )

    def look(self, *, steps: int) -> None:
        """Note whether anything that learns in this phase has moved; from then on, nothing more is compared."""
        if self._start is None or steps <= self._step:
            return
        self.expected = True
        if self._note(bool(self._start.changed(self._select(self._compared)))):
            self._start = None

    def end_phase(self, *, steps: int, whole: bool) -> None:
        """End the phase, and warn if nothing moved in it.

        Args:
            steps: taken in all.
            whole: whether it was seen from its beginning.
        """
        self.check_fixed()
        self.look(steps=steps)
        if self._start is not None and whole and steps > self._step:
            logger.warning(
                "phase %r: nothing that learns in it has moved in %d steps (%s)",
                self._phase.name,
                steps - self._step,
                _listed(self._learning),
            )
        self._fixed, self._fixed_values, self._versions, self._start = {}, None, None, None

    def end_run(self, *, steps: int, gradients: bool) -> None:
        """End the training, and refuse or warn if nothing has moved in it.

        Args:
            steps: taken in all.
            gradients: whether a parameter that is updated had a ``.grad`` at some update of this process.

        Raises:
            BpfreeError: there was something to learn, and nothing has moved.
        """
        if not self.expected or self.moved:
            return
        rule = type(self._rule).__name__
        if gradients:
            raise BpfreeError(
                f"over {steps} steps no learning parameter has moved, though there were gradients",
                where=rule,
                fix="a larger optimizer.lr or a schedule that is not 0 throughout; or see whether credit fills .grad with zeros",
            )
        raise BpfreeError(
            f"over {steps} steps no learning parameter received a gradient or moved",
            where=rule,
            fix="see that credit fills .grad (is the loss detached, or made under torch.no_grad?) and that learn calls step.apply()",
        )

    def state_dict(self) -> dict[str, bool]:
        """Return what a resumed run needs to know."""
        return {"moved": self.moved, "expected": self.expected}

    def load_state_dict(self, saved: Mapping[str, bool] | None) -> None:
        """Restore what :meth:`state_dict` returned; an older checkpoint counts as that of a run that moved."""
        self.moved, self.expected = (True, True) if saved is None else (saved["moved"], saved["expected"])

    def _note(self, moved: bool) -> bool:
        found = self._world.largest(float(moved))[0] > 0
        self.moved = self.moved or found
        return found

    def _names_learning(self) -> list[str]:
        groups = self._groups or self._rule.groups()
        members = {id(p) for group in groups.values() for p in group}
        return [name for name, p in self._rule.named_parameters() if p.requires_grad and id(p) in members]

    def _names_solved(self) -> list[str]:
        """List the real-valued buffers in which a rule may learn, and the parameters that it fills without gradient descent."""
        buffers = [n for n, b in self._rule.named_buffers() if b.is_floating_point() and n.rpartition(".")[2] not in STATISTICS]
        filled = [name for name, p in self._rule.named_parameters() if not (p.requires_grad or self._twin or name in self._fixed)]
        return [*buffers, *filled]

    def _select(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = named_tensors(self._rule)
        return {name: tensors[name] for name in names if name in tensors}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
