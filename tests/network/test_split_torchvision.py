"""Splitting torchvision's models. Oracles: the models themselves, and their authors' names of blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpfree import TaskSpec, UsageError, build_network, split
from bpfree.network.torchvision_models import TorchvisionConfig, resize_channels, torchvision_network
from bpfree.plugins import installed_plugins

models = pytest.importorskip("torchvision.models")

RESNET = ["stem", *(f"layer{stage}_{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc"]
VGG = [*(f"features_{index}" for index in (0, 4, 8, 11, 15, 18, 22, 25)), *(f"classifier_{index}" for index in (0, 3, 6))]
MOBILENET = [*(f"features_{index}" for index in range(19)), "classifier"]
DENSENET = [
    "features_conv0",
    *(f"features_{kind}{index}" for index in (1, 2, 3) for kind in ("denseblock", "transition")),
    "features_denseblock4",
    "classifier",
]
NAMES = {"resnet18": RESNET, "vgg11_bn": VGG, "mobilenet_v2": MOBILENET, "densenet121": DENSENET}


def results(module: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Scores, gradients of all parameters, running statistics; dropout's masks from a fixed seed."""
    module.train(training)
    module.zero_grad()
    torch.manual_seed(0)
    scores = module(x)
    torch.nn.functional.cross_entropy(scores, torch.arange(len(x), device=x.device)).backward()
    return [scores.detach(), *(p.grad for p in module.parameters() if p.grad is not None), *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_their_blocks_in_value_and_gradient(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"width_per_group": 64} if name == "resnet18" else {}
    model = models.get_model(name, num_classes=10, **options)
    if name == "vgg11_bn":  # 500 MB of linear maps test nothing more
        model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 32)
        model.classifier[3], model.classifier[6] = nn.Linear(32, 32), nn.Linear(32, 10)
    model = model.to(device, torch.float64)
    network = split(copy.deepcopy(model), (3, 32, 32))
    assert network.names == NAMES[name]
    assert network.readout == NAMES[name][-1]
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, device=device)
    for training in (True, False):
        expected = results(model, x, training)
        assert len(expected) == 1 + len(list(model.parameters())) + len(list(model.buffers()))
        torch.testing.assert_close(results(network, x, training), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "count"), [("efficientnet_b0", 19), ("mobilenet_v3_small", 15), ("squeezenet1_0", 18), ("alexnet", 8)])
def test_further_models_give_the_same_scores_when_split(name: str, count: int) -> None:
    model = models.get_model(name, num_classes=10).eval()
    network = split(model, (3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    assert len(network.names) == count
    assert (network.readout is None) == (name == "squeezenet1_0")  # it ends with a convolution
    with torch.no_grad():
        assert torch.equal(network.eval()(x), model(x))


def test_small_images_get_the_small_stem() -> None:
    spec = TaskSpec("toy", (3, 32, 32), 7)
    network = torchvision_network(spec)
    assert network.names == RESNET
    assert tuple(network.shapes["stem"]) == (64, 32, 32)
    assert tuple(network.shapes["fc"]) == (7,)
    assert sum(p.numel() for p in network.parameters()) == 11_173_962 - 3 * 513  # kuangliu/pytorch-cifar's ResNet18, with 7 outputs
    assert tuple(torchvision_network(spec, TorchvisionConfig(small_stem=False)).shapes["stem"]) == (64, 8, 8)


def residual(inputs: int, outputs: int) -> int:
    """Return the parameters of a basic block: two 3x3 convolutions with batch norms, and a projection where channels change."""
    projection = inputs * outputs + 2 * outputs if inputs != outputs else 0
    return 9 * outputs * (inputs + outputs) + 4 * outputs + projection


def test_a_resnet_of_a_quarter_of_the_width() -> None:
    network = build_network("torchvision:resnet18", TaskSpec("toy", (3, 32, 32), 7), width=0.25)
    pairs = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    assert network.names == RESNET
    assert tuple(network.shapes["stem"]) == (16, 32, 32)
    counted = sum(p.numel() for p in network.parameters())
    assert counted == 27 * 16 + 2 * 16 + sum(residual(*pair) for pair in pairs) + 128 * 7 + 7  # He et al. 2016, with these channels


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {"zero_init_residual": True}), ("resnext50_32x4d", {"replace_stride_with_dilation": [False, True, True]})],
)
def test_a_width_of_one_makes_torchvisions_own_layers(name: str, options: dict[str, Any]) -> None:
    model = models.get_model(name, num_classes=5, **options)
    again = copy.deepcopy(model)
    resize_channels(again, 1.0)
    assert repr(again) == repr(model)  # layers, channels, strides, dilations, groups
    for (path, own), old in zip(again.named_parameters(), model.parameters(), strict=True):
        if own.dim() > 1:  # drawn again, from torchvision's distribution
            assert not torch.equal(own, old), path
            torch.testing.assert_close(own.std(), old.std(), rtol=0.15, atol=0)
        elif path != "fc.bias":
            assert torch.equal(own, old), path


def test_grey_images_are_seen_as_if_repeated_in_three_colours() -> None:
    torch.manual_seed(0)
    colour = torchvision_network(TaskSpec("toy", (3, 32, 32), 10), TorchvisionConfig("mobilenet_v2")).eval()
    torch.manual_seed(0)
    grey = torchvision_network(TaskSpec("toy", (1, 32, 32), 10), TorchvisionConfig("mobilenet_v2")).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_options_and_cuts_reach_the_model() -> None:
    config = TorchvisionConfig("squeezenet1_1", at=["features.3", "features.6", "classifier"], options={"dropout": 0.25})
    network = torchvision_network(TaskSpec("toy", (3, 64, 64), 10), config)
    assert network.names == ["features_0", "features_3", "features_6", "classifier"]
    assert [part.p for part in network.modules() if isinstance(part, nn.Dropout)] == [0.25]


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((3, 32, 32), TorchvisionConfig("resnet81"), "did you mean 'resnet18'"),
        ((3, 32, 32), TorchvisionConfig(options={"depth": 3}), "does not take these arguments"),
        ((3, 32, 32), TorchvisionConfig("vgg11", width=0.5), "only ResNets have a width"),
        ((3, 32, 32), TorchvisionConfig("resnext50_32x4d", width=0.03), "layers without channels"),
        ((3, 32, 32), TorchvisionConfig("densenet121", at=["features.denseblock1.denselayer2"]), "cannot cut before"),
        ((3, 8, 8), TorchvisionConfig("alexnet"), r"cannot take an input of shape \(3, 8, 8\)"),
        ((12,), TorchvisionConfig(), "images of 1 or 3 channels"),
        ((3, 64, 64), TorchvisionConfig("googlenet", options={"init_weights": False}), "depends on self.training"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(shape: tuple[int, ...], config: TorchvisionConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        torchvision_network(TaskSpec("toy", shape, 10), config)


def test_the_builder_is_registered() -> None:
    assert installed_plugins().get("networks", "torchvision").build is torchvision_network
