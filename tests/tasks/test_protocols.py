"""Protocols that score features. Oracles: scikit-learn, autograd on the stated objective, brute force, invariances."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SkRidge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_rules import assert_equal_bits, config_of, rule_on, weights

from bpfree import Batch, Network, Split, Step, Task, TaskSpec, UsageError, hookimpl
from bpfree.baselines import Backprop, Linear
from bpfree.config import parse_words, resolve
from bpfree.plugins import Plugins
from bpfree.rule import Streamed, Traits, always
from bpfree.tasks import linear, protocols
from bpfree.tasks.linear import classes_of
from bpfree.tasks.protocols import (
    EvaluationProtocol,
    FittedProbe,
    LinearMap,
    Setting,
    clustering_accuracy,
    fit_clustering,
    fit_linear_probe,
    fit_nearest_centroid,
)
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.operations import counted_operations
from bpfree.training.trainer import Trainer

ALL = ["linear-probe", "nearest-centroid", "clustering"]


def setting_of(device: torch.device, classes: int = 10, seed: int = 0) -> Setting:
    return Setting(classes, seed, device)


def flat(split: Split) -> Split:
    return Split(split.inputs.flatten(1).float(), split.targets)


def blobs(count: int = 300, width: int = 12, classes: int = 3, noise: float = 3.0) -> Split:
    """Overlapping classes, in features of very different scales and places; the last one is constant."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % classes
    inputs = 2 * torch.randn(classes, width, generator=draw)[targets] + noise * torch.randn(count, width, generator=draw)
    inputs = inputs * torch.logspace(-2, 2, width) + torch.linspace(-5, 50, width)
    inputs[:, -1] = 0.1
    return Split(inputs, targets)


# --- linear probe ---------------------------------------------------------------------------------------------------


def reference(train: Split) -> tuple[StandardScaler, LogisticRegression]:
    """The docstring's claim: scikit-learn with C = 1 / (penalty N) on standardised features."""
    assert train.targets is not None
    scaler = StandardScaler().fit(train.inputs.double().numpy())
    model = LogisticRegression(C=1 / (1e-3 * len(train)), tol=1e-9, max_iter=100_000)
    return scaler, model.fit(scaler.transform(train.inputs.double().numpy()), train.targets.numpy())


@pytest.mark.parametrize("rows", [7, 10_000])
def test_the_probe_has_scikit_learns_coefficients(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the features come in several chunks, the last of them a partial one."""
    train = blobs()
    monkeypatch.setattr(linear, "CHUNK", rows * train.inputs.shape[1])
    monkeypatch.setattr(linear, "TOLERANCE", 2e-6)
    probe = fit_linear_probe(train, setting_of(device, 3))
    scaler, model = reference(train)
    weight = probe.map.weight.cpu().numpy() * scaler.scale_  # of standardised features
    np.testing.assert_allclose(weight[:, :-1], model.coef_[:, :-1], atol=2e-3)
    assert not weight[:, -1].any()
    bias = probe.map.bias.cpu().numpy()
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=2e-3)


def test_the_probe_decides_as_scikit_learn_at_its_own_tolerance(digits: Task, device: torch.device) -> None:
    train, test = flat(digits.train), flat(digits.test)
    probe = fit_linear_probe(train, setting_of(device))
    scaler, model = reference(train)
    expected = torch.from_numpy(model.predict(scaler.transform(test.inputs.double().numpy())))
    assert (probe.decide(test.inputs) == expected).float().mean() >= 0.997  # one of 359 examples
    assert probe(test)["accuracy"] == pytest.approx(float((expected == test.targets).float().mean()), abs=0.003)


def test_the_probe_minimises_the_stated_objective(digits: Task, device: torch.device) -> None:
    """Oracle: autograd, in float64, of the docstring's formula at what the probe has found."""
    train = flat(digits.train)
    probe = fit_linear_probe(train, setting_of(device))
    x = train.inputs.double()
    deviation = x.std(0, correction=0)
    z = torch.where(deviation > 0, (x - x.mean(0)) / deviation, 0.0)
    weight = (probe.map.weight.cpu() * deviation).requires_grad_()
    bias = probe.map.bias.cpu().double().requires_grad_()
    objective = nn.functional.cross_entropy(z @ weight.T + bias, train.targets) + 1e-3 / 2 * weight.square().sum()
    found = torch.autograd.grad(objective, [weight, bias])
    assert max(float(part.abs().max()) for part in found) <= 1.01 * linear.TOLERANCE
    assert objective < 0.2  # log 10 at the start


def test_rounding_is_no_feature(device: torch.device) -> None:
    """A feature that differs from class to class in its last bit is left at zero; one that differs in its fourth digit is not."""
    targets = torch.arange(60) % 2
    place = torch.full((60,), 1000.0)
    bit = torch.where(targets == 1, torch.nextafter(place, place + 1), place)
    probe = fit_linear_probe(Split(torch.stack([bit, place + 0.1 * targets], 1), targets), setting_of(device, 2))
    assert probe.map.weight[:, 0].tolist() == [0.0, 0.0]
    assert probe.map.weight[:, 1].abs().min() > 1


def test_a_probe_that_has_not_converged_says_so(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "bpfree"):
        fit_linear_probe(flat(digits.train), setting_of(device))
        assert not caplog.records
        monkeypatch.setattr(linear, "MOST_ITERATIONS", 3)
        fit_linear_probe(flat(digits.train), setting_of(device))
    assert "has not converged" in caplog.text


def test_what_float32_cannot_reach_is_solved_in_float64(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gradient of 1e-9 is below float32's rounding. Oracle: scikit-learn's coefficients, to four more digits than otherwise."""
    monkeypatch.setattr(linear, "TOLERANCE", 1e-9)
    readout = linear.Logistic(flat(digits.train), 10, device)
    with caplog.at_level(logging.WARNING, "bpfree"):
        found = readout.fit(1e-3)
    assert readout.worst <= 1e-9
    assert not caplog.records
    scaler, model = reference(flat(digits.train))
    np.testing.assert_allclose(found.weight.cpu().numpy() * scaler.scale_, model.coef_, atol=2e-6)


@pytest.mark.parametrize("targets", ["classes", "real"])
def test_operations_are_those_that_a_counter_finds(targets: str, device: torch.device) -> None:
    """Oracle: torch's counter of the same fit, whose L-BFGS has a few products of vectors beside it."""
    train = blobs()
    if targets == "real":
        train = Split(train.inputs, train.inputs[:, :4] + 1)
    setting = dataclasses.replace(setting_of(device, 3 if targets == "classes" else 4), targets=targets)
    with counted_operations() as count:
        found = fit_linear_probe(train, setting, train)
    assert found.operations == pytest.approx(count(), rel=0.05 if targets == "classes" else 1e-9)
    with counted_operations() as count:
        centroids = fit_nearest_centroid(blobs(), setting_of(device, 3))
    assert centroids.operations == count()


def test_only_chunks_and_coefficients_are_allocated(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that probe or centroids make is larger than a chunk of features (or float64 sums of the coefficients' size)."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != owned:
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
            return result

    train = blobs(2000, 50)
    before, owned = train.inputs.clone(), train.inputs.untyped_storage().data_ptr()
    monkeypatch.setattr(linear, "CHUNK", 20 * 50)
    monkeypatch.setattr(linear, "MOST_ITERATIONS", 3)
    monkeypatch.setattr(linear, "SHARE_OF_FREE", 0.0)
    for fit in (fit_linear_probe, fit_nearest_centroid):
        with Largest() as largest:
            fit(train, setting_of(device, 3))(train)
        assert 20 * 50 <= largest.numbers <= 2 * max(20 * 50, len(train)), fit.__name__  # targets are int64
    assert torch.equal(train.inputs, before)


# --- nearest centroid -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_:UserWarning")  # pixels that are the same in all of a class
def test_nearest_centroids_are_scikit_learns(digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 100 * 64)
    train, test = flat(digits.train), flat(digits.test)
    assert train.targets is not None
    expected = NearestCentroid().fit(train.inputs.numpy(), train.targets.numpy()).predict(test.inputs.numpy())
    for place in (0.0, 1e4):  # far from the origin, where float32 would lose the distances if it squared them
        moved = fit_nearest_centroid(Split(train.inputs + place, train.targets), setting_of(device))
        assert np.array_equal(moved.decide(test.inputs + place).numpy(), expected)


def test_a_class_without_examples_is_never_chosen(device: torch.device) -> None:
    train = Split(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 2]))
    assert fit_nearest_centroid(train, setting_of(device, 3)).decide(torch.tensor([[-0.1], [0.0], [0.1]])).tolist()[::2] == [0, 2]
    assert fit_linear_probe(train, setting_of(device, 3)).decide(torch.tensor([[-1.0], [1.0]])).tolist() == [0, 2]


# --- clustering -----------------------------------------------------------------------------------------------------


def test_clustering_accuracy_is_the_best_over_all_permutations() -> None:
    """Oracle: every one-to-one assignment of 4 clusters to 4 classes, tried; and the names of clusters mean nothing."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        targets, clusters = (torch.randint(4, (30,), generator=draw) for _ in range(2))
        best = max(float((torch.tensor(names)[clusters] == targets).float().mean()) for names in itertools.permutations(range(4)))
        assert clustering_accuracy(clusters, targets) == pytest.approx(best)
        assert clustering_accuracy(torch.randperm(4, generator=draw)[clusters], targets) == pytest.approx(best)


@pytest.mark.parametrize(
    ("table", "best"), [([[5, 4], [4, 0]], 8 / 13), ([[3, 0, 0]], 1.0), ([[2], [3]], 0.6)], ids=["not greedy", "one cluster", "one class"]
)
def test_clustering_accuracy_of_tables_made_by_hand(table: list[list[int]], best: float) -> None:
    """In the first one, to give the largest entry its wish (5 + 0) is worse than to give it to neither (4 + 4)."""
    counts = torch.tensor(table)
    clusters, targets = (torch.repeat_interleave(index, counts[counts > 0]) for index in torch.nonzero(counts, as_tuple=True))
    assert clustering_accuracy(clusters, targets) == pytest.approx(best)


@pytest.mark.parametrize("limit", [protocols.KMEANS_LIMIT, 0], ids=["whole", "mini-batches"])
def test_clusters_are_found_without_labels(limit: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "KMEANS_LIMIT", limit)
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(400) % 4
    split = Split(10.0 * torch.eye(4, 6)[targets] + torch.randn(400, 6, generator=draw), targets)
    before = split.inputs.clone()
    assert fit_clustering(split, setting_of(device, 4))(split) == {"accuracy": 1.0}
    assert fit_clustering(Split(split.inputs, targets.flip(0) * 0), setting_of(device, 4))(split) == {"accuracy": 1.0}
    assert torch.equal(split.inputs, before)


def test_clustering_is_k_means_and_a_function_of_the_seed(digits: Task, device: torch.device) -> None:
    train, test = flat(digits.train), flat(digits.test)
    assert test.targets is not None
    model = KMeans(10, n_init=10, random_state=3).fit(train.inputs.numpy())
    expected = clustering_accuracy(torch.from_numpy(model.predict(test.inputs.numpy())).long(), test.targets)
    found = [fit_clustering(train, setting_of(device, seed=seed))(test)["accuracy"] for seed in (3, 3, 2**62 + 1)]
    assert found[0] == found[1] == pytest.approx(expected, abs=0.003)
    assert found[2] > 0.6
    few = train.subset(torch.arange(4))  # fewer examples than classes: as many clusters as examples
    assert fit_clustering(few, setting_of(device))(few)["accuracy"] == 1.0


# --- in runs --------------------------------------------------------------------------------------------------------


def asking(device: torch.device, *names: str, **options: Any) -> Any:
    budget = options.pop("budget", BudgetConfig(epochs=2))
    return config_of(device, budget=budget, evaluation=EvaluationConfig(protocols=list(names)), **options)


def test_a_run_scores_its_features_at_the_end_and_is_otherwise_the_same(digits: Task, device: torch.device) -> None:
    """Oracle: the protocols on the trained rule's features; a run without them, bit for bit; the clock at the last epoch."""
    rule, plain = rule_on(digits), rule_on(digits)
    run = Trainer(rule, digits, asking(device, *ALL, select="best-val")).fit()
    Trainer(plain, digits, config_of(device, budget=BudgetConfig(epochs=2), select="best-val")).fit()
    assert_equal_bits(weights(rule), weights(plain))
    assert run.result["train/seconds"] == run.history[-1]["seconds"]

    def features(split: Split) -> Split:
        with torch.no_grad():
            return Split(rule.eval().features(digits.spec.normalise(split.inputs).to(device)).cpu().flatten(1), split.targets)

    assert digits.validation is not None
    for name, fit in (("linear_probe", fit_linear_probe), ("nearest_centroid", fit_nearest_centroid)):
        fitted = fit(features(digits.train), setting_of(device), features(digits.validation))
        assert isinstance(fitted, (LinearMap, FittedProbe))
        for prefix, split in (("val", digits.validation), ("test", digits.test)):
            assert run.result[f"{prefix}/{name}/accuracy"] == pytest.approx(fitted(features(split))["accuracy"], abs=0.006)
    assert run.result["linear_probe/penalty_on_validation"] == 1
    assert run.result["test/linear_probe/accuracy"] > 0.85
    assert run.result["test/clustering/accuracy"] > 0.5


def test_without_a_validation_split_there_is_the_test_split(digits: Task, device: torch.device) -> None:
    whole = Task(digits.spec, digits.train, None, digits.test)
    result = Trainer(rule_on(whole), whole, asking(device, "nearest-centroid", "linear-probe")).fit().result
    assert [key for key in result if "centroid" in key and "accuracy" in key] == ["test/nearest_centroid/accuracy"]
    assert result["linear_probe/penalty"] == linear.DEFAULT_PENALTY
    assert result["linear_probe/penalty_on_validation"] == 0


class Hebb(Streamed):
    """Learns nothing, on a network that ends in a feature map."""

    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1, readout="none", supervision="none"))

    def local_loss(self, trace: Any, batch: Batch, step: Step) -> Tensor:
        return trace.output.square().mean()

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return self.network(inputs).flatten(1)[:, :10]


def test_a_network_without_readout_is_scored_by_its_last_block(digits: Task, device: torch.device) -> None:
    torch.manual_seed(0)
    blocks = {"b1": nn.Conv2d(1, 8, 3), "b2": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))}
    rule = Hebb(Network(blocks, input_shape=digits.spec.input_shape), digits.spec)
    result = Trainer(rule, digits, asking(device, "linear-probe")).fit().result
    assert result["test/linear_probe/accuracy"] > 0.8 > 0.3 > result["test/accuracy"]


def test_the_linear_classifiers_features_are_its_inputs(digits: Task, device: torch.device) -> None:
    rule = rule_on(digits, Linear, depth=0)
    result = Trainer(rule, digits, asking(device, "linear-probe", budget=BudgetConfig(epochs=1))).fit().result
    assert digits.validation is not None
    expected = fit_linear_probe(flat(digits.train), setting_of(device), flat(digits.validation))(flat(digits.test))
    assert result["test/linear_probe/accuracy"] == pytest.approx(expected["accuracy"], abs=0.003)


# --- what cannot be ---------------------------------------------------------------------------------------------------


class Featureless(Backprop):
    """Learns, but its features fail."""

    steps = 0

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.steps += 1
        return super().credit(batch, step)

    def features(self, inputs: Any) -> Tensor:
        raise NotImplementedError("a sequence of states")


def test_wrong_requests_are_refused_before_the_training(digits: Task, device: torch.device) -> None:
    with pytest.raises(UsageError, match="did you mean 'linear-probe'"):
        Trainer(rule_on(digits), digits, asking(device, "linear-prob"))
    with pytest.raises(UsageError, match=r"unknown protocol 'kmeans'\n +where: evaluation\.protocols"):
        resolve(parse_words(["evaluation.protocols=[kmeans]"]))
    rule = rule_on(digits, Featureless)
    assert isinstance(rule, Featureless)
    with pytest.raises(UsageError, match=r"Featureless gives no features .*a sequence of states"):
        Trainer(rule, digits, asking(device, "clustering")).fit()
    assert rule.steps == 0
    loose = Network({"a": nn.Linear(64, 10), "b": nn.Linear(64, 10)}, input_shape=(64,), chain=False)
    with pytest.raises(UsageError, match="gives no features: its network is no chain"):
        Trainer(NoChain(loose, digits.spec), digits, asking(device, "clustering"))


class NoChain(Hebb):
    """Blocks side by side, and no word on what its features are."""

    traits_of = always(Traits(chain=False, readout="none"))


@pytest.mark.parametrize("targets", ["soft", "real"])
def test_targets_that_a_protocol_cannot_score_are_refused(targets: Any, device: torch.device, workplace: Any) -> None:
    rows = torch.eye(3)[torch.arange(60) % 3]
    split = Split(torch.randn(60, 4), rows)
    task = Task(TaskSpec("rows", (4,), 3, targets=targets), split, None, split)
    with pytest.raises(UsageError, match=f"nearest-centroid scores classes, but task 'rows' has '{targets}' targets"):
        Trainer(rule_on(task), task, asking(device, "nearest-centroid"))
    np.savez("rows.npz", x=split.inputs.numpy(), y=rows.numpy())
    words = ["task=npz", "task.path=rows.npz", f"task.targets={targets}", "evaluation.protocols=[nearest-centroid]"]
    with pytest.raises(UsageError, match=r"nearest-centroid scores classes"):
        resolve(parse_words(words))


@pytest.mark.parametrize("targets", ["soft", "real"])
def test_the_probe_reads_soft_labels_and_real_targets(targets: Any, device: torch.device) -> None:
    """Oracle: one-hot rows as soft labels give the classes' own probe; as real targets, scikit-learn's ridge regression."""
    train = blobs()
    rows = Split(train.inputs, torch.eye(3)[classes_of(train)])
    probe = fit_linear_probe(rows, Setting(3, 0, device, targets))
    if targets == "soft":
        expected = fit_linear_probe(train, setting_of(device, 3))
        assert torch.equal(probe.decide(rows.inputs), expected.decide(train.inputs))
        assert probe(rows) == expected(train)
    else:
        scaled = StandardScaler().fit_transform(train.inputs.double().numpy()[:, :-1])
        model = SkRidge(alpha=linear.DEFAULT_PENALTY * len(train)).fit(scaled, rows.targets)
        loss = 0.5 * ((model.predict(scaled) - rows.targets.numpy()) ** 2).sum(1).mean()
        assert probe(rows)["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_penalty_is_chosen_on_validation_and_the_grid_grows_at_its_edge() -> None:
    """Oracle: made scores whose best is known; of equal ones the strongest penalty is taken."""
    asked: list[float] = []

    def peak(at: float) -> Any:
        def score(penalty: float) -> float:
            asked.append(penalty)
            return -abs(np.log10(penalty) - np.log10(at))

        return score

    for at, tried in ((1e-2, 4), (1e-6, 7), (1e1, 7)):
        asked.clear()
        choice = linear.choose_penalty(peak(at))
        assert choice.penalty == at
        assert len(asked) == tried
        assert not choice.at_edge
    assert linear.choose_penalty(lambda penalty: 0.5).penalty == linear.STRONGEST
    assert linear.choose_penalty(lambda penalty: 0.5 * (penalty <= 1e-3)).penalty == 1e-3


class Entry:
    """An entry point of a package with two protocols: one counts examples, one fails."""

    name, dist = "counting", None

    def load(self) -> Any:
        def fail(train: Split, setting: Setting, validation: Split | None) -> Any:
            raise ArithmeticError("no inverse")

        class Module:
            bpfree_api = 2

            @hookimpl
            def bpfree_protocols(self) -> dict[str, EvaluationProtocol]:
                count = EvaluationProtocol(
                    lambda train, setting, validation: lambda split: {"share": torch.tensor(len(split) / len(train))}
                )
                return {"my-count": count, "failing": EvaluationProtocol(fail)}

        return Module()


def test_a_plugins_protocol_runs_and_one_that_fails_costs_its_own_numbers(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Plugins(entry_points=[Entry()])
    monkeypatch.setattr("bpfree.training.evaluation.installed_plugins", lambda: registry)
    with caplog.at_level(logging.WARNING, "bpfree"):
        run = Trainer(rule_on(digits), digits, asking(device, "failing", "my-count")).fit()
    assert run.status == "finished"
    assert run.result["test/my_count/share"] == pytest.approx(len(digits.test) / len(digits.train))
    assert "test/accuracy" in run.result
    assert not any("failing" in key for key in run.result)
    assert "skipping the protocol 'failing': ArithmeticError: no inverse" in caplog.text


def test_a_trained_run_that_is_asked_to_stop_is_finished_without_them(
    digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(rule_on(digits), digits, asking(device, "clustering"))
    features, calls = trainer.rule.features, []

    def stopping(inputs: Any) -> Tensor:
        calls.append(len(inputs))
        if len(calls) == 2:  # the first one is the trial before the training
            trainer.stop("stopped by the test")
        return features(inputs)

    trainer.rule.features = stopping  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "bpfree"):
        run = trainer.fit()
    assert (run.status, calls[0], len(calls)) == ("finished", 2, 2)
    assert "test/accuracy" in run.result
    assert "test/clustering/accuracy" not in run.result
    assert "stopped by the test" in caplog.text


def test_features_that_are_not_finite_have_no_score(digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    class Infinite(Backprop):
        def features(self, inputs: Any) -> Tensor:
            return super().features(inputs) / 0

    with caplog.at_level(logging.WARNING, "bpfree"):
        run = Trainer(rule_on(digits, Infinite), digits, asking(device, "clustering")).fit()
    assert run.status == "finished"
    assert "features are not finite" in caplog.text
