"""Data and their spec. Oracles: the other dtype's run bit for bit, counts of NaN and classes made by hand, numpy's argmax and unique."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bpfree
from bpfree import BpfreeError, Network, Split, Task, TaskSpec, UsageError
from bpfree.baselines import DFA, Backprop
from bpfree.cli.main import main
from bpfree.network import mlp
from bpfree.scoring import score
from bpfree.step import Batch
from bpfree.tasks.check import check_inputs, check_split, not_finite
from bpfree.tasks.loading import Loader
from bpfree.tasks.npz import NPZ, ArraysConfig
from bpfree.training.checkpoint import read_checkpoint, write_checkpoint
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.evaluation import evaluate
from bpfree.training.trainer import Trainer

FLAT = TaskSpec("flat", (5,), 3)
PICTURES = TaskSpec("pictures", (1, 6, 6), 4, mean=(0.4,), std=(0.3,))
REAL = TaskSpec("real", (5,), 2, targets="real")
SOFT = TaskSpec("soft", (5,), 3, targets="soft")


def vectors(count: int = 60) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(0))


def labels(count: int = 60, classes: int = 3) -> Tensor:
    return torch.arange(count) % classes


def pictures(count: int = 96) -> Tensor:
    """uint8 pictures whose brighter quarter tells the class."""
    images = torch.randint(0, 120, (count, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    for index, label in enumerate(labels(count, 4).tolist()):
        images[index, 0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 120
    return images.to(torch.uint8)


def task_of(spec: TaskSpec, train: Split, test: Split | None = None, validation: Split | None = None) -> Task:
    return Task(spec, train, validation, train if test is None else test)


def train(task: Task, *, epochs: int = 2, folder: Path | None = None, prepare: Callable[[nn.Module], Any] = lambda module: None) -> Any:
    torch.manual_seed(0)
    network = mlp(task.spec)
    prepare(network)
    config = TrainConfig(budget=BudgetConfig(epochs=epochs), device="cpu", batch_size=16)
    trainer = Trainer(Backprop(network, task.spec), task, config, folder=folder)
    return trainer.fit(), trainer.rule


def command(words: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


# --- the meaning of inputs is the task's, not their dtype's ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_pictures_of_every_dtype_train_test_and_predict_alike_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    spec, images = dataclasses.replace(PICTURES, scale=255.0), pictures()
    (run, rule), (other, same) = (
        train(task_of(spec, Split(kind, labels(96, 4))), folder=tmp_path / str(kind.dtype)) for kind in (images, images.to(dtype))
    )
    assert run.result["test/accuracy"] == other.result["test/accuracy"]
    assert run.result["test/loss"] == other.result["test/loss"]
    for one, two in zip(rule.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, two)
    saved = bpfree.load(tmp_path / "torch.uint8", rule=Backprop(mlp(spec), spec))
    assert torch.equal(saved.predict(images), saved.predict(images.to(dtype)))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "float32", "float64"])
def test_arrays_of_every_dtype_are_the_same_task(dtype: str, tmp_path: Path) -> None:
    """Integer images are pixels; floats of the same values are, once that is said."""

    def normalised(kind: str) -> tuple[Tensor, TaskSpec]:
        np.savez(tmp_path / f"{kind}.npz", x=pictures().numpy()[:, 0].astype(kind), y=labels(96, 4).numpy())
        config = ArraysConfig(str(tmp_path / f"{kind}.npz"), scale=255.0 if kind.startswith("float") else None, layout="image")
        task = Task.from_source(NPZ, config)
        return next(iter(Loader(task.train, task.spec, batch_size="all", device=torch.device("cpu")))).inputs, task.spec

    (expected, spec), (found, other) = normalised("uint8"), normalised(dtype)
    assert torch.equal(expected, found)
    assert spec == other
    assert (spec.scale, spec.limits, spec.mean) == (255.0, (0.0, 255.0), (0.5,))


@pytest.mark.parametrize("images", [pictures().float(), pictures().double(), pictures().long(), pictures().float() + 0.25])
def test_what_may_be_pixels_or_not_is_refused_until_the_scale_is_said(images: Tensor, tmp_path: Path) -> None:
    split = Split(images, labels(96, 4))
    with pytest.raises(UsageError, match="pixels, or numbers") as caught:
        task_of(PICTURES, split)
    assert "task.scale=255" in caught.value.fix
    assert "TaskSpec" in caught.value.fix
    for scale in (255.0, 1.0):
        spec = task_of(dataclasses.replace(PICTURES, scale=scale), split).spec
        expected = (images.float() / scale - 0.4) / 0.3
        torch.testing.assert_close(spec.normalise(images), expected, rtol=1e-6, atol=1e-6)
    if images.is_floating_point():
        np.savez(tmp_path / "f.npz", x=images.numpy()[:, 0], y=labels(96, 4).numpy())
        with pytest.raises(UsageError, match="pixels, or numbers"):
            Task.from_source(NPZ, ArraysConfig(str(tmp_path / "f.npz"), layout="image"))


@pytest.mark.parametrize("images", [torch.rand(96, 1, 6, 6), torch.randn(96, 1, 6, 6), torch.randint(-9, 10, (96, 1, 6, 6)).float()])
def test_what_can_be_no_pixels_is_taken_as_it_is(images: Tensor) -> None:
    spec = task_of(PICTURES, Split(images, labels(96, 4))).spec
    assert spec.scale == 1
    assert torch.equal(spec.normalise(images), (images - 0.4) / 0.3)


def test_tokens_in_bytes_are_no_pictures(tmp_path: Path) -> None:
    """Once [65, 66, 255] became [0, 0, 1]."""
    tokens = torch.tensor([[65, 66, 255], [1, 2, 3]], dtype=torch.uint8)
    spec = TaskSpec("tokens", (3,), 2)
    with pytest.raises(UsageError, match="vectors of uint8"):
        task_of(spec, Split(tokens, labels(2, 2)))
    for kind in (tokens, tokens.long()):
        task = task_of(dataclasses.replace(spec, scale=1.0), Split(kind, labels(2, 2)))
        assert task.spec.normalise(kind).tolist() == tokens.tolist()
    assert task_of(spec, Split(tokens.long(), labels(2, 2))).spec.normalise(tokens.long()).tolist() == tokens.tolist()
    np.savez(tmp_path / "t.npz", x=np.tile(tokens.numpy(), (10, 1)), y=labels(20, 2).numpy())
    with pytest.raises(UsageError, match="vectors of uint8"):
        NPZ.spec(ArraysConfig(str(tmp_path / "t.npz")), None)
    said = NPZ.spec(ArraysConfig(str(tmp_path / "t.npz"), scale=1.0), None)
    assert said.normalise(tokens).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("trained", "given", "fix"),
    [
        (pictures(), pictures().float() / 255, "multiply them by 255"),
        (pictures().float() / 255, pictures(), "divided by 255"),
        (pictures().float() / 255, pictures().long(), "divided by 255"),
        (pictures(), pictures().long() - 100, "bring them to 0 to 255"),
        (pictures(), pictures().long() * 257, "bring them to 0 to 255"),
    ],
)
def test_inputs_in_another_range_than_those_of_training_are_refused(trained: Tensor, given: Tensor, fix: str, tmp_path: Path) -> None:
    """By predict, and as a test split."""
    split = Split(trained, labels(96, 4))
    task = task_of(PICTURES, split)
    train(task, epochs=1, folder=tmp_path)
    saved = bpfree.load(tmp_path, rule=Backprop(mlp(PICTURES), PICTURES))
    with pytest.raises(UsageError, match="raw inputs of this task lie in") as caught:
        saved.predict(given)
    assert fix in caught.value.fix
    assert caught.value.where == "predict"
    saved.predict(trained[:1] * 0)  # black in every dtype and scale
    with pytest.raises(UsageError, match="raw inputs of this task lie in") as caught:
        task_of(PICTURES, split, test=Split(given, split.targets))
    assert "test split" in caught.value.where


def test_dark_integer_images_say_which_value_is_white(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pictures().numpy()[:, 0] // 15, y=labels(96, 4).numpy())
    with pytest.raises(UsageError, match=r"largest value of the images .* is 15"):
        Task.from_source(NPZ, ArraysConfig(str(tmp_path / "d.npz")))
    task = Task.from_source(NPZ, ArraysConfig(str(tmp_path / "d.npz"), scale=15.0))
    assert task.spec.normalise(task.train.inputs).max() == 1


def test_a_checkpoint_from_before_there_was_a_scale_means_what_it_meant(tmp_path: Path) -> None:
    task = task_of(PICTURES, Split(pictures(), labels(96, 4)))
    train(task, epochs=1, folder=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = dict(read_checkpoint(path))
    new = bpfree.load(tmp_path, rule=Backprop(mlp(PICTURES), PICTURES))
    content["task"] = {key: value for key, value in content["task"].items() if key not in ("scale", "limits")}
    write_checkpoint(path, content)
    old = bpfree.load(tmp_path, rule=Backprop(mlp(PICTURES), PICTURES))
    assert (old.spec.scale, new.spec.scale) == (None, 255.0)
    assert torch.equal(old.predict(pictures()), new.predict(pictures()))
    assert torch.equal(old.predict(pictures().float() / 255), old.predict(pictures()))  # floats in [0, 1], as it took them
    with pytest.raises(UsageError, match="pixels, or numbers"):
        old.predict(pictures().long())


@pytest.mark.parametrize("rule", [Backprop, DFA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["classes", "soft", "real"])
def test_networks_and_inputs_of_other_floating_dtypes_train_and_predict(rule: type[Any], dtype: torch.dtype, kind: Any) -> None:
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    targets = {"classes": labels(), "soft": rows.softmax(1), "real": rows}[kind]
    config = TrainConfig(budget=BudgetConfig(epochs=2), device="cpu", batch_size=16)
    if kind == "classes":
        config.evaluation.protocols = ["nearest-centroid"]
    for inputs in (vectors(), vectors().to(dtype)):
        task = task_of(dataclasses.replace(FLAT, targets=kind), Split(inputs, targets))
        made = rule(mlp(task.spec).to(dtype), task.spec)
        run = Trainer(made, task, config).fit()
        assert run.status == "finished"
        assert len(task.fingerprint()) == 16
        assert next(made.parameters()).dtype == dtype


def test_a_double_network_sees_its_inputs_in_double_precision() -> None:
    """Oracle: the inputs normalised in float64 by hand; float32 would be off by 1e-8."""
    spec, x = dataclasses.replace(FLAT, mean=(0.1,), std=(0.3,)), vectors().double()
    batch = next(iter(Loader(Split(x, labels()), spec, batch_size="all", device=torch.device("cpu"), dtype=torch.float64)))
    torch.testing.assert_close(batch.inputs, (x - 0.1) / 0.3, rtol=1e-15, atol=0)
    assert torch.equal(batch.inputs, spec.normalise(x, torch.float64))


def test_predict_takes_bfloat16_for_a_float32_network(tmp_path: Path) -> None:
    task = task_of(FLAT, Split(vectors(), labels()))
    train(task, epochs=1, folder=tmp_path)
    saved = bpfree.load(tmp_path, rule=Backprop(mlp(FLAT), FLAT))
    few = vectors()[:4].bfloat16()
    assert torch.equal(saved.predict(few), saved.predict(few.float()))


# --- numbers that are not finite, or not there ----------------------------------------------------------------------------


def holed(value: float, places: list[tuple[int, int]]) -> Tensor:
    x = vectors()
    for row, column in places:
        x[row, column] = value
    return x


HOLES = [(0, 0), (0, 3), (7, 1)]


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")])
@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_inputs_that_are_not_finite_are_counted_before_training(value: float, kind: str, name: str) -> None:
    splits = {key: Split(vectors(), labels()) for key in ("train", "validation", "test")}
    splits[name] = Split(holed(value, HOLES), labels())
    with pytest.raises(UsageError, match=rf"x_{name} holds 3 values that are {kind} \(in 2 of 60 rows\)") as caught:
        Task(FLAT, **splits)
    assert f"{name} split" in caught.value.where


def test_not_finite_arrays_are_named_as_in_their_file(tmp_path: Path) -> None:
    x = holed(float("nan"), HOLES).numpy()
    np.savez(tmp_path / "a.npz", x=x, y=labels().numpy())
    with pytest.raises(UsageError, match=r"^x holds 3 values that are NaN \(in 2 of 60 rows\)"):
        Task.from_source(NPZ, ArraysConfig(str(tmp_path / "a.npz")))
    np.savez(tmp_path / "b.npz", x_train=vectors(), y_train=labels(), x_test=x, y_test=labels())
    with pytest.raises(UsageError, match=r"^x_test holds 3 values that are NaN"):
        Task.from_source(NPZ, ArraysConfig(str(tmp_path / "b.npz")))
    np.savez(tmp_path / "c.npz", x=vectors(), y=np.where(np.arange(60) == 5, np.nan, 0.5))
    with pytest.raises(UsageError, match=r"^y holds 1 value that is NaN \(in 1 of 60 rows\)"):
        NPZ.spec(ArraysConfig(str(tmp_path / "c.npz")), None)
    np.savez(tmp_path / "d.npz", x=np.full((60, 2), 1e300), y=labels())
    with pytest.raises(UsageError, match="infinite"):
        Task.from_source(NPZ, ArraysConfig(str(tmp_path / "d.npz")))


def test_every_kind_of_number_that_is_not_finite_is_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfree.tasks.check.CHUNK", 16)
    x = holed(float("nan"), HOLES)
    x[59, 4] = x[58, 4] = float("inf")
    assert not_finite(x, "x") == "x holds 3 values that are NaN and 2 values that are infinite (in 4 of 60 rows)"
    assert not_finite(vectors(), "x") is None
    assert not_finite(torch.arange(5), "x") is None


@pytest.mark.parametrize("spec", [REAL, SOFT])
def test_targets_that_are_not_finite_are_counted(spec: TaskSpec) -> None:
    rows = torch.full((60, spec.outputs), 1 / spec.outputs)
    rows[3, 1] = float("nan")
    with pytest.raises(UsageError, match=r"y_train holds 1 value that is NaN \(in 1 of 60 rows\)"):
        task_of(spec, Split(vectors(), rows))


class Broken(Backprop):
    """Scores are NaN for some examples, in the column of their class or in another one."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator).clone()
        scores[:3, 0] = self.filling
        return scores

    filling = float("nan")


def batches_of(spec: TaskSpec, targets: Tensor) -> Loader:
    return Loader(Split(vectors(), targets), spec, batch_size=20, device=torch.device("cpu"))


@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_have_no_accuracy(filling: float, caplog: pytest.LogCaptureFixture) -> None:
    """argmax takes NaN for the largest: those labelled 0 were right. Oracle: 3 rows in each of 3 batches of 20."""
    rule = Broken(mlp(FLAT), FLAT)
    rule.filling = filling
    result = evaluate(rule, batches_of(FLAT, labels()), torch.Generator(), draws=2, each_draw=True)
    assert not any("accuracy" in name for name in result)
    assert not np.isfinite(result["loss"])
    assert "15.00 %" in caplog.text
    assert not FLAT.correct(torch.full((3, 3), float("nan")), torch.tensor([0, 1, 2])).any()
    rule.filling = -float("inf")  # a class that is ruled out
    assert 0 <= evaluate(rule, batches_of(FLAT, labels() % 2 + 1), torch.Generator())["accuracy"] <= 1


def test_a_run_whose_scores_are_no_numbers_diverges() -> None:
    """On validation, where there is one; and else in the test."""
    task = task_of(FLAT, Split(vectors(), labels()), validation=Split(vectors(), labels()))

    class BrokenInTheEnd(Broken):
        def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
            return super().predict(inputs, generator) if self.final_prediction else self.network(inputs)

    for kind, epochs in ((Broken, 0), (BrokenInTheEnd, 2)):
        config = TrainConfig(budget=BudgetConfig(epochs=2), device="cpu", batch_size=16)
        run = Trainer(kind(mlp(FLAT), FLAT), task, config).fit()
        assert run.status == "diverged"
        assert "loss is nan" in run.reason
        assert "test/accuracy" not in run.result
        assert sum("val/accuracy" in metrics for metrics in run.history) == epochs


def test_evaluate_says_that_scores_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["train", "rule=backprop", "budget.epochs=1", "tracking.enabled=false", "pictures.every=0"]) == 0
    (path,) = tmp_path.glob("runs/*/checkpoints/last.pt")
    content = dict(read_checkpoint(path))
    for weights in content["weights"].values():
        weights.fill_(float("nan"))
    write_checkpoint(path, content)
    capsys.readouterr()
    assert command(["evaluate", str(path)]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert "outputs are NaN or infinite for 100.00 %" in caplog.text


# --- labels ---------------------------------------------------------------------------------------------------------------


def spec_of(folder: Path, y: Any, **options: Any) -> TaskSpec:
    np.savez(folder / "set.npz", x=vectors(len(y)).numpy(), y=y)
    return NPZ.spec(ArraysConfig(str(folder / "set.npz"), **options), None)


CLASSES = np.arange(60) % 3


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (CLASSES - 1, "20 of 60 are negative"),
        (CLASSES + 1, "the labels are 1, 2, 3, but classes are counted from 0"),
        (np.array([0, 1, 7])[CLASSES], "the labels are 0, 1, 7, but classes have no gaps"),
        (CLASSES * 0, "nothing to tell apart"),
        (CLASSES * 0 + 4, "nothing to tell apart"),
        (CLASSES.astype(np.float32), "whole numbers stored as floats"),
        ((CLASSES - 1.0), "whole numbers stored as floats"),
        (np.eye(3, dtype=np.int64)[CLASSES], "rows of 0 and 1"),
        (np.eye(3)[CLASSES], "rows of 0 and 1"),
        (np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])[CLASSES], "rows of 0 and 1"),
        (np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)[CLASSES], "rows of 0 and 1"),
        (np.array([[1.0, 1.0], [0, 1], [0, 0]])[CLASSES], "rows of 0 and 1"),
        (np.array([[4, 1], [0, 2], [7, 0]])[CLASSES], "rows of integers"),
        (np.array(["cat", "dog", "owl"])[CLASSES], "has dtype <U3, expected numbers"),
    ],
)
def test_labels_that_can_be_read_in_several_ways_are_refused(y: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        spec_of(tmp_path, y)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("y", "said", "outputs"),
    [
        (CLASSES.astype(np.float64), "classes", 3),
        (np.eye(3)[CLASSES], "classes", 3),
        (np.eye(3, dtype=np.int8)[CLASSES], "classes", 3),
        (np.eye(3)[CLASSES], "soft", 3),
        (np.eye(3, dtype=np.int8)[CLASSES], "soft", 3),
        (CLASSES - 1, "real", 1),
        (CLASSES.astype(np.float32), "real", 1),
        (np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])[CLASSES], "real", 3),
        (CLASSES == 1, "auto", 2),
        (CLASSES[:, None], "auto", 3),
    ],
)
def test_targets_are_what_is_said(y: Any, said: Any, outputs: int, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, y, targets=said)
    assert (spec.targets, spec.outputs) == ("classes" if said == "auto" else said, outputs)
    train, test = NPZ.load(ArraysConfig(str(tmp_path / "set.npz"), targets=said), None)
    assert train.targets is not None
    assert test.targets is not None
    found = np.sort(torch.cat([train.targets, test.targets]).numpy().astype(float), axis=0)
    wanted = y if spec.targets != "classes" or y.ndim == 1 else y[:, 0] if y.shape[1] == 1 else y.argmax(1)
    np.testing.assert_array_equal(found, np.sort(np.asarray(wanted, float).reshape(found.shape), axis=0))
    assert spec_of(tmp_path, y, targets=said).targets == task_of(spec, train, test).spec.targets


@pytest.mark.parametrize(
    ("y", "said", "message"),
    [
        (CLASSES - 1, "classes", "the labels are -1, 0, 1"),
        (CLASSES - 1.0, "classes", "the labels are -1, 0, 1"),
        (CLASSES + 0.5, "classes", "fractions"),
        (np.array([[1, 1], [0, 1]])[CLASSES % 2], "classes", "one-hot"),
        (CLASSES.astype(float), "soft", "sum to one"),
    ],
)
def test_what_is_said_of_targets_must_be_true(y: Any, said: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(tmp_path, y, targets=said)


def test_the_number_of_classes_can_be_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    y = np.array([0, 1, 7])[CLASSES]
    assert spec_of(tmp_path, y, classes=9).outputs == 9
    task = Task.from_source(NPZ, ArraysConfig(str(tmp_path / "set.npz"), classes=9))
    assert [record.getMessage() for record in caplog.records] == ["task npz: 6 of 9 classes never occur in training (2, 3, 4, 5, 6, 8)"], (
        task.spec
    )
    with pytest.raises(UsageError, match="but 7 classes are 0 to 6"):
        spec_of(tmp_path, y, classes=7)


def test_labels_that_are_met_first_in_the_test_are_told(caplog: pytest.LogCaptureFixture) -> None:
    spec = dataclasses.replace(FLAT, outputs=5)
    caplog.set_level(logging.WARNING, logger="bpfree")
    task_of(spec, Split(vectors(), labels(60, 4)), test=Split(vectors(), labels(60, 5)))
    assert caplog.messages == ["task flat: 1 of 5 classes never occur in training (4); 12 of 60 test examples are of these"]
    caplog.clear()
    task_of(FLAT, Split(vectors(), labels()))
    assert not caplog.messages


# --- splits beside their spec ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        (FLAT, Split(vectors(), labels(61)), "60 inputs and 61 targets"),
        (FLAT, Split(vectors(61), labels()), "61 inputs and 60 targets"),
        (FLAT, Split(vectors(0), labels(0)), "holds no examples"),
        (FLAT, Split(torch.randn(60, 6), labels()), "inputs have shape"),
        (FLAT, Split(torch.randn(60, 5, 1), labels()), "inputs have shape"),
        (FLAT, Split(torch.randn(60, 5, dtype=torch.complex64), labels()), "complex"),
        (FLAT, Split(vectors(), None), "no targets"),
        (dataclasses.replace(FLAT, targets="none"), Split(vectors(), labels()), "has targets"),
        (FLAT, Split(vectors(), labels()[:, None]), "classes are"),
        (FLAT, Split(vectors(), labels().float()), "classes are integers"),
        (FLAT, Split(vectors(), labels() + 1), "the labels 1, 2, 3, but classes of 3 outputs are 0 to 2"),
        (FLAT, Split(vectors(), labels() - 1), "the labels -1, 0, 1"),
        (FLAT, Split(vectors(), labels(60, 20)), r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(20 of them\)"),
        (FLAT, Split(vectors(), labels() * 0), "nothing to tell apart"),
        (SOFT, Split(vectors(), labels()), "expected"),
        (SOFT, Split(vectors(), torch.ones(60, 3)), "do not sum to one"),
        (SOFT, Split(vectors(), torch.tensor([1.5, -0.5, 0.0]).repeat(60, 1)), "below 0"),
        (SOFT, Split(vectors(), torch.eye(3, dtype=torch.long)[labels()]), "expected floats"),
        (REAL, Split(vectors(), torch.randn(60, 3)), "expected"),
        (dataclasses.replace(REAL, outputs=1), Split(vectors(), torch.randn(60)), "expected"),
        (REAL, Split(vectors(), torch.ones(60, 2, dtype=torch.long)), "expected floats"),
    ],
)
def test_a_split_beside_its_spec_is_refused(spec: TaskSpec, split: Split, message: str) -> None:
    """As a training split, which needs a second class; and all else as a test split, too."""
    with pytest.raises(UsageError, match=message):
        task_of(spec, split)
    good = {
        "classes": Split(vectors(), labels()),
        "soft": Split(vectors(), torch.full((60, 3), 1 / 3)),
        "real": Split(vectors(), torch.randn(60, spec.outputs)),
        "none": Split(vectors(), None),
    }[spec.targets]
    task_of(spec, good)
    if "apart" not in message:
        with pytest.raises(UsageError, match=message):
            task_of(spec, good, test=split)


def test_a_source_with_more_labels_than_pictures_is_refused() -> None:
    """Before the validation split is cut, which would drop them without a word."""

    def source(extra: int, validation: float) -> Task:
        parts = Split(vectors(), labels(60 + extra)), Split(vectors(), labels())
        return Task.from_source(bpfree.tasks.DataSource(lambda config, root: FLAT, lambda config, root: parts), validation=validation)

    assert len(source(0, 0.1).train) == 54
    for validation in (0.0, 0.1):
        with pytest.raises(UsageError, match="60 inputs and 61 targets"):
            source(1, validation)


def test_what_is_no_tensor_is_refused() -> None:
    good = Split(vectors(), labels())
    with pytest.raises(UsageError, match="the test split is no Split but TensorDataset"):
        Task(FLAT, good, None, torch.utils.data.TensorDataset(vectors(), labels()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the targets of the train split are no tensor but list"):
        task_of(FLAT, Split(vectors(), labels().tolist()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="inputs are no tensor but ndarray"):
        check_inputs(FLAT, vectors().numpy(), "predict")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"targets": "labels"}, {"outputs": 0}, {"std": (0.0,)}, {"mean": (1.0, 2.0)}, {"scale": 0.0}])
def test_a_spec_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        dataclasses.replace(FLAT, **options)


def test_a_spec_with_a_loss_of_its_own_decides_what_targets_are() -> None:
    class Sequences(TaskSpec):
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            assert batch.targets is not None
            return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten())

    split = Split(vectors(), torch.randint(0, 3, (60, 5)))
    task_of(Sequences("text", (5,), 3), split)
    with pytest.raises(UsageError, match="classes are"):
        task_of(FLAT, split)
    with pytest.raises(UsageError, match="61 inputs"):
        task_of(Sequences("text", (5,), 3), Split(vectors(61), split.targets))


@pytest.mark.parametrize(
    ("spec", "outputs", "targets"),
    [
        (dataclasses.replace(REAL, outputs=1), torch.randn(8, 1), torch.randn(8)),
        (FLAT, torch.randn(3, 3), torch.randint(0, 3, (3, 5))),
    ],
)
def test_nothing_is_broadcast_in_a_loop_of_ones_own(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> None:
    batch = Batch(vectors(len(outputs)), targets)
    with pytest.raises(BpfreeError, match="outputs have shape"):
        spec.error(outputs, batch)
    with pytest.raises(BpfreeError, match="outputs have shape"):
        spec.loss(outputs, batch) if spec.targets == "real" else spec.correct(outputs, targets)


@pytest.mark.parametrize("spec", [FLAT, SOFT, REAL])
def test_a_readout_of_another_size_is_refused(spec: TaskSpec) -> None:
    def network(outputs: int) -> Network:
        return Network({"a": nn.Linear(5, 4), "b": nn.Linear(4, outputs)}, input_shape=(5,), readout="b")

    Backprop(network(spec.outputs), spec)
    for wrong in (spec.outputs - 1, spec.outputs + 1):
        with pytest.raises(UsageError, match=f"outputs of shape \\({wrong},\\), but the task has {spec.outputs}"):
            Backprop(network(wrong), spec)


def test_a_rule_built_for_another_task_is_refused() -> None:
    task = task_of(FLAT, Split(vectors(), labels()))
    for change in ({"outputs": 4}, {"targets": "soft"}, {"input_shape": (6,)}):
        spec = dataclasses.replace(FLAT, **change)
        with pytest.raises(UsageError, match="the rule was built for"):
            Trainer(Backprop(mlp(spec), spec), task, TrainConfig(device="cpu"))
    grid = Network({"a": nn.Linear(5, 4), "b": nn.Linear(4, 2)}, input_shape=(5,), readout="b")
    shaped = task_of(REAL, Split(vectors(), torch.randn(60, 1, 2)))
    with pytest.raises(UsageError, match=r"\(2,\), but the targets have \(1, 2\)"):
        Trainer(Backprop(grid, REAL), shaped, TrainConfig(device="cpu"))


def test_a_run_on_data_beside_their_spec_exits_2_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "task=npz", "task.path=a.npz", "tracking.enabled=false", "pictures.every=0", "budget.epochs=1"]
    x = vectors().numpy()
    np.savez("a.npz", x_train=x, y_train=CLASSES, x_test=holed(float("nan"), HOLES).numpy(), y_test=CLASSES)
    assert command(words) == 2
    np.savez("a.npz", x=x, y=CLASSES - 1)
    assert command(words) == 2
    np.savez("a.npz", x=x[:3], y=CLASSES[:3])  # a fifth of them is none
    assert command([*words, "task.validation=0"]) == 2
    np.savez("a.npz", x=x, y=CLASSES)
    assert command(words) == 0


def test_evaluate_checks_another_task_against_the_one_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("u.npz", x=pictures().numpy(), y=labels(96, 4).numpy())
    np.savez("f.npz", x=pictures().numpy() / 255, y=labels(96, 4).numpy())
    words = ["task=npz", "task.path=u.npz", "tracking.enabled=false", "pictures.every=0", "budget.epochs=1"]
    assert command(["train", *words]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    parsed = bpfree.config.parse_words(["task.path=f.npz"])
    assert score(str(run))[0]["examples"]
    with pytest.raises(UsageError, match="raw inputs of this task lie in 0 to 255"):
        score(str(run), parsed)


def test_one_of_the_readouts_inputs_alone_can_be_checked() -> None:
    check_inputs(FLAT, vectors(), "here")
    check_split(FLAT, Split(vectors(), labels() * 0), "validation")  # one class is enough to be scored
    with pytest.raises(UsageError, match=r"expected \(N, 5\)") as caught:
        check_inputs(FLAT, vectors()[0], "here")
    assert "x[None]" in caught.value.fix


def test_the_check_is_cheap() -> None:
    """Less than a tenth of a second of one core for 60,000 pictures in bytes, and once per task."""
    images = torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8)
    split = Split(images, torch.arange(60_000) % 10)
    spec = TaskSpec("mnist", (1, 28, 28), 10, scale=255.0)
    since = time.process_time()
    Task(spec, split, None, split)
    assert time.process_time() - since < 0.1


def test_a_last_batch_of_one_that_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """61 examples in batches of 20."""
    caplog.set_level(logging.WARNING, logger="bpfree")
    said = "the last batch of one example is left out of each epoch: batch_size=20"
    for count, expected in ((60, []), (61, [said]), (62, [])):
        caplog.clear()
        split = Split(vectors(count), labels(count))
        config = TrainConfig(budget=BudgetConfig(epochs=2), device="cpu", batch_size=20)
        Trainer(Backprop(mlp(FLAT), FLAT), task_of(FLAT, split), config).fit()
        assert caplog.messages == expected
    loader = Loader(Split(vectors(61), labels(61)), FLAT, batch_size=20, device=torch.device("cpu"))
    assert loader.left_out == 0  # evaluation leaves out nothing
