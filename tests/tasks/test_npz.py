"""The task npz. Oracle: the arrays that were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree import Task, TaskSpec, UsageError
from bpfree.tasks.npz import NPZ, ArraysConfig

RNG = np.random.default_rng(0)
Array = np.ndarray[Any, np.dtype[Any]]


def save(folder: Path, **arrays: Array) -> str:
    np.savez(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


def halves(x: Array, y: Array) -> dict[str, Array]:
    cut = len(x) * 3 // 4
    return {"x_train": x[:cut], "y_train": y[:cut], "x_test": x[cut:], "y_test": y[cut:]}


def spec_of(folder: Path, x: Array, y: Array, **options: Any) -> TaskSpec:
    return NPZ.spec(ArraysConfig(save(folder, **halves(x, y)), **options), None)


IMAGES = RNG.integers(0, 256, (40, 9, 8, 3), dtype=np.uint8)
CLASSES = np.arange(40) % 5


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("said", [True, False])
def test_images_come_out_with_the_channels_first(layout: str, said: bool, tmp_path: Path) -> None:
    stored = IMAGES if layout == "nhwc" else IMAGES.transpose(0, 3, 1, 2)
    config = ArraysConfig(save(tmp_path, **halves(stored, CLASSES)), layout=layout if said else "auto")  # type: ignore[arg-type]
    task = Task.from_source(NPZ, config, validation=0)
    assert (task.spec.input_shape, task.spec.outputs, task.spec.targets) == ((3, 9, 8), 5, "classes")
    assert torch.equal(task.train.inputs, torch.from_numpy(IMAGES[:30]).permute(0, 3, 1, 2))
    assert torch.equal(task.test.inputs, torch.from_numpy(IMAGES[30:]).permute(0, 3, 1, 2))
    assert task.train.inputs.is_contiguous()
    assert task.test.targets is not None
    assert task.test.targets.tolist() == CLASSES[30:].tolist()


@pytest.mark.parametrize(
    ("x", "shape", "dtype"),
    [
        (IMAGES, (3, 9, 8), torch.uint8),
        (IMAGES[..., 0], (1, 9, 8), torch.uint8),
        (RNG.normal(size=(40, 6)), (6,), torch.float32),
        (RNG.integers(-5, 5, (40, 6)), (6,), torch.float32),
    ],
)
def test_shapes_and_types_of_inputs(x: Array, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    config = ArraysConfig(save(tmp_path, **halves(x, CLASSES)))
    train, _ = NPZ.load(config, None)
    assert NPZ.spec(config, None).input_shape == shape
    assert (tuple(train.inputs.shape[1:]), train.inputs.dtype) == (shape, dtype)


@pytest.mark.parametrize(
    ("y", "kind", "outputs"),
    [
        (CLASSES, "classes", 5),
        (CLASSES.astype(np.uint8)[:, None], "classes", 5),
        (RNG.dirichlet(np.ones(4), 40), "soft", 4),
        (RNG.normal(size=(40, 3)), "real", 3),
        (RNG.normal(size=40), "real", 1),
    ],
)
def test_the_kind_of_targets_is_seen_from_their_type_and_values(y: Array, kind: str, outputs: int, tmp_path: Path) -> None:
    config = ArraysConfig(save(tmp_path, **halves(IMAGES, y)))
    spec, (train, _) = NPZ.spec(config, None), NPZ.load(config, None)
    assert (spec.targets, spec.outputs) == (kind, outputs)
    assert train.targets is not None
    if kind == "classes":
        assert train.targets.tolist() == CLASSES[:30].tolist()
    else:
        np.testing.assert_array_equal(train.targets.numpy(), y[:30].reshape(30, -1).astype(np.float32))


def test_the_number_of_classes_counts_those_of_the_test_split(tmp_path: Path) -> None:
    assert spec_of(tmp_path, IMAGES, np.arange(40)).outputs == 40


def test_the_kind_of_targets_can_be_said(tmp_path: Path) -> None:
    assert spec_of(tmp_path, IMAGES, CLASSES, targets="real").outputs == 1
    with pytest.raises(UsageError, match="sum to one"):
        spec_of(tmp_path, IMAGES, RNG.normal(size=(40, 3)), targets="soft")
    with pytest.raises(UsageError, match="counted from 0"):
        spec_of(tmp_path, IMAGES, CLASSES - 1, targets="classes")


def test_options_that_do_nothing_with_these_arrays_are_refused(tmp_path: Path) -> None:
    """Oracle: real targets have no classes, vectors no axis of channels."""
    with pytest.raises(UsageError, match=r"task\.classes=3 does nothing with targets of kind real"):
        spec_of(tmp_path, IMAGES, RNG.normal(size=(40, 2)), classes=3)
    with pytest.raises(UsageError, match=r"task\.layout=nchw does nothing with inputs of shape"):
        spec_of(tmp_path, RNG.normal(size=(40, 6)), CLASSES, layout="nchw")


def test_constants_of_normalisation(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, IMAGES, CLASSES)
    assert (spec.mean, spec.std) == ((0.5,), (0.5,))
    assert spec.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)).flatten().tolist() == [-1, 1]
    spec = spec_of(tmp_path, IMAGES.astype(np.float32), CLASSES)
    assert (spec.mean, spec.std) == ((0.0,), (1.0,))
    config = ArraysConfig(save(tmp_path, **halves(IMAGES, CLASSES)))
    spec = Task.from_source(NPZ, config, mean=[0.1, 0.2, 0.3], std=[2.0]).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (2.0,))
    assert Task.from_source(NPZ, config, mean=[0.1]).spec.std == (0.5,)
    with pytest.raises(UsageError, match="2 values"):
        Task.from_source(NPZ, config, mean=[0.1, 0.2])


def test_a_file_without_a_test_split_gives_a_fixed_stratified_fifth(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float32)[:, None]
    config = ArraysConfig(save(tmp_path, x=x, y=np.arange(100) % 5))
    train, test = NPZ.load(config, None)
    assert sorted([*train.inputs.flatten().tolist(), *test.inputs.flatten().tolist()]) == list(range(100))
    assert test.targets is not None
    assert test.targets.bincount().tolist() == [4] * 5
    assert torch.equal(test.inputs, NPZ.load(config, None)[1].inputs)
    assert NPZ.spec(config, None).outputs == 5


def test_the_spec_reads_no_inputs(tmp_path: Path) -> None:
    """The bytes of the inputs are destroyed behind their header, and no one notices until they are loaded."""
    config = ArraysConfig(save(tmp_path, **halves(np.full((800, 7, 7), 77, np.uint8), np.arange(800) % 5)))
    path = Path(config.path)
    content = path.read_bytes()
    assert content.count(b"M" * 100) >= 2
    path.write_bytes(content.replace(b"M" * 100, b"N" * 100))
    assert NPZ.spec(config, None).input_shape == (1, 7, 7)
    with pytest.raises(UsageError, match="cannot read the arrays"):
        NPZ.load(config, None)


def test_a_relative_path_is_also_looked_up_in_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, **halves(IMAGES, CLASSES))
    assert NPZ.spec(ArraysConfig("set.npz"), tmp_path).outputs == 5
    with pytest.raises(UsageError, match="no such file"):
        NPZ.spec(ArraysConfig("set.npz"), tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES}, "x_train, y_train, x_test and y_test"),
        ({"x": IMAGES, "y": CLASSES[:3]}, "differ in length"),
        ({"x": IMAGES[:0], "y": CLASSES[:0]}, "empty"),
        ({"x": IMAGES, "y": np.array([{}] * 40)}, "expected numbers"),
        ({"x": RNG.normal(size=(40, 2, 2, 2, 2)), "y": CLASSES}, "neither vectors nor images"),
        ({"x": IMAGES[:, :3], "y": CLASSES}, "task.layout"),
        ({**halves(IMAGES, CLASSES), "x_test": IMAGES[30:, :8]}, "differ in the shape"),
    ],
)
def test_arrays_that_are_no_task_are_refused(arrays: dict[str, Array], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        NPZ.spec(ArraysConfig(save(tmp_path, **arrays)), None)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UsageError, match="cannot read"):
        NPZ.spec(ArraysConfig(str(tmp_path / "text.npz")), None)
    with pytest.raises(UsageError, match="needs a file"):
        NPZ.spec(ArraysConfig(), None)


SEQUENCES = RNG.normal(size=(40, 7, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 11, (40, 6), dtype=np.uint8)
TOKENS[0, 0] = 255


def test_floats_with_two_axes_are_images_or_sequences_and_have_to_be_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grey images, or sequences") as caught:
        spec_of(tmp_path, SEQUENCES, CLASSES)
    assert "task.layout=image or task.layout=sequence" in caught.value.fix
    for layout, expected in (("sequence", SEQUENCES), ("image", SEQUENCES[:, None])):
        task = Task.from_source(NPZ, ArraysConfig(save(tmp_path, **halves(SEQUENCES, CLASSES)), layout=layout), validation=0)  # type: ignore[arg-type]
        assert task.spec.input_shape == expected.shape[1:]
        np.testing.assert_array_equal(task.train.inputs.numpy(), expected[:30])
    with pytest.raises(UsageError, match=r"task\.layout=sequence does nothing with inputs of shape \(30, 9, 8, 3\)"):
        spec_of(tmp_path, IMAGES, CLASSES, layout="sequence")


def test_integers_with_two_axes_are_pixels_unless_they_are_said_to_be_a_sequence(tmp_path: Path) -> None:
    grey = IMAGES[..., 0]
    assert spec_of(tmp_path, grey, CLASSES).input_shape == (1, 9, 8)
    config = ArraysConfig(save(tmp_path, **halves(grey.astype(np.int64), CLASSES)), layout="sequence")
    task = Task.from_source(NPZ, config, validation=0)
    assert (task.spec.input_shape, task.spec.scale) == ((9, 8), 1.0)
    np.testing.assert_array_equal(task.train.inputs.numpy(), grey[:30].astype(np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_tokens_stay_what_they_are(dtype: str, tmp_path: Path) -> None:
    """Oracle: the array itself; divided by 255 and cut to integers, bytes would be 0 and 1."""
    path = save(tmp_path, **halves(TOKENS.astype(dtype), CLASSES))
    task = Task.from_source(NPZ, ArraysConfig(path, inputs="tokens"), validation=0)
    assert (task.spec.vocabulary, task.spec.input_shape, task.spec.outputs) == (256, (6,), 5)
    made = task.spec.normalise(task.train.inputs)
    assert made.dtype == torch.int64
    np.testing.assert_array_equal(made.numpy(), TOKENS[:30])
    assert NPZ.spec(ArraysConfig(path, inputs="tokens", vocabulary=300), None).vocabulary == 300
    with pytest.raises(UsageError, match="vocabulary is 0 to 99"):
        Task.from_source(NPZ, ArraysConfig(path, inputs="tokens", vocabulary=100))


def test_tokens_below_zero_or_with_fractions_are_refused(tmp_path: Path) -> None:
    for wrong in (TOKENS.astype(np.float32), -TOKENS.astype(np.int64)):
        with pytest.raises(UsageError, match="tokens are integers from 0"):
            spec_of(tmp_path, wrong, CLASSES, inputs="tokens")


def test_targets_that_are_tokens(tmp_path: Path) -> None:
    """Oracle: the array; -100 does not count, and there are 0 to the largest."""
    following = np.where(TOKENS % 2, TOKENS.astype(np.int64) % 11, -100)
    task = Task.from_source(NPZ, ArraysConfig(save(tmp_path, **halves(TOKENS, following)), inputs="tokens", targets="tokens"), validation=0)
    assert (task.spec.targets, task.spec.outputs, task.spec.output_size) == ("tokens", following.max() + 1, (6, following.max() + 1))
    assert task.train.targets is not None
    np.testing.assert_array_equal(task.train.targets.numpy(), following[:30])
    path = save(tmp_path, **halves(SEQUENCES, RNG.integers(0, 4, (40, 7))))
    assert NPZ.spec(ArraysConfig(path, layout="sequence", targets="tokens"), None).output_size == (7, 4)
    with pytest.raises(UsageError, match="tokens must be integers"):
        spec_of(tmp_path, TOKENS, CLASSES, inputs="tokens", targets="tokens")


def test_targets_that_are_several_labels(tmp_path: Path) -> None:
    labels = RNG.integers(0, 2, (40, 3))
    with pytest.raises(UsageError, match="rows of 0 and 1") as caught:
        spec_of(tmp_path, RNG.normal(size=(40, 6)), labels)
    assert "multilabel" in caught.value.fix
    config = ArraysConfig(save(tmp_path, **halves(RNG.normal(size=(40, 6)), labels)), targets="multilabel")
    task = Task.from_source(NPZ, config, validation=0)
    assert (task.spec.targets, task.spec.outputs) == ("multilabel", 3)
    assert task.train.targets is not None
    np.testing.assert_array_equal(task.train.targets.numpy(), labels[:30])
    with pytest.raises(UsageError, match="of 0 and 1"):
        spec_of(tmp_path, RNG.normal(size=(40, 6)), labels * 2, targets="multilabel")
