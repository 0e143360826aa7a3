"""Comparing rules over seeds: each beside the linear classifier, its frozen twin, and back-propagation."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bpfree import runner
from bpfree.config import Leaf, parse_words, resolve
from bpfree.errors import BpfreeError, UsageError
from bpfree.plugins import Plugins, installed_plugins
from bpfree.rule import Rule
from bpfree.tasks.protocols import result_key
from bpfree.training.run import Run
from bpfree.training.trainer import Interrupted

__all__ = ["Row", "compare", "rows_for", "summary"]

HEADERS = ("rule", "test accuracy", "spread", "n", "best alternative", "seconds", "samples/s", "memory MiB", "parameters", "trained")


@dataclass
class Row:
    """One line of a comparison: a rule with its settings, and its runs over seeds.

    Attributes:
        label: as printed.
        leaves: settings of this row alone.
        own_network: whether the rule brings a network of its own, which settings of all rows under ``network`` do not reach.
        runs: one per seed that ended with a result or a reason.
    """

    label: str
    leaves: list[Leaf]
    own_network: bool = False
    runs: list[Run] = field(default_factory=list)

    @property
    def finished(self) -> list[Run]:
        """The runs that have a result."""
        return [run for run in self.runs if run.status == "finished"]


def rows_for(words: Sequence[str], *, references: bool = True, registry: Plugins | None = None) -> list[Row]:
    """The rows of a comparison, floor first and ceiling last.

    Args:
        words: ``RULE`` or ``RULE,KEY=VALUE,...`` for settings of that row alone.
        references: add the linear classifier, the frozen twin of each rule, and back-propagation.

    Raises:
        UsageError: an unknown rule, or none.
    """
    registry = registry or installed_plugins()
    asked: list[tuple[type[Rule], Row]] = []
    for word in words:
        name, *settings = re.split(r",(?![^\[{]*[\]}])", word)  # not at commas inside brackets
        rule = registry.get("rules", name, where="command line")
        row = Row(word, [Leaf("rule.name", name, "command line"), *parse_words(settings)], has_own_network(rule))
        if all(row.label != other.label for _, other in asked):
            asked.append((rule, row))
    if not asked:
        raise UsageError("no rule to compare", fix="name some; bpfree rules lists them")
    if not references:
        return [row for _, row in asked]
    own = [row for _, row in asked if row.label not in ("linear", "frozen", "backprop")]
    twins = [_twin(rule, row) for rule, row in asked if row in own]
    return [_reference("linear", own_network=True), *_unique([_reference("frozen"), *twins]), *own, _reference("backprop")]


def _reference(name: str, *, own_network: bool = False) -> Row:
    return Row(name, [Leaf("rule.name", name, "reference")], own_network)


def has_own_network(rule: type[Rule]) -> bool:
    """Whether a rule chooses its network itself, rather than taking the common one."""
    return getattr(rule.network_options, "__func__", None) is not Rule.network_options.__func__  # type: ignore[attr-defined]


def _twin(rule: type[Rule], row: Row) -> Row:
    """Rules on the common network share one twin, the rule ``frozen``; others, and those with settings, have their own."""
    if not row.own_network and len(row.leaves) == 1:
        return _reference("frozen")
    return Row(f"{row.label} (frozen twin)", [*row.leaves, Leaf("frozen_twin", True, "reference")], row.own_network)


def _unique(rows: Iterable[Row]) -> Iterator[Row]:
    seen = set()
    for row in rows:
        if row.label not in seen:
            seen.add(row.label)
            yield row


def compare(
    rows: Sequence[Row],
    common: Sequence[Leaf],
    seeds: Sequence[int],
    *,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run every row with every seed, and fill ``row.runs``. A run that fails is a run with a reason, and the rest go on.

    Args:
        rows: of :func:`rows_for`.
        common: settings of all rows.
        seeds: the repetitions.
        quiet: no progress display.
        say: told of failures.

    Raises:
        UsageError: any row's settings are wrong; before anything runs.
        Interrupted: the run in progress was asked to stop.
    """
    cells = [(row, resolve([*reaching(row, common), *row.leaves, Leaf("seed", seed, "seeds")])) for seed in seeds for row in rows]
    task = cells[0][1].build_task()
    for number, (row, recipe) in enumerate(cells, start=1):
        label = f"[{number}/{len(cells)}] {row.label} seed {recipe.settings.seed}"
        same = (recipe.names["task"], recipe.options["task"], recipe.task) == (
            cells[0][1].names["task"],
            cells[0][1].options["task"],
            cells[0][1].task,
        )
        try:
            row.runs.append(runner.run(recipe, quiet=quiet, label=label, task=task if same else None))
        except Interrupted:
            raise
        except Exception as error:  # whatever a plugin's rule may raise
            reason = error.what if isinstance(error, BpfreeError) else f"{type(error).__name__}: {error}"
            row.runs.append(Run("", row.label, status="failed", reason=reason))
            say(f"{label}: {reason}")


def reaching(row: Row, common: Sequence[Leaf]) -> list[Leaf]:
    """The settings of all rows that reach this one."""
    return [leaf for leaf in common if not (row.own_network and leaf.key.split(".")[0] == "network")]


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, a row each, under ``HEADERS``."""
    return [_cells(row) for row in rows]


def _cells(row: Row) -> list[str]:
    runs = row.finished
    if not runs:
        reason = next((f"{run.status}: {run.reason}" for run in row.runs), "not run")
        return [row.label, reason, *[""] * (len(HEADERS) - 2)]
    classes = "test/accuracy" in runs[0].result
    scores = [100 * run.result["test/accuracy"] if classes else run.result.get("test/loss", math.nan) for run in runs]
    spread = f"+- {statistics.stdev(scores):.{2 if classes else 4}f}" if len(scores) > 1 else ""
    count = f"{len(runs)}" if len(runs) == len(row.runs) else f"{len(runs)} of {len(row.runs)}"
    return [
        row.label,
        f"{statistics.fmean(scores):.2f} %" if classes else f"loss {statistics.fmean(scores):.4f}",
        spread,
        count,
        _best_alternative(runs),
        f"{_mean(runs, 'train/seconds'):.1f}",
        f"{_mean(runs, 'train/samples_per_second'):,.0f}",
        f"{_mean(runs, 'train/peak_memory_mb'):.2f}",
        f"{_mean(runs, 'parameters'):,.0f}",
        f"{_mean(runs, 'parameters_trained'):,.0f}",
    ]


def _mean(runs: Sequence[Run], key: str) -> float:
    return statistics.fmean(run.result.get(key, 0.0) for run in runs)


def _best_alternative(runs: Sequence[Run]) -> str:
    """Test accuracy of the rule's best other prediction (a single block, say), chosen on validation."""
    protocols = {result_key(name) for name in runs[0].config.get("evaluation.protocols", ())}  # which are no predictions of the rule
    keys = [key for key in runs[0].result if key.startswith("test/") and key.count("/") == 2]
    names = [name for name in (key.split("/")[1] for key in keys) if name not in protocols]
    if not names or not runs[0].history:
        return ""

    def on_validation(name: str) -> float:
        return statistics.fmean(next((m[key] for m in reversed(run.history) if (key := f"val/{name}/accuracy") in m), 0.0) for run in runs)

    best = max(names, key=on_validation)
    return f"{100 * _mean(runs, f'test/{best}/accuracy'):.2f} % ({best})"


def settings_line(common: Sequence[Leaf], seeds: Sequence[int]) -> str:
    """What all rows share, for a caption."""
    words = " ".join(f"{leaf.key}={leaf.value}" for leaf in common)
    return f"{words or 'default settings'}; seeds {', '.join(map(str, seeds))}"


def default_page(output: str | Path) -> Path:
    """Where a comparison's page goes: in the output folder, with the time in its name."""
    import datetime

    return Path(output) / f"comparison-{datetime.datetime.now():%Y%m%d-%H%M%S}.html"
