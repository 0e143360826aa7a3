"""Time-conditioned blocks, and following their velocity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop.timed import NETWORKS, TimedBlock, TimeEmbedding
from bpfree_noprop.timed_rules import follow
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.tasks.task import TaskSpec

MNIST = TaskSpec("m", (1, 28, 28), 10)
CIFAR10, CIFAR100 = TaskSpec("c", (3, 32, 32), 10), TaskSpec("c", (3, 32, 32), 100)


def block_of(name: str, spec: TaskSpec, **options: object) -> TimedBlock:
    builder = NETWORKS[name]
    block = builder.build(spec, builder.Config(**options)).blocks["block"]
    assert isinstance(block, TimedBlock)
    return block


def test_the_papers_block() -> None:
    # Oracle: Figure 6: layers in order, and the number of parameters that they imply.
    block = block_of("noprop-timed-paper", MNIST)
    convolutions = [(m.in_channels, m.out_channels) for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [(1, 32), (32, 64), (64, 128)]
    linear = [(m.in_features, m.out_features) for m in block.modules() if isinstance(m, nn.Linear)]
    assert linear == [(128 * 7 * 7, 256), (10, 256), (64, 256), *[(256, 256)] * 3, (256, 128), (128, 10)]
    assert not [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    weights = sum(a * b + b for a, b in linear) - 2 * 256 + sum(9 * a * b + b for a, b in convolutions)  # three that are one of 768
    assert sum(p.numel() for p in block.parameters()) == weights
    assert sum(p.numel() for p in block_of("noprop-timed-paper", CIFAR100).parameters()) > weights


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("noprop-timed-mlp", TaskSpec("v", (7,), 3), {"width": 16}),
        ("noprop-timed-mlp", TaskSpec("d", (1, 8, 8), 10), {"label": "input", "state_dim": 64, "width": 8}),
        ("noprop-timed-cnn", MNIST, {"channels": 4, "width": 16}),
        ("noprop-timed-cnn", CIFAR10, {"channels": 4, "width": 16, "label": "input", "state_dim": 3072}),
        ("noprop-timed-paper", MNIST, {}),
    ],
)
def test_joining_in_parts_is_the_layer_on_everything(name: str, spec: TaskSpec, options: dict[str, object]) -> None:
    # Oracle: concatenation and one linear layer, as the paper draws it.
    torch.manual_seed(0)
    block = block_of(name, spec, **options).eval().double()
    x, t = torch.randn(5, *spec.input_shape, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    z = torch.randn(5, block.state_dim, dtype=torch.float64)
    paths = torch.cat([block.stem(x), block.label(z), block.time(t)], dim=1)
    weight = torch.cat([part.weight for part in block.join.values()], dim=1)
    torch.testing.assert_close(block(x, z, t), block.out(block.fuse(F.linear(paths, weight, block.join["stem"].bias))))
    # one time for all is that time for each; features do not depend on state or time
    same = block.judge(block.features(x), z, block.moments(t[:1]))
    torch.testing.assert_close(same, block(x, z, t[0].expand(5)))


@pytest.mark.parametrize("name", ["noprop-timed-mlp", "noprop-timed-cnn"])
@pytest.mark.parametrize("label", ["vector", "input"])
def test_states_of_a_batch_do_not_mix(name: str, label: str) -> None:
    # Oracle: in training, other states and times of the other examples leave an example's logits as they are.
    torch.manual_seed(0)
    sizes = {"width": 16, "label": label, "state_dim": 784 if label == "input" else 10}
    block = block_of(name, MNIST, **sizes).train().double()
    x, t = torch.randn(4, 1, 28, 28, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    z = torch.randn(4, block.state_dim, dtype=torch.float64)
    before = block(x, z, t)
    after = block(x, torch.cat([z[:1], 5 * z[1:]]), torch.cat([t[:1], 1 - t[1:]]))
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1:], before[1:])


def test_times_are_told_apart() -> None:
    # Oracle: sines and cosines written out; neighbouring steps of a thousand differ, and nothing repeats within [0, 1].
    embedding = TimeEmbedding(64).double()
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    rows = embedding(t)
    assert rows.shape == (1001, 64)
    frequencies = [10 ** (3 * k / 31) for k in range(32)]
    torch.testing.assert_close(
        rows[500, :32], torch.tensor([math.sin(0.5 * f) for f in frequencies], dtype=torch.float64), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(rows[:, :32].square() + rows[:, 32:].square(), torch.ones(1001, 32, dtype=torch.float64))
    distances = torch.cdist(rows, rows) + 10 * torch.eye(1001, dtype=torch.float64)
    assert float(distances.min()) > 0.3


def test_a_network_for_images_refuses_vectors() -> None:
    with pytest.raises(UsageError, match="noprop-timed-mlp"):
        block_of("noprop-timed-cnn", TaskSpec("v", (7,), 3))


def test_masks_are_drawn_from_the_given_generator() -> None:
    # Oracle: the same generator, the same output, whatever the global generator does in between.
    block = block_of("noprop-timed-paper", MNIST).train()
    x, z, t = torch.randn(3, 1, 28, 28), torch.randn(3, 10), torch.rand(3)

    def output(seed: int) -> Tensor:
        with block.masks(lambda name: torch.Generator().manual_seed(seed + len(name)), "block"):
            return block(x, z, t)

    first = output(0)
    torch.rand(5)
    assert torch.equal(first, output(0))
    assert not torch.equal(first, output(1))


@pytest.mark.parametrize(("stepper", "method"), [("euler", "euler"), ("heun", "heun2")])
def test_following_a_field(stepper: str, method: str) -> None:
    # Oracle: torchdiffeq's fixed-step solvers on an equation that depends on time and state.
    from torchdiffeq import odeint

    def field(z: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * t) * z - z.pow(2) * t

    z = torch.rand(6, 2, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    wanted = odeint(lambda t, y: field(y, t), z, ends, method=method, options={"step_size": 1 / 16})[-1]
    found = follow(z, lambda z, index: field(z, torch.tensor(index / 16)), steps=16, stepper=stepper)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted)
