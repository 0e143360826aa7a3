"""The residual block and its study."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from bpfree_noprop.modern import NETWORKS, ResidualConfig
from torch import Tensor, nn

from bpfree.cli.main import main
from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.step import Batch
from bpfree.study.cells import plan
from bpfree.study.file import find_study
from bpfree.tasks.task import TaskSpec
from bpfree.training.updater import new_step

STUDY = "noprop/modern-cifar10"
SMALL = TaskSpec("images", input_shape=(3, 16, 16), outputs=5)
CIFAR10 = TaskSpec("cifar10", input_shape=(3, 32, 32), outputs=10)


def network(spec: TaskSpec = SMALL, **options: object) -> Network:
    torch.manual_seed(0)
    return NETWORKS["noprop-residual"].build(spec, ResidualConfig(**{"blocks": 2, "channels": 4, "width": 8, **options}))  # type: ignore[arg-type]


def block(made: Network, name: str = "t1") -> DenoisingBlock:
    found = made.blocks[name]
    assert isinstance(found, DenoisingBlock)
    return found


def some(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rule_on(spec: TaskSpec, device: torch.device, **options: object) -> NoPropDT:
    config = NoPropDTConfig(T=2, **options)  # type: ignore[arg-type]
    wanted = {key: value for key, value in NoPropDT.network_options(spec, config).items() if key != "name"}
    return NoPropDT(network(spec, **wanted), spec, config).to(device)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 17, 19), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("label", ["vector", "input"])
def test_shapes(shape: tuple[int, int, int], label: str, device: torch.device) -> None:
    # Oracle: the documented shapes, F = channels 2^stages; features computed once give the logits of the whole block.
    spec = TaskSpec("images", input_shape=shape, outputs=5)
    d = spec.input_size if label == "input" else 7
    made = network(spec, state_dim=d, label=label).to(device).eval()
    assert made.names == ["t1", "t2"]
    x, z = some(device, 4, *shape), some(device, 4, d)
    for name in made.names:
        features = block(made, name).features(x)
        assert features.shape == (4, 4 * 2**3)
        assert torch.equal(block(made, name)(x, z), block(made, name).judge(features, z))
        assert block(made, name)(x, z).shape == (4, 5)
        assert not torch.equal(block(made, name)(x, z), block(made, name)(x, -z))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_stage_halves_the_image_and_doubles_the_channels(stages: int) -> None:
    # Oracle: the shape before the pooling; 19 halves to 10, 5, 3.
    spec = TaskSpec("images", input_shape=(1, 17, 19), outputs=3)
    stem = block(network(spec, stages=stages)).stem
    assert isinstance(stem, nn.Sequential)
    side = {1: (9, 10), 2: (5, 5), 3: (3, 3)}[stages]
    assert stem[:-2](torch.randn(2, 1, 17, 19)).shape == (2, 4 * 2**stages, *side)


def test_parameters_are_those_of_the_layers() -> None:
    # Oracle: counted by hand: 3x3 convolutions without bias, two numbers per channel of a batch norm, linear layers with bias.
    c, width = 16, 64
    convolutions = 9 * (3 * c + sum(2 ** (2 * s + 1) * c * c + 2 * (2 ** (s + 1) * c) ** 2 for s in range(3)))
    norms = 2 * (c + sum(3 * 2 ** (s + 1) * c for s in range(3)))
    linear = (10 * width + width) + ((8 * c + width) * width + width) + 2 * 2 * width + (width * 10 + 10)
    made = network(CIFAR10, channels=c, width=width)
    assert sum(p.numel() for p in block(made).parameters()) == convolutions + norms + linear == 499_610


@pytest.mark.parametrize("training", [True, False])
def test_features_do_not_depend_on_the_noised_label(training: bool, device: torch.device) -> None:
    # Oracle: equality of bits, of what the joined layer takes and of the running statistics, for different z.
    x, seen, statistics = some(device, 6, 3, 16, 16), [], []
    for seed in (2, 3):
        part = block(network().to(device)).train(training)
        part.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, : 4 * 2**3].detach().clone()))
        part(x, some(device, 6, 5, seed=seed))
        statistics.append(copy.deepcopy(part.stem.state_dict()))
    assert torch.equal(*seen)
    assert all(torch.equal(statistics[0][key], statistics[1][key]) for key in statistics[0])
    if not training:
        assert torch.equal(seen[0], part.features(x))


@pytest.mark.parametrize("embedding", ["one-hot", "prototype"])
def test_blocks_are_independent(embedding: str, device: torch.device) -> None:
    # Oracle: the loss of one block has a gradient in each of its own parameters and in no other block's, and does not move with them.
    rule = rule_on(SMALL, device, embedding=embedding)
    batch = Batch(some(device, 10, 3, 16, 16), (torch.arange(10) % 5).to(device))
    rows = SMALL.target_rows(batch, torch.float32)

    def loss() -> Tensor:
        return rule.block_loss(2, batch.inputs, rows, new_step(rule, seed=3), share=0.5)

    before = loss()
    before.backward()
    assert all(p.grad is None for p in block(rule.network, "t1").parameters())
    assert all(p.grad is not None for p in block(rule.network, "t2").parameters())
    with torch.no_grad():
        for p in block(rule.network, "t1").parameters():
            p.mul_(3.0)
    assert torch.equal(loss(), before)


@pytest.mark.parametrize(("side", "stages"), [(15, 3), (7, 2), (31, 4)])
def test_images_that_are_too_small_are_refused(side: int, stages: int) -> None:
    spec = TaskSpec("images", input_shape=(1, 32, side), outputs=3)
    with pytest.raises(UsageError, match=rf"at least {2 ** (stages + 1)}x.*not 32x{side}"):
        network(spec, stages=stages)


def test_vectors_and_labels_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match="needs images"):
        network(TaskSpec("vectors", input_shape=(900,), outputs=3))
    with pytest.raises(UsageError, match=r"768 dimensions, not 5"):
        network(label="input")


def test_the_study() -> None:
    """Rows differ from the first in what their labels say, and stand beside the published accuracy of their kind."""
    study = find_study(STUDY)
    assert {row.label: row.published[""]["test/accuracy"].mean for row in study.rows} == {
        "one-hot": 79.25,
        "prototype": 80.54,
        "one-hot without augmentation": 79.25,
        "one-hot with the paper's block": 79.25,
        "back-propagation": 79.92,
    }
    flats = {cell.key.row: cell.recipe.flat() for cell in plan(study, load=False).cells}
    first = flats["one-hot"]
    protocol = {"task.validation": 0, "select": "last", "rule.T": 10, "network.blocks": 10, "rule.eta": 0.1, "rule.updates": "simultaneous"}
    assert {key: first[key] for key in protocol} == protocol
    ours = {"network.name", "network.channels", "network.stages", "network.depth", "network.width"}
    changed = {row: {key for key in first if key in flat and flat[key] != first[key]} for row, flat in flats.items()}
    assert changed == {
        "one-hot": set(),
        "prototype": {"rule.embedding", "network.state_dim", "network.label"},
        "one-hot without augmentation": {"task.augment"},
        "one-hot with the paper's block": {"network.name", "optimizer.lr", "optimizer.weight_decay"},
        "back-propagation": {"rule.name", "stream"},
    }
    assert all(ours <= set(flat) for row, flat in flats.items() if "paper" not in row)


def test_a_row_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Four steps on small images, with two blocks; the warm-up begins at a rate of zero, so one step would move nothing."""
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randint(256, (64, 1, 16, 16), dtype=torch.uint8), torch.arange(64) % 4
    np.savez("small.npz", x_train=images.numpy(), y_train=labels.numpy(), x_test=images.numpy(), y_test=labels.numpy())
    words = ["task=npz", "task.path=small.npz", "rule.T=2", "budget.epochs=1", "batch_size=16"]
    with pytest.raises(SystemExit) as ended:
        main(["study", "run", STUDY, "--rows", "one-hot", "--seeds", "1", "--quiet", *words, "tracking.enabled=false", "device=cpu"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    assert "79.25" in printed
