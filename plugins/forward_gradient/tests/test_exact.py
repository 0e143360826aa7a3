"""Directions that span the space give the gradient itself: K orthonormal directions times sqrt(K).

Oracle of every test here: autograd, in float64, to 1e-9 relative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_forward_gradient.mixer import LocalMixerConfig, TokenLinear, local_mixer
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalForwardGradient
from estimates import EXAMPLES, batch_for, exact_credit, gradient_of, mlp, random_heads, task_loss
from torch import nn

import bpfree
from bpfree import Network, TaskSpec, new_step


def assert_equals_autograd(rule: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    random_heads(rule)
    expected = gradient_of(rule, task_loss(rule, batch))
    found = exact_credit(rule, batch, monkeypatch, **options)
    assert found.keys() == {name for name, p in rule.named_parameters() if p.requires_grad}
    for name, value in found.items():
        reference = expected.get(name, torch.zeros_like(value))
        assert torch.allclose(value, reference, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_activities_of_one_loss(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, mask: bool, together: bool) -> None:
    rule = ForwardGradient(mlp(spec, 8, 6), spec, ForwardGradientConfig(tangents=14, mask=mask, together=together)).double()
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)


@pytest.mark.parametrize("independent", [True, False])
def test_weights_of_one_loss(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, independent: bool) -> None:
    config = ForwardGradientConfig(perturb="weights", tangents=12 * 4 + 4 + 4 * 3 + 3, independent=independent)
    assert_equals_autograd(ForwardGradient(mlp(spec, 4, 3), spec, config).double(), batch_for(spec), monkeypatch)


@pytest.mark.parametrize("losses", ["blockwise", "groupwise", "all"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_local_losses(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, losses: Any, perturb: Any) -> None:
    config = LocalForwardGradientConfig(perturb=perturb, losses=losses, group_size=2, tangents=8 if perturb == "activities" else 104)
    assert_equals_autograd(LocalForwardGradient(mlp(spec, 8, 6), spec, config).double(), batch_for(spec), monkeypatch)


@pytest.mark.parametrize("scales", ["weights", "activities"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda width: nn.GroupNorm(2, width)])
def test_through_a_normalisation(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, norm: Any, scales: Any) -> None:
    """The normalisation's cotangent in closed form; its scale and shift by noise of their own, or from the same estimate."""
    rule = ForwardGradient(mlp(spec, 8, 6, norm=norm), spec, ForwardGradientConfig(tangents=8 + 6 + 2 * 14, norm_scales=scales)).double()
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)


@pytest.mark.parametrize("scales", ["weights", "activities"])
def test_one_derivative_per_batch_with_batch_norm(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, scales: Any) -> None:
    """Batch norm in train mode mixes the examples, so their noises span one space together."""
    numbers = EXAMPLES * (6 + 4) + 2 * (6 + 4)
    rule = ForwardGradient(mlp(spec, 6, 4, norm=nn.BatchNorm1d), spec, ForwardGradientConfig(tangents=numbers, norm_scales=scales)).double()
    assert_equals_autograd(rule, batch_for(spec), monkeypatch, joint=True)


def test_frozen_statistics_give_each_example_a_derivative(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the network in eval mode, once the running statistics have followed the batch."""
    config = ForwardGradientConfig(tangents=10, batch_norm="frozen-statistics")
    rule = ForwardGradient(mlp(spec, 6, 4, norm=nn.BatchNorm1d), spec, config).double()
    batch = batch_for(spec)
    found = exact_credit(rule, batch, monkeypatch)
    rule.eval()
    for name, value in gradient_of(rule, spec.loss(rule.network(batch.inputs), batch)).items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("local", [True, False])
def test_the_objective_has_frozen_statistics_too(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    """What alignment compares the credit with."""
    network = mlp(spec, 6, 4, norm=nn.BatchNorm1d)
    if local:
        rule: Any = LocalForwardGradient(network, spec, LocalForwardGradientConfig(tangents=6, batch_norm="frozen-statistics"))
    else:
        rule = ForwardGradient(network, spec, ForwardGradientConfig(tangents=10, batch_norm="frozen-statistics"))
    rule.double()
    random_heads(rule)
    batch, before = batch_for(spec), [buffer.clone() for buffer in network.buffers()]
    expected = gradient_of(rule, rule.objective(batch, new_step(rule)))
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
    for name, value in exact_credit(rule, batch, monkeypatch).items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize(("losses", "norm"), [("blockwise", "both"), ("patchwise", "both"), ("groupwise", "after"), ("all", "both")])
def test_the_local_mixer(images: TaskSpec, monkeypatch: pytest.MonkeyPatch, losses: Any, norm: Any) -> None:
    """Token mixing, dense and group-linear layers, normalisations, residual sums; every patch and group with its own loss."""
    network = local_mixer(images, LocalMixerConfig(blocks=2, patches=2, channels=8, groups=2, norm=norm)).double()
    rule = LocalForwardGradient(network, images, LocalForwardGradientConfig(losses=losses, tangents=3 * 4 * 8)).double()
    assert_equals_autograd(rule, batch_for(images), monkeypatch)


@pytest.mark.parametrize("losses", ["blockwise", "patchwise", "all"])
def test_noise_in_front_of_token_mixing(monkeypatch: pytest.MonkeyPatch, losses: Any) -> None:
    """A patch's noise then reaches the losses of all patches, and only behind the mixing its own alone, if there are losses of patches."""
    torch.manual_seed(0)
    spec = TaskSpec(name="toy", input_shape=(3, 4), outputs=5)
    block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), TokenLinear(3), nn.ReLU())
    network = Network({"b1": block, "readout": nn.Sequential(nn.Flatten(), nn.Linear(18, 5))}, input_shape=(3, 4), readout="readout")
    config = LocalForwardGradientConfig(losses=losses, group_size=3, tangents=2 * 3 * 6)
    rule = LocalForwardGradient(network, spec, config).double()
    assert [reach.tokens for reach in rule.scopes[0].reach] == [False, losses != "blockwise"]
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)


def test_weights_of_the_local_mixer(images: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    network = local_mixer(images, LocalMixerConfig(blocks=2, patches=2, channels=6, groups=3)).double()
    rule = LocalForwardGradient(network, images, LocalForwardGradientConfig(perturb="weights", tangents=320)).double()
    assert_equals_autograd(rule, batch_for(images), monkeypatch)


class Residual(nn.Module):
    """Two convolutions and a shortcut that meet before a ReLU, one normalisation, and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.norm, self.shortcut, self.relu = nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 1, stride=2), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.second(self.relu(self.first(x)) * self.scale))
        y += self.shortcut(x)
        return torch.max_pool2d(self.relu(y), 2)


@pytest.mark.parametrize("local", [True, False])
def test_convolutions_with_a_shortcut(images: TaskSpec, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    """Also parameters that belong to no linear map (norm and scale), which take noise of their own."""
    torch.manual_seed(0)
    network = Network(
        {"b1": Residual(), "readout": nn.Sequential(nn.Flatten(), nn.Linear(16, 5))}, input_shape=(3, 8, 8), readout="readout"
    )
    numbers = 2 * 4 * 4 * 4 + 12
    if local:
        rule: Any = LocalForwardGradient(network, images, LocalForwardGradientConfig(group_size=2, pool=2, tangents=numbers))
    else:
        rule = ForwardGradient(network, images, ForwardGradientConfig(tangents=numbers))
    assert_equals_autograd(rule.double(), batch_for(images), monkeypatch)


class Columns(nn.Module):
    """A linear map of an image's columns: what its weight's rows make is no channel."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.map(x))


@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize(
    ("layer", "input_shape", "units", "weights"),
    [
        (Columns, (3, 2, 8), 3 * 2 * 6, 54),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU()), (3, 4), 8 * 4, 32),
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU()), (2, 3, 2, 3), 4 * 2 * 1 * 2, 68),
    ],
)
def test_outputs_of_other_layouts(
    layer: Any, input_shape: tuple[int, ...], units: int, weights: int, perturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the weight that are no channels, and feature maps of three dimensions; with groupwise losses and with one loss."""
    torch.manual_seed(0)
    spec = TaskSpec(name="toy", input_shape=input_shape, outputs=5)
    readout = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    readout(layer()(torch.zeros(1, *input_shape)))
    network = Network({"b1": layer(), "readout": readout}, input_shape=input_shape, readout="readout")
    options: dict[str, Any] = {"perturb": perturb, "tangents": units if perturb == "activities" else weights}
    for rule in (
        LocalForwardGradient(network, spec, LocalForwardGradientConfig(losses="groupwise", group_size=1, **options)),
        ForwardGradient(network, spec, ForwardGradientConfig(**options)),
    ):
        assert_equals_autograd(rule.double(), batch_for(spec), monkeypatch)


class RandomDepth(nn.Module):
    """A layer that is left out in some steps."""

    left_out = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.left_out else torch.relu(self.linear(x))


def test_a_layer_that_is_left_out(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no gradient then, as with autograd, and the other layers have theirs."""
    torch.manual_seed(0)
    blocks = {"b1": RandomDepth(), "b2": nn.Sequential(nn.Linear(12, 6), nn.ReLU()), "readout": nn.Linear(6, 5)}
    rule = ForwardGradient(Network(blocks, input_shape=(12,), readout="readout"), spec, ForwardGradientConfig(tangents=18)).double()
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)
    monkeypatch.setattr(RandomDepth, "left_out", True)
    batch = batch_for(spec)
    expected, found = gradient_of(rule, task_loss(rule, batch)), exact_credit(rule, batch, monkeypatch)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(value, expected[name], rtol=1e-9, atol=1e-11) for name, value in found.items())


def test_a_readout_with_hidden_layers(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last linear map takes the exact gradient, what is in front of it is perturbed."""
    torch.manual_seed(0)
    readout = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    network = Network({"b1": nn.Sequential(nn.Linear(12, 8), nn.ReLU()), "readout": readout}, input_shape=(12,), readout="readout")
    for rule in (
        ForwardGradient(network, spec, ForwardGradientConfig(tangents=14)),
        LocalForwardGradient(network, spec, LocalForwardGradientConfig(tangents=8)),
    ):
        assert_equals_autograd(rule.double(), batch_for(spec), monkeypatch)


def test_soft_and_real_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("soft", "real"):
        spec = TaskSpec(name="toy", input_shape=(12,), outputs=5, targets=kind)  # type: ignore[arg-type]
        targets = torch.rand(EXAMPLES, 5, dtype=torch.float64)
        batch = bpfree.Batch(batch_for(spec).inputs, targets / targets.sum(1, keepdim=True) if kind == "soft" else targets)
        rule = LocalForwardGradient(mlp(spec, 8, 6), spec, LocalForwardGradientConfig(tangents=8)).double()
        assert_equals_autograd(rule, batch, monkeypatch)


def test_frozen_parameters_take_no_part(spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the second block learns, its noise alone spans the space, and the others have no gradient."""
    rule = ForwardGradient(mlp(spec, 8, 6), spec, ForwardGradientConfig(tangents=6)).double()
    rule.network.blocks["b1"].requires_grad_(False)
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)
    rule.freeze_features()
    rule.config.tangents = 1
    assert_equals_autograd(rule, batch_for(spec), monkeypatch)
