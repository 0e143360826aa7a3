"""Slow, literal references: one example, one position, one unit at a time; and the steps that are compared with them."""

from __future__ import annotations

import math

import torch
from bpfree_hebbian.base import Hebbian
from torch import Tensor

from bpfree import Batch, Budget, Stepper


def patches(x: Tensor, kernel: int) -> list[Tensor]:
    """All (C, k, k) windows of a padded image (C, H, W), row by row."""
    _, height, width = x.shape
    return [x[:, i : i + kernel, j : j + kernel] for i in range(height - kernel + 1) for j in range(width - kernel + 1)]


def softhebb_increment(inputs: list[Tensor], weight: Tensor, t_invert: float, anti: bool) -> Tensor:
    """Sum over inputs of y_k x - y_k u_k w_k; losers' y negative (papers: Moraitis et al. 2022, Journe et al. 2023)."""
    total = torch.zeros_like(weight)
    for x in inputs:
        u = [float((row * x).sum()) for row in weight]
        top = max(u)
        e = [math.exp(t_invert * (value - top)) for value in u]
        y = [value / sum(e) for value in e]
        for k, row in enumerate(weight):
            sign = -1.0 if anti and u[k] != top else 1.0
            total[k] += sign * y[k] * x - sign * y[k] * u[k] * row
    return total


def hard_increment(inputs: list[Tensor], weight: Tensor) -> Tensor:
    """Only the winner learns: x - u w."""
    total = torch.zeros_like(weight)
    for x in inputs:
        u = torch.stack([(row * x).sum() for row in weight])
        k = int(u.argmax())
        total[k] += x - u[k] * weight[k]
    return total


def softhebb_step(increment: Tensor, weight: Tensor, lr: float, power: float) -> Tensor:
    """The weight after the update: divided by the largest entry, each row with its own rate."""
    largest = float(increment.abs().max())
    rows = []
    for row, change in zip(weight, increment, strict=True):
        rate = lr * (abs(float(row.norm()) - 1) ** power + 1e-10)
        rows.append(row + rate * change / largest)
    return torch.stack(rows)


def updates(rule: Hebbian, batches: list[Batch], parts: int = 1) -> list[float]:
    """Steps of the first phase, over all of its progress; returns their rates in the first block."""
    stepper, rates = Stepper(rule), []
    with stepper.phase(next(iter(rule.phases(Budget(epochs=4))))):
        for index, batch in enumerate(batches):
            stepper.at(index / len(batches))
            rates.append(stepper.step.lr("b1"))
            stepper.take(batch, parts)
    return rates
