"""Sequential QR and penalties. Oracles: ``numpy.linalg.lstsq``, ridge regression by normal equations, solving again without each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bpfree_sampled.least_squares import QRSums
from torch import Tensor

from bpfree import BpfreeError


def problem(rows: int = 50, features: int = 6, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return made + 3, torch.randn(rows, outputs, generator=generator, dtype=torch.float64) - 1


def summed(rows: Tensor, targets: Tensor, *, constant: bool, size: int = 17) -> QRSums:
    sums = QRSums(rows.shape[1], targets.shape[1], constant=constant, dtype=rows.dtype)
    for part in torch.arange(len(rows)).split(size):
        sums.add(rows[part], targets[part])
    return sums


def ridge(rows: Tensor, targets: Tensor, penalty: float, *, constant: bool) -> tuple[Tensor, Tensor]:
    mean, target_mean = (each.mean(0) if constant else torch.zeros_like(each[0]) for each in (rows, targets))
    x, y = rows - mean, targets - target_mean
    system = x.T @ x + len(rows) * penalty * torch.eye(rows.shape[1], dtype=rows.dtype)
    weight = torch.linalg.solve(system, x.T @ y).T
    return weight, target_mean - weight @ mean


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 1e-3, 1.0])
def test_solutions_are_those_of_ridge_regression(penalty: float, constant: bool) -> None:
    rows, targets = problem()
    for found, expected in zip(
        summed(rows, targets, constant=constant).decompose().solve(penalty, 1e-13),
        ridge(rows, targets, penalty, constant=constant),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_parts_make_no_difference() -> None:
    """Also parts of single rows, of fewer than there are columns, and all at once."""
    rows, targets = problem()
    expected = summed(rows, targets, constant=True, size=50).decompose().solve(0.0, 1e-13)
    for size in (1, 4, 30):
        for found, other in zip(summed(rows, targets, constant=True, size=size).decompose().solve(0.0, 1e-13), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


def test_the_smallest_solution_is_that_of_numpy() -> None:
    """More unknowns than rows, with the same cut of singular values."""
    rows, targets = problem(rows=5, features=9)
    found, _ = summed(rows, targets, constant=False).decompose().solve(0.0, 1e-10)
    expected = np.linalg.lstsq(rows.numpy(), targets.numpy(), rcond=1e-10)[0].T
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-11)


def test_more_digits_than_normal_equations() -> None:
    """A condition number of 1e9: its square is beyond double precision, in which normal equations have hardly a digit."""
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(200, 10, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))
    rows = (left * torch.logspace(0, -9, 10, dtype=torch.float64)) @ right
    truth = torch.ones(10, 1, dtype=torch.float64)
    targets = rows @ truth
    found, _ = summed(rows, targets, constant=False).decompose().solve(0.0, 1e-13)
    assert float((found.T - truth).norm()) < 1e-5
    normal = torch.linalg.lstsq(rows.T @ rows, rows.T @ targets).solution
    assert float((normal - truth).norm()) > 0.01


@pytest.mark.parametrize("constant", [True, False])
def test_errors_of_rows_left_out_are_those_of_solving_again(constant: bool) -> None:
    """The penalty of all n rows, n times ``penalty``, stays when one is left out."""
    rows, targets = problem(rows=20)
    penalties = [1e-2, 0.5]
    made = summed(rows, targets, constant=constant).decompose()
    found = made.left_out(iter([(rows[:7], targets[:7]), (rows[7:], targets[7:])]), penalties, 1e-13)
    for penalty, value in zip(penalties, found, strict=True):
        errors = []
        for place in range(20):
            others = [each for each in range(20) if each != place]
            weight, bias = ridge(rows[others], targets[others], penalty * 20 / 19, constant=constant)
            errors.append((rows[place] @ weight.T + bias - targets[place]).square().sum())
        assert value == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)


def test_generalised_cross_validation_is_its_definition() -> None:
    """n |y - A y|^2 / (n - tr A)^2, with the hat matrix A written out."""
    rows, targets = problem(rows=20)
    n, penalty = 20, 0.1
    x = rows - rows.mean(0)
    hat = x @ torch.linalg.solve(x.T @ x + n * penalty * torch.eye(6, dtype=torch.float64), x.T) + 1 / n
    residual = targets - hat @ targets
    expected = n * float(residual.square().sum()) / (n - float(hat.trace())) ** 2
    (found,) = summed(rows, targets, constant=True).decompose().generalised([penalty], 1e-13)
    assert found == pytest.approx(expected, rel=1e-9)


def test_features_that_are_zero_have_no_weight() -> None:
    rows, targets = problem()
    rows[:, 2] = 0
    made = summed(rows, targets, constant=False).decompose()
    weight, _ = made.solve(0.0, 1e-13)
    assert float(weight[:, 2].abs().max()) < 1e-12
    assert all(np.isfinite(made.left_out(iter([(rows, targets)]), [0.0, 1.0], 1e-13)))


def test_without_rows_there_is_no_solution() -> None:
    with pytest.raises(BpfreeError, match="without rows"):
        QRSums(3, 1, constant=True, dtype=torch.float64).decompose()


def test_numbers_that_are_not_finite_are_refused() -> None:
    rows, targets = problem()
    rows[3, 1] = float("nan")
    with pytest.raises(BpfreeError, match="not finite"):
        summed(rows, targets, constant=True).decompose()
