"""The cells of a study: a row, a column and a seed each, resolved, and known by what their numbers depend on.

A cell's identity is a hash of its whole scientific configuration (what a run computes and how long, not where it is written or how it
is watched), torch's version, the kind of device, the number of threads, the contents of a data file of one's own, and the sources of
the core and of the plugins concerned. Labels do not count, nor does the study: it is the computation that is done once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bpfree import runner
from bpfree.config import NAMED, Leaf, Recipe, resolve
from bpfree.errors import UsageError, nearest
from bpfree.plugins import Plugins
from bpfree.sources import source_hashes
from bpfree.study.file import Column, Row, Study
from bpfree.training.environment import resolve_device

__all__ = ["Cell", "Plan", "is_scientific", "plan", "word"]

NOT_SCIENTIFIC = (runner.CHANGEABLE - {"budget", "evaluation"}) | {"output"}
"""How long is part of the result, and so are the draws of an evaluation and which epochs ``best-val`` chooses among."""


@dataclass(frozen=True)
class Cell:
    """A computation with its place in the table.

    Attributes:
        row, column: labels.
        seed: of this repetition.
        recipe: resolved.
        words: ``KEY=VALUE`` words that give the same recipe.
        identity: what its numbers depend on.
        id: hash of the identity, 16 hex digits.
    """

    row: str
    column: str
    seed: int
    recipe: Recipe
    words: Sequence[str]
    identity: Mapping[str, Any]
    id: str

    @property
    def label(self) -> str:
        """As shown while it runs."""
        return " ".join(filter(None, [self.row, self.column and f"[{self.column}]", f"seed {self.seed}"]))


@dataclass(frozen=True)
class Plan:
    """A study with what the command line says.

    Attributes:
        study: as written.
        cells: of all rows and columns; seeds are the outer loop, so that every row has its first number early.
        seeds: the repetitions.
        changes: how this differs from the study as written, a phrase each.
        shortened: whether it computes less than is written.
    """

    study: Study
    cells: Sequence[Cell]
    seeds: Sequence[int]
    changes: Sequence[str]
    shortened: bool

    @property
    def output(self) -> Path:
        """The folder of runs."""
        return Path(self.cells[0].recipe.settings.output)

    def chosen(self, rows: Sequence[str] | None, columns: Sequence[str] | None) -> list[Cell]:
        """The cells of some rows and columns.

        Raises:
            UsageError: labels that the study does not have.
        """
        for given, labels, kind in (
            (rows, [row.label for row in self.study.rows], "rows"),
            (columns, [column.label for column in self.study.columns], "columns"),
        ):
            _check_labels(given, labels, kind)
        return [cell for cell in self.cells if (rows is None or cell.row in rows) and (columns is None or cell.column in columns)]


def _check_labels(given: Sequence[str] | None, labels: Sequence[str], kind: str) -> None:
    wrong = [label for label in given or () if label not in labels]
    if wrong:
        guesses = [guess for label in wrong if (guess := nearest(label, labels))]
        fix = f"did you mean {', '.join(map(repr, guesses))}? " if guesses else ""
        what = f"the study has no {kind} {', '.join(map(repr, wrong))}"
        raise UsageError(what, where=f"--{kind}", fix=f"{fix}known: {', '.join(filter(None, labels)) or 'none'}")


def plan(study: Study, overrides: Sequence[Leaf] = (), *, seeds: int | None = None, registry: Plugins | None = None) -> Plan:
    """Resolve every cell of a study.

    Args:
        study: as written.
        overrides: settings of all cells, over those of the file.
        seeds: how many, instead of those of the file.
        registry: of names; the installed plugins by default.

    Raises:
        UsageError: with everything that is wrong in any cell.
    """
    taken = [leaf.key for leaf in overrides if leaf.key in ("seed", "seeds")]
    if taken:
        raise UsageError("a study repeats each cell with its seeds", where=taken[0], fix="say how many with --seeds N")
    repetitions = list(study.seeds) if seeds is None else [*study.seeds, *(s for s in range(seeds) if s not in study.seeds)][:seeds]
    recipes = _resolve_all(study, overrides, registry)
    cells = [
        _cell(row, column, seed, recipe, leaves)
        for seed in repetitions
        for (row, column), (recipe, leaves) in zip(study.cells(), recipes, strict=True)
    ]
    changes, shortened = _changes(study, overrides, [recipe for recipe, _ in recipes], registry) if overrides else ([], False)
    if repetitions != list(study.seeds):
        changes.append(f"seeds {_listed(repetitions)} instead of {_listed(study.seeds)}")
        shortened = shortened or len(repetitions) < len(study.seeds)
    return Plan(study, cells, repetitions, changes, shortened)


# --- settings ---------------------------------------------------------------------------------------------------------


def _leaves(study: Study, row: Row, column: Column, overrides: Sequence[Leaf]) -> list[Leaf]:
    """Later ones win: all cells, the column, the row, the cell alone, the command line."""
    layers = [
        # a default, so that a store shows the study's runs together
        ({"tracking.experiment": study.name}, "default"),
        (study.settings, "settings of the study"),
        (column.settings, f"column {column.label}"),
        (row.settings, f"row {row.label}"),
        (row.columns[column.label], f"row {row.label}, column {column.label}"),
    ]
    merged: dict[str, Leaf] = {}
    for leaf in (Leaf(key, value, origin) for settings, origin in layers for key, value in settings.items()):
        merged[_key(leaf)] = leaf
    if any(leaf.key.startswith("budget.") for leaf in overrides):  # a budget has one limit, which is now another
        merged = {key: leaf for key, leaf in merged.items() if not key.startswith("budget.")}
    for leaf in overrides:
        merged[_key(leaf)] = leaf
    return list(merged.values())


def _key(leaf: Leaf) -> str:
    return f"{leaf.key}.name" if leaf.key in NAMED and isinstance(leaf.value, str) else leaf.key


def is_scientific(key: str) -> bool:
    """Whether a setting can change a result."""
    return key.split(".")[0] not in NOT_SCIENTIFIC


def _resolve_all(study: Study, overrides: Sequence[Leaf], registry: Plugins | None) -> list[tuple[Recipe, list[Leaf]]]:
    """A recipe for each cell of one repetition.

    Raises:
        UsageError: with everything that is wrong, each thing once.
    """
    problems: dict[str, list[str]] = {}
    recipes = []
    for row, column in study.cells():
        leaves = _leaves(study, row, column, overrides)
        try:
            recipe = resolve(leaves, registry)
            resolve_device(recipe.settings.device)
            recipes.append((recipe, leaves))
        except UsageError as error:
            for problem in _problems(error):
                problems.setdefault(problem, []).append(row.label)
    if problems:
        every = len(list(study.cells()))
        listed = [_where(problem, rows, every) for problem, rows in problems.items()]
        what = listed[0] if len(listed) == 1 else f"{len(listed)} things are wrong in the study:\n" + "\n".join(f"  - {p}" for p in listed)
        raise UsageError(what, where=f"study {study.name}")
    return recipes


def _problems(error: UsageError) -> list[str]:
    first, *others = error.what.splitlines()
    if others:
        return [line.removeprefix("  - ") for line in others]
    more = "; ".join(part for part in (error.where, error.fix) if part)
    return [f"{first} ({more})" if more else first]


def _where(problem: str, rows: Sequence[str], every: int) -> str:
    if len(rows) == every or "(row " in problem:
        return problem
    return f"{problem} (row {', '.join(dict.fromkeys(rows))})"


# --- identity ---------------------------------------------------------------------------------------------------------


def _cell(row: Row, column: Column, seed: int, recipe: Recipe, leaves: Iterable[Leaf]) -> Cell:
    recipe = dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, seed=seed))
    identity = _identity(recipe)
    text = json.dumps(identity, sort_keys=True, default=str)
    words = [word(leaf.key, leaf.value) for leaf in leaves if leaf.origin != "default"]
    return Cell(row.label, column.label, seed, recipe, [*words, f"seed={seed}"], identity, hashlib.sha256(text.encode()).hexdigest()[:16])


def word(key: str, value: Any) -> str:
    """A setting as the command line takes it."""
    return f"{key}={_value(value)}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _identity(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.settings
    return {
        "config": {key: _content(key, value, recipe.root()) for key, value in recipe.flat().items() if is_scientific(key)},
        "torch": str(torch.__version__),
        "device": resolve_device(settings.device).type,
        "threads": settings.threads or torch.get_num_threads(),
        "sources": source_hashes(recipe),
    }


def _content(key: str, value: Any, root: Path | None) -> Any:
    """For a file of data its content: the path is not what counts."""
    if not key.startswith("task.") or not isinstance(value, str):
        return value
    for path in (Path(value), (root or Path()) / value):
        if path.is_file():
            with path.open("rb") as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return value


# --- how it differs from what is written ------------------------------------------------------------------------------


def _changes(study: Study, overrides: Sequence[Leaf], now: Sequence[Recipe], registry: Plugins | None) -> tuple[list[str], bool]:
    """A phrase for each setting that differs in any cell; whether a budget is smaller than written."""
    try:
        written = _resolve_all(study, [leaf for leaf in overrides if not is_scientific(leaf.key)], registry)
    except UsageError:  # the file leaves to the command line what it needs, such as a path
        return [word(leaf.key, leaf.value) for leaf in overrides if is_scientific(leaf.key)], False
    before: dict[str, list[Any]] = {}
    after: dict[str, list[Any]] = {}
    shortened = False
    for recipe, (other, _) in zip(now, written, strict=True):
        values, others = recipe.flat(), other.flat()
        for key in dict.fromkeys([*values, *others]):
            new, old = values.get(key), others.get(key)
            if new != old and is_scientific(key):
                after.setdefault(key, []).append(new)
                before.setdefault(key, []).append(old)
                shortened = shortened or (key.startswith("budget.") and new is not None and old is not None and new < old)
    return [f"{key}={_listed(_distinct(values))} instead of {_listed(_distinct(before[key]))}" for key, values in after.items()], shortened


def _distinct(values: Iterable[Any]) -> Iterator[Any]:
    return iter(dict.fromkeys(map(_value, values)))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
