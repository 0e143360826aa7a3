"""A thousand classes and more, and classes that come in stages.

Oracles: counted bytes, chance, runs without kept features, weights that do not move.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_noprop import NoPropDT, NoPropDTConfig, noprop_network
from bpfree_noprop.blocks import NETWORKS, MLPConfig
from torch import nn

import bpfree
from bpfree.errors import UsageError
from bpfree.options import OptimizerConfig
from bpfree.step import Batch, Budget
from bpfree.tasks.task import Split, Task, TaskSpec
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.meters import StepMemory
from bpfree.training.stepper import new_step

CLASSES = 1200


def many(T: int, spec: TaskSpec, width: int = 8, dim: int = 16, **options: Any) -> NoPropDT:
    torch.manual_seed(0)
    builder = NETWORKS["noprop-mlp"]
    network = builder.build(spec, builder.Config(blocks=T, state_dim=dim, width=width, depth=1))
    return NoPropDT(network, spec, NoPropDTConfig(T=T, embedding="learned", embedding_dim=dim, **options))


# --- a thousand classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", ["simultaneous", "sequential"])
def test_memory_of_a_step_holds_no_scores_of_several_blocks(updates: str) -> None:
    """Scores of a block are 128 x 1200 numbers, its parameters a tenth of that: a further block may cost its gradients, and no more."""
    spec, batch = TaskSpec("many", (8,), CLASSES), Batch(torch.randn(128, 8), torch.arange(128) * 9)
    found = {}
    for T in (2, 8):
        rule, memory = many(T, spec), StepMemory(torch.device("cpu"))
        rule.config.updates = updates  # type: ignore[assignment]
        phase = next(iter(rule.phases(Budget(epochs=1))))
        step = new_step(rule)
        step.phase = phase
        rule.learn(batch, step)
        with memory.watch():
            rule.learn(batch, step)
        found[T] = memory.step_bytes
    scores, gradients = 4 * 128 * CLASSES, 4 * sum(p.numel() for p in rule.network.blocks["t1"].parameters())
    assert gradients < 0.15 * scores
    assert found[2] > scores  # those of one block are seen
    assert (found[8] - found[2]) / 6 < (1.5 * gradients if updates == "simultaneous" else 0.02 * scores)


def test_a_thousand_classes_are_learned() -> None:
    """Each class is a point of 24 coordinates, examples are 0.3 away from it in each: nearest points are right in nearly all cases."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(CLASSES, 24, generator=generator)

    def split(each: int) -> Split:
        targets = torch.arange(CLASSES).repeat(each)
        return Split(points[targets] + 0.3 * torch.randn(len(targets), 24, generator=generator), targets)

    task = Task(TaskSpec("many", (24,), CLASSES), split(4), None, split(1))
    rule = many(2, task.spec, width=128, dim=64, loss="cross-entropy")
    config = bpfree.TrainConfig(
        budget=BudgetConfig(epochs=3), batch_size=128, device="cpu", optimizer=OptimizerConfig("adamw", lr=1e-2),
        evaluation=EvaluationConfig(every=3),
    )  # fmt: skip
    assert bpfree.Trainer(rule, task, config).fit().result["test/accuracy"] > 0.8


# --- streams of classes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Task:
    return bpfree.load_task("digits")


def streamed(rule: NoPropDT, task: Task, epochs: int = 1, **memory: Any) -> dict[str, Any]:
    stream = bpfree.class_stream(task, start=4, increment=3, memory=bpfree.Memory(**memory) if memory else None)
    config = bpfree.TrainConfig(budget=BudgetConfig(epochs=epochs), batch_size=32, device="cpu")
    return bpfree.Trainer(rule, stream, config).fit().result


@pytest.mark.parametrize("updates", ["simultaneous", "sequential"])
def test_classes_that_come_in_stages(updates: Any, digits: Task) -> None:
    """Without a memory the last classes are known and the first forgotten, as of every rule that learns from what is there."""
    network = NETWORKS["noprop-mlp"].build(digits.spec, MLPConfig(blocks=3))
    result = streamed(NoPropDT(network, digits.spec, NoPropDTConfig(T=3, updates=updates)), digits, epochs=4)
    assert result["test/after_3/on_3/accuracy"] > 0.8
    assert result["test/after_3/on_1/accuracy"] < 0.3


def test_kept_features_in_a_stream_are_those_of_the_stage(digits: Task) -> None:
    # Oracle: the same run with features computed for each batch.
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        network = noprop_network(digits.spec, nn.Flatten, blocks=2, width=16, shared=True, frozen=True, keep=keep)
        rule = NoPropDT(network, digits.spec)
        assert rule.keeps_features == keep
        results.append(streamed(rule, digits, total=20))  # at random: what herding goes by is the features, here the stem's or the blocks'
    for key in ("test/after_3/on_1/accuracy", "test/after_2/on_2/accuracy", "test/forgetting/accuracy"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-6)


def test_prototypes_of_classes_that_have_not_come_are_refused(digits: Task) -> None:
    builder = NETWORKS["noprop-mlp"]
    network = builder.build(digits.spec, builder.Config(state_dim=64, label="input"))
    with pytest.raises(UsageError, match="class 4 has no training example"):
        streamed(NoPropDT(network, digits.spec, NoPropDTConfig(embedding="prototype")), digits)
