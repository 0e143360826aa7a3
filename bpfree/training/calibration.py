"""Calibration: values that a rule chooses on the validation split, once, after training, with its weights fixed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bpfree import devices
from bpfree.errors import BpfreeError
from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.tasks.task import Examples
from bpfree.training import environment
from bpfree.training.guards import Values

__all__ = ["NOT_CALIBRATED", "Calibration", "calibrate", "calibrates"]

NOT_CALIBRATED = "not calibrated: no validation split"
"""The tag ``calibration`` of a run whose rule had nothing to choose on."""


@dataclass
class Calibration:
    """A rule's calibrated values, and the step of their calibration; kept in checkpoints, so that a rule calibrates once.

    Attributes:
        step: of the run.
        seconds: that it took.
        values: what the rule returned.
        before, after: the buffers that it set, by name.
    """

    step: int
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)

    def put(self, rule: Rule) -> None:
        """Set the buffers to the calibrated values."""
        _set(rule, self.after)

    def undo(self, rule: Rule) -> None:
        """Set the buffers to the values that training left, for a run that is resumed."""
        _set(rule, self.before)

    def result(self) -> dict[str, float]:
        """Return the calibrated numbers for the run's result."""
        return {**{f"calibration/{name}": value for name, value in self.values.items()}, "calibration_seconds": self.seconds}

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as tensors and plain values."""
        return asdict(self)


def calibrates(rule: Rule) -> bool:
    """Tell whether the rule has anything to calibrate; one that has only for some tasks says so by an attribute ``calibrates``."""
    return type(rule).calibrate is not Rule.calibrate and bool(getattr(rule, "calibrates", True))


def calibrate(
    rule: Rule,
    data: Examples,
    generator: torch.Generator,
    *,
    step: int,
    precision: str = "fp32",
    method: Literal["calibrate", "finish_calibration"] = "calibrate",
) -> Calibration:
    """Let a rule calibrate itself: in eval mode, without gradients.

    Args:
        rule: with the weights that will be tested.
        data: the validation split, raw.
        generator: on the rule's device.
        step: of the run.
        precision: as predictions have it.
        method: of the rule, that is called.

    Raises:
        BpfreeError: a parameter has changed, a buffer was made, or what was returned is no mapping of numbers.
    """
    name, device = type(rule).__name__, generator.device
    parameters = Values(dict(rule.named_parameters()))
    before = {name: buffer.detach().clone() for name, buffer in rule.named_buffers()}
    began = time.perf_counter()
    with torch.no_grad(), evaluating(rule), devices.preserved_global_state(device), environment.autocast(device, precision):
        returned = getattr(rule, method)(data, generator)
    seconds = time.perf_counter() - began
    changed = parameters.changed(dict(rule.named_parameters()))
    if changed:
        raise BpfreeError(
            f"{method} changed the parameter {changed[0]}, but weights are fixed after training",
            where=f"{name}.{method}",
            fix="choose values of buffers (register_buffer), such as a threshold or a temperature",
        )
    buffers = dict(rule.named_buffers())
    if buffers.keys() != before.keys() or any(_other_kind(buffers[name], before[name]) for name in before):
        raise BpfreeError(
            f"{method} may fill buffers, but neither make nor reshape them",
            where=f"{name}.{method}",
            fix="register them in __init__, with their defaults",
        )
    chosen = Values(before).changed(buffers)
    after = {name: buffers[name].detach().clone() for name in chosen}
    return Calibration(step, seconds, _numbers(returned, f"{name}.{method}"), {name: before[name] for name in chosen}, after)


def _numbers(returned: Any, where: str) -> dict[str, float]:
    if isinstance(returned, Mapping) and all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in returned.items()):
        return {name: float(value) for name, value in returned.items()}
    raise BpfreeError(
        f"{where.rpartition('.')[2]} must return plain numbers by name", where=where, fix='return {"threshold": float(threshold)}, say'
    )


def _other_kind(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or one.dtype != other.dtype


@torch.no_grad()
def _set(rule: Rule, values: Mapping[str, Tensor]) -> None:
    buffers = dict(rule.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)
