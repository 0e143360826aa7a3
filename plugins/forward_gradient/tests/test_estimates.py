"""Random directions: the mean of many estimates, their variance, and what the options do to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_forward_gradient.noise import Noise
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalForwardGradient
from estimates import batch_for, credit_of, gradient_of, mlp, random_heads, task_loss
from torch import Tensor, nn

from bpfree import Batch, Network, Rule, TaskSpec, new_step


def flat(gradients: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


def hidden(rule: Rule) -> list[str]:
    """Parameters whose gradient is estimated rather than exact."""
    return [name for name, _ in rule.named_parameters() if name.startswith("network.blocks.b")]


def assert_unbiased(rule: Any, batch: Batch, draws: int = 900) -> None:
    """Oracle: autograd. The mean of n estimates is within 4 standard errors of it, in the norm over all parameters."""
    random_heads(rule)
    names, step = hidden(rule), new_step(rule, seed=1)
    expected = flat(gradient_of(rule, task_loss(rule, batch)), names)
    found = []
    for step.index in range(draws):
        found.append(flat(credit_of(rule, batch, step), names))
    estimates = torch.stack(found)
    error = (estimates.mean(0) - expected).square().sum()
    standard = (estimates.var(0).sum() / draws).sqrt()
    assert error.sqrt() < 4 * standard, "biased"
    assert standard < 0.35 * expected.norm(), "too few draws to tell an estimate of zero from the gradient"


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("local", [True, False])
def test_unbiased(spec: TaskSpec, noise: Any, perturb: Any, local: bool) -> None:
    options: dict[str, Any] = {"noise": noise, "perturb": perturb, "tangents": 2 if perturb == "activities" else 8}
    network = mlp(spec, 8, 6)
    if local:
        assert_unbiased(LocalForwardGradient(network, spec, LocalForwardGradientConfig(group_size=2, **options)).double(), batch_for(spec))
    else:
        assert_unbiased(ForwardGradient(network, spec, ForwardGradientConfig(**options)).double(), batch_for(spec))


@pytest.mark.parametrize(
    "options",
    [
        {"independent": False, "tangents": 4},
        {"perturb": "weights", "independent": True, "tangents": 4},
        {"antithetic": True, "tangents": 2},
        {"mask": False},
    ],
)
def test_unbiased_whatever_the_noise(spec: TaskSpec, options: dict[str, Any]) -> None:
    assert_unbiased(ForwardGradient(mlp(spec, 8, 6), spec, ForwardGradientConfig(**{"tangents": 2, **options})).double(), batch_for(spec))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("local", [True, False])
def test_unbiased_with_a_normalisation(spec: TaskSpec, norm: Any, local: bool) -> None:
    """Layer norm with its closed-form cotangent; batch norm in train mode with one derivative per batch where it mixes examples."""
    network = mlp(spec, 6, 6, norm=norm)
    if local:
        rule: Any = LocalForwardGradient(network, spec, LocalForwardGradientConfig(group_size=2))
    else:
        rule = ForwardGradient(network, spec, ForwardGradientConfig(tangents=4))
    assert_unbiased(rule.double(), batch_for(spec))


def test_a_derivative_per_example_behind_batch_norm_would_be_biased(spec: TaskSpec) -> None:
    """Why there is one per batch: with one per example (the reach overruled) the mean of many estimates misses the gradient."""
    rule = ForwardGradient(mlp(spec, 6, 6, norm=nn.BatchNorm1d), spec, ForwardGradientConfig(tangents=4)).double()
    reach = rule.scopes[0].reach
    assert [site.examples for site in reach] == [False, True]
    reach[0] = reach[1]
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(rule, batch_for(spec))


def test_ignoring_the_normalisation_changes_the_estimate(spec: TaskSpec) -> None:
    rules = [
        ForwardGradient(mlp(spec, 6, norm=nn.LayerNorm), spec, ForwardGradientConfig(norm_gradient=choice)).double()
        for choice in ("exact", "ignored")
    ]
    exact, ignored = (credit_of(rule, batch_for(spec), new_step(rule)) for rule in rules)
    assert not torch.allclose(exact["network.blocks.b1.0.weight"], ignored["network.blocks.b1.0.weight"])
    # oracle: without the cotangent, the signal behind the norm is taken for the one in front of it, so its mean over channels stays
    assert ignored["network.blocks.b1.0.bias"].sum().abs() > 1e-6 > exact["network.blocks.b1.0.bias"].sum().abs()


# --- variance, Ren et al. 2022, section 3 (papers: 2210.03310) --------------------------------------------------------

INPUTS, OUTPUTS, BATCH = 5, 4, 3


def linear_rule(config: ForwardGradientConfig) -> ForwardGradient:
    """One linear layer without bias, and a readout that turns its output into a squared error."""
    torch.manual_seed(0)
    spec = TaskSpec(name="linear", input_shape=(INPUTS,), outputs=3, targets="real")
    network = Network(
        {"b1": nn.Linear(INPUTS, OUTPUTS, bias=False), "readout": nn.Linear(OUTPUTS, 3)}, input_shape=(INPUTS,), readout="readout"
    )
    return ForwardGradient(network, spec, config).double()


def draw_batch(count: int) -> Batch:
    return Batch(torch.randn(count, INPUTS, dtype=torch.float64) + 0.5, torch.randn(count, 3, dtype=torch.float64) + 1)


def per_example_moments(rule: ForwardGradient) -> tuple[float, float]:
    """V and S: variance of an example's gradient and square of the mean gradient, both means over the weights."""
    batch = draw_batch(100_000)
    x, weight = batch.inputs, rule.network.blocks["b1"].weight.detach()
    readout = rule.network.blocks["readout"]
    error = x @ weight.t() @ readout.weight.t().detach() + readout.bias.detach() - batch.targets
    gradients = torch.einsum("nq,np->nqp", error @ readout.weight.detach(), x)
    return float(gradients.var(0).mean()), float(gradients.mean(0).square().mean())


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"perturb": "weights", "independent": True}, lambda p, q, n: ((p * q + 2) / n, (p * q + 1) / n)),
        ({"perturb": "weights", "independent": False}, lambda p, q, n: ((p * q + 2) / n, p * q + 1)),
        ({"perturb": "activities", "independent": True}, lambda p, q, n: ((q + 2) / n, (q + 1) / n)),
        ({"perturb": "activities", "independent": False}, lambda p, q, n: ((q + 2) / n, q + 1)),
    ],
)
def test_variance_of_one_linear_layer(options: dict[str, Any], factors: Any) -> None:
    """Oracle: the closed forms a V + b S, within 4 standard errors over batches of draws. Gaussian, K = 1, unmasked.

    The gradient's own 1/N is in V and S: they are of one example's gradient.
    """
    rule = linear_rule(ForwardGradientConfig(noise="gaussian", tangents=1, mask=False, **options))
    variance, square = per_example_moments(rule)
    first, second = factors(INPUTS, OUTPUTS, BATCH)
    expected = first * variance + second * square
    step, parts, draws = new_step(rule, seed=2), 25, 160
    found = []
    for part in range(parts):
        estimates = []
        for index in range(draws):
            step.index = part * draws + index
            estimates.append(credit_of(rule, draw_batch(BATCH), step)["network.blocks.b1.weight"])
        found.append(torch.stack(estimates))
    mean = torch.cat(found).mean(0)  # over all draws, so that the parts' squares around it are nearly independent
    squares = torch.stack([(part - mean).square().mean() for part in found]) * (parts * draws) / (parts * draws - 1)
    standard = squares.std() / parts**0.5
    assert abs(float(squares.mean()) - expected) < 4 * float(standard)
    assert standard < 0.1 * expected


def test_rademacher_noise_has_less_variance() -> None:
    """u_j^2 = 1 leaves out each unit's own excess kurtosis: (q - 1) instead of (q + 1) in the S term, q instead of q + 2 in the V term."""
    spread = {}
    for noise in ("gaussian", "rademacher"):
        rule = linear_rule(ForwardGradientConfig(noise=noise, tangents=1, mask=False))  # type: ignore[arg-type]
        batch, step, estimates = draw_batch(BATCH), new_step(rule, seed=3), []
        for step.index in range(3000):
            estimates.append(credit_of(rule, batch, step)["network.blocks.b1.weight"])
        spread[noise] = float(torch.stack(estimates).var(0).sum())
    ratio = (OUTPUTS - 1) / (OUTPUTS + 1)  # of the noise's part, at a fixed batch
    assert spread["rademacher"] / spread["gaussian"] == pytest.approx(ratio, rel=0.12)


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_moments_of_the_noise(kind: Any) -> None:
    noise = Noise(ForwardGradientConfig(noise=kind, tangents=3), torch.Generator().manual_seed(0))
    values = noise.draw((1000, 33), 0, torch.device("cpu"), torch.float32)
    assert values.shape == (3, 1000, 33)
    assert abs(float(values.mean())) < 0.02
    assert float(values.var()) == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(values.flatten(1))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.03
    if kind == "rademacher":
        assert set(values.unique().tolist()) == {-1.0, 1.0}
    else:
        assert float((values**4).mean()) == pytest.approx(3, rel=0.05)


def test_antithetic_directions_cancel_what_the_other_sites_add() -> None:
    """Oracle: with signs (+,+) and (+,-), the mean of (a u1 + b u2) u1 and (a u1 - b u2) u1 is a u1 u1: the first site alone."""
    config = ForwardGradientConfig(antithetic=True, tangents=2)
    noise = Noise(config, torch.Generator().manual_seed(0))
    first, second = (noise.draw((6,), place, torch.device("cpu"), torch.float64) for place in (0, 1))
    a, b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    derivatives = first @ a + second @ b
    assert torch.allclose((derivatives[:, None] * first).mean(0), (first[0] @ a) * first[0])
    assert torch.allclose((derivatives[:, None] * second).mean(0), (second[0] @ b) * second[0])


@pytest.mark.parametrize("options", [{}, {"perturb": "weights"}])
def test_a_place_alone_takes_no_pairs(spec: TaskSpec, options: dict[str, Any]) -> None:
    """A local loss with one layer in front: pairs would be one direction twice. Oracle: the same noise without the option."""
    found = []
    for antithetic in (True, False):
        config = LocalForwardGradientConfig(tangents=2, antithetic=antithetic, **options)
        rule = LocalForwardGradient(mlp(spec, 8, 6), spec, config).double()
        random_heads(rule)
        found.append(credit_of(rule, batch_for(spec), new_step(rule)))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_pairs_tell_apart_the_layers_that_learn(spec: TaskSpec) -> None:
    """Oracle: what one layer adds to the other's estimate cancels, so that directions of the other do not matter. The layer between
    them learns nothing, and has no noise."""
    rule = ForwardGradient(mlp(spec, 8, 7, 6), spec, ForwardGradientConfig(tangents=2, antithetic=True)).double()
    random_heads(rule)
    rule.network.blocks["b2"].requires_grad_(False)
    batch, step = batch_for(spec), new_step(rule)
    alone, together = {}, credit_of(rule, batch, step)
    for name, other in (("b1", "b3"), ("b3", "b1")):
        rule.network.blocks[other].requires_grad_(False)
        rule.config.antithetic, rule.config.tangents = False, 1
        alone[name] = credit_of(rule, batch, step)
        rule.network.blocks[other].requires_grad_(True)
    for name, gradients in alone.items():
        weight = f"network.blocks.{name}.0.weight"
        assert torch.allclose(together[weight], gradients[weight])


def test_an_estimate_is_even_in_its_direction(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that v and -v, the usual antithetic pair, would give the same estimate twice."""
    rule = ForwardGradient(mlp(spec, 8, 6), spec, ForwardGradientConfig(tangents=1)).double()
    plus = credit_of(rule, batch_for(spec), new_step(rule))
    draw = Noise.draw
    monkeypatch.setattr(Noise, "draw", lambda self, *args: -draw(self, *args))
    minus = credit_of(rule, batch_for(spec), new_step(rule))
    assert all(torch.equal(plus[name], minus[name]) for name in plus)


def test_more_directions_reduce_the_variance(spec: TaskSpec) -> None:
    """Oracle: K independent directions have 1/K of one direction's variance."""
    spread = []
    for tangents in (1, 4):
        rule = ForwardGradient(mlp(spec, 8, 6), spec, ForwardGradientConfig(tangents=tangents)).double()
        batch, step, estimates = batch_for(spec), new_step(rule, seed=4), []
        for step.index in range(800):
            estimates.append(flat(credit_of(rule, batch, step), hidden(rule)))
        spread.append(float(torch.stack(estimates).var(0).sum()))
    assert spread[1] / spread[0] == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_same_step_draws_the_same_noise(spec: TaskSpec, noise: Any) -> None:
    """Whatever else has drawn numbers: a resumed run has the same bits."""
    rule = LocalForwardGradient(mlp(spec, 8, 6), spec, LocalForwardGradientConfig(noise=noise)).double()
    random_heads(rule)
    step, batch = new_step(rule), batch_for(spec)
    first, again = credit_of(rule, batch, step), credit_of(rule, batch, step)
    step.index += 1
    other = credit_of(rule, batch, step)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.blocks.b1.0.weight"], other["network.blocks.b1.0.weight"])
