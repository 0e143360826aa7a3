"""Draw pictures of what a rule learns: a grid per block and epoch, ``pictures/BLOCK/epoch-0001.png`` in the run's folder.

They are drawn between the evaluation of an epoch and its checkpoint: not timed, in eval mode, without a graph, and with torch's
global generators restored. So a run with pictures gives the same bits as one without.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bpfree.devices import preserved_global_state
from bpfree.files import remove_abandoned, replacing
from bpfree.hooks import hookimpl
from bpfree.network.network import evaluating
from bpfree.record.folder import RunFolder
from bpfree.run import Run
from bpfree.tracking.config import PicturesConfig

if TYPE_CHECKING:
    from bpfree.rule import Rule

__all__ = ["Pictures", "grid", "is_due"]

logger = logging.getLogger("bpfree.tracking")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
WIDTH = 800
"""Approximate width of a grid in pixels; wider if its pictures are."""
GAP, WHITE = 4, 255


class Pictures:
    """Draws :meth:`bpfree.Rule.pictures` and adds the files to the run's artifacts; a failure is a warning, and ends the drawing.

    What cannot be written because of the disk is written after a later epoch, or at the end.

    Args:
        config: when, and how many.
    """

    def __init__(self, config: PicturesConfig | None = None) -> None:
        self.config = config or PicturesConfig()
        self._drawn: dict[str, Tensor] = {}
        self._waiting: dict[Path, Pixels] = {}
        self._active, self._warned = True, False

    @hookimpl
    def run_start(self, run: Run) -> None:
        """Start over; a resumed run keeps the pictures of its earlier epochs."""
        self._drawn, self._waiting, self._active, self._warned = {}, {}, True, False
        if run.resumed and run.folder is not None:
            for folder in RunFolder(run.folder).pictures.glob("*"):  # where a folder became read-only, a part of a file may be left
                remove_abandoned(folder, "epoch-*.png")
            run.artifacts.update((name, path) for epoch, name, path in _found(run.folder) if epoch <= run.epoch)

    @hookimpl
    def epoch_end(self, run: Run, rule: Rule) -> None:
        """Draw pictures that have changed since they were last drawn, if this epoch is due."""
        if run.folder is None or not self._active or not is_due(run.epoch, self.config.every, run.total_epochs):
            return
        try:
            for name, fields in self._pictures(rule).items():
                if name in self._drawn and torch.equal(fields, self._drawn[name]):
                    continue
                folder, pixels = RunFolder(run.folder).pictures / _file_name(name), grid(fields)
                known = run.resumed and name not in self._drawn
                self._drawn[name] = fields
                if not (known and _is_last(pixels, folder, run.epoch)):  # an interrupted run may have drawn it
                    self._waiting[folder / f"epoch-{run.epoch:04d}.png"] = pixels
            self._write(run)
        except Exception as error:
            self._active = False
            logger.warning("no pictures of %s from epoch %d on: %s: %s", run.name, run.epoch, type(error).__name__, error)

    @hookimpl
    def run_end(self, run: Run) -> None:
        """Write what could not be written before."""
        self._write(run)

    def _write(self, run: Run) -> None:
        for path in list(self._waiting):
            assert run.folder is not None
            try:
                _save(self._waiting[path], path)
            except OSError as error:
                if not self._warned:
                    logger.warning("cannot write the picture %s: %s; the run will try again", path.name, error.strerror or error)
                self._warned = True
                return
            self._warned = False
            del self._waiting[path]
            run.artifacts[path.relative_to(run.folder).as_posix()] = path

    def _pictures(self, rule: Rule) -> dict[str, Tensor]:
        device = next((parameter.device for parameter in rule.parameters()), torch.device("cpu"))
        with torch.no_grad(), evaluating(rule), preserved_global_state(device):
            pictures = rule.pictures(self.config.count)
            # copied, because on the CPU these may be the weights themselves
            return {name: fields.detach().to("cpu", torch.float32, copy=True) for name, fields in pictures.items() if len(fields)}


def is_due(epoch: int, every: int | None, total: int | None = None) -> bool:
    """Tell whether an epoch is drawn: every n-th, and the last of ``total``; never for 0.

    ``None`` thins out: each of the first 20, then every 10th, from 200 on every 100th, and so on: 28 of 100 epochs, 41 of 500.
    """
    if every == 0:
        return False
    step = every or 10 ** (len(str(epoch // 2)) - 1)
    return epoch % step == 0 or epoch == total


def grid(fields: Tensor) -> Pixels:
    """Arrange fields (K, C, h, w) in a grid, enlarged by a whole factor: bytes (H, W), or (H, W, 3) in colour.

    Each is scaled by its own largest absolute value: that is white, its negative black, zero mid-grey (128). Frames are white.

    Raises:
        ValueError: other shapes.
    """
    if fields.dim() != 4 or fields.shape[1] not in (1, 3) or 0 in fields.shape:
        raise ValueError(f"a picture must have shape (K, 1 or 3, H, W), not {tuple(fields.shape)}")
    values = np.nan_to_num(fields.permute(0, 2, 3, 1).float().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    count, height, width, channels = values.shape
    largest = np.abs(values).max((1, 2, 3), keepdims=True)
    pixels = np.rint(127.5 + 127.5 * values / np.where(largest > 0, largest, 1)).astype(np.uint8)
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    rows = -(-count // columns)
    factor = max(1, round((WIDTH / columns - GAP) / width))
    across, down = width * factor + GAP, height * factor + GAP
    whole = np.full((rows * down + GAP, columns * across + GAP, channels), WHITE, dtype=np.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * down + GAP, index % columns * across + GAP
        whole[top : top + down - GAP, left : left + across - GAP] = picture.repeat(factor, 0).repeat(factor, 1)
    return whole if channels == 3 else whole[..., 0]


def _save(pixels: Pixels, path: Path) -> None:
    from PIL import Image

    with replacing(path) as file:
        # other compression levels take several times as long for a tenth less
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)


def _is_last(pixels: Pixels, folder: Path, epoch: int) -> bool:
    """Tell whether the last picture before an epoch shows the same."""
    from PIL import Image

    before = [path for path in sorted(folder.glob("epoch-*.png")) if path.name < f"epoch-{epoch:04d}.png"]
    try:
        return bool(before) and np.array_equal(np.asarray(Image.open(before[-1])), pixels)
    except OSError:
        return False


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"


def _found(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """List epoch, name and path of each existing picture."""
    for path in sorted(folder.glob("pictures/*/epoch-*.png")):
        number = path.stem.removeprefix("epoch-")
        if number.isdigit():
            yield int(number), path.relative_to(folder).as_posix(), path
