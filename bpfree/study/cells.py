"""The cells of a study: a row, a column and a seed each, resolved, and known by what their numbers depend on.

A cell's identity is a hash of its whole scientific configuration (what a run computes and how long, not where it is written, how it
is watched or who executes it), torch's version, the kind of device, the number of threads, the fingerprint of the data, and the sources
of the core and of the plugins concerned. Labels do not count.

Seeds go by axis: the order of the data and the split are the same for all rules of a repetition, initialisation and noise are those of
the rule and the repetition (the setting ``stream``, which a study sets to the rule's name).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bpfree.code_files import shown
from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.leaves import Leaf, canonical, leaf_at, said
from bpfree.metric import ACCURACY, ERROR
from bpfree.plugins import Plugins, installed_plugins
from bpfree.recipe import Recipe, is_scientific, quick_examples
from bpfree.redaction import redacted
from bpfree.rule import Rule
from bpfree.sources import source_hashes
from bpfree.study.fingerprints import Fingerprints, KnownData, digest
from bpfree.study.measures import measure_of
from bpfree.study.model import MEMORY, Column, Row, Study
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellKey
from bpfree.study.things import named
from bpfree.training.config import LIMITS
from bpfree.training.environment import resolve_device
from bpfree.yaml_values import text_of

__all__ = ["Plan", "cell_of", "is_scientific", "plan", "recipe_with", "word"]

TRAINERS = ("rule.name", "program.name")
DEFAULT = "default"
PROBE = "linear-probe"
"""Origin of settings that cannot change a result and are not written out as words."""


@dataclass(frozen=True)
class Plan:
    """A study with what the command line says.

    Attributes:
        study: as written.
        rows: in their columns, with the cells of the configurations as written.
        seeds: the repetitions.
        changes: how this differs from the study as written, a phrase each.
        shortened: whether it computes less than is written.
        fingerprints: of the data.
    """

    study: Study
    rows: Sequence[TableRow]
    seeds: Sequence[int]
    changes: Sequence[str]
    shortened: bool
    fingerprints: Fingerprints

    @property
    def cells(self) -> list[Cell]:
        """Cells as written; seeds are the outer loop, so that every row has its first result early."""
        return [row.cells[number] for number in range(len(self.seeds)) for row in self.rows]

    @property
    def output(self) -> Path:
        """The folder of runs."""
        return Path(self.rows[0].recipe.settings.output)


def plan(
    study: Study, overrides: Sequence[Leaf] = (), *, seeds: int | None = None, load: bool = False, registry: Plugins | None = None
) -> Plan:
    """Resolve every cell of a study.

    Args:
        study: as written; rules, networks and tasks may be objects in place of names.
        overrides: settings of all cells, over those of the file.
        seeds: how many, instead of those of the file.
        load: whether data may be loaded (and downloaded) to know their fingerprints; otherwise sets that are not on
            this machine count as unknown.
        registry: of names; the installed plugins by default.

    Raises:
        UsageError: with everything that is wrong in any cell.
    """
    study, registry = named(study, registry or installed_plugins())
    taken = [leaf.key for leaf in overrides if leaf.key in ("seed", "seeds")]
    if taken:
        raise UsageError(
            "a study runs each cell once per seed, so seed cannot be set", where=taken[0], fix="choose the number of seeds with --seeds N"
        )
    repetitions = _repetitions(study, seeds)
    resolved = _resolve_all(study, overrides, registry)
    _check_code(resolved)
    fingerprints = Fingerprints(Path(resolved[0].recipe.settings.output) / "studies", load=load)
    rows = [
        dataclasses.replace(
            row,
            cells=[cell_of(row, seed, fingerprints) for seed in repetitions],
            twin=_twin_of(row) if study.equal_budget else None,
        )
        for row in resolved
    ]
    changes, shortened = _changes(study, overrides, rows, registry) if any(is_scientific(leaf.key) for leaf in overrides) else ([], False)
    if repetitions != list(study.seeds):
        changes.append(f"seeds {_listed(repetitions)} instead of {_listed(study.seeds)}")
        shortened = shortened or len(repetitions) < len(study.seeds)
    return Plan(study, rows, repetitions, changes, shortened, fingerprints)


def _check_code(rows: Sequence[TableRow]) -> None:
    """Refuse code files with the same file name, because tables and identities name a file by it alone.

    Raises:
        UsageError: there are two.
    """
    places: dict[str, str] = {}
    for file in (file for row in rows for file in row.recipe.code_files()):
        first = places.setdefault(file.path.name, str(file.path))
        if first != str(file.path):
            raise UsageError(f"two files of code are called {file.path.name}", where=f"{first}, {file.path}", fix="rename one of them")


def _repetitions(study: Study, count: int | None) -> list[int]:
    """Return the study's seeds, or ``count`` of them, without tuning seeds: a tested cell must be trained with a seed of its own."""
    if count is None:
        return list(study.seeds)
    taken = {*study.seeds, *(study.tune.seeds if study.tune is not None else ())}
    return [*study.seeds, *islice((seed for seed in itertools.count() if seed not in taken), count)][:count]


# --- settings ---------------------------------------------------------------------------------------------------------


def _leaves(study: Study, row: Row, column: Column, overrides: Sequence[Leaf]) -> list[Leaf]:
    """Collect a cell's settings in order of precedence, lowest first: study, column, row, cell, command line."""
    layers: list[tuple[Mapping[str, Any], str]] = [
        # so that a store shows the study's runs together
        ({"tracking.experiment": study.name}, DEFAULT),
        # the report shows the curves of all cells, and their folders hold the data; a store would only duplicate them
        ({"tracking.artifacts": False, "tracking.checkpoint": False, "pictures.every": 0, "pictures.curves": False}, DEFAULT),
        # results do not depend on the number of workers, and workers do not oversubscribe the processors
        ({"threads": 1}, "every study"),
        (study.settings, "settings of the study"),
        (column.settings, f"column {column.label}"),
        (row.settings, f"row {row.label}"),
        (row.columns[column.label], f"row {row.label}, column {column.label}"),
    ]
    merged: dict[str, Leaf] = {}
    for settings, origin in layers:
        own = origin.startswith("row ")
        # a comparison comes from the user's command line; a study file may come from someone else
        word = study.path is None
        folder = None if study.path is None else study.path.parent
        given = [Leaf(key, value, origin, not own or key in row.shared, word) for key, value in settings.items()]
        replace_in(merged, [leaf_at(leaf, folder) for leaf in given])
    replace_in(merged, [dataclasses.replace(leaf, shared=True) for leaf in overrides])
    if "stream" not in merged:
        named = [
            leaf for key in TRAINERS if (leaf := merged.get(key)) is not None
        ]  # a row's own key comes first; a row without any is refused
        value = next((leaf.value for leaf in sorted(named, key=lambda leaf: leaf.shared)), "")
        merged["stream"] = Leaf("stream", shown(str(value)), "every study")
    return list(merged.values())


def replace_in(merged: dict[str, Leaf], later: Iterable[Leaf]) -> None:
    """Merge later settings over earlier ones; a budget has one limit, so a later limit of another kind replaces the earlier one."""
    later, limits = list(later), [f"budget.{name}" for name in LIMITS]
    if any(leaf.key in limits for leaf in later):
        for key in [key for key in merged if key in limits]:
            del merged[key]
    for leaf in later:
        merged[canonical(leaf.key, leaf.value)] = leaf


def faults_in(study: Study, registry: Plugins | None = None) -> list[BpfreeError]:
    """List what is wrong in the settings of a study's rows."""
    study, registry = named(study, registry or installed_plugins())
    try:
        _resolve_all(study, [], registry)
    except UsageError as error:
        return error.faults
    return []


def _resolve_all(study: Study, overrides: Sequence[Leaf], registry: Plugins | None) -> list[TableRow]:
    """Resolve the rows in each of their columns.

    Raises:
        UsageError: with every problem, each reported once.
    """
    problems: dict[str, tuple[BpfreeError, list[str]]] = {}
    found = []

    def note(problem: str | BpfreeError, *rows: str) -> None:
        fault = UsageError(problem) if isinstance(problem, str) else problem
        problems.setdefault(fault.sentence, (fault, []))[1].extend(rows)

    for row, column in study.cells():
        leaves = _leaves(study, row, column, overrides)
        try:
            if not any(canonical(leaf.key, leaf.value) in TRAINERS for leaf in leaves):
                raise UsageError("no rule is set", fix="give one in the settings of the row or of the study, such as rule: dfa")
            recipe = _without(resolve(leaves, registry), row)
            resolve_device(recipe.settings.device)
            if study.probe and _can_be_probed(recipe, leaves):
                leaves.append(Leaf("evaluation.protocols", [PROBE], "every study"))
                evaluation = dataclasses.replace(recipe.settings.evaluation, protocols=[PROBE])
                recipe = dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, evaluation=evaluation))
            found.append(TableRow(row, column.label, recipe, leaves))
        except UsageError as error:
            for fault in error.faults:
                note(fault, row.label)
    for each in found:
        for problem in (*_wrongly_published(each), *_wrong_target(study.targets.get(each.column), each)):
            note(problem, each.written.label)
    for problem in [] if problems else _used_by_none(found):
        note(problem, *(each.written.label for each in found))
    if problems:
        every = len(list(study.cells()))
        listed = [_where(fault, rows, every) for fault, rows in problems.values()]
        raise UsageError.of(listed, "study", where=f"study {study.name}")
    return found


def _wrongly_published(row: TableRow) -> Iterator[str | UsageError]:
    """Report problems of a row's published numbers: metrics that its task does not have, and shares out of range."""
    for key, number in row.written.published.get(row.column, {}).items():
        if key == MEMORY:
            continue
        known = row.metrics
        measure = measure_of(key, known)
        low, high = measure.bounds
        if measure.measured not in known:
            names = [*known, *([ERROR.name] if ACCURACY.name in known else [])]
            guess = nearest(measure.metric.name, names)
            fix = f"did you mean {measure.split}/{guess}?" if guess else "measure it: evaluation.metrics=[NAME]"
            yield UsageError(f"published: unknown metric {key!r}", fix=fix, known=[f"{measure.split}/{name}" for name in names])
        elif not low <= number.mean <= high:
            yield f"published: {key}={number.mean:g} is out of range: in per cent, from {low:g} to {high:g}"


def _wrong_target(target: float | None, row: TableRow) -> Iterator[str]:
    """Report a target that is out of range: shares are in per cent."""
    if target is not None and row.primary.share and not 0 <= target <= 100:
        yield f"target: {target:g} is out of range: {row.primary.name} is in per cent, from 0 to 100"


def _can_be_probed(recipe: Recipe, leaves: Sequence[Leaf]) -> bool:
    """Tell whether to add the probe of the features: the rule has features, and the study names no protocols itself."""
    if recipe.is_program:
        return False
    rule: type[Rule] = recipe.registry.get("rules", recipe.names["rule"])
    features = rule.features is not Rule.features or rule.traits_of(recipe.options["rule"]).chain
    named = any(leaf.key == "evaluation.protocols" for leaf in leaves)
    return features and not named and recipe.spec().targets in recipe.registry.get("protocols", PROBE).kinds


def _twin_of(row: TableRow) -> TableRow | None:
    """Make a row's own-prediction twin; ``None`` for a row that is untrained itself, has no hidden blocks, or is a program's."""
    if row.recipe.is_program or row.recipe.names["rule"] in ("linear", "frozen") or row.recipe.settings.twin:
        return None
    more = [Leaf("twin", True, "twin"), Leaf("evaluation.protocols", [], "twin")]
    if row.recipe.settings.budget.patience is not None:  # the twin's budget is a number of operations, which patience must not cut
        more.append(Leaf("budget.patience", None, "twin"))
    recipe, leaves = recipe_with(row, more)
    return TableRow(dataclasses.replace(row.written, label=f"{row.written.label} (twin)", published={}), row.column, recipe, leaves)


def _without(recipe: Recipe, row: Row) -> Recipe:
    """Add to a row's recipe the settings of a common network that do not reach the row, as unused."""
    reason = "the rule brings its own network"
    return dataclasses.replace(recipe, unused={**recipe.unused, **dict.fromkeys(row.without, reason)}) if row.without else recipe


def _used_by_none(rows: Sequence[TableRow]) -> Iterator[str]:
    """Report each shared setting that reaches some rows and is used by none of them."""
    unused: dict[tuple[str, str], str] = {}
    used: set[tuple[str, str]] = set()
    for row in rows:
        for leaf in row.leaves:
            key = canonical(leaf.key, leaf.value)
            source = said(leaf.value) if leaf.key in row.written.shared else leaf.origin  # a network's settings are copied into rows
            if key in row.recipe.unused:
                unused.setdefault((key, source), row.recipe.unused[key])
            else:
                used.add((key, source))
    yield from (f"{key} is used by no row: {reason}" for (key, source), reason in unused.items() if (key, source) not in used)


def _where(fault: BpfreeError, rows: Sequence[str], every: int) -> BpfreeError:
    if len(rows) == every or "row " in fault.where:
        return fault
    return fault.at("; ".join(filter(None, [fault.where, f"row {', '.join(dict.fromkeys(rows))}"])))


# --- identity ---------------------------------------------------------------------------------------------------------


def cell_of(row: TableRow, seed: int, fingerprints: Fingerprints, more: Sequence[Leaf] = (), *, trial: int | None = None) -> Cell:
    """Make a cell of a row.

    Args:
        row: whose.
        seed: of the repetition.
        fingerprints: of the data.
        more: settings that tuning tries, or has chosen.
        trial: its number, for a trial.

    Raises:
        UsageError: the further settings do not fit.
    """
    recipe, leaves = recipe_with(row, more)
    recipe = dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, seed=seed))
    data = fingerprints.of(recipe)
    identity = _identity(recipe, data)
    settings = [*leaves, Leaf("seed", seed, "seeds of the study")]
    key = CellKey(digest(identity), row.written.label, row.column, seed, trial, redacted(identity), settings)
    words = [*(word(leaf.key, leaf.value) for leaf in leaves if _is_told(leaf, recipe)), f"seed={seed}"]
    examples = None if data is None else data.examples
    if examples is not None and recipe.settings.quick:
        examples = min(examples, quick_examples(recipe.settings))
    return Cell(key, recipe, words, examples)


def _is_told(leaf: Leaf, recipe: Recipe) -> bool:
    return leaf.origin != DEFAULT and canonical(leaf.key, leaf.value) not in recipe.unused


def recipe_with(row: TableRow, more: Sequence[Leaf]) -> tuple[Recipe, list[Leaf]]:
    """Resolve a row's recipe with further settings.

    Raises:
        UsageError: they do not fit.
    """
    if not more:
        return row.recipe, list(row.leaves)
    merged = {canonical(leaf.key, leaf.value): leaf for leaf in row.leaves}
    replace_in(merged, more)
    return _without(resolve(list(merged.values()), row.recipe.registry), row.written), list(merged.values())


def word(key: str, value: Any) -> str:
    """Write a setting as the command line takes it, with addresses redacted."""
    return f"{key}={text_of(redacted({key: value})[key])}"


def _identity(recipe: Recipe, data: KnownData | None) -> dict[str, Any]:
    settings = recipe.settings
    return {
        "config": {key: _without_place(key, value, recipe, data) for key, value in recipe.flat().items() if is_scientific(key)},
        "torch": str(torch.__version__),
        "device": resolve_device(settings.device).type,
        "threads": settings.threads or torch.get_num_threads(),
        "data": None if data is None else data.fingerprint,
        "sources": source_hashes(recipe),
        **({"packages": _versions(recipe)} if recipe.is_program else {}),
    }


def _versions(recipe: Recipe) -> dict[str, str]:
    """Return the versions of the packages that a program computes with."""
    return {package: metadata.version(package) for package in recipe.registry.get("programs", recipe.names["program"]).packages}


def _without_place(key: str, value: Any, recipe: Recipe, data: KnownData | None) -> Any:
    """Replace a data file's path by a fixed value, because the identity holds its content instead."""
    places = (Path(), recipe.root() or Path())
    if data is not None and key.startswith("task.") and isinstance(value, str) and any((place / value).is_file() for place in places):
        return "a file"
    return value


# --- how it differs from what is written ------------------------------------------------------------------------------


def _changes(study: Study, overrides: Sequence[Leaf], now: Sequence[TableRow], registry: Plugins | None) -> tuple[list[str], bool]:
    """Describe each setting that differs in any cell, and tell whether a budget is smaller than written."""
    try:
        written = _resolve_all(study, [leaf for leaf in overrides if not is_scientific(leaf.key)], registry)
    except UsageError:  # settings that the file leaves to the command line, such as a path
        return [word(leaf.key, leaf.value) for leaf in overrides if is_scientific(leaf.key)], False
    before: dict[str, list[Any]] = {}
    after: dict[str, list[Any]] = {}
    shortened = False
    for row, as_written in zip(now, written, strict=True):
        values, others = row.recipe.flat(), as_written.recipe.flat()
        for key in dict.fromkeys([*values, *others]):
            new, old = values.get(key), others.get(key)
            if new != old and is_scientific(key):
                after.setdefault(key, []).append(new)
                before.setdefault(key, []).append(old)
                shortened = shortened or key == "quick" or (key.startswith("budget.") and new is not None and old is not None and new < old)
    return [f"{key}={_listed(_distinct(values))} instead of {_listed(_distinct(before[key]))}" for key, values in after.items()], shortened


def _distinct(values: Iterable[Any]) -> Iterator[Any]:
    return iter(dict.fromkeys(text_of(redacted(value)) for value in values))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
