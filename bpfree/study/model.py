"""Data classes of a study: rows, columns, seeds and published numbers; :mod:`bpfree.study.file` reads them from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["MEMORY", "Choices", "Column", "Domain", "Published", "Range", "Row", "Study", "Tune"]

MEMORY = "memory_mb"
"""Key of published numbers that is not a metric of a split: memory of training in MiB."""


Search = Literal["quasi-random", "tpe"]
Pruner = Literal["none", "asha"]


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        log: searched on a logarithmic scale.
        integer: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: Sequence[Any]


Domain = Range | Choices


@dataclass(frozen=True)
class Tune:
    """Settings of tuning, by which every row has the same number of trials, scored on validation only.

    Attributes:
        trials: of each row in each column; the first is the configuration as the file has it.
        search: ``quasi-random`` (scrambled Sobol points) or ``tpe`` (tree-structured Parzen estimator).
        seeds: of the trials, over which a score is the mean; none of them is a seed of the study.
        space: by setting; a row may change it.
        settings: of trials alone, such as a shorter budget.
        pruner: ``asha``: trials are compared at rungs, and most of them are ended there (:mod:`bpfree.study.pruning`); ``none``: each
            trains to its end.
        rung: epochs of the first rung.
        reduction: one of this many trials at a rung continues; the next rung is this many times as far.
    """

    trials: int
    search: Search = "quasi-random"
    seeds: Sequence[int] = (1000,)
    space: Mapping[str, Domain] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pruner: Pruner = "none"
    rung: int = 1
    reduction: int = 3

    @property
    def pruning(self) -> str:
        """Description of the pruning of trials; empty without pruning."""
        if self.pruner == "none":
            return ""
        each = f"{self.rung}, {self.rung * self.reduction}, {self.rung * self.reduction**2} ... epochs"
        return f"after {each} one of {self.reduction} trials continues, the best so far on validation (successive halving)"


@dataclass(frozen=True)
class Published:
    """A number of the paper, with its standard deviation where the paper has one."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table: its label (empty where a study has no columns), its settings, and its own target."""

    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: as printed.
        settings: of its cells, by dotted key; a rule, network or task may be an object in place of its name.
        columns: those in which it has a cell, each with settings of that cell alone; by default that of a study without columns.
        published: by column and metric; what is absent is not known.
        space: what is tuned, by setting; empty: nothing.
        shared: those of ``settings`` that rows have in common, such as the network of a comparison.
        without: settings of such a network that do not reach this row, as its rule brings its own.
    """

    label: str
    settings: Mapping[str, Any]
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    published: Mapping[str, Mapping[str, Published]] = field(default_factory=dict)
    space: Mapping[str, Domain] = field(default_factory=dict)
    shared: Sequence[str] = ()
    without: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """A study: what its file says, or what was written in Python.

    Attributes:
        name: of the registered study, or the file's.
        title, paper, notes: for readers.
        settings: of all cells, by dotted key.
        seeds: the repetitions.
        columns: at least one; a single one without a label where the file has none.
        rows: in the order of the table.
        controls: labels of the rows with which all others are compared, such as random features.
        targets: by column, the value of the task's primary metric on validation (shares in per cent) whose time is taken.
        tune: how rows are tuned; ``None``: they are not.
        jobs: cells that run at the same time, unless the command line says otherwise.
        timeout: seconds that a cell may take; ``None``: as long as it needs.
        path: of the file; ``None`` for a study made in Python.
        floor: whether the floor of each task and network is measured.
        probe: whether the features of each row are read by a converged linear readout.
        equal_budget: whether each row has an own-prediction twin with the same trials and as many operations.
    """

    name: str
    title: str = ""
    paper: str = ""
    notes: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    columns: Sequence[Column] = (Column(),)
    rows: Sequence[Row] = ()
    controls: Sequence[str] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    tune: Tune | None = None
    jobs: int = 1
    timeout: float | None = None
    path: Path | None = None
    floor: bool = True
    probe: bool = True
    equal_budget: bool = False

    def published_metric(self, split: str) -> str | None:
        """Return the published metric of a split, such as ``test/error``; ``None`` if there is none."""
        names = (name for row in self.rows for numbers in row.published.values() for name in numbers)
        return next((name for name in names if name.startswith(f"{split}/")), None)

    def publishes(self, split: str) -> bool:
        """Tell whether any number of a split is published."""
        return self.published_metric(split) is not None

    def cells(self) -> Iterator[tuple[Row, Column]]:
        """Iterate over the cells of one repetition, row by row."""
        return ((row, column) for row in self.rows for column in self.columns if column.label in row.columns)
