"""Predictions that are kept with a run. Oracles: the trained rule's own scores, computed again, and the run's accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_rules import StopAfter, config_of, rule_on

from bpfree import Batch, Rule, Run, Split, Task, TaskSpec, always
from bpfree.baselines import Backprop
from bpfree.network import MLPConfig, mlp
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.predictions import Collector, Predictions, read_predictions, write_predictions
from bpfree.training.trainer import Interrupted, Trainer

FILE = "predictions.npz"


def trained(rule: Rule, task: Task, folder: Path | None, device: torch.device, **options: Any) -> Run:
    return Trainer(rule, task, config_of(device, **{"budget": BudgetConfig(epochs=1), **options}), folder=folder).fit()


def scores_of(rule: Rule, task: Task, device: torch.device) -> Tensor:
    with torch.no_grad():
        return rule.eval().predict(task.spec.normalise(task.test.inputs).to(device), torch.Generator(device)).cpu()


def test_a_byte_for_each_example_in_the_order_of_the_split(digits: Task, device: torch.device, tmp_path: Path) -> None:
    rule = rule_on(digits)
    run = trained(rule, digits, tmp_path, device)
    found = read_predictions(tmp_path)
    assert found is not None
    expected = scores_of(rule, digits, device).argmax(1).numpy()
    assert digits.test.targets is not None
    assert found.predicted is not None
    assert found.correct is not None
    assert found.predicted.dtype == found.correct.dtype == np.dtype(np.uint8)
    assert found.loss is None
    assert (found.predicted == expected).all()
    assert (found.correct == (expected == digits.test.targets.numpy())).all()
    assert found.target is not None
    assert found.target.dtype == np.uint8
    assert (found.target == digits.test.targets.numpy()).all()
    assert found.correct.mean() == pytest.approx(run.result["test/accuracy"], abs=1e-9)
    assert not found.protocols
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "checkpoints", "events.jsonl"}  # nothing temporary is left


def test_confusions_are_counted_by_true_and_predicted_class(tmp_path: Path) -> None:
    """Counted by hand; a file from before targets were kept has predictions and no confusions."""
    predicted, target = np.array([0, 2, 2, 1, 2], np.uint8), np.array([0, 0, 2, 1, 0], np.uint8)
    kept = Predictions(predicted, (predicted == target).astype(np.uint8), target=target)
    write_predictions(tmp_path / FILE, kept)
    found = read_predictions(tmp_path)
    assert found is not None
    counts = found.confusion(4)
    assert counts is not None
    assert counts.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert Predictions(predicted, kept.correct).confusion(4) is None


def test_protocols_keep_their_decisions(digits: Task, device: torch.device, tmp_path: Path) -> None:
    names = ["linear-probe", "nearest-centroid", "clustering"]
    run = trained(rule_on(digits), digits, tmp_path, device, evaluation=EvaluationConfig(protocols=names))
    found = read_predictions(tmp_path)
    assert found is not None
    assert found.protocols.keys() == {"linear_probe", "nearest_centroid"}  # clusters are matched with classes as a whole
    for name, correct in found.protocols.items():
        assert correct.dtype == np.uint8
        assert correct.mean() == pytest.approx(run.result[f"test/{name}/accuracy"], abs=1e-9)


class Wavering(Backprop):
    draws_of = always(3)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        return scores + 5 * torch.randn(scores.shape, generator=generator, device=scores.device)


def test_of_several_draws_the_share_that_is_right(digits: Task, device: torch.device, tmp_path: Path) -> None:
    run = trained(rule_on(digits, Wavering), digits, tmp_path, device)
    found = read_predictions(tmp_path)
    assert found is not None
    assert found.predicted is not None
    assert found.correct is not None
    assert found.correct.dtype == np.float32
    assert {round(3 * float(share)) for share in found.correct} == {0, 1, 2, 3}
    assert found.correct.mean() == pytest.approx(run.result["test/accuracy"], abs=1e-6)
    assert digits.test.targets is not None
    first = (found.predicted == digits.test.targets.numpy()).mean()
    assert first == pytest.approx(run.result["test/accuracy_draw_1"], abs=1e-9)


class Doubled(TaskSpec):
    """A loss of its own."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return 2 * super().loss(outputs, batch)


@pytest.mark.parametrize(("kind", "factor"), [(TaskSpec, 1), (Doubled, 2)])
def test_the_loss_of_each_example_where_targets_are_real(
    digits: Task, device: torch.device, tmp_path: Path, kind: type[TaskSpec], factor: int
) -> None:
    spec = kind("digits", (1, 8, 8), 2, "real", digits.spec.mean, digits.spec.std)

    def rows(split: Split) -> Split:
        assert split.targets is not None
        return Split(split.inputs, torch.stack([split.targets / 10, split.targets.float().sin()], 1))

    assert digits.validation is not None
    task = Task(spec, rows(digits.train), rows(digits.validation), rows(digits.test))
    rule = Backprop(mlp(spec, MLPConfig(depth=1, width=16)), spec)
    run = trained(rule, task, tmp_path, device)
    found = read_predictions(tmp_path)
    assert found is not None
    assert found.loss is not None
    assert found.predicted is None
    assert found.correct is None
    assert found.loss.dtype == np.float32
    assert task.test.targets is not None
    expected = factor * 0.5 * (scores_of(rule, task, device) - task.test.targets).square().sum(1)
    assert np.allclose(found.loss, expected.numpy(), rtol=1e-5, atol=1e-7)
    assert found.loss.mean() == pytest.approx(run.result["test/loss"], rel=1e-5)


def test_a_run_that_was_interrupted_keeps_the_same_bytes(digits: Task, device: torch.device, tmp_path: Path) -> None:
    trained(rule_on(digits), digits, tmp_path / "straight", device, deterministic=True)
    watch = StopAfter(9)
    config = config_of(device, budget=BudgetConfig(epochs=1), deterministic=True)
    folder = tmp_path / "resumed"
    watch.trainer = Trainer(rule_on(digits), digits, config, folder=folder, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    assert not (folder / FILE).exists()
    for _ in range(2):  # the second time it was finished
        Trainer(rule_on(digits), digits, config, folder=folder).fit(folder / "checkpoints" / "last.pt")
        assert (folder / FILE).read_bytes() == (tmp_path / "straight" / FILE).read_bytes()


def test_nothing_is_kept_of_what_is_not_tested_or_has_no_folder(
    digits: Task, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(rule_on(digits), digits, tmp_path / "trial", device, evaluation=EvaluationConfig(test=False))
    assert read_predictions(tmp_path / "trial") is None
    trained(rule_on(digits), digits, None, device)
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]


def test_a_folder_that_cannot_be_written_costs_the_predictions_alone(
    digits: Task, device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).mkdir()  # in the way
    assert trained(rule_on(digits), digits, tmp_path, device).status == "finished"
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(("outputs", "dtype"), [(256, np.uint8), (257, np.uint16), (65537, np.int32)])
def test_many_classes(outputs: int, dtype: type[Any]) -> None:
    collector = Collector(TaskSpec("many", (1,), outputs))
    collector.begin_draw()
    scores = torch.zeros(2, outputs)
    scores[0, outputs - 1] = scores[1, 3] = 1
    collector.add(scores, Batch(torch.zeros(2, 1), torch.tensor([outputs - 1, 4])))
    found = collector.predictions()
    assert found is not None
    assert found.predicted is not None
    assert found.correct is not None
    assert found.predicted.dtype == dtype
    assert (found.predicted.tolist(), found.correct.tolist()) == ([outputs - 1, 3], [1, 0])


def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    whole = Predictions(np.arange(50, dtype=np.uint8), np.ones(50, dtype=np.uint8))
    path = tmp_path / "predictions.npz"
    assert read_predictions(path) is None
    write_predictions(path, whole)
    content = path.read_bytes()
    found = read_predictions(path)
    assert found is not None
    assert found.predicted is not None
    assert found.predicted.tolist() == list(range(50))
    flipped = bytes([*content[:60], *(255 - byte for byte in content[60:120]), *content[120:]])
    for damaged in (b"", b"nothing", content[:-30], content[: len(content) // 2], flipped):
        path.write_bytes(damaged)
        assert read_predictions(path) is None
    np.savez_compressed(path, predicted=np.zeros(3, dtype=np.uint8))  # half of it
    assert read_predictions(path) is None
    np.savez_compressed(path, predicted=np.zeros(3, dtype=np.uint8), correct=np.zeros(4, dtype=np.uint8))
    assert read_predictions(path) is None
    np.savez_compressed(path, predicted=np.array([object()]), correct=np.zeros(1, dtype=np.uint8))  # pickled
    assert read_predictions(path) is None


class Tolerant(TaskSpec):
    """A loss that is finite whatever the scores are."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs.nan_to_num(), batch)


class Silent(Backprop):
    """Its scores of the first class are no numbers."""

    def predict(self, x: Tensor, generator: torch.Generator) -> Tensor:
        scores = super().predict(x, generator).clone()
        scores[:, 0] = torch.nan
        return scores


def test_scores_that_are_no_numbers_are_not_kept_as_predictions(digits: Task, device: torch.device, tmp_path: Path) -> None:
    spec = Tolerant("digits", (1, 8, 8), 10, "classes", digits.spec.mean, digits.spec.std)
    task = Task(spec, digits.train, digits.validation, digits.test)
    run = trained(Silent(mlp(spec, MLPConfig(depth=1, width=16)), spec), task, tmp_path, device)
    assert run.status == "finished"
    assert "test/loss" in run.result
    assert "test/accuracy" not in run.result
    assert read_predictions(tmp_path) is None


def test_a_flipped_bit_changes_no_prediction(tmp_path: Path) -> None:
    """An archive of NumPy has a checksum of each array: what is damaged is not there, the rest is what was written."""
    path = tmp_path / "predictions.npz"
    written = Predictions(np.arange(200, dtype=np.uint8), np.ones(200, np.uint8))
    write_predictions(path, written)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        found = read_predictions(path)
        if found is not None:
            assert {name: array.tobytes() for name, array in found.arrays().items()} == {
                name: array.tobytes() for name, array in written.arrays().items()
            }
