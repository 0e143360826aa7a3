"""The task ``csv``: a table of your own, ``task=csv task.path=FILE task.target=COLUMN``.

The first line names the columns. A column whose cells are all numbers is one input; any other one has an input for each of its categories,
in alphabetical order, which is 1 for that category and 0 otherwise. The names of the inputs (``age``, ``colour=red``) are recorded in the
spec. Without ``task.test``, another table, a fixed stratified fifth is the test split.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.files import expanded
from bpfree.options import option
from bpfree.tasks.splits import Split
from bpfree.tasks.task import DataSource, TaskSpec, fixed_test

__all__ = ["CSV", "TableConfig"]

MISSING = ("", "na", "n/a", "nan", "null", "?")
"""Cells without a value, in lower case."""
SEPARATORS = (",", ";", "\t")
MOST_CATEGORIES = 1000


@dataclass
class TableConfig:
    """The files of the table, and the meaning of its columns."""

    path: str = option("", "the table; a relative path is looked up in the working directory, then in the data root")
    test: str = option("", "another table with the test examples (none: a fixed fifth of the table)")
    target: str = option("", "name of the column that is to be predicted")
    targets: Literal["auto", "classes", "real"] = option("auto", "what the target is; auto: text is classes, fractions are numbers")
    categorical: list[str] = option(factory=list, help="columns whose numbers are names of categories")
    leave_out: list[str] = option(factory=list, help="columns that are not read")
    separator: str = option("auto", "between the columns (auto: the one of comma, semicolon and tab that the first line has)")


@dataclass(frozen=True)
class TextTable:
    """Cells by column, and the line of each row in its file."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def refused(self, what: str, column: str, row: int, fix: str) -> UsageError:
        """Make an error about a cell."""
        return UsageError(what, where=f"{self.path}, line {self.lines[row]}, column {column}", fix=fix)


@dataclass(frozen=True)
class Columns:
    """The inputs and the target among the columns.

    Attributes:
        inputs: categories of each input column; ``None``: numbers.
        target: name of the target's column.
        classes: that the target has; empty: numbers.
    """

    inputs: dict[str, tuple[str, ...] | None]
    target: str
    classes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        found: list[str] = []
        for name, categories in self.inputs.items():
            found += [name] if categories is None else [f"{name}={category}" for category in categories]
        return tuple(found)


def spec(config: TableConfig, root: Path | None) -> TaskSpec:
    """Read names, categories and classes from the table, once for each of its states.

    Raises:
        UsageError: no such table or column; or a column of which it is not clear what it is.
    """
    path = located(config.path, root, "task.path")
    stat = path.stat()
    chosen = (config.target, config.targets, tuple(config.categorical), tuple(config.leave_out), config.separator)
    return _spec(path, stat.st_size, stat.st_mtime_ns, chosen)


@lru_cache(maxsize=8)
def _spec(
    path: Path, size: int, changed: int, chosen: tuple[str, Literal["auto", "classes", "real"], tuple[str, ...], tuple[str, ...], str]
) -> TaskSpec:
    target, targets, categorical, leave_out, separator = chosen
    config = TableConfig(str(path), "", target, targets, list(categorical), list(leave_out), separator)
    found = described(read(path, separator), config)
    kind: Literal["classes", "real"] = "classes" if found.classes else "real"
    outputs = len(found.classes) or 1
    return TaskSpec("csv", (len(found.names),), outputs, kind, scale=1.0, class_names=found.classes, input_names=found.names)


def load(config: TableConfig, root: Path | None) -> tuple[Split, Split]:
    """Load training and test examples: inputs float32 (N, columns), classes (N,) or numbers (N, 1).

    Raises:
        UsageError: as for ``spec``; or a test table with other columns, categories or classes.
    """
    table = read(located(config.path, root, "task.path"), config.separator)
    found = described(table, config)
    train = encoded(table, found)
    if not config.test:
        return fixed_test(train)
    return train, encoded(read(located(config.test, root, "task.test"), config.separator), found)


def files(config: TableConfig, root: Path | None) -> list[Path]:
    """List the files of the tables."""
    return [located(path, root, key) for path, key in ((config.path, "task.path"), (config.test, "task.test")) if path]


def located(given: str, root: Path | None, key: str) -> Path:
    if not given:
        raise UsageError("task csv needs a table", where=key, fix="give task.path=FILE.csv and task.target=COLUMN")
    path = expanded(Path(given))
    places = [path] if path.is_absolute() or root is None else [path, expanded(root) / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError("no such table", where=f"{key}: {' or '.join(map(str, places))}", fix=f"give {key}=FILE.csv")
    return found


def read(path: Path, separator: str) -> TextTable:
    """Read the cells of a table.

    Raises:
        UsageError: the file is no table.
    """
    return next(read_parts(path, separator))


def read_parts(path: Path, separator: str, size: int | None = None) -> Iterator[TextTable]:
    """Read the cells of a table in parts of ``size`` rows; ``None``: all rows at once.

    Raises:
        UsageError: the file is no table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=separator_of(first, separator, path))
            rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row))
            line, header = next(rows, (1, list[str]()))
            part = list(islice(rows, size))
            if not part:
                raise UsageError("the table has no examples", where=str(path), fix="give a line of names, and a line for each example")
            check_header(header, f"{path}, line {line}")
            while part:
                yield text_table(path, header, part)
                part = list(islice(rows, size))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read the table: {error}", where=str(path), fix="save it as comma-separated text in UTF-8") from error


def check_header(header: list[str], where: str) -> None:
    """Refuse a first line that does not name each column."""
    if all(number(cell) is not None for cell in header) or "" in header or len(set(header)) < len(header):
        what = "the first line does not name the columns" if len(set(header)) == len(header) else "two columns have the same name"
        raise UsageError(what, where=where, fix="give each column a name of its own")


def text_table(path: Path, header: list[str], rows: Sequence[tuple[int, list[str]]]) -> TextTable:
    for line, row in rows:
        if len(row) != len(header):
            what = f"{len(row)} cells, but there are {len(header)} columns"
            raise UsageError(what, where=f"{path}, line {line}", fix="correct the line; text that holds the separator is put into quotes")
    cells = zip(*(row for _, row in rows), strict=True)
    return TextTable(path, {name: list(column) for name, column in zip(header, cells, strict=True)}, [line for line, _ in rows])


def separator_of(first: str, said: str, path: Path) -> str:
    if said != "auto":
        said = {"tab": "\t", "\\t": "\t"}.get(said, said)
        if len(said) != 1:
            raise UsageError(f"task.separator={said!r} is not a single character", where=str(path), fix="give one character, or tab")
        return said
    found = [sign for sign in SEPARATORS if sign in first]
    if len(found) > 1:
        signs = " and ".join(repr(sign) for sign in found)
        raise UsageError(f"the first line holds {signs}: which separates the columns?", where=str(path), fix='set task.separator=","')
    return found[0] if found else ","


def number(cell: str) -> float | None:
    """Return the number in a cell; ``None`` for text."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def described(table: TextTable, config: TableConfig) -> Columns:
    """Determine what the columns are.

    Raises:
        UsageError: a column that is not there, lacks a value, or is partly numbers and partly text.
    """
    if config.target not in table.columns:
        what = "task csv needs the target's column" if not config.target else f"there is no column {config.target!r}"
        raise UsageError(what, where=f"task.target, {table.path}", fix=f"one of {', '.join(table.columns)}")
    for key, names in (("categorical", config.categorical), ("leave_out", config.leave_out)):
        if unknown := [name for name in names if name not in table.columns]:
            raise UsageError(
                f"there is no column {unknown[0]!r}", where=f"task.{key}, {table.path}", fix=f"one of {', '.join(table.columns)}"
            )
    inputs = {
        name: categories(table, name, told=name in config.categorical)
        for name in table.columns
        if name != config.target and name not in config.leave_out
    }
    if not inputs:
        raise UsageError("there is no column but the target's", where=str(table.path), fix="give it inputs")
    return Columns(inputs, config.target, classes(table, config))


def categories(table: TextTable, name: str, *, told: bool) -> tuple[str, ...] | None:
    cells = table.columns[name]
    check_missing(table, name)
    texts = [row for row, cell in enumerate(cells) if number(cell) is None]
    if not told and not texts:
        return None
    if not told and len(texts) < len(cells):
        what = f"{cells[texts[0]]!r} is no number, but {len(cells) - len(texts)} of {len(cells)} cells of the column are"
        raise table.refused(what, name, texts[0], f"correct it, or set task.categorical=[{name}] if they are names")
    found = tuple(sorted(set(cells)))
    if len(found) > MOST_CATEGORIES or (len(found) == len(cells) and not told and len(cells) > 2):
        what = f"the column {name} has {len(found)} categories in {len(cells)} rows"
        raise UsageError(what, where=str(table.path), fix=f"leave it out: task.leave_out=[{name}]")
    return found


def check_missing(table: TextTable, name: str) -> None:
    row = next((row for row, cell in enumerate(table.columns[name]) if cell.lower() in MISSING), None)
    if row is not None:
        what = f"the value {table.columns[name][row]!r} is missing" if table.columns[name][row] else "a value is missing"
        raise table.refused(what, name, row, f"fill it in, remove the line, or task.leave_out=[{name}]")


def classes(table: TextTable, config: TableConfig) -> tuple[str, ...]:
    """List the classes of the target in order, numbers by their value; none if the target is a number."""
    name, cells = config.target, table.columns[config.target]
    check_missing(table, name)
    numbers = [number(cell) for cell in cells]
    numeric = [value for value in numbers if value is not None]
    if config.targets == "real" or (config.targets == "auto" and len(numeric) == len(cells) and any(value % 1 for value in numeric)):
        return ()
    if config.targets == "auto" and len(numeric) == len(cells):
        what = f"the target {name} holds whole numbers: classes or numbers?"
        raise UsageError(what, where=str(table.path), fix="set task.targets=classes or task.targets=real")
    found = sorted(set(cells), key=float if len(numeric) == len(cells) else str)
    if len(found) > MOST_CATEGORIES:
        raise UsageError(
            f"the target {name} has {len(found)} classes", where=str(table.path), fix="set task.targets=real if they are numbers"
        )
    return tuple(found)


def encoded(table: TextTable, found: Columns) -> Split:
    """Encode inputs and targets as numbers.

    Raises:
        UsageError: a column is not there; or a cell is no number, or of no known category or class.
    """
    check_columns(table, [*found.inputs, found.target], "give both tables the same columns")
    return Split(encoded_inputs(table, found.inputs), target(table, found))


def check_columns(table: TextTable, names: Sequence[str], fix: str) -> None:
    """Refuse a table without one of these columns, or with a cell of theirs that is empty."""
    for name in names:
        if name not in table.columns:
            raise UsageError(f"there is no column {name!r}", where=str(table.path), fix=fix)
        check_missing(table, name)


def encoded_inputs(table: TextTable, inputs: Mapping[str, tuple[str, ...] | None]) -> Tensor:
    """Encode the inputs (N, columns) as float32: numbers as they are, categories as zeros and a one."""
    parts = [numbers(table, name) if known is None else one_hot(table, name, known) for name, known in inputs.items()]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def named_inputs(names: Sequence[str], columns: Collection[str]) -> dict[str, tuple[str, ...] | None]:
    """Find the columns, and the categories of each, that make inputs of these names (:attr:`Columns.names`).

    Args:
        names: of the inputs, such as ``age`` and ``colour=red``.
        columns: of the table; a name may hold ``=`` itself.
    """
    found: dict[str, tuple[str, ...] | None] = {}
    for name in names:
        cuts = [place for place, sign in enumerate(name) if sign == "="]
        if name in columns or not cuts:
            found[name] = None
            continue
        cut = next((place for place in cuts if name[:place] in columns), cuts[0])
        found[name[:cut]] = (*(found.get(name[:cut]) or ()), name[cut + 1 :])
    return found


def target(table: TextTable, found: Columns) -> Tensor:
    if not found.classes:
        return torch.from_numpy(numbers(table, found.target))
    return torch.from_numpy(places(table, found.target, found.classes))


def numbers(table: TextTable, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values = [number(cell) for cell in table.columns[name]]
    for row, value in enumerate(values):
        if value is None or not math.isfinite(value) or abs(value) > np.finfo(np.float32).max:
            raise table.refused(f"{table.columns[name][row]!r} is no finite number", name, row, "correct it")
    return np.array(values, dtype=np.float64).astype(np.float32)[:, None]


def places(table: TextTable, name: str, known: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    index = {category: place for place, category in enumerate(known)}
    for row, cell in enumerate(table.columns[name]):
        if cell not in index:
            what = f"{cell!r} does not occur in the training table"
            raise table.refused(what, name, row, f"known: {', '.join(known[:8])}")
    return np.array([index[cell] for cell in table.columns[name]], dtype=np.int64)


def one_hot(table: TextTable, name: str, known: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.eye(len(known), dtype=np.float32)[places(table, name, known)]


CSV = DataSource(spec, load, TableConfig, "a table of your own: task.path=FILE.csv task.target=COLUMN", files=files, normalise="auto")
