"""Tasks that are learned in stages, and rules that solve in closed form.

Oracles: accuracies counted by hand, the summary of a matrix worked out on paper, ``numpy.linalg.lstsq``, a run that was never interrupted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bpfree
from bpfree import (
    Batch,
    Card,
    Memory,
    Network,
    RidgeSums,
    Solved,
    Split,
    Stage,
    Step,
    Task,
    TaskSpec,
    TrainConfig,
    class_stream,
)
from bpfree.errors import BpfreeError, UsageError
from bpfree.metric import ACCURACY, LOSS
from bpfree.plugins import installed_plugins
from bpfree.rule import Metrics
from bpfree.tasks.stages import herded
from bpfree.training.config import BudgetConfig
from bpfree.training.streams import stream_scores
from bpfree.training.trainer import Trainer

CLASSES = 6


def blobs(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(9))
    targets = torch.arange(count) % CLASSES
    return Split(centres[targets] + torch.randn(count, 8, generator=generator), targets)


def stream(memory: Memory | None = None, **options: Any) -> Task:
    task = Task(TaskSpec("blobs", (8,), CLASSES), blobs(180, 0), blobs(60, 1), blobs(60, 2))
    return class_stream(task, **{"start": 2, "increment": 2, **options}, memory=memory)


def network() -> Network:
    torch.manual_seed(0)
    blocks = {"b1": nn.Sequential(nn.Linear(8, 16), nn.Tanh()), "readout": nn.Linear(16, CLASSES)}
    return Network(blocks, input_shape=(8,), readout="readout")


@dataclass
class RidgeConfig:
    """Options of the rule below."""

    penalty: float = 1e-3


class Ridge(Solved):
    """Random features and a readout that is solved for; it sees each class as it comes, and forgets nothing."""

    Config = RidgeConfig
    card = Card("ridge regression on random features", equation="W = Y H^T (H H^T + n lambda I)^-1")

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.sums = RidgeSums(16, spec.outputs)

    def accumulate(self, batch: Batch, step: Step) -> Metrics:
        self.sums.add(self.network.features(batch.inputs), self.spec.target_rows(batch))
        return {}

    def solve(self, step: Step) -> None:
        weight, bias = self.sums.solve(self.config.penalty)
        readout = self.network.blocks["readout"]
        readout.weight.copy_(weight)
        readout.bias.copy_(bias)


class Growing(bpfree.Rule):
    """Back-propagation of a readout that gets an output for each class when the class comes, and keeps the inputs it has seen."""

    card = Card("grows")
    traits_of = installed_plugins().get("rules", "backprop").traits_of
    growing = ("seen",)

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = nn.ModuleList()
        self.labels: list[int] = []
        self.register_buffer("seen", torch.zeros(0, 8))

    def start_stage(self, stage: Stage) -> None:
        self.labels += stage.classes
        self.heads.append(nn.Linear(16, len(stage.classes)))

    def scores(self, inputs: Tensor) -> Tensor:
        features = self.network.features(inputs)
        made = torch.full((len(inputs), self.spec.outputs), -20.0)
        return made.index_copy(1, torch.tensor(self.labels), torch.cat([head(features) for head in self.heads], dim=1))

    def credit(self, batch: Batch, step: Step) -> Metrics:
        self.seen = torch.cat([self.get_buffer("seen"), batch.inputs[:1]])
        assert step.stage is not None
        loss = self.spec.loss(self.scores(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return self.scores(inputs)


def config(**options: Any) -> TrainConfig:
    budget = options.pop("budget", BudgetConfig(epochs=2))
    return TrainConfig(budget=budget, batch_size=20, optimizer=bpfree.OptimizerConfig("adam", lr=0.02), **options)


# --- the stream ----------------------------------------------------------------------------------------------------------------


def test_stages_have_the_classes_and_examples_of_their_turn() -> None:
    task = stream(start=3, increment=2, order=[5, 0, 3, 1, 2, 4])
    assert [stage.classes for stage in task.stages] == [(5, 0, 3), (1, 2), (4,)]
    for stage in task.stages:
        for split, places in ((task.train, stage.train), (task.validation, stage.validation), (task.test, stage.test)):
            assert split is not None
            assert split.targets is not None
            assert places is not None
            expected = [place for place, label in enumerate(split.targets.tolist()) if label in stage.classes]
            assert places.tolist() == expected
    for options in ({"start": 0}, {"increment": 0}, {"order": [0, 1, 2, 3, 4, 4]}):
        with pytest.raises(UsageError):
            stream(**options)


def test_training_sees_the_examples_of_one_stage_at_a_time() -> None:
    seen: list[tuple[int, set[int]]] = []
    prepared: list[Tensor | None] = []

    class Watching(Growing):
        def prepare(self, data: bpfree.Examples, generator: torch.Generator) -> None:
            prepared.append(data.targets)

        def credit(self, batch: Batch, step: Step) -> Metrics:
            assert step.stage is not None
            assert batch.targets is not None
            seen.append((step.stage.index, set(batch.targets.tolist())))
            return super().credit(batch, step)

    task = stream()
    run = Trainer(Watching(network(), task.spec), task, config()).fit()
    assert [index for index, _ in seen] == sorted(index for index, _ in seen)
    assert prepared[0] is not None
    assert set(prepared[0].tolist()) == set(task.stages[0].classes)
    for index in range(3):
        assert set().union(*(labels for stage, labels in seen if stage == index)) == set(task.stages[index].classes)
    assert run.epoch == 6  # two passes over each of three stages
    assert run.result["train/samples"] == 2 * 180


def test_the_matrix_is_that_of_the_stages_test_examples() -> None:
    """After the last stage it must agree with predictions that are counted here; the whole test split is its weighted mean."""
    task = stream()
    rule = Growing(network(), task.spec)
    run = Trainer(rule, task, config(budget=BudgetConfig(epochs=12))).fit()
    inputs, targets = task.test.batch(torch.arange(60))
    rule.eval()
    right = rule.predict(inputs, torch.Generator()).argmax(1) == targets
    for stage in task.stages:
        assert run.result[f"test/after_3/on_{stage.index + 1}/accuracy"] == pytest.approx(float(right[stage.test].float().mean()))
    assert run.result["test/last/accuracy"] == pytest.approx(run.result["test/accuracy"]) == pytest.approx(float(right.float().mean()))
    assert run.result["test/forgetting/accuracy"] > 0.3  # it is trained on one stage at a time
    assert "test/after_1/on_2/accuracy" not in run.result
    hidden = Trainer(Growing(network(), task.spec), task, config(evaluation=bpfree.training.config.EvaluationConfig(test=False))).fit()
    assert not any(key.startswith("test/") for key in hidden.result)
    assert "val/average_incremental/accuracy" in hidden.result


def test_a_matrix_is_summarised() -> None:
    """Worked out by hand: stages of 10 and 30 examples, then 10."""
    rows = [[0.9], [0.5, 0.7], [0.6, 0.4, 0.8]]
    found = stream_scores(rows, [10, 30, 10], ACCURACY)
    second, third = (0.5 * 10 + 0.7 * 30) / 40, (0.6 * 10 + 0.4 * 30 + 0.8 * 10) / 50
    assert found["average_incremental/accuracy"] == pytest.approx((0.9 + second + third) / 3)
    assert found["last/accuracy"] == pytest.approx(third)
    assert found["forgetting/accuracy"] == pytest.approx(((0.9 - 0.6) + (0.7 - 0.4)) / 2)
    worse = stream_scores([[1.0], [3.0, 1.0]], [1, 1], LOSS)
    assert worse["forgetting/loss"] == pytest.approx(2.0)  # a loss that has grown is forgotten, too


@pytest.mark.parametrize("choose", ["random", "herding"])
def test_a_memory_keeps_examples_of_earlier_stages(choose: Any) -> None:
    seen: list[tuple[int, Tensor]] = []

    class Watching(Growing):
        def credit(self, batch: Batch, step: Step) -> Metrics:
            assert step.stage is not None
            assert batch.targets is not None
            seen.append((step.stage.index, batch.targets.clone()))
            return super().credit(batch, step)

    task = stream(Memory(total=12, choose=choose))
    longer = config(budget=BudgetConfig(epochs=12))
    plain = Trainer(Growing(network(), task.spec), stream(), longer).fit().result["test/forgetting/accuracy"]
    run = Trainer(Watching(network(), task.spec), task, longer).fit()
    for index, each in ((1, 6), (2, 3)):  # 12 in all: six of each of two classes, then three of each of four
        labels = torch.cat([targets for stage, targets in seen if stage == index])
        for label in range(2 * index):
            assert int((labels == label).sum()) == 12 * each  # passes
    assert run.result["train/memory_examples"] == 12
    assert run.result["train/memory_examples_mb"] == pytest.approx(12 * 8 * 4 / 2**20)
    assert run.result["test/forgetting/accuracy"] < plain


def test_herding_keeps_the_mean() -> None:
    """The first is the example nearest to the mean; all of them have the mean of the class."""
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    normal = torch.nn.functional.normalize(rows.double(), dim=1)
    order = herded(rows, 40)
    assert sorted(order.tolist()) == list(range(40))
    assert int(order[0]) == int((normal - normal.mean(0)).pow(2).sum(1).argmin())
    random = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:10]
    assert (normal[order[:10]].mean(0) - normal.mean(0)).norm() < (normal[random].mean(0) - normal.mean(0)).norm()


def test_choosing_by_features_is_charged() -> None:
    """Herding computes the features of two stages of 60 examples; nothing is chosen after the last one."""
    counted: list[int] = []

    class Featured(Growing):
        def features(self, inputs: Any) -> Any:
            counted.append(len(inputs))
            return self.network(inputs)

    spent = {}
    for choose in ("random", "herding"):
        task = stream(Memory(per_class=4, choose=choose))  # type: ignore[arg-type]
        spent[choose] = Trainer(Featured(network(), task.spec), task, config()).fit().result["train/operations"]
        assert sum(counted) == (120 if choose == "herding" else 0)
    forward = 2 * (8 * 16 + 16 * CLASSES)  # operations of an example, a multiplication and an addition for each weight
    assert spent["herding"] - spent["random"] == pytest.approx(120 * forward)


@pytest.mark.parametrize("other", [stream(Memory(per_class=3)), stream(), stream(Memory(per_class=4), increment=4)])
def test_a_stream_that_is_another_one_is_not_resumed(other: Task, tmp_path: Path) -> None:
    task = stream(Memory(per_class=4))
    Trainer(Growing(network(), task.spec), task, config(), folder=tmp_path).fit()
    assert other.fingerprint() != task.fingerprint() == stream(Memory(per_class=4)).fingerprint()
    with pytest.raises(BpfreeError, match="made on other data"):
        Trainer(Growing(network(), task.spec), other, config()).fit(resume=tmp_path / "checkpoints" / "last.pt")


def test_a_part_of_the_training_split_is_what_a_phase_is_on() -> None:
    base = stream()
    task = Task(base.spec, base.train, base.validation, base.test, parts={"few": torch.arange(30)})
    sizes: list[int] = []

    class OnPart(installed_plugins().get("rules", "backprop")):  # type: ignore[misc]
        def phases(self, budget: bpfree.Budget) -> Any:
            return [bpfree.Phase("few", epochs=1, part="few"), bpfree.Phase("all", epochs=1)]

        def credit(self, batch: Batch, step: Step) -> Metrics:
            sizes.append(len(batch))
            return super().credit(batch, step)  # type: ignore[no-any-return]

    run = Trainer(OnPart(network(), task.spec), task, config()).fit()
    assert sizes == [20, 10, *[20] * 9]
    assert run.result["train/samples"] == 30 + 180

    class Unknown(OnPart):
        def phases(self, budget: bpfree.Budget) -> Any:
            return [bpfree.Phase("few", epochs=1, part="fwe")]

    with pytest.raises(UsageError, match="few"):
        Trainer(Unknown(network(), task.spec), task, config()).fit()


def test_a_stream_cannot_take_its_best_epoch() -> None:
    task = stream()
    with pytest.raises(UsageError, match="before later stages were learned"):
        Trainer(Growing(network(), task.spec), task, config(select="best-val"))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from bpfree import Memory, hookimpl
from bpfree.training.trainer import Trainer
from test_stages import Growing, config, network, stream

class Killer:
    @hookimpl
    def checkpoint_saved(self, run, path):
        if run.epoch == {epoch}:
            os.kill(os.getpid(), signal.SIGKILL)

task = stream(Memory(per_class=4, choose="herding"))
Trainer(Growing(network(), task.spec), task, config(), folder={folder!r}, observers=[Killer()]).fit()
"""


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_stream_that_was_killed_is_resumed_bit_for_bit(epoch: int, tmp_path: Path) -> None:
    """Killed at the end of the first stage, in the middle of the second, and at its end."""
    task = stream(Memory(per_class=4, choose="herding"))
    whole_rule = Growing(network(), task.spec)
    whole = Trainer(whole_rule, task, config(), folder=tmp_path / "whole").fit()
    code = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), epoch=epoch, folder=str(tmp_path / "killed")))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    rule = Growing(network(), task.spec)
    run = Trainer(rule, task, config(), folder=tmp_path / "killed").fit(resume=tmp_path / "killed" / "checkpoints" / "last.pt")
    for (name, mine), (_, theirs) in zip(rule.state_dict().items(), whole_rule.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
    expected = {key: value for key, value in whole.result.items() if key.startswith(("test/", "val/", "train/memory"))}
    assert {key: run.result[key] for key in expected} == expected
    saved = bpfree.load(tmp_path / "killed", rule=Growing(network(), task.spec))
    assert torch.equal(
        saved.predict(task.test.batch(torch.arange(60))[0]), rule.eval().predict(task.test.batch(torch.arange(60))[0], torch.Generator())
    )


# --- closed form -------------------------------------------------------------------------------------------------------------


def test_sums_over_batches_give_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, targets = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    sums = RidgeSums(4, 3)
    for part in range(0, 50, 7):
        sums.add(rows[part : part + 7], targets[part : part + 7])
    weight, bias = sums.solve(0.0)
    expected = np.linalg.lstsq(np.c_[rows.double().numpy(), np.ones(50)], targets.double().numpy(), rcond=None)[0]
    assert np.allclose(np.vstack([weight.T.numpy(), bias.numpy()]), expected, atol=1e-10)
    weight, bias = sums.solve(0.3)
    stacked = np.vstack([np.c_[rows.double().numpy(), np.ones(50)], np.c_[np.sqrt(0.3 * 50) * np.eye(4), np.zeros(4)]])
    expected = np.linalg.lstsq(stacked, np.vstack([targets.double().numpy(), np.zeros((4, 3))]), rcond=None)[0]
    assert np.allclose(np.vstack([weight.T.numpy(), bias.numpy()]), expected, atol=1e-10)
    with pytest.raises(BpfreeError, match="no single solution"):
        RidgeSums(4, 3).solve(0.1)


def test_a_rule_that_solves_learns_in_one_pass_and_is_charged_for_it() -> None:
    base = stream()
    task = Task(base.spec, base.train, base.validation, base.test)
    rule = Ridge(network(), task.spec)
    run = Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=5), batch_size=20)).fit()
    assert run.epoch == 1
    features = rule.network.features(base.train.batch(torch.arange(180))[0]).detach().double().numpy()
    rows = np.eye(CLASSES)[base.train.targets.numpy()]  # type: ignore[union-attr]
    stacked = np.vstack([np.c_[features, np.ones(180)], np.c_[np.sqrt(1e-3 * 180) * np.eye(16), np.zeros(16)]])
    expected = np.linalg.lstsq(stacked, np.vstack([rows, np.zeros((16, CLASSES))]), rcond=None)[0]
    assert np.allclose(rule.network.blocks["readout"].weight.detach().double().numpy(), expected[:-1].T, atol=1e-5)  # type: ignore[union-attr, operator]
    assert run.result["test/accuracy"] > 0.9
    assert run.result["train/seconds"] > 0
    assert run.result["train/operations"] > 2 * 180 * 17 * 17  # the sums alone
    with pytest.raises(UsageError, match="optimizer"):
        Trainer(Ridge(network(), task.spec), task, config())
    with pytest.raises(BpfreeError, match="solves in closed form"):
        rule.credit(Batch(torch.zeros(1, 8)), bpfree.new_step(rule))


def test_a_rule_that_solves_forgets_nothing_in_a_stream() -> None:
    """The sums over all stages are those over all examples: the readout after the stream is that of joint training."""
    task = stream()
    one = Ridge(network(), task.spec)
    run = Trainer(one, task, TrainConfig(budget=BudgetConfig(epochs=1), batch_size=20)).fit()
    joint = Ridge(network(), task.spec)
    Trainer(joint, Task(task.spec, task.train, task.validation, task.test), TrainConfig(budget=BudgetConfig(epochs=1), batch_size=20)).fit()
    mine, theirs = one.network.blocks["readout"].weight, joint.network.blocks["readout"].weight
    assert torch.allclose(mine, theirs, atol=1e-5)  # type: ignore[arg-type]
    assert run.result["test/forgetting/accuracy"] < 0.15
