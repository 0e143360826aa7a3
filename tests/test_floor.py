"""The floor. Oracles: scikit-learn on features that are computed here, statistics by hand, a plain loop over penalties."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn
from training_rules import rule_on

from bpfree import Network, Split, Task, TaskSpec
from bpfree.baselines import Backprop, Frozen
from bpfree.config import parse_words, resolve
from bpfree.rule import Rule
from bpfree.training import floor
from bpfree.training.floor import ALL, INPUTS, chance_of, fill_statistics, measure_floor, nearest_mean, read_inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Task:
    """Digits with few examples, so that a fit takes a moment."""
    from bpfree.tasks.digits import DIGITS

    task = Task.from_source(DIGITS)
    assert task.validation is not None
    return Task(task.spec, task.train.subset(torch.arange(400)), task.validation, task.test)


def untrained(task: Task, seed: int, **options: Any) -> Rule:
    torch.manual_seed(seed)
    return rule_on(task, Frozen, **options)


def sources_by_hand(rule: Rule, split: Split) -> dict[str, np.ndarray]:
    x = rule.spec.normalise(split.inputs)
    found = {INPUTS: x.flatten(1)}
    with torch.no_grad():
        for name in rule.network.hidden:
            x = rule.network.blocks[name](x)
            found[name] = x.flatten(1)
    found[ALL] = torch.cat(list(found.values()), 1)
    return {name: value.double().numpy() for name, value in found.items()}


def test_every_reading_is_scikit_learns(small: Task) -> None:
    """Each source at the penalty that was chosen: mean validation accuracy over seeds; and the floor's own test accuracy."""
    rules = [untrained(small, seed, depth=2, width=24) for seed in (3, 4)]
    found = measure_floor(small, rules)
    assert [each.source for each in found.readings] == [INPUTS, "b1", "b2", ALL]
    assert small.validation is not None
    hands = [{name: sources_by_hand(rule, split) for name, split in splits(small).items()} for rule in rules]
    for reading in found.readings:
        scores = []
        for hand in hands:
            scaler = StandardScaler().fit(hand["train"][reading.source])
            model = LogisticRegression(C=1 / (reading.penalty * len(small.train)), tol=1e-8, max_iter=20_000)
            model.fit(scaler.transform(hand["train"][reading.source]), small.train.targets)
            held = model.score(scaler.transform(hand["validation"][reading.source]), small.validation.targets)
            scores.append(held)
            if reading is found.best:
                test = model.score(scaler.transform(hand["test"][reading.source]), small.test.targets)
                assert reading.test[len(scores) - 1] == pytest.approx(test, abs=0.006)  # two of 359 on the border
        assert reading.validation == pytest.approx(scores, abs=0.015)
        assert reading.gradient <= 1e-4
    assert found.best is max(found.readings, key=lambda reading: reading.rank)
    assert [bool(each.test) for each in found.readings] == [each in (found.readings[0], found.best) for each in found.readings]
    assert [float(each.float().mean()) for each in found.best.examples] == pytest.approx(found.test)


def splits(task: Task) -> dict[str, Split]:
    assert task.validation is not None
    return {"train": task.train, "validation": task.validation, "test": task.test}


def test_the_penalty_is_one_for_all_seeds(small: Task) -> None:
    """Chosen by the mean over seeds, which may be no single seed's own choice: read alone, seeds choose for themselves."""
    rules = [untrained(small, seed, depth=1, width=16) for seed in range(3)]
    together = measure_floor(small, rules).readings[1]
    alone = [measure_floor(small, [rule]).readings[1] for rule in rules]
    assert all(max(each.validation) >= score for each, score in zip(alone, together.validation, strict=True))


def test_a_floor_without_validation_takes_the_defaults(small: Task) -> None:
    whole = Task(small.spec, small.train, None, small.test)
    found = measure_floor(whole, [untrained(small, 0, depth=1, width=8)])
    assert not found.chosen
    assert (found.best.source, found.best.penalty) == (ALL, 1e-3)
    assert len(found.test) == 1


def test_running_statistics_are_filled_by_one_pass_without_labels(small: Task) -> None:
    """Oracle: mean and variance over the training inputs, for equal pieces; labels that are missing change nothing."""
    count = 2 * floor.BATCH
    inputs = torch.randn(count, 5) * 3 + 2
    blocks = {"b1": nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5)), "out": nn.Linear(5, 3)}
    spec = TaskSpec("rows", (5,), 3)
    rule = Backprop(Network(blocks, input_shape=(5,), readout="out"), spec)
    fill_statistics(rule, Split(inputs, None), CPU)
    norm = rule.network.blocks["b1"][0]
    assert norm.running_mean.tolist() == pytest.approx(inputs.mean(0).tolist(), abs=1e-5)
    pieces = torch.stack([piece.var(0) for piece in inputs.split(floor.BATCH)])
    assert norm.running_var.tolist() == pytest.approx(pieces.mean(0).tolist(), rel=1e-5)
    assert norm.momentum == 0.1
    assert rule.training
    assert norm.training


def test_real_targets_are_read_by_ridge_regression() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(240, 6, generator=draw)
    y = torch.stack([x[:, 0] - 2 * x[:, 1], x.square().sum(1)], 1) + 0.3 * torch.randn(240, 2, generator=draw)
    whole = Split(x, y)
    parts = [whole.subset(torch.arange(first, last)) for first, last in ((0, 140), (140, 190), (190, 240))]
    task = Task(TaskSpec("real", (6,), 2, "real"), *parts)
    reading = read_inputs(task, 1)
    scaler = StandardScaler().fit(parts[0].inputs.double().numpy())
    model = Ridge(alpha=reading.penalty * 140).fit(scaler.transform(parts[0].inputs.double().numpy()), parts[0].targets)
    errors = model.predict(scaler.transform(parts[2].inputs.double().numpy())) - parts[2].targets.numpy()
    assert reading.test[0] == pytest.approx(-0.5 * (errors**2).sum(1).mean(), rel=1e-4)
    assert reading.examples[0].tolist() == pytest.approx(0.5 * (errors**2).sum(1), rel=1e-3)
    found = measure_floor(task, [untrained(task, 0, depth=1, width=32)])
    assert found.real
    assert found.best.rank >= reading.rank
    assert chance_of(task) is None
    assert nearest_mean(task) is None


def test_features_that_are_too_large_are_not_read(small: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "MOST_NUMBERS", 400 * 64)
    found = measure_floor(small, [untrained(small, 0, depth=1, width=65)])
    assert found.skipped == ("b1 (65 features)", "inputs and all blocks (129 features)")
    assert found.best.source == INPUTS


def test_without_validation_no_block_stands_for_the_inputs(small: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """All together where that is read, else the inputs: a narrow block, which reads far worse, is not the floor because it came last."""
    task = dataclasses.replace(small, validation=None)
    assert measure_floor(task, [untrained(small, 0, depth=1, width=2)]).best.source == ALL
    monkeypatch.setattr(floor, "MOST_NUMBERS", 400 * 65)
    found = measure_floor(task, [untrained(small, 0, depth=1, width=2)])
    assert (found.best.source, found.skipped) == (INPUTS, ("inputs and all blocks (66 features)",))


def test_products_of_real_targets_features_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ridge regression holds features times features: few examples do not make a wide source a small one."""
    split = Split(torch.randn(30, 6), torch.randn(30, 2))
    task = Task(TaskSpec("real", (6,), 2, "real"), split, split, split)
    monkeypatch.setattr(floor, "MOST_NUMBERS", 50 * 50)
    found = measure_floor(task, [untrained(task, 0, depth=1, width=45)])
    assert found.skipped == ("inputs and all blocks (51 features)",)
    assert [each.source for each in found.readings] == [INPUTS, "b1"]


def test_networks_of_other_dtypes_are_read(small: Task) -> None:
    """In float64 the features are those of float32, but for rounding."""
    rule = untrained(small, 0, depth=1, width=12)
    single = measure_floor(small, [rule], test=False).readings[1]
    double = measure_floor(small, [rule.double()], test=False).readings[1]
    assert double.validation == pytest.approx(single.validation, abs=0.012)  # two of 178 on the border


@pytest.mark.parametrize("count", [1, 256, 257, 255 * 256 + 1])
def test_pieces_are_of_about_the_same_size(count: int) -> None:
    sizes = [len(piece) for piece in floor._pieces(Split(torch.zeros(count, 1), None))]
    assert sum(sizes) == count
    assert max(sizes) <= floor.BATCH
    assert max(sizes) - min(sizes) <= 1


def test_chance_is_the_larger_of_one_over_classes_and_the_largest_class() -> None:
    def task(labels: list[int]) -> Task:
        split = Split(torch.zeros(len(labels), 2), torch.tensor(labels))
        return Task(TaskSpec("few", (2,), 4), split, None, split)

    assert chance_of(task([0, 0, 0, 1])) == 0.75
    assert chance_of(task([0, 1, 2, 3, 3])) == pytest.approx(0.4)
    assert chance_of(task([0, 1, 2, 3])) == 0.25


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["rule=noprop-dt", "rule.T=3", "network.blocks=3"], ["t1", "t2", "t3"]),
        (["rule=noprop-ct"], ["block"]),
        (["rule=hebbian-norm"], ["all classes"]),
    ],
)
def test_networks_that_are_no_chain_are_read_too(words: list[str], names: list[str], small: Task) -> None:
    """What is read of NoProp is the readout's input for z = 0: its last linear map makes of it what the block says of z = 0."""
    recipe = resolve(parse_words(words))
    rule = recipe.build_rule(small.spec).eval()
    x = small.spec.normalise(small.test.inputs[:7])
    with torch.no_grad():
        found = rule.representations(x)
        assert list(found) == names
        assert torch.equal(rule.features(x).flatten(1), torch.cat([each.flatten(1) for each in found.values()], 1))
        if words[0] == "rule=noprop-dt":
            block = rule.network.blocks["t2"]
            assert torch.allclose(block.out(found["t2"]), block(x, torch.zeros(7, 10)))
        if words[0] == "rule=noprop-ct":
            block = rule.network.blocks["block"]
            assert torch.allclose(block.out(found["block"]), block(x, torch.zeros(7, 10), torch.zeros(1)), atol=1e-6)
    assert measure_floor(dataclasses.replace(small), [rule], test=False).best.test == ()
