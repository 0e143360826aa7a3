"""The networks. Oracles: the published layers and numbers of parameters, and torch's own modules in the published order."""

from __future__ import annotations

import pytest
import torch
from bpfree_local_losses.networks import LocalVGGConfig, local_vgg
from torch import nn

from bpfree import TaskSpec, UsageError

CIFAR = TaskSpec("cifar", (3, 32, 32), 10)
MNIST = TaskSpec("mnist", (1, 28, 28), 10)


@pytest.mark.parametrize(("spec", "layers", "millions"), [(MNIST, "vgg8b", 7.3), (CIFAR, "vgg8b", 8.9), (CIFAR, "vgg11b", 11.6)], ids=str)
def test_parameters_are_as_many_as_published(spec: TaskSpec, layers: str, millions: float) -> None:
    """The README of the authors' code has 7.3, 8.9 and 11.6 million."""
    with torch.device("meta"):
        network = local_vgg(spec, LocalVGGConfig(layers=layers))  # type: ignore[arg-type]
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_blocks_are_in_the_published_order() -> None:
    network = local_vgg(CIFAR, LocalVGGConfig(width=0.25, block_dropout=0.1, dense=[256]))
    kinds = [[type(part) for part in block] for block in list(network.blocks.values())[:-1]]
    plain = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Dropout2d]
    pooled = [*plain, nn.MaxPool2d]
    assert kinds[:6] == [plain, pooled, plain, pooled, pooled, pooled]
    assert kinds[6] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]
    assert [network.shapes[name][0] for name in network.hidden] == [32, 64, 64, 128, 128, 128, 256]
    assert network.blocks["b1"][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_may_be_multiples_and_begin_with_a_stem() -> None:
    network = local_vgg(MNIST, LocalVGGConfig(width=0.25, multiple=10, stem=128, dense=[], slope=0, norm="none"))
    assert [network.shapes[name][0] for name in network.hidden] == [40, 40, 70, 70, 130, 130, 130]
    assert [len(network.blocks[name]) for name in network.hidden] == [2, 2, 3, 2, 3, 3, 3]
    assert isinstance(network.blocks["b1"][1], nn.ReLU)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_norms_of_examples_do_not_mix_them(norm: str) -> None:
    """Oracle: each example by itself, in training."""
    torch.manual_seed(0)
    network = local_vgg(CIFAR, LocalVGGConfig(width=0.05, norm=norm, dense=[16])).double().train()  # type: ignore[arg-type]
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="needs images"):
        local_vgg(TaskSpec("flat", (12,), 3))
    with pytest.raises(UsageError, match="too small for 4 poolings"):
        local_vgg(TaskSpec("tiny", (1, 8, 8), 3))
