"""Image sets. Oracles: files written by hand in the published formats, numbers recorded from the real sets (shared data README)."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree import BpfreeError, Task, UsageError
from bpfree.options import NoOptions
from bpfree.plugins import installed_plugins
from bpfree.tasks import vision
from bpfree.tasks.task import DataSource

NAMES = ["mnist", "fashion-mnist", "cifar10", "cifar100"]
FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    "cifar10": [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
    "cifar100": [19, 29, 0, 11, 1, 86, 90, 28, 23, 31],
}


def write_idx(path: Path, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """The idx format: two zero bytes, type 8 (uint8), number of axes, sizes as big-endian int32, the values."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def tiny(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_from_torchvisions_place(name: str, folder: str, tmp_path: Path) -> None:
    images, labels = tiny(6, 28, 28), tiny(6) % 10
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", labels[:count])
    train, test = installed_plugins().get("tasks", name).load(NoOptions(), tmp_path)
    assert torch.equal(train.inputs, torch.from_numpy(images)[:, None])
    assert train.targets.tolist() == labels.tolist()
    assert (train.inputs.dtype, train.targets.dtype) == (torch.uint8, torch.int64)
    assert len(test) == 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.arange(30, dtype=np.uint8) % 10, "20 inputs and 30 targets"), (np.repeat(np.array([3, 12], np.uint8), 10), "the labels 3, 12")],
)
@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_labels_that_do_not_fit_their_pictures_are_refused(labels: Any, message: str, validation: float, tmp_path: Path) -> None:
    """Once the labels that were too many were dropped, or the rest of them trained on the wrong pictures."""
    for part in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", tiny(20, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    with pytest.raises(UsageError, match=message):
        Task.from_source(vision.MNIST, root=tmp_path, validation=validation)


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_batches_are_read_from_torchvisions_place(name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())  # ours are not the official files
    images, labels = tiny(2, 3, 32, 32), [3, 1]
    files = (
        [("cifar-10-batches-py", file) for file in vision.BATCHES]
        if name == "cifar10"
        else [("cifar-100-python", file) for file in ("train", "test", "meta")]
    )
    for folder, file in files:
        (tmp_path / folder).mkdir(exist_ok=True)
        content = {"label_names": [], "fine_label_names": []} if "meta" in file else {"data": images.reshape(2, -1), key: labels}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    train, test = installed_plugins().get("tasks", name).load(NoOptions(), tmp_path)
    assert len(train) == (10 if name == "cifar10" else 2)
    assert torch.equal(train.inputs[:2], torch.from_numpy(images))
    assert train.inputs.is_contiguous()
    assert test.targets.tolist() == labels


def test_names_of_cifar100_are_numbered_as_its_authors_do() -> None:
    """In alphabetical order; the first training images are known: a bull, a dinosaur, apples, a boy, a fish, a telephone, a train."""
    names = vision.FINE
    assert list(names) == sorted(set(names))
    assert len(names) == 100
    seen = [names[label] for label in FIRST_LABELS["cifar100"][:7]]
    assert seen == ["cattle", "dinosaur", "apple", "boy", "aquarium_fish", "telephone", "train"]
    if (meta := Path(os.environ.get("BPFREE_DATA", "unset")) / "cifar-100-python" / "meta").is_file():
        assert pickle.loads(meta.read_bytes(), encoding="latin1")["fine_label_names"] == list(names)


def test_cifar100_can_be_a_single_file_of_arrays(tmp_path: Path) -> None:
    images = tiny(4, 32, 32, 3)
    np.savez(tmp_path / "cifar100.npz", x_train=images, y_train=np.arange(4), x_test=images[:1], y_test=np.array([99]))
    train, test = vision.CIFAR100.load(NoOptions(), tmp_path)
    assert torch.equal(train.inputs, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert test.targets is not None
    assert test.targets.tolist() == [99]
    (tmp_path / "cifar100.npz").write_bytes(b"PK but no more")
    with pytest.raises(BpfreeError, match="cannot read"):
        vision.CIFAR100.load(NoOptions(), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_without_files_and_network_one_error_says_what_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    root = tmp_path / "data"
    with pytest.raises(BpfreeError) as caught:
        installed_plugins().get("tasks", name).load(NoOptions(), root)
    assert caught.value.exit_code == 1
    for expected in (str(root), "data.root", "BPFREE_DATA", "MNIST/raw/{train-images" if "mnist" in name else f"cifar-{name[5:]}"):
        assert expected in str(caught.value)
    assert not root.exists()
    assert capfd.readouterr() == ("", "")


def test_a_download_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import mnist

    def half(url: str, download_root: str, filename: str, md5: str) -> None:
        if "labels" in filename:
            raise RuntimeError("connection reset")
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(b"")

    monkeypatch.setattr(mnist, "download_and_extract_archive", half)
    (tmp_path / "other").write_text("mine")
    with pytest.raises(BpfreeError, match="connection reset"):
        vision.MNIST.load(NoOptions(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_download_is_moved_into_place_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import mnist

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        write_idx(Path(download_root) / filename.removesuffix(".gz"), tiny(5, 28, 28) if "images" in filename else tiny(5) % 10)

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    timeout = socket.getdefaulttimeout()
    train, _ = vision.MNIST.load(NoOptions(), tmp_path / "new")
    assert len(train) == 5
    assert sorted(path.name for path in (tmp_path / "new" / "MNIST" / "raw").iterdir()) == sorted(vision.IDX)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["MNIST"]
    assert socket.getdefaulttimeout() == timeout


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in vision.IDX:
        write_idx(tmp_path / "MNIST" / "raw" / name, tiny(3, 28, 28) if "images" in name else tiny(3))
    (tmp_path / "MNIST" / "raw" / vision.IDX[0]).write_bytes(b"\0\0\x08\x03")
    with pytest.raises(BpfreeError, match="damaged") as caught:
        vision.MNIST.load(NoOptions(), tmp_path)
    assert "MNIST/raw" in caught.value.where


def test_nothing_imports_torchvision_before_data_are_loaded() -> None:
    code = """
import json, sys
from bpfree.plugins import Plugins
known = Plugins(entry_points=[])
source = known.get("tasks", "cifar10")
shape = source.spec(source.Config(), None).input_shape
print(json.dumps([shape, known.names("networks"), sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    shape, networks, modules = json.loads(done.stdout)
    assert shape == [3, 32, 32]
    assert "torchvision" in networks
    assert "torch" in modules
    assert not {"torchvision", "mlflow", "sklearn"} & set(modules)


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_the_real_sets_have_the_recorded_statistics(name: str) -> None:
    root = Path(os.environ.get("BPFREE_DATA", "unset"))
    source: DataSource = installed_plugins().get("tasks", name)
    place = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar100.npz"}[name]
    if not (root / place).exists():
        pytest.skip(f"needs {place} in the folder that BPFREE_DATA names (it is {root})")
    task = Task.from_source(source, root=root, validation=0)
    assert (task.train.inputs.shape[1:], task.spec.outputs) == (task.spec.input_shape, 100 if name == "cifar100" else 10)
    assert len(task.train) == (60_000 if "mnist" in name else 50_000)
    assert len(task.test) == 10_000
    assert task.train.targets is not None
    assert task.train.targets.bincount().numel() == task.spec.outputs
    assert task.train.targets[:10].tolist() == FIRST_LABELS[name]
    for channel, (mean, std) in enumerate(zip(task.spec.mean, task.spec.std, strict=True)):
        histogram = task.train.inputs[:, channel].flatten().bincount(minlength=256).double()
        values = torch.arange(256).double() / 255
        found = (histogram @ values / histogram.sum()).item()
        assert found == pytest.approx(mean, abs=6e-5)
        assert ((histogram @ (values - found) ** 2 / histogram.sum()) ** 0.5).item() == pytest.approx(std, abs=6e-5)
