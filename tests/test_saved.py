"""Trained rules predict from whatever inputs a user has: arrays, lists, one example or many, in batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree
from bpfree import InputPart, TaskSpec, UsageError
from bpfree.baselines import Backprop
from bpfree.network import mlp
from bpfree.saved import Saved
from bpfree.tasks.check import check_inputs
from bpfree.tasks.given import as_batch, as_tensor

GREY = TaskSpec("grey", (1, 4, 5), 3, scale=255.0, limits=(0.0, 255.0), class_names=("cat", "dog", "owl"))
COLOUR = TaskSpec("colour", (3, 4, 5), 3, scale=255.0, limits=(0.0, 255.0))
VECTORS = TaskSpec("vectors", (6,), 2, "real")


def saved_of(spec: TaskSpec, rule: type[bpfree.Rule] = Backprop) -> Saved:
    torch.manual_seed(0)
    return Saved(rule(mlp(spec), spec).eval(), spec, None, Path("runs/mine/checkpoints/last.pt"))


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def reference(saved: Saved, batch: Tensor) -> Tensor:
    """The network on inputs that are normalised by hand: all of these specs have mean 0 and deviation 1."""
    with torch.no_grad():
        return saved.rule.network(batch.float() / (saved.spec.scale or 1.0))


FORMS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: x.numpy(),
    lambda x: x.tolist(),
    lambda x: list(x),
    lambda x: list(x.numpy()),
    lambda x: x.numpy().astype(np.uint16),
    lambda x: x.numpy().astype(">f4"),
    lambda x: x.numpy()[::-1][::-1],
    lambda x: x[:, 0],  # without the axis of channels
    lambda x: x[:, 0, ..., None].numpy(),  # channels last
    lambda x: x.flatten(1).numpy(),
    lambda x: np.lib.stride_tricks.as_strided(x.numpy(), writeable=False),
]


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_any_kind_are_the_same_inputs(form: Callable[[Tensor], Any]) -> None:
    """Oracle: the network itself, on the same pixels as a normalised batch."""
    saved, batch = saved_of(GREY), pixels(7, 1, 4, 5)
    torch.testing.assert_close(saved.predict(form(batch)), reference(saved, batch))
    torch.testing.assert_close(saved.predict(form(batch)[0]), reference(saved, batch[:1]))  # one example


def test_images_of_colour_may_have_their_channels_last() -> None:
    saved, batch = saved_of(COLOUR), pixels(7, 3, 4, 5)
    last = batch.permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(saved.predict(last), reference(saved, batch))
    torch.testing.assert_close(saved.predict(last[0]), reference(saved, batch[:1]))


def test_the_shape_of_training_goes_before_all_others() -> None:
    """(4, 4, 4) could have its channels last too: it is taken as it is."""
    spec, batch = replace(COLOUR, input_shape=(4, 4, 4)), pixels(2, 4, 4, 4)
    assert torch.equal(as_batch(spec, batch, ""), batch)
    assert torch.equal(as_batch(spec, batch[0], ""), batch[:1])


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        (COLOUR, pixels(7, 60)),  # flattened: which order of axes?
        (COLOUR, pixels(7, 4, 5)),
        (COLOUR, pixels(7, 5, 4, 3)),
        (GREY, pixels(7, 3, 4, 5)),
        (GREY, pixels(19)),
        (VECTORS, pixels(7, 5)),
        (VECTORS, pixels(2, 3)),
        (VECTORS, torch.tensor(1.0)),
    ],
)
def test_other_shapes_are_refused_with_both_shapes(spec: TaskSpec, given: Tensor) -> None:
    with pytest.raises(UsageError, match="inputs have shape") as caught:
        saved_of(spec).predict(given.numpy())
    assert str(tuple(given.shape)) in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("given", [[[1, 2], [3]], [torch.zeros(6), torch.zeros(5)], [["a"] * 6], np.array([[None] * 6]), "text"])
def test_what_is_no_batch_of_numbers_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"differ in shape|not numbers"):
        saved_of(VECTORS).predict(given)


def test_inputs_of_several_tensors_come_as_trees_of_arrays() -> None:
    structure = {"nodes": InputPart((-1, 2)), "kind": InputPart((), "integer", 5), "pair": [InputPart((3,)), InputPart((3,), "bool")]}
    spec = TaskSpec("trees", (), 2, structure=structure)
    many = {"nodes": np.zeros((4, 9, 2)), "kind": [1, 2, 3, 4], "pair": [[[1, 2, 3]] * 4, np.ones((4, 3), dtype=bool)]}
    one = {"nodes": np.zeros((9, 2)), "kind": 1, "pair": [[1, 2, 3], np.ones(3, dtype=bool)]}
    for given, count in ((many, 4), (one, 1)):
        batch = as_batch(spec, given, "")
        check_inputs(spec, batch, "")
        assert [tuple(batch["nodes"].shape), tuple(batch["kind"].shape)] == [(count, 9, 2), (count,)]
        assert batch["pair"][1].dtype == torch.bool
    with pytest.raises(UsageError, match="have the parts"):
        check_inputs(spec, as_batch(spec, {"nodes": np.zeros((4, 9, 2))}, ""), "")


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_size_of_batches_makes_no_difference(batch_size: int) -> None:
    saved, batch = saved_of(COLOUR), pixels(7, 3, 4, 5)
    torch.testing.assert_close(saved.predict(batch, batch_size=batch_size), reference(saved, batch))
    assert saved.predict_classes(batch, batch_size=batch_size) == saved.predict_classes(batch)


def test_no_more_than_a_batch_is_computed_at_a_time() -> None:
    saved, seen = saved_of(COLOUR), list[int]()
    saved.rule.network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    assert saved.predict(pixels(7, 3, 4, 5), batch_size=3).shape == (7, 3)
    assert seen == [3, 3, 1]
    assert saved.predict(pixels(0, 3, 4, 5)).shape == (0, 3)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_a_size_of_batches_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match="batch_size="):
        saved_of(VECTORS).predict(torch.zeros(2, 6), batch_size=size)


def test_probabilities_are_the_softmax_of_the_scores() -> None:
    saved, batch = saved_of(GREY), pixels(7, 1, 4, 5)
    found, scores = saved.predict_proba(batch), reference(saved, batch).double().numpy()
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert saved.predict_classes(batch) == [saved.classes[place] for place in expected.argmax(1)]
    assert saved.classes == ("cat", "dog", "owl")


def test_classes_without_names_are_numbers() -> None:
    saved, batch = saved_of(COLOUR), pixels(7, 3, 4, 5)
    assert saved.classes == ("0", "1", "2")
    assert saved.predict_classes(batch) == reference(saved, batch).argmax(1).tolist()


def test_labels_have_a_probability_each() -> None:
    """Oracle: the logistic function of numpy."""
    saved, batch = saved_of(replace(GREY, targets="multilabel")), pixels(7, 1, 4, 5)
    expected = 1 / (1 + np.exp(-reference(saved, batch).double().numpy()))
    np.testing.assert_allclose(saved.predict_proba(batch), expected, rtol=1e-6)
    names = [[name for name, share in zip(saved.classes, row, strict=True) if share > 0.5] for row in expected]
    assert saved.predict_classes(batch) == names


@pytest.mark.parametrize("ask", ["predict_proba", "predict_classes"])
def test_real_targets_have_no_probabilities(ask: str) -> None:
    saved = saved_of(VECTORS)
    assert saved.classes == ()
    with pytest.raises(UsageError, match="has no classes: its targets are real") as caught:
        getattr(saved, ask)(torch.zeros(2, 6))
    assert "use predict" in caught.value.fix


def test_the_names_of_classes_are_kept_with_the_weights(tmp_path: Path) -> None:
    from bpfree.tasks.task import Split, Task
    from bpfree.training.config import BudgetConfig, TrainConfig

    split = Split(pixels(12, 1, 4, 5), torch.arange(12) % 3)
    task = Task(GREY, split, None, split)
    config = TrainConfig(budget=BudgetConfig(epochs=1), device="cpu")
    bpfree.Trainer(Backprop(mlp(GREY), GREY), task, config, folder=tmp_path).fit()
    assert bpfree.load(tmp_path, rule=Backprop(mlp(GREY), GREY)).classes == GREY.class_names


def test_a_saved_rule_shows_itself_in_a_line() -> None:
    assert repr(saved_of(GREY)) == "Saved(Backprop on grey: 1x4x5 -> 3 classes; cpu; runs/mine/checkpoints/last.pt)"


def test_a_saved_rule_moves_between_devices(device: torch.device) -> None:
    saved, batch = saved_of(COLOUR), pixels(7, 3, 4, 5)
    before = saved.predict(batch)
    assert saved.to(device).device.type == device.type
    torch.testing.assert_close(saved.predict(batch).cpu(), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="device"):
        saved.to("abacus")


def test_tensors_keep_their_numbers() -> None:
    for values in (np.arange(3, dtype=np.uint32), np.float32(2.5), [True, False], np.array([1.5], dtype=np.float16)):
        assert as_tensor(values, "").tolist() == np.asarray(values).tolist()
