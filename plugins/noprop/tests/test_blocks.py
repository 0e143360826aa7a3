"""The networks of denoising blocks."""

from __future__ import annotations

import pytest
import torch
from bpfree_noprop.blocks import NETWORKS

from bpfree.errors import UsageError
from bpfree.tasks.task import TaskSpec

MNIST = TaskSpec("mnist", input_shape=(1, 28, 28), outputs=10)
CIFAR10 = TaskSpec("cifar10", input_shape=(3, 32, 32), outputs=10)
CIFAR100 = TaskSpec("cifar100", input_shape=(3, 32, 32), outputs=100)


@pytest.mark.parametrize(("spec", "millions"), [(MNIST, 2.00), (CIFAR10, 2.49), (CIFAR100, 2.53)])
def test_parameters_of_the_papers_block(spec: TaskSpec, millions: float) -> None:
    # Oracle: counted from the paper's Figure 6 with padding 1 (papers.md 1.1).
    builder = NETWORKS["noprop-paper"]
    network = builder.build(spec, builder.Config(blocks=1))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("side", [4, 5, 6, 7, 28])
def test_convolutional_blocks_fit_any_size(side: int) -> None:
    # Oracle: a forward pass over each remainder of the two halvings.
    spec, builder = TaskSpec("images", input_shape=(1, side, side), outputs=3), NETWORKS["noprop-cnn"]
    block = builder.build(spec, builder.Config(blocks=1, channels=4, width=8)).blocks["t1"]
    assert block(torch.randn(2, 1, side, side), torch.randn(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("label", ["vector", "input"])
def test_blocks_take_inputs_and_states(name: str, label: str, device: torch.device) -> None:
    # Oracle: the documented shapes; features computed once give the same logits as the whole block.
    spec, builder = TaskSpec("images", input_shape=(3, 16, 16), outputs=5), NETWORKS[name]
    d = spec.input_size if label == "input" else 7
    network = builder.build(spec, builder.Config(blocks=2, state_dim=d, label=label)).to(device).eval()
    assert network.names == ["t1", "t2"]
    assert network.readout is None
    x, z = torch.randn(4, 3, 16, 16, device=device), torch.randn(4, d, device=device)
    for block in network.blocks.values():
        assert block(x, z).shape == (4, 5)
        assert torch.equal(block(x, z), block.judge(block.features(x), z))
        assert not torch.equal(block(x, z), block(x, -z))


def test_mlp_blocks_take_vectors(device: torch.device) -> None:
    spec, builder = TaskSpec("vectors", input_shape=(9,), outputs=3), NETWORKS["noprop-mlp"]
    network = builder.build(spec, builder.Config(blocks=1, depth=0)).to(device)
    assert network.blocks["t1"](torch.randn(4, 9, device=device), torch.randn(4, 3, device=device)).shape == (4, 3)


def test_a_convolutional_network_needs_images() -> None:
    builder = NETWORKS["noprop-cnn"]
    with pytest.raises(UsageError, match="needs images"):
        builder.build(TaskSpec("vectors", input_shape=(9,), outputs=3), builder.Config())


def test_a_label_shaped_like_an_input_has_its_size() -> None:
    builder = NETWORKS["noprop-mlp"]
    with pytest.raises(UsageError, match=r"state_dim=9"):
        builder.build(TaskSpec("vectors", input_shape=(9,), outputs=3), builder.Config(label="input"))
