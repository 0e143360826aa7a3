"""Networks per class: literal loops, soft labels, independence, the decision, the subspace method as closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_hebbian.classes import ClassesConfig, HebbianNorm, HebbianNormConfig, classes
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, TaskSpec, UsageError, load_task, new_step
from bpfree.network import mlp
from bpfree.training.accumulation import accumulate
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.trainer import Trainer

FLAT = TaskSpec("flat", (12,), 3)
SOFT = TaskSpec("flat", (12,), 3, targets="soft")


def rule_of(spec: TaskSpec = FLAT, update: Any = "hebb", **network: Any) -> HebbianNorm:
    torch.manual_seed(0)
    return HebbianNorm(classes(spec, ClassesConfig(**{"units": 4, **network})), spec, HebbianNormConfig(update=update)).double()


def batch_of(count: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(3, (count,), generator=generator))


def literal_step(batch: Batch, weights: Tensor, lr: float, update: str, activation: Any) -> Tensor:
    """Example by example, only the network of its class; with unit inputs, and rows of length one where Hebb's rule is plain."""
    total = torch.zeros_like(weights)
    for x, label in zip(F.normalize(batch.inputs, dim=1), batch.targets, strict=True):
        w = weights[label]
        y = activation(w @ x)
        total[label] += torch.outer(y, x) - (torch.outer(y, y) @ w if update == "oja" else 0)
    moved = weights + lr * len(weights) * total / len(batch)
    return moved / moved.norm(dim=2, keepdim=True) if update == "hebb" else moved


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("update", ["hebb", "oja"])
def test_a_step_is_the_literal_one(update: str, activation: Any) -> None:
    rule, batch = rule_of(update=update, activation=activation), batch_of()
    before = rule.weights()
    rule.learn(batch, new_step(rule, OptimizerConfig("sgd", lr=0.3)))
    expected = literal_step(batch, before, 0.3, update, torch.relu if activation == "relu" else lambda u: u)
    torch.testing.assert_close(rule.weights(), expected, rtol=1e-12, atol=1e-14)


def test_soft_labels_count_by_their_weights() -> None:
    """Oracles: one-hot rows are classes; the increment is linear in the rows."""
    rule, batch = rule_of(SOFT, "oja"), batch_of()
    hard = F.one_hot(batch.targets, 3).double()
    other = hard.roll(1, dims=1)

    def gradient(rows: Tensor) -> Tensor:
        rule.zero_grad()
        rule.credit(Batch(batch.inputs, rows), new_step(rule))
        return torch.stack([network.linear.weight.grad for network in rule.networks])

    plain = rule_of(FLAT, "oja")
    plain.credit(batch, new_step(plain))
    torch.testing.assert_close(gradient(hard), torch.stack([network.linear.weight.grad for network in plain.networks]))
    torch.testing.assert_close(gradient(0.7 * hard + 0.3 * other), 0.7 * gradient(hard) + 0.3 * gradient(other))


@pytest.mark.parametrize("update", ["hebb", "oja"])
def test_accumulated_batches_are_the_large_batch(update: str) -> None:
    """Oracle: the identity; 64 examples at once, and four times 16."""
    results = []
    for parts in (1, 4):
        rule = rule_of(update=update)
        accumulate(rule, batch_of(64), new_step(rule), parts)
        results.append(rule.weights())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("update", ["hebb", "oja"])
def test_a_network_learns_from_its_class_alone(update: str) -> None:
    """Oracle: without the other classes' examples, and with other networks for them, its increment is the same."""
    batch = batch_of()
    own = batch.targets == 1

    def gradient(x: Tensor, targets: Tensor, scale: float, others: float) -> Tensor:
        rule = rule_of(update=update)
        with torch.no_grad():
            rule.networks[0].linear.weight.mul_(others)
        rule.credit(Batch(x, targets), new_step(rule))
        assert rule.networks[1].linear.weight.grad is not None
        return rule.networks[1].linear.weight.grad * scale

    share = float(own.double().mean())
    torch.testing.assert_close(
        gradient(batch.inputs, batch.targets, 1, 1), gradient(batch.inputs[own], batch.targets[own], share, 5.0), rtol=1e-12, atol=1e-14
    )


def test_the_longest_output_names_the_class() -> None:
    """Oracle: the norms of the blocks' outputs, each executed by itself."""
    rule, batch = rule_of(activation="relu"), batch_of()
    scores = rule.predict(batch.inputs, torch.Generator())
    expected = torch.stack([block(batch.inputs).norm(dim=1) for block in rule.network.blocks.values()], dim=1)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(rule.read(rule.features(batch.inputs), torch.Generator()), expected)


def test_ojas_update_becomes_the_subspace_method() -> None:
    """Oracle: CLAFIC in closed form: projections on the leading eigenvectors of each class's second moments."""
    torch.manual_seed(0)
    spec = TaskSpec("flat", (6,), 2)
    bases = [torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(2)]
    spread = torch.tensor([2, 1.5, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)
    x = torch.cat([torch.randn(2000, 6, dtype=torch.float64) * spread @ basis.T for basis in bases])
    targets = torch.arange(2).repeat_interleave(2000)
    rule = HebbianNorm(classes(spec, ClassesConfig(units=2)), spec, HebbianNormConfig(update="oja")).double()
    step = new_step(rule, OptimizerConfig("sgd", lr=0.5))
    for _ in range(200):
        rule.learn(Batch(x, targets), step)
    for network, part in zip(rule.networks, F.normalize(x, dim=1).split(2000), strict=True):
        leading = torch.linalg.eigh(part.T @ part).eigenvectors[:, -2:]
        assert float(torch.linalg.svdvals(network.linear.weight.detach() @ leading).min()) >= 0.9999


def test_the_untrained_twin_stays_as_it_was_made() -> None:
    torch.manual_seed(0)
    task = load_task("digits")
    rule = HebbianNorm(classes(task.spec), task.spec)
    before = rule.weights()
    run = Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=2), twin=True)).fit()
    assert torch.equal(rule.weights(), before)
    assert 0 < run.result["test/accuracy"] < 0.5


def test_digits_with_the_defaults() -> None:
    """Oracle: below the recorded accuracies (90 % and 92 % of the test split, seed 0)."""
    task = load_task("digits")
    for update, accuracy in (("hebb", 0.86), ("oja", 0.9)):
        torch.manual_seed(0)
        rule = HebbianNorm(classes(task.spec), task.spec, HebbianNormConfig(update=update))  # type: ignore[arg-type]
        run = Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=10))).fit()
        assert run.result["test/accuracy"] >= accuracy


def test_pictures_are_the_weights_of_each_class() -> None:
    spec = TaskSpec("image", (1, 4, 3), 2)
    rule = HebbianNorm(classes(spec, ClassesConfig(units=5)), spec)
    pictures = rule.pictures(3)
    assert {name: tuple(images.shape) for name, images in pictures.items()} == {"c0": (3, 1, 4, 3), "c1": (3, 1, 4, 3)}
    torch.testing.assert_close(pictures["c1"].flatten(1), rule.weights()[1, :3])
    assert rule_of().pictures() == {}


def test_other_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="a network for each of the 3 classes"):
        HebbianNorm(mlp(FLAT), FLAT)
    with pytest.raises(UsageError, match="for each of the 3 classes"):
        HebbianNorm(Network({"c0": nn.Linear(12, 4)}, input_shape=(12,), chain=False), FLAT)
