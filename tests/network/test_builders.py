"""The core's networks. Oracles: layers written down from papers, torch's own modules, moments of distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bpfree import TaskSpec, UsageError
from bpfree.config import parse_words, resolve
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg
from bpfree.network.builders import ACTIVATIONS
from bpfree.network.initialisation import INITIALISATIONS, initialise

IMAGES = TaskSpec("images", (3, 32, 32), 10)
FLAT = TaskSpec("flat", (300,), 10)


def test_vgg8b_has_the_layers_of_its_paper() -> None:
    """Nokland and Eidnes 2019, appendix: 128C3-256C3-MP-256C3-512C3-MP-512C3-MP-512C3-MP-1024FC, batch norm before the nonlinearity."""
    network = vgg(IMAGES, VGGConfig(preset="vgg8b"))
    kinds = [
        f"{layer.in_channels}>{layer.out_channels}k{layer.kernel_size[0]}p{layer.padding[0]}"
        if isinstance(layer, nn.Conv2d)
        else f"{layer.in_features}>{layer.out_features}"
        if isinstance(layer, nn.Linear)
        else type(layer).__name__
        for block in network.blocks.values()
        for layer in (block if isinstance(block, nn.Sequential) else [block])
    ]
    norm = ["BatchNorm2d", "ReLU"]
    assert kinds == [
        *("3>128k3p1", *norm),
        *("128>256k3p1", *norm, "MaxPool2d"),
        *("256>256k3p1", *norm),
        *("256>512k3p1", *norm, "MaxPool2d"),
        *("512>512k3p1", *norm, "MaxPool2d"),
        *("512>512k3p1", *norm, "MaxPool2d"),
        *("Flatten", "2048>1024", "BatchNorm1d", "ReLU"),
        "1024>10",
    ]
    assert network.names == [*(f"b{index}" for index in range(1, 8)), "readout"]
    small = vgg(TaskSpec("grey", (1, 28, 28), 10), VGGConfig(preset="vgg8b"))
    assert small.shapes["b6"] == (512, 1, 1)


def test_a_preset_takes_no_layers_beside_it() -> None:
    words = ["rule=dfa", "task=cifar10", "network=vgg", "network.preset=vgg8b"]
    assert resolve(parse_words(words), spec=IMAGES).options["network"].preset == "vgg8b"
    with pytest.raises(UsageError, match=r"network.channels=\[8\] does nothing with network.preset=vgg8b"):
        resolve(parse_words([*words, "network.channels=[8]"]), spec=IMAGES)
    with pytest.raises(UsageError, match="images of 8x8 are too small for 4 poolings") as caught:
        vgg(TaskSpec("tiny", (1, 8, 8), 10), VGGConfig(preset="vgg8b"))
    assert caught.value.where == "network.preset"


def test_dense_layers_follow_convolutions() -> None:
    network = vgg(IMAGES, VGGConfig(channels=[4], pool_after=[1], dense=[20, 30], norm="layer"))
    assert [tuple(shape) for shape in network.shapes.values()] == [(4, 16, 16), (20,), (30,), (10,)]


def test_dropout_in_each_block_and_before_the_readout() -> None:
    network = vgg(IMAGES, VGGConfig(channels=[4, 4], pool_after=[1], dense=[8], block_dropout=0.2, dropout=0.5))
    found = {
        name: [(type(part), part.p) for part in block.modules() if "Dropout" in type(part).__name__]
        for name, block in network.blocks.items()
    }
    assert found == {"b1": [(nn.Dropout2d, 0.2)], "b2": [(nn.Dropout2d, 0.2)], "b3": [(nn.Dropout, 0.2)], "readout": [(nn.Dropout, 0.5)]}
    assert isinstance(network.blocks["b1"][-1], nn.Dropout2d)  # after the pooling


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
        ("hard-sigmoid", lambda x: ((x + 3) / 6).clamp(0, 1)),
        ("softplus", lambda x: torch.log1p(torch.exp(x))),
    ],
)
def test_activations(name: str, by_hand: object) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name]()(x), by_hand(x))  # type: ignore[operator]
    network = mlp(FLAT, MLPConfig(depth=1, activation=name))  # type: ignore[arg-type]
    assert type(network.blocks["b1"][1]) is type(ACTIVATIONS[name]())


DEVIATIONS = {
    "xavier-normal": math.sqrt(2 / (300 + 400)),
    "xavier-uniform": math.sqrt(2 / (300 + 400)),
    "he-normal": math.sqrt(2 / 300),
    "he-uniform": math.sqrt(2 / 300),
    "lecun-normal": math.sqrt(1 / 300),
    "orthogonal": math.sqrt(1 / 400),
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_initial_weights_have_the_deviation_of_their_papers(name: str) -> None:
    """Of 400 units on 300 inputs; 120,000 draws give it to half a percent. Uniform ones are bounded, orthogonal ones orthonormal."""
    torch.manual_seed(0)
    network = mlp(FLAT, MLPConfig(depth=1, width=400, init=name, init_gain=1.5))  # type: ignore[arg-type]
    layer = network.blocks["b1"][0]
    weight = layer.weight.detach() / 1.5
    assert float(weight.std()) == pytest.approx(DEVIATIONS[name], rel=0.01)
    assert not layer.bias.any()
    if name.endswith("uniform"):
        assert float(weight.abs().max()) == pytest.approx(math.sqrt(3) * DEVIATIONS[name], rel=0.01)
    elif name.endswith("normal"):
        assert float(weight.abs().max()) > 3.5 * DEVIATIONS[name]
    else:
        torch.testing.assert_close(weight.T @ weight, torch.eye(300), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    assert float(vgg(IMAGES, VGGConfig(init=name)).blocks["readout"][-1].weight.detach().std()) > 0  # type: ignore[arg-type]


def test_torchs_own_initialisation_stays() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 128)
    torch.manual_seed(0)
    assert torch.equal(mlp(FLAT, MLPConfig(depth=1)).blocks["b1"][0].weight, layer.weight)
    before = layer.bias.clone()
    initialise(layer, "torch")
    assert torch.equal(layer.bias, before)
    with pytest.raises(UsageError, match=r"network.init_gain=2.0 does nothing with network.init=torch"):
        resolve(parse_words(["network=mlp", "network.init_gain=2.0"]))
