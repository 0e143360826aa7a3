"""The task folder. Oracles: the pixels that were written, torchvision's ImageFolder, and torchvision's resize of a picture of PIL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional

from bpfree import Task, UsageError
from bpfree.cli.output import print_result
from bpfree.config import parse_words, resolve
from bpfree.runner import run
from bpfree.summary import summary
from bpfree.tasks.folders import FOLDER, FolderConfig
from bpfree.tasks.loading import Loader
from bpfree.tasks.splits import DatasetSplit, Split

CLASSES = ("ant", "bee", "cat")
RNG = np.random.default_rng(0)
Array = np.ndarray[Any, np.dtype[np.uint8]]


def write(folder: Path, count: int = 5, shape: tuple[int, ...] = (6, 9, 3), classes: tuple[str, ...] = CLASSES) -> Array:
    """Pictures in folders of classes; gives their pixels, in the order of the files."""
    pixels = RNG.integers(0, 256, (len(classes) * count, *shape), dtype=np.uint8)
    for place, picture in enumerate(pixels):
        (folder / classes[place // count]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / classes[place // count] / f"{place:03}.png")
    return pixels


def task(folder: Path, *, validation: float = 0, **options: Any) -> Task:
    return Task.from_source(FOLDER, FolderConfig(path=str(folder), **options), validation=validation, normalise="none")


@pytest.mark.parametrize("keep", ["memory", "files"])
@pytest.mark.parametrize("shape", [(6, 9, 3), (6, 9)], ids=["rgb", "grey"])
def test_what_was_written_is_read_pixel_for_pixel(keep: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    parts = {name: write(tmp_path / name, count, shape) for name, count in (("train", 7), ("val", 2), ("test", 3))}
    made = task(tmp_path, keep=keep)
    assert (made.spec.input_shape, made.spec.class_names) == (((1 if len(shape) == 2 else 3), 6, 9), CLASSES)
    for split, pixels in zip((made.train, made.validation, made.test), parts.values(), strict=True):
        assert isinstance(split, Split if keep == "memory" else DatasetSplit)
        inputs, targets = split.batch(torch.arange(len(split)))
        expected = pixels[:, None] if len(shape) == 2 else pixels.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(inputs.numpy(), expected)
        assert inputs.dtype == torch.uint8
        assert targets is not None
        assert targets.tolist() == [label for label in range(3) for _ in range(len(pixels) // 3)]


def test_classes_and_order_are_those_of_torchvision(tmp_path: Path) -> None:
    write(tmp_path, 4, classes=("10", "2", "x", "A"))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").rmdir()
    theirs = ImageFolder(str(tmp_path))
    train, test = FOLDER.load(FolderConfig(path=str(tmp_path)), None)  # type: ignore[misc]
    assert FOLDER.spec(FolderConfig(path=str(tmp_path)), None).class_names == tuple(theirs.classes)
    assert sorted([*train.targets.tolist(), *test.targets.tolist()]) == [label for _, label in theirs.samples]  # type: ignore[union-attr]


def test_pictures_of_several_sizes_are_resized_as_torchvision_does(tmp_path: Path) -> None:
    for name, shape in (("ant", (20, 31, 3)), ("bee", (9, 12, 3))):
        (tmp_path / name).mkdir()
        for place in range(5):
            Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name / f"{place}.png")
    with pytest.raises(UsageError, match="9 x 12 pixels, but the first one has 20 x 31") as caught:
        task(tmp_path)
    assert "task.size=[20,31]" in caught.value.fix
    made = FOLDER.load(FolderConfig(path=str(tmp_path), size=[8]), None)[0].batch(torch.arange(1))[0][0]
    paths = sorted(tmp_path.rglob("*.png"))
    candidates = [functional.pil_to_tensor(functional.resize(Image.open(path), [8, 8])) for path in paths]
    assert any(torch.equal(made, candidate) for candidate in candidates)
    assert task(tmp_path, size=[8, 10]).spec.input_shape == (3, 8, 10)


def test_files_on_demand_are_the_same_task_as_in_memory(tmp_path: Path) -> None:
    write(tmp_path, 12)
    batches = []
    for keep in ("memory", "files"):
        made = Task.from_source(FOLDER, FolderConfig(path=str(tmp_path), keep=keep), validation=0.2)  # type: ignore[arg-type]
        loader = Loader(made.train, made.spec, batch_size=5, device=torch.device("cpu"), seed=3)
        batches.append((made.spec, list(loader.batches(1))))
    (spec, first), (other, second) = batches
    assert spec == other
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.targets, two.targets)  # type: ignore[arg-type]


def test_constants_are_those_of_the_training_pictures_by_default(tmp_path: Path) -> None:
    write(tmp_path, 12)
    made = Task.from_source(FOLDER, FolderConfig(path=str(tmp_path)), validation=0.2)
    pixels = made.train.batch(torch.arange(len(made.train)))[0].double().numpy() / 255
    np.testing.assert_allclose(made.spec.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(made.spec.std, pixels.std((0, 2, 3)))


def test_a_fingerprint_is_of_what_is_in_the_files(tmp_path: Path) -> None:
    pixels = write(tmp_path, 6)
    before = task(tmp_path, keep="files").fingerprint()
    assert task(tmp_path, keep="files").fingerprint() == before
    Image.fromarray(255 - pixels[0]).save(tmp_path / "ant" / "000.png")
    assert task(tmp_path, keep="files").fingerprint() != before
    assert len(FOLDER.files(FolderConfig(path=str(tmp_path)), None)) == 18  # type: ignore[misc]


def test_validation_pictures_are_the_test_split_where_there_is_no_other(tmp_path: Path) -> None:
    write(tmp_path / "train", 6)
    pixels = write(tmp_path / "val", 2)
    made = task(tmp_path, validation=0.2)
    assert made.validation is not None
    assert len(made.validation) + len(made.train) == 18
    np.testing.assert_array_equal(made.test.batch(torch.arange(6))[0].numpy(), pixels.transpose(0, 3, 1, 2))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, 5, classes=("bus", "car", "train"))
    assert task(tmp_path).spec.class_names == ("bus", "car", "train")


def test_pictures_with_colours_among_grey_ones_are_refused_until_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, 5, (6, 9))
    Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(tmp_path / "cat" / "x.png")
    with pytest.raises(UsageError, match="has colours, but the first one is grey"):
        task(tmp_path)
    assert task(tmp_path, colour="rgb").spec.input_shape == (3, 6, 9)
    assert task(tmp_path, colour="grey").spec.input_shape == (1, 6, 9)


def test_folders_that_are_no_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a folder"):
        FOLDER.spec(FolderConfig(), None)
    with pytest.raises(UsageError, match="no such folder"):
        FOLDER.spec(FolderConfig(path=str(tmp_path / "none")), None)
    with pytest.raises(UsageError, match="0 folders, but there must be one for each class"):
        task(tmp_path)
    (tmp_path / "ant").mkdir()
    (tmp_path / "bee").mkdir()
    with pytest.raises(UsageError, match="hold no picture"):
        task(tmp_path)
    write(tmp_path, 3, classes=("ant",))
    with pytest.raises(UsageError, match="the class bee has no picture"):
        task(tmp_path)


def test_splits_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", 4)
    write(tmp_path / "test", 2, classes=("ant", "dog"))
    with pytest.raises(UsageError, match="the class dog is not in the training split"):
        task(tmp_path)
    (tmp_path / "more").mkdir()
    with pytest.raises(UsageError, match="beside train there is more: a split, or a class"):
        task(tmp_path)


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_a_damaged_picture_is_named(keep: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    path = tmp_path / "bee" / "007.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match="cannot read the picture") as caught:
        task(tmp_path, keep=keep)
    assert str(path) in caught.value.where


def test_a_folder_is_learned_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run classifies bright and dark pictures; its classes have names."""
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for place in range(20):
            Image.fromarray(RNG.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "set" / name / f"{place}.png")
    words = f"task=folder task.path={tmp_path / 'set'} budget.epochs=3 batch_size=8 tracking.enabled=false pictures.every=0"
    recipe = resolve(parse_words([*words.split(), f"output={tmp_path / 'runs'}"]))
    made = run(recipe, quiet=True)
    assert dict(summary(recipe, task := recipe.build_task(), recipe.build_rule(task.spec), made, []))["data"].endswith(
        "2 classes (dark, light)"
    )
    assert made.result["test/accuracy"] == 1.0
    print_result(made)
    assert re.search(r"^classes +dark, light$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("kind", ["plain", "subset"])
def test_a_data_set_of_pictures_is_a_task_in_python(kind: str, tmp_path: Path) -> None:
    """Oracle: the pixels. torchvision's classes give pictures of PIL where they have no transform."""
    pixels = write(tmp_path, 8)
    data: Any = ImageFolder(str(tmp_path))
    task = Task.of(data if kind == "plain" else torch.utils.data.Subset(data, range(24)), data, validation=0)
    assert (task.spec.input_shape, task.spec.outputs, task.spec.scale) == ((3, 6, 9), 3, 255)
    assert task.spec.class_names == (CLASSES if kind == "plain" else ())
    inputs, targets = task.train.batch(torch.arange(24))
    np.testing.assert_array_equal(inputs.numpy(), pixels.transpose(0, 3, 1, 2))
    assert targets is not None
    assert targets.tolist() == data.targets
    assert task.train.targets is not None
