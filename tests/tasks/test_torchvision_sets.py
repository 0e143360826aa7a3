"""The task torchvision. Oracles: files in torchvision's formats that are written here, and the items of torchvision's own classes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional

from bpfree import BpfreeError, Task, UsageError
from bpfree.config import parse_words, resolve
from bpfree.tasks.splits import DatasetSplit
from bpfree.tasks.torchvision_sets import EMNIST_CLASSES, KNOWN, TORCHVISION, TorchvisionSetConfig

RNG = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


def write_letters(root: Path) -> dict[str, tuple[Any, Any]]:
    """EMNIST's letters, whose classes are 1 to 26, as its files are."""
    made = {}
    for name, count in (("train", 78), ("test", 26)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 26 + 1).astype(np.uint8)
        folder = root / "EMNIST" / "raw"
        write_idx(folder / f"emnist-letters-{name}-images-idx3-ubyte", images)
        write_idx(folder / f"emnist-letters-{name}-labels-idx1-ubyte", labels)
        made[name] = images, labels
    return made


def config(dataset: str, **options: Any) -> TorchvisionSetConfig:
    return TorchvisionSetConfig(dataset=dataset, **options)


def test_letters_are_read_as_they_were_written_with_classes_from_0(tmp_path: Path) -> None:
    made = write_letters(tmp_path)
    chosen = config("EMNIST", options={"split": "letters"})
    task = Task.from_source(TORCHVISION, chosen, root=tmp_path, validation=0)
    assert (task.spec.input_shape, task.spec.outputs, task.spec.class_names[:3]) == ((1, 28, 28), 26, ("a", "b", "c"))
    for split, name in ((task.train, "train"), (task.test, "test")):
        images, targets = split.batch(torch.arange(len(split)))
        np.testing.assert_array_equal(images[:, 0].numpy(), made[name][0])
        assert targets is not None
        np.testing.assert_array_equal(targets.numpy() + 1, made[name][1])
    theirs = datasets.EMNIST(tmp_path, split="letters", train=True)
    image, label = theirs[5]
    assert torch.equal(functional.pil_to_tensor(image), task.train.batch(torch.tensor([5]))[0][0])
    assert theirs.classes[label] == task.spec.class_names[int(task.train.targets[5])]  # type: ignore[index]


def test_sets_of_arrays_are_brought_to_another_size(tmp_path: Path) -> None:
    write_letters(tmp_path)
    chosen = config("EMNIST", options={"split": "letters"}, size=[16], colour="rgb")
    task = Task.from_source(TORCHVISION, chosen, root=tmp_path, validation=0)
    assert task.spec.input_shape == (3, 16, 16) == tuple(task.test.batch(torch.tensor([0]))[0].shape[1:])


@pytest.mark.parametrize("dataset", [*KNOWN, "EMNIST"])
def test_what_is_known_beforehand_needs_no_data(dataset: str, tmp_path: Path) -> None:
    """Oracle: the names in torchvision's classes."""
    for split in EMNIST_CLASSES if dataset == "EMNIST" else [""]:
        spec = TORCHVISION.spec(config(dataset, options={"split": split} if split else {}), tmp_path)
        names = getattr(getattr(datasets, dataset), "classes", None)
        if dataset == "EMNIST":
            names = [name for name in datasets.EMNIST.classes_split_dict[split] if name != "N/A"]
        assert names is None or len(names) == spec.outputs
        assert not spec.class_names or len(spec.class_names) == spec.outputs
    assert not list(tmp_path.iterdir())


class Shapes(torch.utils.data.Dataset[Any]):
    """A set of pictures of PIL of several sizes, as torchvision's newer ones are: made when it is downloaded."""

    classes = ("dark", "light")

    def __init__(self, root: str, split: str = "train", transform: Any = None, download: bool = False) -> None:
        folder = Path(root) / "shapes"
        if download:
            folder.mkdir(exist_ok=True, parents=True)
            for name, count in (("train", 12), ("test", 4)):
                np.save(folder / f"{name}.npy", RNG.integers(0, 256, (count, 6, 7, 3), dtype=np.uint8))
        if not folder.is_dir():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.pixels = np.load(folder / f"{split}.npy")
        self._labels = [place % 2 for place in range(len(self.pixels))]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels[place]), self._labels[place]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> type[Shapes]:
    monkeypatch.setattr(datasets, "Shapes", Shapes, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Shapes"))
    return Shapes


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_a_set_is_downloaded_once_into_the_root(keep: str, shapes: type[Shapes], tmp_path: Path) -> None:
    root = tmp_path / keep
    task = Task.from_source(TORCHVISION, config("Shapes", keep=keep), root=root, validation=0)
    assert [path.name for path in root.iterdir()] == ["shapes"]
    assert isinstance(task.train, DatasetSplit) == (keep == "files")
    again = Task.from_source(TORCHVISION, config("Shapes", keep=keep), root=root, validation=0)
    assert again.fingerprint() == task.fingerprint()
    expected = np.load(root / "shapes" / "train.npy").transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(task.train.batch(torch.arange(12))[0].numpy(), expected)
    assert task.spec.class_names == ("dark", "light")


def test_a_set_that_cannot_be_downloaded_is_one_error(shapes: type[Shapes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, root: str, split: str = "train", transform: Any = None, download: bool = False) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>" if download else "not found")

    monkeypatch.setattr(Shapes, "__init__", fail)
    with pytest.raises(BpfreeError, match="Shapes is not on this machine, and downloading it failed") as caught:
        TORCHVISION.spec(config("Shapes"), tmp_path / "absent")
    assert "Name or service" in caught.value.what
    assert "data.root" in caught.value.fix
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (config(""), "needs the name of a data set"),
        (config("KMNITS"), "no data set 'KMNITS'"),
        (config("SVHN", options={"spilt": "extra"}), "SVHN takes no argument 'spilt'"),
        (config("EMNIST"), "EMNIST has no split None"),
        (config("CIFAR10", options={"root": "x"}), "takes no argument 'root'"),
    ],
)
def test_sets_and_arguments_that_do_not_exist_are_refused(chosen: TorchvisionSetConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        TORCHVISION.spec(chosen, tmp_path)


def test_the_set_is_named_on_the_command_line() -> None:
    recipe = resolve(parse_words(["task=torchvision", "task.dataset=EMNIST", "task.options.split=balanced", "task.size=[32]"]))
    spec = recipe.spec()
    assert (spec.outputs, spec.input_shape) == (47, (1, 32, 32))
    assert recipe.options["task"].options == {"split": "balanced"}
    assert torchvision.__version__
