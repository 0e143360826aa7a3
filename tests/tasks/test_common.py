"""Options of every task: subset, constants, class weights, the order of batches.

Oracles: counts of classes; numpy's mean and deviation; torch's ``cross_entropy(weight=...)`` and autograd; scikit-learn's class weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

import bpfree
from bpfree import Batch, BudgetConfig, Split, Task, TaskSpec, TrainConfig, UsageError
from bpfree.baselines import Backprop
from bpfree.config import parse_words, resolve
from bpfree.network.builders import mlp
from bpfree.plugins import installed_plugins
from bpfree.runner import run
from bpfree.study.fingerprints import Fingerprints
from bpfree.tasks.augment import Augmentation, Draws
from bpfree.tasks.check import check_task
from bpfree.tasks.common import TaskCommon, described, stratified_order, subset_of
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.loading import Loader, Loading
from bpfree.tasks.weighted import WeightedSpec
from bpfree.training.trainer import Trainer

CPU = torch.device("cpu")
COUNTS = (60, 25, 10, 5)
LABELS = torch.cat([torch.full((count,), label) for label, count in enumerate(COUNTS)])
INPUTS = 3 + 2 * torch.randn(len(LABELS), 6, generator=torch.Generator().manual_seed(0))
IMBALANCED = Split(INPUTS, LABELS)


def task(**common: Any) -> Task:
    return Task.of(IMBALANCED, IMBALANCED, name="imbalanced", **common)


# --- subset ---------------------------------------------------------------------------------------------------------------


def positions(count: int) -> list[int]:
    """Which examples a subset has."""
    made = subset_of(Split(torch.arange(len(LABELS))[:, None], LABELS), count)
    return made.batch(torch.arange(len(made)))[0].flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("smaller", [4, 10, 37, 99])
def test_a_smaller_subset_is_a_part_of_a_larger_one(smaller: int) -> None:
    for larger in (smaller + 1, 100):
        assert set(positions(smaller)) < set(positions(larger))
    assert positions(smaller) == sorted(positions(smaller))
    assert len(positions(smaller)) == smaller


def test_every_beginning_is_stratified() -> None:
    """A beginning has the same share t of every class, rounded up; of those that would come next at the same share, some."""
    order = stratified_order(LABELS, len(LABELS))
    assert sorted(order.tolist()) == list(range(len(LABELS)))
    for count in range(1, len(LABELS)):
        counts = LABELS[order[:count]].bincount(minlength=4)
        low = max((n - 1) / size for n, size in zip(counts.tolist(), COUNTS, strict=True))
        high = min(n / size for n, size in zip(counts.tolist(), COUNTS, strict=True))
        assert low <= high + 1e-12, "one class has a larger share than another, by more than one example"
    assert set(LABELS[order[:4]].tolist()) == {0, 1, 2, 3}


def test_classes_that_are_equally_frequent_have_as_many_in_a_subset_of_digits() -> None:
    labels = torch.arange(1000) % 10
    made = subset_of(Split(torch.zeros(1000, 1), labels), 200)
    assert made.targets is not None
    assert made.targets.bincount().tolist() == [20] * 10


def test_a_subset_is_taken_before_the_validation_cut() -> None:
    whole, part = Task.from_source(DIGITS), Task.from_source(DIGITS, subset=100)
    assert part.validation is not None
    assert len(part.train) + len(part.validation) == 100
    assert len(part.test) == len(whole.test)
    assert part.fingerprint() != whole.fingerprint()
    again = Task.from_source(DIGITS, subset=100, split_seed=5)
    assert again.validation is not None
    rows = [set(map(tuple, torch.cat([each.train.inputs, each.validation.inputs]).flatten(1).tolist())) for each in (part, again)]
    assert rows[0] == rows[1]


def test_a_subset_without_classes_is_a_random_part() -> None:
    made = subset_of(Split(torch.arange(50.0)[:, None], torch.arange(50.0)[:, None]), 20)
    assert len(set(made.batch(torch.arange(20))[0].flatten().tolist())) == 20


def test_a_subset_that_is_too_large_is_refused() -> None:
    with pytest.raises(UsageError, match=r"task\.subset=101, but there are 100 training examples"):
        task(subset=101)


def test_a_subset_is_recorded_and_a_studys_data_are_others() -> None:
    known = Fingerprints(None, load=True)
    whole, part = (known.of(resolve(parse_words(words))) for words in (["task=digits"], ["task=digits", "task.subset=200"]))
    assert whole is not None
    assert part is not None
    assert (part.examples, whole.examples) == (200, 1438)
    assert part.fingerprint != whole.fingerprint
    assert resolve(parse_words(["task.subset=200"])).recorded()["task"]["subset"] == 200


# --- constants ------------------------------------------------------------------------------------------------------------


def test_constants_of_vectors_are_those_of_each_feature_in_the_training_split_alone() -> None:
    made = task(normalise="auto")
    np.testing.assert_allclose(made.spec.mean, made.train.inputs.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.spec.std, made.train.inputs.double().numpy().std(0), rtol=1e-12)
    assert abs(np.array(made.spec.mean) - INPUTS.double().numpy().mean(0)).max() > 1e-4, "the validation examples count too"
    seen = next(iter(Loader(made.train, made.spec, batch_size="all", device=CPU))).inputs
    torch.testing.assert_close(seen.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["tensor", "dataset"])
def test_constants_of_images_are_those_of_each_channel_after_the_scale(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 200, (300, 3, 5, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(300) % 2
    data: Any = Split(images, labels)
    if kind == "dataset":
        data = bpfree.DatasetSplit(list(zip(images, labels, strict=True)), targets=labels)  # type: ignore[arg-type]
    spec = TaskSpec("images", (3, 5, 4), 2, scale=255)
    made = Task.of(data, data, spec=spec, validation=0, normalise="auto").spec
    scaled = images.double().numpy() / 255
    np.testing.assert_allclose(made.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(made.std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_a_feature_that_is_constant_is_not_divided_by_zero() -> None:
    inputs = INPUTS.clone()
    inputs[:, 2] = 0.1
    spec = Task.of(Split(inputs, LABELS), Split(inputs, LABELS), normalise="auto").spec
    assert spec.std[2] == 1
    assert spec.normalise(inputs)[:, 2].abs().max() < 1e-7


def test_constants_that_are_given_or_none() -> None:
    given = Task.from_source(DIGITS, normalise="given", mean=[0.25], std=[2.0]).spec
    assert (given.mean, given.std) == ((0.25,), (2.0,))
    assert (Task.from_source(DIGITS, normalise="none").spec.mean, Task.from_source(DIGITS).spec.mean) == ((0.0,), (0.3053,))
    with pytest.raises(UsageError, match="needs both"):
        Task.from_source(DIGITS, normalise="given", mean=[0.25])
    with pytest.raises(UsageError, match=r"task\.mean: 3 values for inputs of shape \(1, 8, 8\)"):
        Task.from_source(DIGITS, mean=[0.1, 0.2, 0.3])
    with pytest.raises(UsageError, match=r"task\.mean=\[0\.25\] does nothing with task\.normalise=auto"):
        resolve(parse_words(["task.normalise=auto", "task.mean=[0.25]"]))


def test_constants_of_inputs_that_are_taken_as_they_are_are_refused() -> None:
    tokens = Split(torch.randint(0, 9, (40, 3)), torch.arange(40) % 2)
    with pytest.raises(UsageError, match="takes its inputs as they are"):
        Task.of(tokens, tokens, spec=TaskSpec("tokens", (3,), 2, vocabulary=9), normalise="auto")


def test_faults_of_the_inputs_are_named_before_constants_are_computed() -> None:
    inputs = INPUTS.clone()
    inputs[4, 1] = float("nan")
    with pytest.raises(UsageError, match="x_train holds 1 value that is NaN"):
        Task.of(Split(inputs, LABELS), Split(INPUTS, LABELS), spec=TaskSpec("holes", (6,), 4), validation=0, normalise="auto")


def test_constants_of_a_run_are_in_its_checkpoint(tmp_path: Path) -> None:
    """Oracle: the spec of the task. What is predicted from disk is what the trained rule predicts."""
    words = ["task=digits", "task.normalise=auto", "task.subset=200", "budget.epochs=1", "tracking.enabled=false", "pictures.every=0"]
    recipe = resolve(parse_words([*words, f"output={tmp_path}"]))
    made = run(recipe, quiet=True)
    assert made.folder is not None
    built = recipe.build_task()
    saved = bpfree.load(made.folder)
    assert saved.spec == built.spec
    assert saved.spec.mean != recipe.spec().mean
    assert built.spec.mean == (pytest.approx(float(built.train.inputs.double().mean()), rel=1e-12),)


# --- class weights --------------------------------------------------------------------------------------------------------


WEIGHTS = (0.5, 1.0, 3.0, 7.0)
SOFT = torch.rand(20, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SOFT = SOFT / SOFT.sum(1, keepdim=True)
OUTPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("targets", [torch.arange(20) % 4, SOFT], ids=["classes", "soft"])
def test_the_weighted_loss_is_torchs_own(targets: torch.Tensor) -> None:
    spec, batch = WeightedSpec("w", (6,), 4, class_weights=WEIGHTS), Batch(None, targets)
    expected = F.cross_entropy(OUTPUTS, targets, weight=torch.tensor(WEIGHTS, dtype=torch.float64), reduction="none")
    torch.testing.assert_close(spec.losses(OUTPUTS, batch), expected)
    torch.testing.assert_close(spec.loss(OUTPUTS, batch), expected.mean())


@pytest.mark.parametrize("targets", [torch.arange(20) % 4, SOFT], ids=["classes", "soft"])
def test_the_weighted_error_is_the_derivative_of_the_loss(targets: torch.Tensor) -> None:
    spec, batch = WeightedSpec("w", (6,), 4, class_weights=WEIGHTS), Batch(None, targets)
    leaf = OUTPUTS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(spec.loss(leaf, batch), leaf)
    torch.testing.assert_close(spec.error(OUTPUTS, batch), expected)
    loss, error = spec.loss_and_error(OUTPUTS, batch)
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(loss, spec.loss(OUTPUTS, batch))


def test_weights_of_one_are_no_weights() -> None:
    batch, plain = Batch(None, torch.arange(20) % 4), TaskSpec("p", (6,), 4)
    spec = WeightedSpec("w", (6,), 4, class_weights=(1.0,) * 4)
    torch.testing.assert_close(spec.loss(OUTPUTS, batch), plain.loss(OUTPUTS, batch))
    torch.testing.assert_close(spec.error(OUTPUTS, batch), plain.error(OUTPUTS, batch))


def test_balanced_weights_are_scikit_learns_of_the_training_split() -> None:
    made = task(class_weights="balanced")
    assert isinstance(made.spec, WeightedSpec)
    assert made.train.targets is not None
    expected = compute_class_weight("balanced", classes=np.arange(4), y=made.train.targets.numpy())
    np.testing.assert_allclose(made.spec.class_weights, expected)


def test_a_class_without_examples_has_no_balanced_weight() -> None:
    spec = TaskSpec("d", (6,), 4, class_names=("a", "b", "c", "d"))
    with pytest.raises(UsageError, match="no training example is of d"):
        Task.of(Split(INPUTS[:95], LABELS[:95]), IMBALANCED, spec=spec, validation=0, class_weights="balanced")


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0, 2.0], "2 numbers for 4 classes"), ("heavy", "give none, balanced, or a list"), ([1.0, 0.0, 1.0, 1.0], "positive numbers")],
)
def test_weights_that_are_none_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task(class_weights=weights)


def test_weights_are_for_classes() -> None:
    real = Split(INPUTS, torch.randn(100, 1))
    with pytest.raises(UsageError, match=r"task\.class_weights is for classes"):
        Task.of(real, real, class_weights="balanced")


def test_a_rule_that_teaches_its_own_loss_is_refused_by_name() -> None:
    kind = installed_plugins().get("rules", "noprop-dt")
    recipe = resolve(parse_words(["rule=noprop-dt", "task.class_weights=balanced"]))
    with pytest.raises(UsageError, match="own_loss"):
        recipe.build_rule(recipe.spec())
    assert not kind.traits_of(kind.Config()).own_loss


def test_a_weighted_run_is_trained_and_loaded(tmp_path: Path) -> None:
    words = ["task=digits", "task.class_weights=balanced", "budget.epochs=2", "tracking.enabled=false", "pictures.every=0"]
    made = run(resolve(parse_words([*words, f"output={tmp_path}"])), quiet=True)
    assert made.status == "finished"
    assert made.folder is not None
    assert isinstance(bpfree.load(made.folder).spec, WeightedSpec)
    assert made.result["test/accuracy"] > 0.5


# --- order ----------------------------------------------------------------------------------------------------------------


def loader(**options: Any) -> Loader:
    return Loader(
        IMBALANCED, check_task(TaskSpec("i", (6,), 4), IMBALANCED, None, IMBALANCED), batch_size=32, device=CPU, seed=1, **options
    )


def test_a_balanced_pass_shows_all_classes_equally_often() -> None:
    order = loader(balanced=True).order(0)
    assert len(order) == 100
    assert LABELS[order].bincount().tolist() == [25] * 4
    for label, count in enumerate(COUNTS):
        times = order[LABELS[order] == label].bincount(minlength=100)[label == LABELS]
        assert len(times) == count
        assert times.max() - times.min() <= 1, "within a class, each example is shown as often as another, to one"


def test_a_balanced_pass_is_a_function_of_seed_and_epoch() -> None:
    one, two = loader(balanced=True), loader(balanced=True)
    list(one.batches(0))
    assert torch.equal(one.order(3), two.order(3))
    assert not torch.equal(one.order(3), one.order(4))
    assert torch.equal(torch.cat([batch.targets for batch in one.batches(3, start=2)]), LABELS[two.order(3)[64:]])  # type: ignore[misc]


def test_an_example_that_is_shown_again_is_augmented_otherwise() -> None:
    seen: list[torch.Tensor] = []

    def look(images: torch.Tensor, targets: Any, draws: Draws) -> Any:
        seen.append(draws.uniform("x")[:, 0])
        return images, targets

    batches = loader(balanced=True, augment=[Augmentation(look)])
    list(batches.batches(0))
    assert len(torch.cat(seen).unique()) == 100
    uniform = loader(augment=[Augmentation(look)])
    seen.clear()
    list(uniform.batches(0))
    assert torch.equal(torch.cat(seen), Draws(1, 0, uniform.order(0)).uniform("x")[:, 0])


def test_a_run_is_sampled_as_it_is_told() -> None:
    made = Task.of(IMBALANCED, IMBALANCED, validation=0)
    seen: list[torch.Tensor] = []

    class Watching(Backprop):
        def credit(self, batch: Batch, step: bpfree.Step) -> Any:
            assert batch.targets is not None
            seen.append(batch.targets.clone())
            return super().credit(batch, step)

    config = TrainConfig(budget=BudgetConfig(epochs=1), batch_size=20, device="cpu")
    Trainer(Watching(mlp(made.spec), made.spec), made, config, loading=Loading(sampling="balanced")).fit()
    assert torch.cat(seen[-5:]).bincount().tolist() == [25] * 4


def test_a_balanced_order_needs_classes() -> None:
    with pytest.raises(UsageError, match=r"task\.sampling=balanced is for classes"):
        described(TaskSpec("real", (6,), 1, "real"), TaskCommon(sampling="balanced"))
    with pytest.raises(UsageError, match="sampling belongs to the training"):
        task(sampling="balanced")
    with pytest.raises(UsageError, match="known beforehand"):
        Loader(Split(INPUTS, None), TaskSpec("n", (6,), 1, "none"), batch_size=5, device=CPU, seed=0, balanced=True)
