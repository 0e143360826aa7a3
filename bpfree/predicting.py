"""Predictions for files: pictures, arrays and tables, read in batches as the task of a run reads its data."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.files import replacing
from bpfree.saved import BATCH_SIZE, NAMED, Saved, decided, probabilities
from bpfree.tasks import npz, tables
from bpfree.tasks.folders import SUFFIXES, pictures_in
from bpfree.tasks.pictures import Form, PictureConfig, opened

__all__ = ["Predicted", "Reading", "predict_files", "writer_of"]

WHITE = 255.0
TABLES, ARRAYS = (".csv", ".tsv"), (".npz", ".npy")
WRITTEN = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        batch_size: inputs that are read and predicted at a time.
        array: name of the inputs in files of several arrays; empty: ``x``, or the only one.
        resize: whether pictures of another size or with other colours are brought to those of the task.
        skipped: called with the reason for each picture that cannot be read, which is left out then; ``None``: it is an error.
        seed: of a stochastic rule's draws.
        interval: probability of the interval that is added to each real output (``price_low``, ``price_high``); ``None``: none.
    """

    batch_size: int = BATCH_SIZE
    array: str = ""
    resize: bool = False
    skipped: Callable[[str], None] | None = None
    seed: int = 0
    interval: float | None = None


@dataclass(frozen=True)
class Predicted:
    """The prediction for one input.

    Attributes:
        name: of the input: its file, with the row in it (``data.npz[3]``), or its line (``people.csv:4``).
        decision: the class, the labels, or ``None`` for numbers.
        values: probability of each class or label, or the outputs, by name.
    """

    name: str
    decision: Any
    values: Mapping[str, float]


Batches = Iterator[tuple[list[str], Any]]


def predict_files(saved: Saved, places: Iterable[str | Path], reading: Reading | None = None) -> Iterator[Predicted]:
    """Predict for each input in the files, in order, a batch at a time.

    Args:
        saved: the trained rule.
        places: pictures, folders of pictures, arrays (``.npz``, ``.npy``) and tables (``.csv``, ``.tsv``).
        reading: how they are read.

    Raises:
        UsageError: no such file, one of no known kind, or one that does not hold inputs as the task has them; which one is said.
    """
    reading = reading or Reading()
    spec = saved.spec
    if spec.targets not in (*NAMED, "real") or spec.structure is not None:
        what = f"the task {spec.name} has targets of kind {spec.targets}" if spec.structure is None else "its inputs are several tensors"
        raise UsageError(what, where=str(saved.path), fix="predict in Python: bpfree.load(RUN).predict(inputs)")
    if reading.interval is not None and spec.targets != "real":
        fix = "leave it out: probabilities say how sure a prediction of classes is"
        raise UsageError(f"the task {spec.name} has no real targets, so no intervals", where="--interval", fix=fix)
    for place, (names, inputs) in enumerate(_read(saved, [Path(each) for each in places], reading)):
        try:
            options = {"batch_size": reading.batch_size, "seed": reading.seed + place}
            scores = saved.predict(inputs, **options)
            ends = None if reading.interval is None else saved.predict_interval(inputs, reading.interval, **options)
        except BpfreeError as error:
            span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise type(error)(error.what, where=span, fix=error.fix) from error
        if len(scores) != len(names):
            what = f"this is a single example of shape {tuple(inputs.shape)}, not a batch of them"
            raise UsageError(what, where=names[0].rpartition("[")[0], fix="save it as (N, ...): x[None]")
        yield from _described(saved, names, scores, ends)


def _described(saved: Saved, names: list[str], scores: Tensor, ends: tuple[Tensor, Tensor] | None) -> Iterator[Predicted]:
    if saved.spec.targets == "real":
        kinds = ("",) if ends is None else ("", "_low", "_high")
        titles = [f"{title}{kind}" for title in output_names(saved) for kind in kinds]
        columns = torch.stack([scores, *(ends or ())], -1).cpu().flatten(1)
        for name, row in zip(names, columns.tolist(), strict=True):
            yield Predicted(name, None, dict(zip(titles, row, strict=True)))
        return
    shares = probabilities(saved.spec, scores).tolist()
    for name, decision, row in zip(names, decided(saved.spec, scores, saved.classes), shares, strict=True):
        yield Predicted(name, decision, dict(zip(saved.classes, row, strict=True)))


def output_names(saved: Saved) -> list[str]:
    """Name the outputs of a real target: by the table's column, else ``output``, numbered where there are several."""
    count = math.prod(saved.spec.output_size)
    options = None if saved.recipe is None else saved.recipe.options["task"]
    name = options.target if isinstance(options, tables.TableConfig) else "output"
    return [name] if count == 1 else [f"{name}{place}" for place in range(count)]


# --- reading ------------------------------------------------------------------------------------------------------------------


def _read(saved: Saved, places: list[Path], reading: Reading) -> Batches:
    for place in places:
        if not place.exists():
            raise UsageError("no such file or folder", where=str(place), fix="give pictures, folders of pictures, .npz, .npy or .csv files")
    pictures: list[Path] = []
    for place in places:
        kind = place.suffix.lower()
        if place.is_dir() or kind in SUFFIXES:
            pictures.append(place)
            continue
        if kind not in (*ARRAYS, *TABLES):
            known = ", ".join((*SUFFIXES, *ARRAYS, *TABLES))
            raise UsageError("this is neither a picture nor a file of arrays or a table", where=str(place), fix=f"known: {known}")
        yield from _read_pictures(saved, pictures, reading)
        pictures = []
        yield from (_read_arrays if kind in ARRAYS else _read_table)(saved, place, reading)
    yield from _read_pictures(saved, pictures, reading)


def _read_pictures(saved: Saved, places: list[Path], reading: Reading) -> Batches:
    """Decode pictures, batch by batch; those of consecutive places share batches."""
    if not places:
        return
    form = _form(saved, reading)
    found = _decoded(saved, (path for place in places for path in _listed(place)), form, reading)
    while batch := list(islice(found, reading.batch_size)):
        yield [name for name, _ in batch], torch.stack([pixels for _, pixels in batch])


def _listed(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
        return
    found = pictures_in(place)
    first = next(found, None)
    if first is None:
        raise UsageError("the folder holds no picture", where=str(place), fix=f"known are files that end with {', '.join(SUFFIXES)}")
    yield first
    yield from found


def _form(saved: Saved, reading: Reading) -> Form:
    """Return the form to which the run's task brings pictures."""
    shape, spec = tuple(saved.spec.input_shape), saved.spec
    if len(shape) != 3 or shape[0] not in (1, 3) or not spec.takes_real_tensors:
        sizes = " x ".join(map(str, shape))
        raise UsageError(f"inputs of task {spec.name} are no pictures: {sizes}", where=str(saved.path), fix="give .npz, .npy or .csv files")
    options = None if saved.recipe is None else saved.recipe.options["task"]
    own = options if isinstance(options, PictureConfig) else None
    resize, convert = bool(own and own.size), bool(own and own.colour != "auto")
    return Form((shape[0], shape[1], shape[2]), resize or reading.resize, convert or reading.resize)


def _decoded(saved: Saved, paths: Iterable[Path], form: Form, reading: Reading) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            yield str(path), _raw(saved, _pixels(path, form))
        except UsageError as error:
            if reading.skipped is None:
                raise
            reading.skipped(f"{path}: {error.what}")


def _pixels(path: Path, form: Form) -> Tensor:
    try:
        with opened(path) as image:
            return form.tensor(image, str(path))
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all of these for pixels that are cut short
        raise UsageError(
            f"cannot read the picture: {error}", where=str(path), fix="remove it, or leave such pictures out by --skip-damaged"
        ) from error
    except UsageError as error:
        if "task." not in error.fix:  # it is damaged, or has more than eight bits
            raise UsageError(error.what, where=error.where, fix=f"{error.fix}; or leave such pictures out by --skip-damaged") from error
        what = error.what.replace("the first one has", "the run's have").replace("the first one is", "the run's are")
        fix = "give --resize, which brings pictures to the size and colours of the run's"
        raise UsageError(what, where=error.where, fix=fix) from error


def _raw(saved: Saved, pixels: Tensor) -> Tensor:
    """Convert pixels of 0 to 255 to the range in which the task has its inputs."""
    spec = saved.spec
    if spec.limits is not None and spec.limits[1] != WHITE:
        return pixels.float() * (spec.limits[1] / WHITE)
    if spec.limits is None and spec.scale not in (None, WHITE):
        what = f"inputs of task {spec.name} are numbers of any range, so that it is unknown which one is white"
        raise UsageError(what, where=str(saved.path), fix="give .npz or .npy files")
    return pixels


def _read_arrays(saved: Saved, path: Path, reading: Reading) -> Batches:
    array, options = _array(path, reading.array), None if saved.recipe is None else saved.recipe.options["task"]
    expected = len(saved.spec.input_shape) + 1
    as_task = isinstance(options, npz.ArraysConfig) and options.inputs == "numbers" and array.ndim in (expected, expected - 1)
    for first in range(0, len(array), reading.batch_size):
        part = np.asarray(array[first : first + reading.batch_size])
        whole = npz.as_inputs(part, options, path) if as_task and isinstance(options, npz.ArraysConfig) else part
        yield [f"{path}[{first + place}]" for place in range(len(part))], whole


def _array(path: Path, name: str) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix.lower() == ".npz":
            found = found[_name(path, found.files, name)]
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        fix = "save them again with numpy.savez or numpy.save"
        raise UsageError(f"cannot read the arrays: {error}", where=str(path), fix=fix) from error
    if not found.ndim or not len(found):
        raise UsageError(f"the array has the shape {found.shape}, so it holds no examples", where=str(path), fix="give (N, ...)")
    return found


def _name(path: Path, names: Sequence[str], said: str) -> str:
    """Choose the array of the inputs."""
    chosen = said or ("x" if "x" in names else names[0] if len(names) == 1 else "")
    if chosen not in names:
        what = f"there is no array {said}" if said else "which array holds the inputs?"
        raise UsageError(what, where=str(path), fix=f"--array NAME; the file holds {', '.join(names) or 'none'}")
    return chosen


def _read_table(saved: Saved, path: Path, reading: Reading) -> Batches:
    """Read rows of a table: named columns where the task has them, else a number for each entry of an input."""
    names = saved.spec.input_names
    if not names:
        yield from _read_numbers(saved, path, reading)
        return
    options = None if saved.recipe is None else saved.recipe.options["task"]
    separator = options.separator if isinstance(options, tables.TableConfig) and path.suffix.lower() == ".csv" else "auto"
    for part in tables.read_parts(path, separator, reading.batch_size):
        inputs = tables.named_inputs(names, part.columns)
        tables.check_columns(part, list(inputs), f"the run was trained on the columns {', '.join(inputs)}")
        yield [f"{path}:{line}" for line in part.lines], tables.encoded_inputs(part, inputs)


def _read_numbers(saved: Saved, path: Path, reading: Reading) -> Batches:
    """Read rows that are whole inputs, one after the other; a first line that is no numbers names the columns."""
    size = saved.spec.input_size
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=tables.separator_of(first, "auto", path))
        rows = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
        found = (entry for entry in rows if entry[0] > 1 or all(tables.number(cell) is not None for cell in entry[1]))
        while part := list(islice(found, reading.batch_size)):
            for line, row in part:
                wrong = next((cell for cell in row if tables.number(cell) is None), None)
                if len(row) != size or wrong is not None:
                    what = f"{wrong!r} is no number" if wrong is not None else f"{len(row)} numbers, but an input has {size}"
                    raise UsageError(what, where=f"{path}, line {line}", fix="give a line with all numbers of an input for each example")
            rows_ = np.array([[float(cell) for cell in row] for _, row in part], dtype=np.float32)
            yield [f"{path}:{line}" for line, _ in part], rows_.reshape(-1, *saved.spec.input_shape)


# --- writing ------------------------------------------------------------------------------------------------------------------


class _Csv:
    """Writes rows of comma-separated text: the input, the class with its probability, and the probability of each class."""

    def __init__(self, file: IO[str]) -> None:
        self._rows, self._begun = csv.writer(file, lineterminator="\n"), False

    def add(self, found: Predicted) -> None:
        """Write a row; first the names of the columns."""
        decided = found.decision is not None
        if not self._begun:
            before = ["class"] if isinstance(found.decision, str) else ["labels"] if decided else []
            self._rows.writerow(["input", *before, *(f"p_{name}" if decided else name for name in found.values)])
            self._begun = True
        said = [";".join(found.decision) if isinstance(found.decision, list) else found.decision] if decided else []
        self._rows.writerow([found.name, *said, *(f"{value:.6g}" for value in found.values.values())])

    def end(self) -> None:
        """Do nothing more."""


class _Json:
    """Writes a list of objects, or an object in each line."""

    def __init__(self, file: IO[str], *, lines: bool) -> None:
        self._file, self._lines, self._count = file, lines, 0

    def add(self, found: Predicted) -> None:
        """Write an object."""
        text = json.dumps(as_json(found), ensure_ascii=False)
        self._file.write(f"{text}\n" if self._lines else f"{',' if self._count else '['}\n{text}")
        self._count += 1

    def end(self) -> None:
        """Close the list."""
        if not self._lines:
            self._file.write("\n]\n" if self._count else "[]\n")


def as_json(found: Predicted) -> dict[str, Any]:
    """Return a prediction as plain values."""
    if found.decision is None:
        return {"input": found.name, "outputs": dict(found.values)}
    key = "labels" if isinstance(found.decision, list) else "class"
    return {"input": found.name, key: found.decision, "probabilities": dict(found.values)}


@contextmanager
def writer_of(path: Path) -> Iterator[_Csv | _Json]:
    """Open a file for predictions, which appears when all are written: ``.csv``, ``.json``, or ``.jsonl`` with an object in each line.

    Raises:
        UsageError: another ending.
    """
    kind = path.suffix.lower()
    if kind not in WRITTEN:
        raise UsageError(f"predictions are not written as {kind or 'a file without ending'}", where=str(path), fix=", ".join(WRITTEN))
    with replacing(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        writer = _Csv(file) if kind == ".csv" else _Json(file, lines=kind == ".jsonl")
        yield writer
        writer.end()
        file.flush()
        file.detach()


def csv_to(file: IO[str]) -> _Csv:
    """Write comma-separated text to an open file."""
    return _Csv(file)
