"""The library without command line, configuration files or MLflow: as an engineer uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_rules import assert_equal_bits, config_of, noisy, weights

import bpfree
from bpfree import Batch, BpfreeError, Budget, ScheduleConfig, Split, Stepper, Task, TaskSpec, Trainer, new_step
from bpfree.baselines import DFA, Backprop
from bpfree.network import mlp
from bpfree.study.comparing import comparison
from bpfree.tasks.loading import Loader
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.updater import ClipConfig


def test_a_rule_in_ones_own_loop(digits: Task, device: torch.device) -> None:
    """Direct feedback alignment closes at least 80 % of the gap between its twin and back-propagation on digits (3 seeds)."""
    from bpfree.baselines import Frozen

    x, y = digits.spec.normalise(digits.train.inputs).to(device), digits.train.targets.to(device)
    test = digits.spec.normalise(digits.test.inputs).to(device)

    def accuracy(factory: type[bpfree.Rule]) -> float:
        scores = []
        for seed in range(3):
            torch.manual_seed(seed)
            rule = factory(mlp(digits.spec), digits.spec).to(device)
            step = new_step(rule, seed=seed)
            order = torch.Generator().manual_seed(seed)
            for _ in range(30):
                for chosen in torch.randperm(len(x), generator=order).split(64):
                    rule.learn(Batch(x[chosen], y[chosen]), step)
                    step.index += 1
            with torch.no_grad():
                hits = rule.eval().predict(test, step.generator).argmax(1).cpu() == digits.test.targets
            scores.append(hits.float().mean().item())
        return sum(scores) / len(scores)

    floor, ours, ceiling = accuracy(Frozen), accuracy(DFA), accuracy(Backprop)
    assert ceiling - floor > 0.1  # the network can show learning at all
    assert (ours - floor) / (ceiling - floor) > 0.8


@pytest.mark.parametrize("parts", [1, 2])
def test_a_stepper_takes_the_steps_of_a_run(digits: Task, device: torch.device, parts: int) -> None:
    """Oracle: the trainer with the same seed, bit for bit, whatever else is drawn from torch between the steps."""
    settings: dict[str, Any] = {"schedule": ScheduleConfig("linear"), "clip": ClipConfig(norm=1.0), "seed": 3}
    trained, rule = noisy(digits), noisy(digits)
    run = Trainer(trained, digits, config_of(device, budget=BudgetConfig(epochs=4), accumulate=parts, **settings)).fit()
    stepper, random = Stepper(rule, device=device, **settings), torch.get_rng_state()
    stepper.prepare(digits.train)
    for phase in rule.phases(Budget(epochs=4)):
        with stepper.phase(phase):
            assert phase.epochs is not None
            for passed in range(phase.epochs):
                loader = Loader(digits.train, digits.spec, batch_size=phase.batch_size or 64, device=device, seed=3)
                for index, batch in enumerate(loader.batches(stepper.step.epoch)):
                    done = passed + index / len(loader)
                    stepper.at((stepper.step.epoch - passed + done) / 4, done / phase.epochs if phase.schedule else None)
                    stepper.take(batch, parts)
                    assert torch.equal(torch.get_rng_state(), random)
                    random = torch.manual_seed(stepper.step.index).get_state()
                stepper.end_pass()
            stepper.end_phase()
    assert stepper.step.index == run.result["train/steps"]
    assert_equal_bits(weights(rule), weights(trained))


def synthetic(shape: tuple[int, ...], count: int = 96) -> Task:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, *shape, generator=generator) + targets.float().view(-1, *(1,) * len(shape))
    split = Split(inputs, targets)
    return Task(TaskSpec("synthetic", shape, 3), split, split.subset(torch.arange(30)), split.subset(torch.arange(30)))


def test_the_trainer_takes_ones_own_module(device: torch.device, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    network = bpfree.split(model, input_shape=(3, 32, 32))
    assert network.readout == "fc"
    assert "layer4_1" in network.names
    task = synthetic((3, 32, 32))
    run = Trainer(DFA(network, task.spec), task, TrainConfig(budget=BudgetConfig(epochs=1), device=str(device)), folder=tmp_path).fit()
    assert run.status == "finished"
    assert any(not torch.equal(p.detach().cpu(), before[name]) for name, p in model.named_parameters() if name.startswith("layer2"))
    with pytest.raises(BpfreeError, match="build the rule in Python"):
        bpfree.load(tmp_path)
    torch.manual_seed(1)
    again = bpfree.load(tmp_path, rule=DFA(bpfree.split(torchvision.models.resnet18(num_classes=3), input_shape=(3, 32, 32)), task.spec))
    for name, value in again.network.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name].cpu())


@pytest.mark.parametrize("kind", ["soft", "real"])
def test_tasks_with_soft_labels_and_real_targets(kind: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    y = torch.stack([x[:, 0] + x[:, 1], x[:, 2] * 2], 1)
    split = Split(x, y.softmax(1) if kind == "soft" else y)
    task = Task(TaskSpec("regression", (5,), 2, targets=kind), split, None, split)
    torch.manual_seed(0)
    config = TrainConfig(budget=BudgetConfig(epochs=20), device=str(device))
    run = Trainer(Backprop(mlp(task.spec), task.spec), task, config).fit()
    assert run.history[-1]["train/loss"] < 0.5 * run.history[0]["train/loss"] or run.result.get("test/accuracy", 0) > 0.95


def test_a_task_without_targets_trains_a_rule_that_needs_none(device: torch.device) -> None:
    """Evaluation has nothing to score, and says nothing; no label is invented."""

    class Shrink(bpfree.Rule):
        traits_of = bpfree.always(bpfree.Traits("independent", 0, 1, supervision="none", targets=("none",), readout="none"))

        def credit(self, batch: Batch, step: bpfree.Step) -> dict[str, torch.Tensor]:
            assert batch.targets is None
            loss = self.network(batch.inputs).pow(2).mean()
            loss.backward()
            return {"loss": loss.detach()}

    split = Split(torch.randn(100, 5), None)
    task = Task(TaskSpec("unlabelled", (5,), 2, targets="none"), split, None, split)
    network = bpfree.Network({"a": nn.Linear(5, 4)}, input_shape=(5,))
    run = Trainer(Shrink(network, task.spec), task, TrainConfig(budget=BudgetConfig(epochs=3), device=str(device))).fit()
    assert run.history[-1]["rule/loss"] < run.history[0]["rule/loss"]
    assert not any(name.startswith("test/") for name in run.result)
    with pytest.raises(bpfree.UsageError, match="cannot learn from targets of kind 'none'"):
        Backprop(mlp(task.spec), task.spec)


def test_the_rows_of_a_comparison() -> None:
    def labels(*words: str, references: bool = True) -> list[str]:
        return [row.label for row in comparison(words, [], references=references).rows]

    assert labels("dfa") == ["linear", "frozen", "dfa", "backprop"]
    assert labels("dfa", "backprop", "linear") == ["linear", "frozen", "dfa", "backprop"]
    assert labels("noprop-dt") == ["linear", "frozen", "noprop-dt (twin)", "noprop-dt", "backprop"]
    assert labels("dfa", "dfa", references=False) == ["dfa"]
    with pytest.raises(bpfree.UsageError, match="did you mean 'dfa'"):
        labels("dfaa")


def test_a_rule_splits_a_module_that_is_no_network_and_says_how(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with caplog.at_level("INFO", logger="bpfree.network"):
        rule = DFA(module, TaskSpec("mine", (5,), 3))
    assert rule.network.names == ["b0", "b2"]
    assert rule.network.readout == "b2"
    assert rule.network.blocks["b2"] is module[2]
    assert "Sequential is split into blocks" in caplog.text
    assert "b0" in caplog.text
