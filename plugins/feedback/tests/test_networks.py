"""BioTorch's networks. Oracles: its published modules' numbers of parameters and shapes, and a layer by layer composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bpfree_feedback.networks import LeNetConfig, ResNetConfig, lenet, resnet

from bpfree import TaskSpec, UsageError

COLOUR, GREY, MNIST = TaskSpec("c", (3, 32, 32), 10), TaskSpec("g", (1, 32, 32), 10), TaskSpec("m", (1, 28, 28), 10)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_as_many_parameters_as_biotorchs() -> None:
    assert count(lenet(GREY)) == count(lenet(MNIST)) == 61_706
    assert count(lenet(COLOUR, LeNetConfig("colour"))) == 128_842
    assert count(resnet(COLOUR)) == 269_722
    assert count(resnet(COLOUR, ResNetConfig(depth=56))) == 853_018


@pytest.mark.parametrize("variant", ["grey", "colour"])
def test_pooling_before_the_relu_is_the_same(variant: str) -> None:
    """Oracle: convolution, ReLU, pooling, in this order; values and gradients."""
    spec = GREY if variant == "grey" else COLOUR
    network = lenet(spec, LeNetConfig(variant))  # type: ignore[arg-type]
    x = torch.randn(5, *spec.input_shape)
    layers = [block[0] for block in list(network.blocks.values())[:3]]
    h = F.max_pool2d(F.relu(layers[0](x)), 2)
    h = F.relu(layers[2](F.max_pool2d(F.relu(layers[1](h)), 2)))
    h = h if variant == "grey" else F.avg_pool2d(h, h.shape[3])
    expected = network.blocks["readout"](F.relu(network.blocks["b4"][1](h.flatten(1))))
    y = torch.arange(5)
    ours, theirs = (
        torch.autograd.grad(F.cross_entropy(scores, y), list(network.parameters()), retain_graph=True) for scores in (network(x), expected)
    )
    torch.testing.assert_close(network(x), expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_initial_weights_are_xaviers() -> None:
    weight = lenet(GREY).blocks["b3"][0].weight.detach()
    assert float(weight.abs().max()) == pytest.approx((6 / (25 * (16 + 120))) ** 0.5, rel=0.01)
    assert not lenet(GREY).blocks["b3"][0].bias.any()


def test_shortcuts_take_every_second_position_and_add_empty_channels() -> None:
    unit = resnet(COLOUR, ResNetConfig(depth=8, width=4)).blocks["s2u1"].eval()
    torch.nn.init.zeros_(unit.norm2.weight)  # nothing beside the shortcut
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(unit(x)[:, 2:6], x[:, :, ::2, ::2])
    assert not unit(x)[:, :2].any()
    assert not unit(x)[:, 6:].any()


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match=r"6 n \+ 2 layers, not 22[\s\S]*network.depth=20 or 26"):
        resnet(COLOUR, ResNetConfig(depth=22))
    for build in (lenet, resnet):
        with pytest.raises(UsageError, match="needs images"):
            build(TaskSpec("v", (7,), 3))
