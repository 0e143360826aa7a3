"""Streams of seeds, and runs that must not see the test split. Oracles: seeds written out, and identities between runs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rules import assert_equal_bits, config_of, noisy, weights

from bpfree import Batch, Rule, Run, Step, Task, runner
from bpfree.baselines import Backprop
from bpfree.config import parse_words, resolve
from bpfree.seeds import KeyedGenerators, derive, derive_in
from bpfree.tasks.task import Split
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.trainer import Trainer

QUICK = ("task=digits", "budget.epochs=1", "device=cpu", "threads=1", "tracking.enabled=false", "network.depth=2", "network.width=16")


def test_seeds_without_a_stream_are_those_of_old_and_with_one_have_it_as_their_last_word() -> None:
    """Oracle: the numbers, as SHA-256 gave them when there were no streams."""
    old = {
        (3, "initialisation"): 5945123785085788412,
        (3, "noise"): 7779453692375803267,
        (3, "global"): 3890855041401295363,
        (3, "keyed", "b1"): 4895197503211153397,
        (3, "evaluation", "val", 2): 1190803739309999623,
    }
    for parts, expected in old.items():
        assert derive_in(None, *parts) == derive_in("", *parts) == derive(*parts) == expected
    assert derive_in("dfa", 3, "noise") == derive(3, "noise", "dfa") == 2402066370143945062


def test_keyed_generators_of_a_stream_draw_apart() -> None:
    def draw(**options: Any) -> list[float]:
        keyed = KeyedGenerators(3, torch.device("cpu"), lambda: (5, 0), **options)
        return torch.rand(4, generator=keyed("b1")).tolist()

    assert draw() == draw(stream=None) == draw(stream="")
    assert draw() != draw(stream="a") != draw(stream="b")


class Watching(Backprop):
    """Notes all that it is given, and all that it draws."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Batch] = []
        self.drawn: list[torch.Tensor] = []

    def credit(self, batch: Batch, step: Step) -> dict[str, torch.Tensor]:
        self.seen.append(batch)
        self.drawn.append(torch.stack([torch.rand((), generator=g) for g in (step.generator, step.generator_for("x"), None)]))
        return super().credit(batch, step)


def watched(stream: str | None) -> tuple[Watching, dict[str, torch.Tensor]]:
    """A rule that was trained on augmented digits for an epoch, and its initial weights."""
    recipe = resolve(parse_words([*QUICK, "seed=3", *([] if stream is None else [f"stream={stream}"])]))
    task = recipe.build_task()
    built = recipe.build_rule(task.spec)
    rule = Watching(built.network, task.spec)
    before = weights(built)
    augment = [recipe.registry.get("augmentations", name) for name in ("flip", "crop")]
    Trainer(rule, task, recipe.settings, augment=augment).fit()
    return rule, before


def test_streams_share_the_data_and_their_order_and_nothing_else() -> None:
    """Batches (augmented) are equal bit for bit; initial weights and draws of all three kinds of noise are not."""
    (one, first), (other, second), (plain, third), (empty, fourth) = (watched(stream) for stream in ("a", "b", None, "''"))
    for rule in (other, plain, empty):
        assert len(one.seen) == len(rule.seen) == 21
        for ours, theirs in zip(one.seen, rule.seen, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets, theirs.targets)
    assert not any(torch.equal(first[name], other[name]) for other in (second, third) for name in first if name.endswith("weight"))
    assert not bool((one.drawn[0] == other.drawn[0]).any())
    assert not bool((one.drawn[0] == plain.drawn[0]).any())
    assert_equal_bits(third, fourth)
    assert all(torch.equal(a, b) for a, b in zip(plain.drawn, empty.drawn, strict=True))


def test_a_stream_changes_the_noise_of_evaluations(digits: Task, device: torch.device) -> None:
    class Guessing(Backprop):
        def predict(self, inputs: Any, generator: torch.Generator) -> torch.Tensor:
            return torch.rand(len(inputs), 10, generator=generator, device=generator.device)

    def score(stream: str | None) -> float:
        rule = Guessing(noisy(digits).network, digits.spec)
        return Trainer(rule, digits, config_of(device, stream=stream, budget=BudgetConfig(epochs=1))).fit().result["test/accuracy"]

    assert score(None) == score("") != score("a")


def test_each_draw_of_a_stochastic_rule_is_reported_of_the_test_split_alone(digits: Task, device: torch.device) -> None:
    """Mean and standard error of the draws are what is reported of them together; drawn once there is one accuracy."""

    class Guessing(Backprop):
        def predict(self, inputs: Any, generator: torch.Generator) -> torch.Tensor:
            return torch.rand(len(inputs), 10, generator=generator, device=generator.device)

    def result(draws: int) -> dict[str, float]:
        rule = Guessing(noisy(digits).network, digits.spec)
        config = config_of(device, evaluation=EvaluationConfig(draws=draws), budget=BudgetConfig(epochs=1))
        run = Trainer(rule, digits, config).fit()
        assert not any("draw" in key for key in run.history[-1])
        return run.result

    four = result(4)
    each = [four[f"test/accuracy_draw_{number}"] for number in (1, 2, 3, 4)]
    assert len(set(each)) > 1
    assert four["test/accuracy"] == pytest.approx(statistics.fmean(each), rel=1e-12)
    assert four["test/accuracy_se"] == pytest.approx(statistics.stdev(each) / 2, rel=1e-12)
    assert "test/accuracy_draw_5" not in four
    assert not any("draw" in key for key in result(1))


class NotToBeSeen(Split):
    """A test split that no one may look at; its length may be known."""

    def __len__(self) -> int:
        return 359

    def subset(self, indices: Any) -> Split:
        raise AssertionError("the test split was read")

    @property
    def inputs(self) -> torch.Tensor:  # type: ignore[override]
        raise AssertionError("the test split was read")

    @inputs.setter
    def inputs(self, value: torch.Tensor) -> None: ...


def test_without_a_test_nobody_looks_at_the_test_split(digits: Task, device: torch.device) -> None:
    """Protocols then score validation alone."""
    blind = Task(digits.spec, digits.train, digits.validation, digits.test, ["fingerprint"])
    object.__setattr__(blind, "test", NotToBeSeen.__new__(NotToBeSeen))  # a task checks its splits when it is made, and then no more
    rule: Rule = noisy(digits)
    evaluation = EvaluationConfig(test=False, protocols=["nearest-centroid"])
    run = Trainer(rule, blind, config_of(device, evaluation=evaluation)).fit()
    assert run.status == "finished"
    assert not any(key.startswith("test/") for key in run.result)
    assert run.result["val/nearest_centroid/accuracy"] > 0.5
    assert "val/accuracy" in run.history[-1]


def test_how_often_the_test_split_was_seen_is_counted(tmp_path: Path) -> None:
    """Never in a trial; once when the trial continues with a test; and twice when that run is extended."""
    words = [*QUICK, "rule=dfa", f"output={tmp_path}", "pictures.every=0"]
    trial = runner.run(resolve(parse_words([*words, "evaluation.test=false"])), quiet=True)
    assert trial.tags["test_evaluations"] == "0"
    assert "test/accuracy" not in trial.result
    tested = runner.resume(str(trial.folder), changes=parse_words(["evaluation.test=true"]), quiet=True)
    assert tested.tags["test_evaluations"] == "1"
    assert "test/accuracy" in tested.result
    longer = runner.resume(str(trial.folder), changes=parse_words(["budget.epochs=2"]), quiet=True)
    assert longer.tags["test_evaluations"] == "2"


@pytest.mark.parametrize(
    ("ended", "count"),
    [
        (None, 0),
        ({"status": "running", "tags": {"test_evaluations": "1"}}, 0),
        ({"status": "finished", "tags": {"test_evaluations": "1"}}, 1),
        ({"status": "interrupted", "tags": {"test_evaluations": "2"}}, 1),
        ({"status": "interrupted", "tags": {"test_evaluations": "1"}, "config": {"evaluation.test": False}}, 1),
    ],
)
def test_tests_before(ended: dict[str, Any] | None, count: int) -> None:
    assert runner.tests_before(None if ended is None else Run("id", "name", **ended)) == count
