"""Sampled units. Oracles: their values at the base points, a grid, exact probabilities, and ``swimnetworks`` where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bpfree_sampled import layers, pairs
from torch import Tensor

from bpfree import BpfreeError

Double = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int = 30, size: int = 3) -> Tensor:
    return torch.randn(count, size, generator=generator(9), dtype=Double)


@pytest.mark.parametrize(("activation", "values"), [("tanh", (-0.5, 0.5)), ("relu", (0.0, 1.0))])
def test_units_have_their_values_at_the_base_points(activation: str, values: tuple[float, float]) -> None:
    x = points()
    made = pairs.pair_layer(x, 50, activation, generator())
    for places, value in zip((made.one, made.other), values, strict=True):
        found = layers.image(x[places], made.weight, made.bias, activation).diagonal()
        torch.testing.assert_close(found, torch.full((50,), value, dtype=Double), rtol=0, atol=1e-12)


def test_pairs_that_differ_are_drawn() -> None:
    """On a grid whose rows share x_1, with f = x_1, only pairs that differ in it; uniformly, others too."""
    x = torch.cartesian_prod(torch.arange(5), torch.arange(5)).to(Double)
    made = pairs.pair_layer(x, 20, "tanh", generator(), x[:, :1])
    assert bool((x[made.one, 0] != x[made.other, 0]).all())
    uniform = pairs.pair_layer(x, 20, "tanh", generator())
    assert bool((x[uniform.one, 0] == x[uniform.other, 0]).any())


def test_steep_pairs_are_likelier() -> None:
    """Three points on a line at 0, 1 and 3 with values 0, 1 and 1: weights of the pairs are 1, 1/3 and 0. One unit, drawn 600 times."""
    x, f = torch.tensor([[0.0], [1.0], [3.0]], dtype=Double), torch.tensor([[0.0], [1.0], [1.0]], dtype=Double)
    drawn, draws = generator(), 600
    counts = torch.zeros(3)
    expected = torch.zeros(3)
    for _ in range(draws):
        state = drawn.get_state()
        one = torch.randint(3, (3,), generator=drawn)  # the candidates, as they are drawn
        other = (one + torch.randint(1, 3, (3,), generator=drawn)) % 3
        drawn.set_state(state)
        weights = (f[other] - f[one]).abs()[:, 0] / (x[other] - x[one]).abs()[:, 0]
        kind = one + other - 1  # 0: first and second, 1: first and third, 2: second and third
        if float(weights.sum()) > 0:
            expected.index_add_(0, kind, (weights / weights.sum()).float())
        made = pairs.pair_layer(x, 1, "tanh", drawn, f)
        if float(weights.sum()) > 0:
            counts[int(made.one + made.other - 1)] += 1
    assert counts[2] == 0 == expected[2]
    assert float((counts - expected).abs().max()) < 4 * draws**0.5 / 2


def test_classes_that_differ_count_alike() -> None:
    """Targets 0, 1, 2 as one-hot rows differ by 1; with ``classes`` larger differences make no pair likelier."""
    x, f = points(), torch.randint(3, (30, 1), generator=generator()).to(Double)
    one = pairs.pair_layer(x, 20, "tanh", generator(3), f, classes=True)
    rows = torch.nn.functional.one_hot(f[:, 0].long(), 3).to(Double)
    other = pairs.pair_layer(x, 20, "tanh", generator(3), rows, classes=True)
    assert torch.equal(one.weight, other.weight)
    assert bool((f[one.one] != f[one.other]).all())


def test_different_pairs_are_drawn_as_long_as_there_are_some() -> None:
    x = points(40)
    made = pairs.pair_layer(x, 40, "tanh", generator())
    assert len(set(made.weight[:, 0].tolist())) > 35  # 40 candidates, of which few are the same pair
    few = pairs.pair_layer(x[:3], 50, "tanh", generator())
    assert few.weight.shape == (50, 3)
    assert bool(few.weight.isfinite().all())


def test_points_that_coincide_make_no_unit() -> None:
    x = points(10).repeat(2, 1)
    made = pairs.pair_layer(x, 60, "relu", generator())
    assert bool((made.one % 10 != made.other % 10).all())
    with pytest.raises(BpfreeError, match="the same"):
        pairs.pair_layer(torch.ones(4, 2), 3, "tanh", generator())
    with pytest.raises(BpfreeError, match="1 points"):
        pairs.pair_layer(points(1), 3, "tanh", generator())


def test_a_constant_function_has_uniform_pairs() -> None:
    x = points()
    flat = pairs.pair_layer(x, 20, "tanh", generator(), torch.ones(30, 1, dtype=Double))
    assert torch.equal(flat.weight, pairs.pair_layer(x, 20, "tanh", generator()).weight)


def test_controls_change_one_thing() -> None:
    x = points()
    made = pairs.pair_layer(x, 20, "tanh", generator())
    turned = pairs.rotated(made, x, "tanh", generator())
    torch.testing.assert_close(turned.weight.norm(dim=1), made.weight.norm(dim=1))
    found = layers.image(x[turned.one], turned.weight, turned.bias, "tanh").diagonal()
    torch.testing.assert_close(found, torch.full((20,), -0.5, dtype=Double))
    assert not torch.allclose(turned.weight, made.weight)
    other = pairs.permuted(made, generator())
    assert torch.equal(other.weight, made.weight)
    assert torch.equal(other.bias.sort().values, made.bias.sort().values)
    assert not torch.equal(other.bias, made.bias)


def test_normal_units_have_their_scale() -> None:
    made = pairs.normal_layer(points(), 4000, generator(), scale=0.2, low=-1.0, high=3.0)
    assert float(made.weight.std()) == pytest.approx(0.2, rel=0.05)
    assert -0.2 <= float(made.bias.min()) < -0.19
    assert 0.59 < float(made.bias.max()) <= 0.6


# --- beside the published package -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_units_are_those_of_swimnetworks(activation: str) -> None:
    """An independent implementation (pip install bpfree-sampled[oracle]), on the pairs that it draws."""
    swim = pytest.importorskip("swimnetworks", reason="swimnetworks, the independent implementation, is not installed")
    x = points()
    f = x[:, :1] ** 2
    theirs = swim.Dense(layer_width=25, activation=activation, parameter_sampler=activation, random_seed=3)
    theirs.fit(x.numpy(), f.numpy())
    one, other = (torch.from_numpy(np.asarray(places)) for places in (theirs.idx_from, theirs.idx_to))
    made = pairs._units(x[one], x[other], activation, one, other)
    torch.testing.assert_close(made.weight, torch.from_numpy(theirs.weights.T), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.bias, torch.from_numpy(theirs.biases[0]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layers.image(x, made.weight, made.bias, activation), torch.from_numpy(theirs.transform(x.numpy())))


def test_pairs_are_as_steep_as_those_of_swimnetworks() -> None:
    """The mean slope of f = x_1^2 along drawn pairs, of 400 units each."""
    swim = pytest.importorskip("swimnetworks", reason="swimnetworks, the independent implementation, is not installed")
    x = points(2000)
    f = x[:, :1] ** 2
    theirs = swim.Dense(layer_width=400, activation="tanh", parameter_sampler="tanh", random_seed=1)
    theirs.fit(x.numpy(), f.numpy())
    made = pairs.pair_layer(x, 400, "tanh", generator(), f)

    def slopes(one: Tensor, other: Tensor) -> Tensor:
        return (f[other] - f[one]).abs()[:, 0] / (x[other] - x[one]).norm(dim=1)

    ours = slopes(made.one, made.other)
    other = slopes(torch.from_numpy(theirs.idx_from), torch.from_numpy(theirs.idx_to))
    error = math.sqrt(float(ours.var() + other.var()) / 400)
    assert float(ours.mean() - other.mean()) == pytest.approx(0, abs=4 * error)
    uniform = pairs.pair_layer(x, 400, "tanh", generator())
    assert float(slopes(uniform.one, uniform.other).mean()) < float(ours.mean()) - 4 * error
