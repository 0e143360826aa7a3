"""What holds for every rule of the plugin, whatever its increment."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpfree_hebbian.networks import CNNConfig, MLPConfig, cnn, mlp
from bpfree_hebbian.plugin import bpfree_rules
from bpfree_hebbian.softhebb import SoftHebb, SoftHebbConfig
from torch import Tensor, nn

from bpfree import Batch, Budget, Network, Run, Step, TaskSpec, UsageError, hookimpl, new_step
from bpfree.config import parse_words, resolve
from bpfree.training.schedules import shape_of
from bpfree.training.trainer import Interrupted, Trainer

RULES = sorted(bpfree_rules())
WITH_READOUT = [name for name in RULES if name != "hebbian-norm"]


def trainer_of(words: list[str], **options: Any) -> Trainer:
    recipe = resolve(parse_words(["task=digits", "device=cpu", "threads=1", *words]))
    task = recipe.build_task()
    return Trainer(recipe.build_rule(task.spec), task, recipe.settings, **options)


def trained(words: list[str]) -> tuple[Run, dict[str, Tensor]]:
    trainer = trainer_of(words)
    return trainer.fit(), trainer.rule.state_dict()


@pytest.mark.parametrize("name", RULES)
def test_half_precision_gives_nearly_the_same_increment(name: str) -> None:
    """Oracle: single precision. Winners that are nearly even may change, so directions are compared."""
    recipe = resolve(parse_words([f"rule={name}", "task=digits"]))
    task, made = recipe.build_task(), []
    for precise in (True, False):
        torch.manual_seed(0)
        rule = recipe.build_rule(task.spec)
        rule.train()
        batch = Batch(task.spec.normalise(task.train.inputs[:200]), task.train.targets[:200])
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            rule.credit(batch, new_step(rule))
        made.append({key: p.grad for key, p in rule.named_parameters() if p.grad is not None})
    assert made[0].keys() == made[1].keys()
    for key, value in made[0].items():
        assert made[1][key].dtype == torch.float32
        assert float(torch.cosine_similarity(value.flatten(), made[1][key].flatten(), 0)) > 0.99, key


@pytest.mark.parametrize("name", RULES)
def test_an_update_of_one_group_leaves_the_others_alone(name: str) -> None:
    """Oracle: the gradients and weights of the other groups, bit for bit; the group itself gets what an update of all gives it."""
    words = [] if name == "hebbian-norm" else ["network.widths=[16,12]"]
    recipe = resolve(parse_words([f"rule={name}", "task=digits", *words]))
    task, made = recipe.build_task(), []
    for whole in (False, True):
        torch.manual_seed(0)
        rule = recipe.build_rule(task.spec)
        rule.credit(Batch(task.spec.normalise(task.train.inputs[:200]), task.train.targets[:200]), new_step(rule))
        groups = rule.groups()
        first = next(iter(groups))
        kept = {key: [(p.grad.clone(), p.detach().clone()) for p in groups[key] if p.grad is not None] for key in groups}
        rule.before_update(list(groups) if whole else [first])
        rule.after_update(list(groups) if whole else [first])
        for key in groups:
            after = [(p.grad, p.detach()) for p in groups[key] if p.grad is not None]
            same = [torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(kept[key], after, strict=True)]
            assert whole or key == first or all(same), key
        made.append([(p.grad, p.detach()) for p in groups[first]])
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(*made, strict=True))


@pytest.mark.parametrize("name", WITH_READOUT)
def test_the_readouts_optimiser_and_the_runs_schedule_leave_the_features_alone(name: str) -> None:
    """Oracle: the run without them."""
    words = [f"rule={name}", "budget.epochs=2"]
    other = ["optimizer.name=sgd", "optimizer.lr=0.5", "optimizer.momentum=0.9", "optimizer.weight_decay=0.1", "schedule=cosine"]
    (_, plain), (_, changed) = trained(words), trained([*words, *other, "optimizer.options.nesterov=true"])
    hidden = [key for key in plain if ".b1." in key]
    assert hidden
    assert all(torch.equal(plain[key], changed[key]) for key in hidden)
    assert not torch.equal(plain["network.blocks.readout.1.weight"], changed["network.blocks.readout.1.weight"])


@pytest.mark.parametrize("extra", [[], ["twin=true"], ["precision=bf16", "accumulate=2", "select=best-val"]])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_run_that_was_stopped_in_any_phase_goes_on_bit_for_bit(extra: list[str], share: float, tmp_path: Path) -> None:
    """Oracle: the run that was not stopped. Batch norm and dropout, blocks one after the other."""
    words = ["rule=softhebb", "rule.order=successive", "network.widths=[16,12]", "network.norm=batch", "network.dropout=0.2"]
    words += ["budget.epochs=4", *extra]
    whole = trainer_of(words)
    steps = whole.fit().result["train/steps"]

    class Stop:
        @hookimpl
        def step_end(self, run: Run, step: Step) -> None:
            if step.index == round(share * steps):
                stopped.stop()

    stopped = trainer_of(words, observers=[Stop()], folder=tmp_path)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = trainer_of(words, folder=tmp_path)
    run = resumed.fit(tmp_path / "checkpoints" / "last.pt")
    assert run.result["test/loss"] == whole.run.result["test/loss"]
    for key, value in whole.rule.state_dict().items():
        assert torch.equal(value, resumed.rule.state_dict()[key]), key


def test_the_readouts_rate_and_its_schedule() -> None:
    """Oracle: halved at 20, 35, 50, 60, 70, 80 and 90 % of its phase; 0.4 / sqrt(features), or the published rate."""
    spec = TaskSpec("flat", (12,), 3)
    rule = SoftHebb(mlp(spec, MLPConfig(widths=[9, 25])), spec)
    assert rule.optimizer.lr == pytest.approx(0.08)
    assert SoftHebb(mlp(spec), spec, SoftHebbConfig(preset="mnist")).optimizer.lr == 1e-3
    schedule = list(rule.phases(Budget(epochs=4)))[-1].schedule
    assert schedule is not None
    factor = shape_of(schedule)
    assert factor is not None
    points = [0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [factor((a + b) / 2) for a, b in itertools.pairwise(points)] == [0.5**index for index in range(8)]
    other = SoftHebb(mlp(spec), spec, SoftHebbConfig(readout_schedule="run"))
    assert list(other.phases(Budget(epochs=4)))[-1].schedule is None


def test_budgets_in_seconds_leave_half_of_them_to_the_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves a millisecond whenever it is read, so that a busy machine does not matter."""
    ticks = itertools.count()
    monkeypatch.setattr("bpfree.training.meters.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000, process_time=lambda: 0.0))
    run, _ = trained(["rule=softhebb", "rule.feature_batch_size=1", "budget.seconds=0.5"])  # a pass in such steps takes longer
    features = [metrics for metrics in run.history if "rule/loss" not in metrics]
    assert len(features) == 1
    assert features[0]["steps"] < 1200
    assert features[0]["seconds"] == pytest.approx(0.25, abs=0.02)
    assert run.history[-1]["seconds"] == pytest.approx(0.5, abs=0.02)


def sequence_network() -> Network:
    blocks = {"b1": nn.Linear(12, 5), "readout": nn.Sequential(nn.Flatten(), nn.Linear(25, 3))}
    return Network(blocks, input_shape=(5, 12), readout="readout")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))  # type: ignore[no-any-return]


def test_epochs_of_features_are_refused_with_a_budget_that_has_none() -> None:
    rule = SoftHebb(mlp(TaskSpec("flat", (12,), 3)), TaskSpec("flat", (12,), 3), SoftHebbConfig(feature_epochs=2))
    with pytest.raises(UsageError, match=r"rule\.feature_epochs=2 does nothing with budget\.seconds"):
        rule.phases(Budget(seconds=1.0))


def test_linear_maps_that_would_be_misread_are_refused() -> None:
    rule = SoftHebb(sequence_network(), TaskSpec("sequence", (5, 12), 3))
    with pytest.raises(UsageError, match=r"a dense layer whose outputs are \(N, 5, 5\)"):
        rule.credit(Batch(torch.randn(4, 5, 12), torch.zeros(4, dtype=torch.long)), new_step(rule))
    blocks = {"b1": Twice(), "readout": nn.Linear(12, 3)}
    rule = SoftHebb(Network(blocks, input_shape=(12,), readout="readout"), TaskSpec("flat", (12,), 3))
    with pytest.raises(UsageError, match="called once, not 2 times"):
        rule.credit(Batch(torch.randn(4, 12), torch.zeros(4, dtype=torch.long)), new_step(rule))


def test_lists_longer_than_the_network_are_refused() -> None:
    """Shorter ones continue with their last value; the defaults of a preset may be longer."""
    spec = TaskSpec("image", (3, 16, 16), 3)
    for word in ("rule.lr=[0.1,0.2]", "rule.t_invert=[1,2]"):
        with pytest.raises(UsageError, match="2 values for 1 layers"):
            trainer_of(["rule=softhebb", word])
    with pytest.raises(UsageError, match="3 values for 2 layers"):
        cnn(spec, CNNConfig(channels=[4, 4], kernels=[3, 3, 3]))
    network = cnn(spec, CNNConfig(channels=[4, 4], kernels=[3], pools=["none"]))
    rates = [options["lr"] for options in SoftHebb(network, spec).group_options().values()]
    assert rates == [0.08, 0.005]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("krotov-hopfield", "rank 2 unlearns 0.1 of what the first learns; norms of p = 2"),
        ("softhebb", "losers unlearn; |norm - 1|^0.5"),
        ("oja", "b1: 16 units of 64 inputs; rate 0.0156"),
    ],
)
def test_the_plan_says_what_is_chosen_by_itself(rule: str, said: str) -> None:
    assert said in trainer_of([f"rule={rule}"]).rule.plan()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("rule.competition=hard rule.t_invert=[2]", "rule.t_invert=[2.0] does nothing with rule.competition=hard"),
        ("rule.competition=hard rule.anti_hebbian=false", "rule.anti_hebbian=false does nothing with rule.competition=hard"),
        ("rule.init=network rule.radius=2", "rule.radius=2.0 does nothing with rule.init=network"),
        ("rule=krotov-hopfield rule.delta=0 rule.rank=3", "rule.rank=3 does nothing with rule.delta=0"),
        ("network.activation=identity network.power=3", "network.power=3.0 does nothing with network.activation=identity"),
        (
            "network=hebbian-cnn network.activation=identity network.powers=[2]",
            "network.powers=[2.0] does nothing with network.activation=identity",
        ),
        (
            "network=hebbian-cnn network.preset=stl10 network.channels=[8] network.kernels=[3] network.powers=[1] network.pools=[none]",
            "network.preset=stl10 does nothing with network.channels=[8]",
        ),
    ],
)
def test_an_option_that_another_makes_meaningless_is_refused(words: str, reason: str) -> None:
    """Oracle: where the rule's code branches, written out by hand."""
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(["rule=softhebb", *words.split()]))
    assert reason in str(caught.value)
