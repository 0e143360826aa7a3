"""The task hf. Oracle: the columns of a stub of the library, and where it is installed, what it saves."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpfree import BpfreeError, Task, UsageError
from bpfree.tasks.huggingface import HF, HuggingFaceConfig
from bpfree.tasks.splits import DatasetSplit

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)


def feature(kind: str, **fields: Any) -> Any:
    return type(kind, (), fields)()


class Columns:
    """What the task asks of a data set: features, rows and columns."""

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features, self.columns = features, columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: column[key] for name, column in self.columns.items()}


def pictures(first: int, last: int) -> Columns:
    features = {"image": feature("Image"), "label": feature("ClassLabel", names=["no", "yes"]), "note": feature("Value", dtype="string")}
    images = [Image.fromarray(each) for each in PIXELS[first:last]]
    return Columns(features, {"image": images, "label": [place % 2 for place in range(first, last)], "note": [""] * (last - first)})


def vectors(**targets: Any) -> Columns:
    features = {"x": feature("Sequence"), **{name: kind for name, (kind, _) in targets.items()}}
    return Columns(features, {"x": PIXELS[:, 0, 0].tolist(), **{name: values for name, (_, values) in targets.items()}})


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A stub of the library with one saved set, and no network."""
    stub = types.ModuleType("datasets")

    def absent(name: str, configuration: str | None) -> Any:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore")

    stub.saved = None  # type: ignore[attr-defined]
    stub.load_from_disk = lambda path: stub.saved  # type: ignore[attr-defined]
    stub.load_dataset = absent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_pictures_and_class_labels(keep: str, library: Any, tmp_path: Path) -> None:
    library.saved = {"train": pictures(0, 20), "validation": pictures(20, 24), "test": pictures(24, 30)}
    task = Task.from_source(HF, HuggingFaceConfig(path=str(tmp_path), keep=keep))  # type: ignore[arg-type]
    assert (task.spec.input_shape, task.spec.class_names, task.spec.scale) == ((3, 5, 6), ("no", "yes"), 255)
    assert isinstance(task.train, DatasetSplit) == (keep == "files")
    for split, (first, last) in zip((task.train, task.validation, task.test), ((0, 20), (20, 24), (24, 30)), strict=True):
        assert split is not None
        inputs, targets = split.batch(torch.arange(len(split)))
        np.testing.assert_array_equal(inputs.numpy(), PIXELS[first:last].transpose(0, 3, 1, 2))
        assert targets is not None
        assert targets.tolist() == [place % 2 for place in range(first, last)]


def test_one_set_without_splits_has_a_fixed_fifth_as_test(library: Any, tmp_path: Path) -> None:
    library.saved = pictures(0, 30)
    task = Task.from_source(HF, HuggingFaceConfig(path=str(tmp_path), size=[4]), validation=0)
    assert (len(task.train), len(task.test), task.spec.input_shape) == (24, 6, (3, 4, 4))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (feature("Value", dtype="float32"), [0.5 * place for place in range(30)], "real"),
        (feature("Value", dtype="int64"), [place % 3 for place in range(30)], "classes"),
    ],
)
def test_arrays_and_numbers(kind: Any, values: list[Any], expected: str, library: Any, tmp_path: Path) -> None:
    library.saved = vectors(y=(kind, values))
    task = Task.from_source(HF, HuggingFaceConfig(path=str(tmp_path), target="y"), validation=0)
    assert (task.spec.targets, task.spec.outputs) == (expected, 1 if expected == "real" else 3)
    rows = torch.cat([split.batch(torch.arange(len(split)))[0] for split in (task.train, task.test)])
    assert sorted(rows.tolist()) == sorted(PIXELS[:, 0, 0].astype(np.float32).tolist())


def test_columns_that_are_not_clear_are_refused(library: Any, tmp_path: Path) -> None:
    kind = feature("ClassLabel", names=["a", "b"])
    library.saved = vectors(y=(kind, [0, 1] * 15), z=(kind, [1, 0] * 15))
    with pytest.raises(UsageError, match=r"which column is the target\? The set has x \(Sequence\), y \(ClassLabel\), z"):
        HF.spec(HuggingFaceConfig(path=str(tmp_path)), None)
    assert HF.spec(HuggingFaceConfig(path=str(tmp_path), target="z"), None).outputs == 2
    with pytest.raises(UsageError, match="no column 'q'"):
        HF.spec(HuggingFaceConfig(path=str(tmp_path), target="q"), None)
    library.saved = pictures(0, 30)
    with pytest.raises(UsageError, match="note holds Value, neither pictures nor arrays"):
        HF.spec(HuggingFaceConfig(path=str(tmp_path), input="note"), None)
    library.saved = vectors(y=(kind, [0, -1] * 15))
    with pytest.raises(UsageError, match="no classes from 0"):
        HF.load(HuggingFaceConfig(path=str(tmp_path)), None)


def test_a_set_that_is_not_here_is_one_error(library: Any) -> None:
    with pytest.raises(BpfreeError, match=r"no such data set on this machine: Couldn't reach 'some/set' on the Hub\n") as caught:
        HF.spec(HuggingFaceConfig(path="some/set"), None)
    assert "save_to_disk" in caught.value.fix
    with pytest.raises(UsageError, match="needs a data set"):
        HF.spec(HuggingFaceConfig(), None)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BpfreeError, match="needs the library datasets") as caught:
        HF.spec(HuggingFaceConfig(path="some/set"), None)
    assert "bpfree[hf]" in caught.value.fix


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the library datasets (extra hf) is not installed")
def test_what_the_library_saves_is_read(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    columns = {"image": [Image.fromarray(each) for each in PIXELS], "label": [place % 2 for place in range(30)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=kinds)}).save_to_disk(str(tmp_path / "set"))
    train, _ = HF.load(HuggingFaceConfig(path=str(tmp_path / "set")), None)  # type: ignore[misc]
    kept = {bytes(row.numpy().tobytes()) for row in train.batch(torch.arange(24))[0]}
    assert kept < {np.ascontiguousarray(row.transpose(2, 0, 1)).tobytes() for row in PIXELS}
