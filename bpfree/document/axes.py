"""Axes of charts: positions of values, and ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Axis", "fitting", "linear", "logarithmic", "short"]

MOST_TICKS = 6
MOST_DECIMALS = 5
WIDE = 50
"""Ratio of the greatest to the least positive value above which an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks.

    Attributes:
        low, high: its ends.
        label: what it shows, with the unit.
        ticks: values with their texts.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    label: str
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value, from 0 at the low end to 1 at the high end; values beyond are clipped to the ends."""
        if self.log:
            place = (math.log(max(value, 1e-300)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))


def fitting(values: Iterable[float], label: str) -> Axis:
    """Make an axis for values of an unknown range, such as losses: logarithmic if they are positive and far apart."""
    found = list(values)
    return logarithmic(found, label) if found and min(found) > 0 and max(found) > WIDE * min(found) else linear(found, label)


def linear(
    values: Iterable[float], label: str, *, bounds: tuple[float, float] = (-math.inf, math.inf), pad: float = 0.04, whole: bool = False
) -> Axis:
    """Make an axis over finite values, with padding.

    Args:
        values: all values that are drawn.
        label: of the axis.
        bounds: which the padding does not cross, such as 0 and 100 per cent.
        pad: padding as a share of the range.
        whole: only whole numbers have ticks, such as epochs.
    """
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    single = high - low <= 1e-12 * max(abs(low), abs(high))  # puts a single value in the middle
    room = (abs(high) * 0.05 or 1.0) if single else pad * (high - low)
    low, high = max(low - room, min(bounds[0], low)), min(high + room, max(bounds[1], high))
    return Axis(low, high, label, _linear_ticks(low, high, least=1.0 if whole else 0.0))


def _linear_ticks(low: float, high: float, most: int = MOST_TICKS, least: float = 0.0) -> list[tuple[float, str]]:
    """Choose ticks at multiples of 1, 2 or 5 times a power of ten, with steps of ``least`` or more."""
    least = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    extreme = max(abs(low), abs(high)) >= 10_000 or decimals > MOST_DECIMALS
    return [(number * step, short(number * step) if extreme else f"{number * step:z.{decimals}f}") for number in numbers]


def logarithmic(values: Iterable[float], label: str) -> Axis:
    """Make a logarithmic axis over the positive ones of some values."""
    found = [value for value in values if math.isfinite(value) and value > 0] or [0.1, 10.0]
    room = (max(found) / min(found)) ** 0.05 if max(found) > 1.001 * min(found) else 1.5
    low, high = min(found) / room, max(found) * room
    return Axis(low, high, label, _log_ticks(low, high), log=True)


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Choose ticks at powers of ten; over a short range also at 2 and 5 times them, over a very short one at round steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / MOST_TICKS))
    decades = [10.0**power for power in range(first, last + 1) if power % every == 0]
    finer = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    for choice in (decades, finer):
        within = [value for value in choice if low <= value <= high]
        if len(within) >= 3 or (choice is finer and len(within) == 2):
            return [(value, short(value)) for value in within]
    return _linear_ticks(low, high, 4)


def short(value: float) -> str:
    """Format a round number in a few characters: 0.001, 1e-5, 20k, 5M."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= size < 1000 * limit:
            return f"{value / limit:.4g}{suffix}"
    if size < 1e-3 or size >= 1e15:
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"
