"""Scores of single classes, and pictures of confusions. Oracle: scikit-learn's report and matrix; counts by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from bpfree import Batch, TaskSpec, UsageError
from bpfree.confusion import ClassScores, Confusion, draw
from bpfree.document.confusion import drawn


def counted(spec: TaskSpec, draws: list[tuple[torch.Tensor, torch.Tensor]], size: int = 7) -> ClassScores:
    found = Confusion(spec)
    for scores, targets in draws:
        found.begin_draw()
        for part in torch.arange(len(scores)).split(size):
            found.add(scores[part], Batch(scores[part], targets[part]))
    made = found.scores()
    assert made is not None
    return made


@pytest.mark.parametrize("soft", [False, True])
def test_scores_of_classes_are_those_of_scikit_learn(soft: bool) -> None:
    """A class that is never predicted, and one that never occurs, are among them."""
    random = torch.Generator().manual_seed(0)
    scores, classes = torch.randn(40, 5, generator=random), torch.randint(4, (40,), generator=random)
    scores[:, 2] = -9
    targets = torch.nn.functional.one_hot(classes, 5) * 0.6 + 0.08 if soft else classes
    found = counted(TaskSpec("t", (5,), 5, "soft" if soft else "classes"), [(scores, targets)])
    made = scores.argmax(1)
    expected = precision_recall_fscore_support(classes, made, labels=range(5), zero_division=0)
    rows = found.rows()
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([row[name] for row in rows], column)
    assert found.counts == confusion_matrix(classes, made, labels=range(5)).tolist()
    assert [row["class"] for row in rows] == list("01234")


def test_labels_are_scored_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(40, 3, generator=random), (torch.randn(40, 3, generator=random) > 0).float()
    found = counted(TaskSpec("t", (5,), 3, "multilabel", class_names=("a", "b", "c")), [(scores, targets)])
    expected = precision_recall_fscore_support(targets.numpy(), (scores > 0).numpy(), zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([row[name] for row in found.rows()], column)
    assert found.counts is None
    with pytest.raises(UsageError, match="no confusion matrix"):
        draw(found, Path("c.svg"), "t")


def test_counts_are_means_over_draws() -> None:
    """Two draws: the only example of class 0 is right once."""
    targets, spec = torch.tensor([0, 1]), TaskSpec("t", (2,), 2)
    found = counted(spec, [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), targets), (torch.tensor([[0.0, 1.0], [0.0, 1.0]]), targets)])
    assert found.counts == [[0.5, 0.5], [0.0, 1.0]]
    assert found.confused(3) == [("0", "1", 0.5, 0.5)]


def test_real_targets_have_no_classes() -> None:
    found = Confusion(TaskSpec("t", (2,), 2, "real"))
    found.begin_draw()
    found.add(torch.zeros(3, 2), Batch(torch.zeros(3, 2), torch.zeros(3, 2)))
    assert found.scores() is None


def made_of(count: int) -> ClassScores:
    counts = torch.eye(count, dtype=torch.float64) * 8
    counts[0, 1] = 2
    names = [f"quite a long name {place}" for place in range(count)]
    return ClassScores(names, counts, counts.diagonal(), counts.sum(1), counts.sum(0))


@pytest.mark.parametrize("count", [2, 10, 13, 26, 100])
def test_names_and_cells_are_inside_and_do_not_touch(count: int) -> None:
    """Oracle: the geometry. Names are at least 8.5 pixels high, and a line of them is not less than that apart."""
    found = made_of(count)
    assert found.counts is not None
    picture = drawn(found.names, found.counts)
    for box in picture.boxes:
        assert 0 < box.x < box.x + box.size <= picture.width
        assert 0 < box.y < box.y + box.size <= picture.height
    for label in picture.labels:
        assert 0 < label.x < picture.width
        assert 0 < label.y < picture.height
        assert label.size >= 8.5
        length = 0.58 * label.size * len(label.text)
        assert label.anchor != "end" or label.x - length >= 0
        assert not (label.upwards and label.anchor == "start") or label.y - length >= 0
    beside = sorted(label.y for label in picture.labels if label.anchor == "end")
    assert min(np.diff(beside)) >= 8.5
    assert [label.text for label in picture.labels if label.anchor == "end"] == list(found.names)


@pytest.mark.parametrize("count", [10, 100])
def test_pictures_show_counts_as_colours(count: int, tmp_path: Path) -> None:
    """The diagonal is blue, the one confusion orange, the rest grey; the pointer shows the share."""
    found = made_of(count)
    assert found.counts is not None
    draw(found, tmp_path / "c.png", "a rule")
    draw(found, tmp_path / "c.svg", "a rule")
    image, boxes = Image.open(tmp_path / "c.png"), drawn(found.names, found.counts).boxes

    def colour(i: int, j: int) -> tuple[int, int, int]:
        box = boxes[i * count + j]
        return image.getpixel((round(2 * box.x + 3), round(2 * (box.y + 24) + 3)))  # type: ignore[return-value]

    (r, _, b), (r2, _, b2), grey = colour(1, 1), colour(0, 1), colour(1, 0)
    assert b > r + 40
    assert r2 > b2 + 10
    assert max(grey) - min(grey) < 8
    text = (tmp_path / "c.svg").read_text()
    assert "quite a long name 0 taken for quite a long name 1: 2 of 10 (20.0 %)" in text
    assert len(re.findall(r'class="c1"', text)) == 1
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not written as \.pdf"):
        draw(made_of(2), tmp_path / "c.pdf", "t")
