"""Read study files: strict YAML, with all problems reported at once.

``docs/studies.md`` describes the format. Settings are checked against rules and tasks when cells are made of them
(:mod:`bpfree.study.cells`), so that a study can be shown where its plugin's data are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bpfree import yaml_values
from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.leaves import REFERENCE, canonical, leaves_of, refers
from bpfree.plugins import Plugins, installed_plugins
from bpfree.study.cells import faults_in
from bpfree.study.grid import GRID_KEYS, expand, unknown
from bpfree.study.model import MEMORY, Choices, Column, Domain, Published, Range, Row, Study, Tune

__all__ = ["find_study", "read_study"]

STUDY_KEYS = (
    "title",
    "paper",
    "notes",
    "settings",
    "seeds",
    "columns",
    "rows",
    "controls",
    "target",
    "tune",
    "jobs",
    "timeout",
    "floor",
    "probe",
    "equal_budget",
)
COLUMN_KEYS = ("label", "settings", "target")
ROW_KEYS = ("label", "program", "settings", "columns", "published", "tune")
TUNE_KEYS = ("trials", "search", "seeds", "space", "settings", "pruner", "rung", "reduction")
SEARCHES = ("quasi-random", "tpe")
PRUNERS = ("none", "asha")
FIRST_TUNING_SEED = 1000
METRIC = re.compile(r"(test|train)/[A-Za-z]\w*")
MOST = {"jobs": 1024, "trials": 10_000, "seeds": 10_000, "rung": 1_000_000, "reduction": 1000}
NOT_HERE = {
    "seed": "use the study's key seeds",
    "seeds": "write it as a key of the study, beside rows",
    "output": "set it on the command line",
}


def find_study(name: str, registry: Plugins | None = None) -> Study:
    """Find a registered study by its name, or read a file by its path.

    Raises:
        UsageError: neither, or the file is wrong.
    """
    registry = registry or installed_plugins()
    if name in registry.names("studies"):
        return read_study(Path(registry.get("studies", name)), name, registry)
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return read_study(Path(name), registry=registry)
    try:
        registry.get("studies", name)
    except UsageError as error:
        raise UsageError(error.what, where="study", fix=f"{error.fix} Or give a study file, NAME.yaml", known=error.known) from None
    raise AssertionError("a name that is registered was found before")


def read_study(path: Path, name: str | None = None, registry: Plugins | None = None) -> Study:
    """Read a study from a YAML file (safe tags only).

    Args:
        path: of the file.
        name: the registered one; by default the file's.
        registry: of rules and presets, for a grid; the installed plugins by default.

    Raises:
        UsageError: the file is missing or not YAML, or with every problem in it.
    """
    try:
        text = yaml_values.text_in(path)
        content, repeated = _content(yaml_values.read(text), yaml_values.written(text)), yaml_values.repeated(text)
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read the study: {getattr(error, 'strerror', None) or error}"
        raise UsageError(what, where=str(path), fix=yaml_values.FIX) from error
    except yaml.YAMLError as error:
        raise UsageError("the study is not valid YAML", where=f"{path}: {' '.join(str(error).split())}", fix=yaml_values.FIX) from error
    reader, registry = _StudyReader(repeated), registry or installed_plugins()
    if isinstance(content, dict):
        content = expand(reader.mapping(content, "the study", [*STUDY_KEYS, *GRID_KEYS]), registry, reader.problems.append, path.parent)
    study = reader.study(content, name or re.sub(r"[^\w.-]+", "-", path.stem), path)
    if reader.problems:
        told = "\n".join(map(str, reader.problems))
        reader.problems += [fault for fault in faults_in(study, registry) if fault.what not in told]
        raise UsageError.of(reader.problems, "study", where=str(path), fix="docs/studies.md describes the format")
    return study


def _content(plain: Any, written: Any, parents: tuple[str, ...] = ()) -> Any:
    """Convert a study's content to values, but keep settings as written, because their types depend on their keys."""
    if parents and _are_settings(parents, plain):
        return written
    if isinstance(plain, dict):
        pairs = zip(plain.items(), written.values(), strict=True)
        return {key: _content(value, as_written, (*parents, str(key))) for (key, value), as_written in pairs}
    if isinstance(plain, list):
        return [_content(value, as_written, (*parents, "*")) for value, as_written in zip(plain, written, strict=True)]
    return plain


def _are_settings(parents: Sequence[str], content: Any) -> bool:
    if parents[-1] in ("settings", "space"):
        return True
    return parents[-2:-1] == ("*",) and (parents[-1] == "tune" or (parents[-1] == "columns" and isinstance(content, dict)))


class _StudyReader:
    """Collects problems instead of stopping at the first."""

    def __init__(self, problems: Iterable[str] = ()) -> None:
        self.problems: list[str | BpfreeError] = list(problems)

    def study(self, content: Any, name: str, path: Path) -> Study:
        node = self.mapping(content, "the study", STUDY_KEYS)
        columns = [self._column(entry, number) for number, entry in enumerate(self._list(node, "columns"), start=1)] or [Column()]
        self._unique([column.label for column in columns], "columns")
        tune = self._tune(node.get("tune"))
        rows = [self._row(entry, number, columns, tune) for number, entry in enumerate(self._list(node, "rows"), start=1)]
        self._unique([row.label for row in rows], "rows")
        if not rows:
            self.problems.append("a study needs rows: a list, each with a label and settings")
        study = Study(
            name=name,
            title=self._text(node, "title", "the study", needed=True),
            paper=self._text(node, "paper", "the study"),
            notes=self._text(node, "notes", "the study"),
            settings=self._settings(node.get("settings"), "settings"),
            seeds=self._seeds(node.get("seeds", 3)),
            columns=columns,
            rows=rows,
            controls=self._controls(node, [row.label for row in rows]),
            targets=self._targets(node, columns),
            tune=tune,
            jobs=self._positive(node, "jobs", whole=True) or 1,
            timeout=self._positive(node, "timeout"),
            path=path,
            floor=self._flag(node, "floor", True),
            probe=self._flag(node, "probe", True),
            equal_budget=self._flag(node, "equal_budget", False),
        )
        self._one_kind(study)
        self._tuning_fits(study)
        return study

    def _flag(self, node: Mapping[str, Any], key: str, default: bool) -> bool:
        value = node.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key}: must be true or false, not {value!r}")
            return default
        return value

    def _column(self, entry: Any, number: int) -> Column:
        node = self.mapping(entry, f"column {number}", COLUMN_KEYS)
        label = self._label(node, f"column {number}")
        target = self._target(node, f"column {label or number}: ")
        return Column(label, self._settings(node.get("settings"), f"column {label or number}: settings"), target)

    def _row(self, entry: Any, number: int, columns: Sequence[Column], tune: Tune | None) -> Row:
        node = self.mapping(entry, f"row {number}", ROW_KEYS)
        label = self._label(node, f"row {number}")
        where = f"row {label or number}"
        cells = self._cells(node.get("columns"), where, [column.label for column in columns])
        settings = self._settings(node.get("settings"), f"{where}: settings")
        if (program := self._text(node, "program", where)) and any(canonical(key, "") == "program.name" for key in settings):
            self.problems.append(f"{where}: the program is set twice, as program and in settings")
        settings = {"program": program, **settings} if program else settings
        published, space = self._published(node.get("published"), where, cells), self._row_space(node, where, tune)
        shared, without = getattr(entry, "shared", ()), getattr(entry, "without", ())  # of a grid
        return Row(label, settings, cells, published, space, shared, without)

    def _cells(self, node: Any, where: str, labels: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Read the columns of a row: all, those listed, or those named with settings of their own."""
        if node is None:
            return {label: {} for label in labels}
        if labels == [""]:
            self.problems.append(f"{where}: columns: the study has no columns")
            return {"": {}}
        if isinstance(node, list):
            node = dict.fromkeys(map(str, node))
        own = self.mapping(node, f"{where}: columns", labels, kind="column")
        if not own:
            self.problems.append(f"{where}: columns: must name at least one column")
        return {label: self._settings(own[label], f"{where}: columns: {label}") for label in labels if label in own}

    def _controls(self, node: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
        """Read the labels of control rows, which must not be all rows."""
        labels = [self._text({"label": label}, "label", "controls", needed=True) for label in self._list(node, "controls")]
        for label in labels:
            if label and label not in rows:
                self._unknown("row", label, [row for row in rows if row], "controls")
        self._unique(labels, "controls")
        if rows and set(rows) <= set(labels):
            self.problems.append("controls: names every row; leave out at least one to compare")
        return labels

    def _targets(self, node: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, float]:
        common = self._target(node)
        targets = {column.label: common if column.target is None else column.target for column in columns}
        return {label: target for label, target in targets.items() if target is not None}

    def _target(self, node: Mapping[str, Any], where: str = "") -> float | None:
        value = node.get("target")
        if value is None or _is_number(value):
            return value
        self.problems.append(f"{where}target: must be a number, not {value!r}")
        return None

    # --- tuning -----------------------------------------------------------------------------------------------------

    def _tune(self, value: Any) -> Tune | None:
        if value is None:
            return None
        node = self.mapping(value, "tune", TUNE_KEYS)
        trials, search = self._positive(node, "trials", "tune", whole=True), node.get("search", SEARCHES[0])
        if node.get("trials") is None:
            self.problems.append("tune: trials: must be the number of trials, including the default configuration")
        if search not in SEARCHES:
            self._unknown("search", search, SEARCHES, "tune: search")
        pruner, rung, reduction = (
            node.get("pruner", "none"),
            *(self._positive(node, key, "tune", whole=True) for key in ("rung", "reduction")),
        )
        if pruner not in PRUNERS:
            self._unknown("pruner", pruner, PRUNERS, "tune: pruner")
        if pruner == "none" and (rung or reduction):
            self.problems.append("tune: rung and reduction need pruner: asha")
        if reduction == 1:
            self.problems.append("tune: reduction: 1 would prune no trial: set 2 or more, or pruner: none")
        seeds = node.get("seeds", 1)
        listed = self._seeds(seeds, "tune: seeds")
        if _is_integer(seeds):
            listed = [FIRST_TUNING_SEED + seed for seed in listed]
        return Tune(
            trials or 1,
            search,
            listed,
            self._space(node.get("space"), "tune: space"),
            self._settings(node.get("settings"), "tune"),
            pruner,
            rung or Tune.rung,
            reduction or Tune.reduction,
        )

    def _space(self, value: Any, where: str) -> dict[str, Domain]:
        """Read a search space by dotted key; leave out domains that are ``null`` or wrong."""
        found: dict[str, Domain] = {}
        for key, domain in self._plain(value, where).items():
            read = None if domain is None else REFERENCE if refers(domain) else _domain(domain)
            if isinstance(read, str):
                self.problems.append(f"{where}: {key}: {read}, not {domain!r}")
            elif read is not None:
                found[key] = read
            if key in NOT_HERE:
                self.problems.append(f"{where}: {key} is not allowed here: {NOT_HERE[key]}")
        return found

    def _row_space(self, node: Mapping[str, Any], where: str, tune: Tune | None) -> dict[str, Domain]:
        """Change the study's space for a row: ``tune: {KEY: DOMAIN}`` sets a domain, ``{KEY: null}`` removes one, ``false`` all."""
        own = node.get("tune")
        if own is False or tune is None:
            if own and tune is None:
                self.problems.append(f"{where}: tune: the study has no tune with trials; add it to the study")
            return {}
        own = {} if own is None else own
        kept = {key: domain for key, domain in tune.space.items() if not isinstance(own, dict) or key not in own}
        return {**kept, **self._space(own, f"{where}: tune")}

    def _tuning_fits(self, study: Study) -> None:
        """Check that tuning has something to tune, and seeds that are not seeds of the study."""
        if study.tune is None:
            return
        shared = sorted(set(study.tune.seeds) & set(study.seeds))
        if shared:
            self.problems.append(f"tune: seeds: {', '.join(map(str, shared))} are seeds of the study; choose other seeds for tuning")
        if not any(row.space for row in study.rows):
            self.problems.append("tune: space: names no setting to tune, nor does any row")

    # --- published numbers ------------------------------------------------------------------------------------------

    def _published(self, node: Any, where: str, cells: Mapping[str, Any]) -> dict[str, dict[str, Published]]:
        where = f"{where}: published"
        if "" in cells:
            return {"": self._numbers(node, where)}
        by_column = self.mapping(node or {}, where, list(cells), kind="column")
        return {label: self._numbers(by_column[label], f"{where}: {label}") for label in cells if label in by_column}

    def _numbers(self, node: Any, where: str) -> dict[str, Published]:
        numbers = {str(key): self._number(value, str(key), where) for key, value in self.mapping(node or {}, where).items()}
        return {key: number for key, number in numbers.items() if number is not None}

    def _number(self, value: Any, key: str, where: str) -> Published | None:
        parts = value if isinstance(value, list) else [value]
        if not (METRIC.fullmatch(key) or key == MEMORY):
            what = f"test/NAME or train/NAME of a metric, or {MEMORY}"
            self.problems.append(f"{where}: unknown metric {key!r}: must be {what}")
            return None
        if value is None:
            return None
        if not 1 <= len(parts) <= 2 or not all(map(_is_number, parts)):
            self.problems.append(f"{where}: {key}: must be a number, [mean, standard deviation], or null, not {value!r}")
            return None
        if key == MEMORY and parts[0] <= 0:
            self.problems.append(f"{where}: {key}={parts[0]:g} is out of range: in MiB, above 0")
        return Published(*map(float, parts))

    def _one_kind(self, study: Study) -> None:
        """Check that the published numbers of a split are of one metric."""
        names = {name for row in study.rows for numbers in row.published.values() for name in numbers}
        for split in ("test", "train"):
            kinds = sorted(name for name in names if name.startswith(f"{split}/"))
            if len(kinds) > 1:
                self.problems.append(f"published: {' and '.join(kinds)} in one table: publish one metric per split")

    # --- values -----------------------------------------------------------------------------------------------------

    def mapping(self, node: Any, where: str, known: Iterable[str] | None = None, kind: str = "key") -> dict[str, Any]:
        """Return a mapping with known keys; a misspelt one is a problem, and stands for the one that is meant."""
        if not isinstance(node, dict):
            self.problems.append(f"{where}: must be a mapping of names to values, not {node!r}")
            return {}
        if known is None:
            return node
        names, found = list(known), dict[str, Any]()
        for key, value in node.items():
            guess = key if key in names else nearest(str(key), names)
            if key not in names:
                self._unknown(kind, key, names, where)
            if guess == key or (guess is not None and guess not in node):
                found[guess] = value
        return found

    def _unknown(self, kind: str, name: Any, known: Sequence[str], where: str) -> None:
        self.problems.append(unknown(kind, name, known, where))

    def _list(self, node: Mapping[str, Any], key: str) -> list[Any]:
        value = node.get(key)
        if value is not None and not isinstance(value, list):
            self.problems.append(f"{key}: must be a list, not {value!r}")
        return value if isinstance(value, list) else []

    def _text(self, node: Mapping[str, Any], key: str, where: str, *, needed: bool = False) -> str:
        value = node.get(key)
        if value is None and not needed:
            return ""
        if value is None:
            self.problems.append(f"{where} has no {key}: add {key}: TEXT")
            return ""
        if not isinstance(value, str) or not value.strip():
            self.problems.append(f"{where}: {key}: must be text, not {value!r} (put it into quotes)")
            return ""
        return value.strip()

    def _label(self, node: Mapping[str, Any], where: str) -> str:
        label = self._text(node, "label", where, needed=True)
        if "," in label or "\n" in label:
            self.problems.append(
                f"{where}: label {label!r} must not contain commas or line breaks (--rows and --columns are comma-separated)"
            )
        return label

    def _unique(self, labels: Sequence[Any], where: str) -> None:
        self.problems.extend(
            f"{where}: {label!r} is given twice" for label in dict.fromkeys(labels) if label != "" and labels.count(label) > 1
        )

    def _positive(self, node: Mapping[str, Any], key: str, where: str = "", *, whole: bool = False) -> Any:
        """Read a positive number; ``None`` if the key is missing."""
        value = node.get(key)
        if value is None:
            return None
        if not (_is_integer(value) if whole else _is_number(value)) or value <= 0:
            kind = "whole number" if whole else "number"
            self.problems.append(f"{f'{where}: ' if where else ''}{key}: must be a {kind} above 0, not {value!r}")
            return None
        if whole and value > MOST[key]:
            self.problems.append(f"{f'{where}: ' if where else ''}{key}: must be at most {MOST[key]}, not {value}")
            return None
        return value

    def _seeds(self, value: Any, where: str = "seeds") -> list[int]:
        if _is_integer(value) and value > MOST["seeds"]:
            self.problems.append(f"{where}: must be at most {MOST['seeds']}, not {value}")
            return []
        listed = list(range(value)) if _is_integer(value) else value
        if not isinstance(listed, list) or not listed or not all(_is_integer(seed) and seed >= 0 for seed in listed):
            self.problems.append(f"{where}: must be the number of seeds (1 or more) or a list of seeds, not {value!r}")
            return []
        self._unique(listed, where)
        return listed

    def _settings(self, node: Any, where: str) -> dict[str, Any]:
        """Read settings by dotted key, nested or not."""
        found: dict[str, Any] = {}
        keys: set[str] = set()
        try:
            leaves = list(leaves_of(self._plain(node, where), "", where))
        except UsageError as error:
            self.problems.append(f"{where}: {error.what}")
            return found
        for leaf in leaves:
            key = canonical(leaf.key, leaf.value)
            if key in keys:
                self.problems.append(f"{where}: {key} is given twice")
            if refers(leaf.value):
                self.problems.append(f"{where}: {leaf.key}: {REFERENCE}")
            if leaf.key in NOT_HERE:
                self.problems.append(f"{where}: {leaf.key} is not allowed here: {NOT_HERE[leaf.key]}")
            keys.add(key)
            found[leaf.key] = leaf.value
        return found

    def _plain(self, node: Any, where: str) -> dict[str, Any]:
        if node is None:
            return {}
        if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
            self.problems.append(f"{where}: must be a mapping of settings to values, not {node!r}")
            return {}
        return node


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _domain(value: Any) -> Domain | str:
    """Read a domain, ``{low: 1e-4, high: 0.1, log: true}`` or a list of choices; return a problem as text."""
    if isinstance(value, list):
        value = [_choice(entry) for entry in value]
        return Choices(value) if len(value) > 1 else "a list of choices must have two or more"
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        return "must be {low: ..., high: ..., log: true or false}, or a list of choices"
    low, high, log = (yaml_values.plain(value.get(key, False)) for key in ("low", "high", "log"))
    if not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high)) or not isinstance(log, bool):
        return "low and high must be numbers, log true or false"
    if not low < high or (log and low <= 0):
        return "low must be less than high" + (", and positive on a logarithmic scale" if log else "")
    return Range(low, high, log, integer=isinstance(low, int) and isinstance(high, int))


def _choice(value: Any) -> Any:
    """Read a choice: a number in any notation, otherwise the text as written until the key's type is known."""
    if isinstance(value, yaml_values.Scalar):
        return value.value if isinstance(value.value, float) and math.isfinite(value.value) else value.text
    return [_choice(entry) for entry in value] if isinstance(value, list) else value
