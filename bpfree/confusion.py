"""Which classes are taken for which: counts, scores of each class, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.document.confusion import Drawing, Label, confusion_panel, drawn
from bpfree.document.content import Figure
from bpfree.document.style import LIGHT
from bpfree.document.svg import svg_file
from bpfree.errors import UsageError
from bpfree.files import replacing, write_text
from bpfree.step import Batch
from bpfree.tasks.spec import TaskSpec
from bpfree.training.predictions import Collector

__all__ = ["ClassScores", "Confusion", "check_picture", "draw"]

MOST = 2000
"""Most classes that are counted against each other."""
KINDS = (".svg", ".png")
SCALE = 2
"""Pixels of a PNG to a unit of the drawing."""


class ClassScores:
    """Counts by class.

    Args:
        names: of the classes or labels.
        counts: (C, C) examples by true and predicted class; ``None`` for several labels at once.
        hits, truth, made: (C,) examples of which the class is right, true, and predicted.

    Counts are means over the draws of a stochastic rule.
    """

    def __init__(self, names: Sequence[str], counts: Tensor | None, hits: Tensor, truth: Tensor, made: Tensor) -> None:
        self.names, self._counts = tuple(names), counts
        self._hits, self._truth, self._made = hits, truth, made

    @property
    def counts(self) -> list[list[float]] | None:
        """Examples by true class (row) and predicted class (column)."""
        return None if self._counts is None else self._counts.tolist()

    def rows(self) -> list[dict[str, Any]]:
        """Return ``class``, ``precision``, ``recall``, ``f1`` and ``support`` of each class; a share of nothing is 0."""
        precision, recall = _share(self._hits, self._made), _share(self._hits, self._truth)
        f1 = _share(2 * self._hits, self._made + self._truth)
        columns = zip(self.names, *(each.tolist() for each in (precision, recall, f1, self._truth)), strict=True)
        return [dict(zip(("class", "precision", "recall", "f1", "support"), row, strict=True)) for row in columns]

    def confused(self, most: int) -> list[tuple[str, str, float, float]]:
        """List the pairs of classes that are confused most often: true one, predicted one, examples, and their share of the true one's."""
        if self._counts is None:
            return []
        wrong = self._counts.clone().fill_diagonal_(0)
        found = wrong.flatten().topk(min(most, wrong.numel()))
        places = [(place // len(self.names), place % len(self.names)) for place in found.indices.tolist()]
        pairs = zip(places, found.values.tolist(), strict=True)
        return [(self.names[i], self.names[j], count, count / max(1.0, float(self._truth[i]))) for (i, j), count in pairs if count]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(1e-12), 0.0)


class Confusion(Collector):
    """Counts predictions against targets in an evaluation, batch by batch.

    Args:
        spec: of the task.
    """

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self._spec, self._count = spec, 0
        self._sums: list[Tensor] | None = None

    def begin_draw(self) -> None:
        """Begin a pass over the split."""
        self._count += 1

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Count a batch."""
        if self._spec.targets not in ("classes", "soft", "multilabel") or batch.targets is None or self._spec.outputs > MOST:
            return
        if self._spec.targets == "multilabel":
            truth, made = batch.targets > 0.5, scores > 0
            sums = [each.sum(0).double().cpu() for each in (truth & made, truth, made)]
        else:
            rows, classes = self._spec.scored_classes(scores, batch.targets)
            if rows.dim() != 2 or rows.shape[1] != self._spec.outputs:  # of a task with a loss of its own
                return
            places = classes.long() * self._spec.outputs + rows.argmax(1)
            sums = [places.bincount(minlength=self._spec.outputs**2).double().cpu()]
        self._sums = sums if self._sums is None else [before + now for before, now in zip(self._sums, sums, strict=True)]

    def scores(self) -> ClassScores | None:
        """Return the counts; ``None`` for targets that are no classes, or too many."""
        if self._sums is None:
            return None
        names, sums = [self._spec.label(place) for place in range(self._spec.outputs)], [each / self._count for each in self._sums]
        if self._spec.targets == "multilabel":
            return ClassScores(names, None, *sums)
        counts = sums[0].view(self._spec.outputs, -1)
        return ClassScores(names, counts, counts.diagonal(), counts.sum(1), counts.sum(0))


def check_picture(path: Path) -> None:
    """Refuse a name that does not say how a picture is written, before anything is computed."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(
            f"pictures are not written as {path.suffix or 'a file without ending'}", where=str(path), fix="FILE.svg or FILE.png"
        )


def draw(found: ClassScores, path: Path, title: str) -> None:
    """Write the confusion matrix as a picture, ``.svg`` or ``.png``.

    Raises:
        UsageError: another ending, or targets that have no such matrix.
    """
    check_picture(path)
    if found.counts is None:
        raise UsageError("several labels at once have no confusion matrix", where=str(path), fix="leave --confusion out")
    if path.suffix.lower() == ".svg":
        caption = "Rows are true classes, columns predicted ones; colour is the share of the row."
        write_text(path, svg_file(title, Figure([confusion_panel(found.names, found.counts)], caption)))
        return
    image = _painted(drawn(found.names, found.counts), title)
    with replacing(path) as file:
        image.save(file, format="PNG")


def _painted(drawing: Drawing, title: str) -> Any:
    """Paint a drawing on white, with its title above it."""
    from PIL import Image, ImageDraw

    above = 24
    width = max(drawing.width, 8 * len(title))
    image = Image.new("RGB", (SCALE * width, SCALE * (drawing.height + above)), _colour("paper"))
    paint = ImageDraw.Draw(image)
    for box in drawing.boxes:
        colour = _colour("panel") if box.tone == "none" else _mixed("c0" if box.tone == "right" else "c1", box.opacity)
        x, y = SCALE * box.x, SCALE * (box.y + above)
        paint.rectangle((x, y, x + SCALE * box.size - 1, y + SCALE * box.size - 1), fill=colour)
    for label in (Label(8, 18 - above, title, 14, "start"), *drawing.labels):
        _write(image, paint, label, above)
    return image


def _write(image: Any, paint: Any, label: Label, above: int) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(SCALE * label.size)
    x, y, colour = SCALE * label.x, SCALE * (label.y + above), _colour("soft" if label.soft else "ink")
    side = {"start": "l", "middle": "m", "end": "r"}[label.anchor]
    if not label.upwards:
        paint.text((x, y), label.text, fill=colour, font=font, anchor=f"{side}s")
        return
    wide, high = int(paint.textlength(label.text, font=font)) + 2, int(SCALE * label.size * 1.4)
    strip = Image.new("L", (wide, high), 0)
    ImageDraw.Draw(strip).text((0, high * 0.75), label.text, fill=255, font=font, anchor="ls")
    strip = strip.rotate(90, expand=True)
    top = y - wide if side == "l" else y - wide / 2 if side == "m" else y
    image.paste(colour, (round(x - high * 0.75), round(top)), strip)


def _colour(name: str) -> tuple[int, int, int]:
    text = LIGHT[name].removeprefix("#")
    text = "".join(2 * letter for letter in text) if len(text) == 3 else text
    return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)


def _mixed(name: str, share: float) -> tuple[int, int, int]:
    (r, g, b), (r0, g0, b0) = _colour(name), _colour("paper")
    return round(share * r + (1 - share) * r0), round(share * g + (1 - share) * g0), round(share * b + (1 - share) * b0)
