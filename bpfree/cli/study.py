"""``bpfree study``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bpfree.study.cells import Cell, Plan
    from bpfree.study.file import Published, Row, Study
    from bpfree.study.state import State

RUN_HELP = """Run what is not finished of a study, and report on it.

STUDY is the name of an installed study or the path of a study file. SETTINGS are KEY=VALUE words over the settings of all cells, such as
`budget.epochs=1` for a try; the report says that the study is not as written. Interrupt it at any time: the same command goes on. Finished
cells are not run again, and a cell that crashes or diverges is a row with its reason. Several processes may run the same study.

\b
  bpfree study run digits-floor-ceiling
  bpfree study run digits-floor-ceiling budget.epochs=1 --seeds 1 --rows dfa,backprop
  bpfree study run mine.yaml --dry-run
"""
REPORT_HELP = """Report on what is finished of a study. Give the SETTINGS and --seeds that it was run with.

\b
  bpfree study report digits-floor-ceiling
  bpfree study report digits-floor-ceiling budget.epochs=1 --seeds 1
"""

settings = click.argument("settings", nargs=-1, metavar="[SETTINGS]...")
seeds = click.option("--seeds", type=click.IntRange(min=1), help="How many repetitions.  [default: what the study says]")
page = click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Where to write the page.  [default: beside the cells]")


@click.group(short_help="Run a paper's table, and put ours beside it.")
def study() -> None:
    """Studies: files that describe a table of a paper, row by row. Plugins bring some; a path to a file of your own works as well."""


@study.command("list", short_help="The installed studies.")
def list_studies() -> None:
    """All installed studies: title, number of cells, and the plugin that brings them."""
    from bpfree.cli.output import print_table
    from bpfree.plugins import installed_plugins

    registry = installed_plugins()
    rows = [[name, *_listed(name), owner.name] for name, _, owner in registry.items("studies")]
    print_table(["study", "title", "cells", "plugin"], rows, right=[2])


def _listed(name: str) -> tuple[str, str]:
    from bpfree.errors import UsageError
    from bpfree.study.file import find_study

    try:
        found = find_study(name)
    except UsageError as error:
        return f"broken: {' '.join(error.what.split())}", ""
    return found.title, str(len(list(found.cells())) * len(found.seeds))


@study.command("show", short_help="What a study runs, and what was published.")
@click.argument("name", metavar="STUDY")
def show(name: str) -> None:
    """The rows of a study with their settings, and the numbers of the paper."""
    from bpfree.cli.output import print_table
    from bpfree.study.file import find_study

    found = find_study(name)
    cells = len(list(found.cells()))
    lines = [("study", found.name), ("title", found.title), ("paper", found.paper), ("settings", _words(found.settings))]
    lines.append(("cells", f"{cells * len(found.seeds)}: {cells} with the seeds {', '.join(map(str, found.seeds))}"))
    lines.append(("controls", ", ".join(found.controls)))
    lines += [(f"column {column.label}", _words(column.settings)) for column in found.columns if column.label]
    width = max(len(key) for key, _ in lines)
    for key, text in lines:
        if text:
            click.echo(f"{key.ljust(width)}  {text}")
    click.echo()
    print_table(*_shown(found))
    if found.notes:
        click.echo(f"\n{found.notes}")


def _words(values: Any) -> str:
    from bpfree.study.cells import word

    return " ".join(word(key, value) for key, value in values.items())


def _shown(found: Study) -> tuple[list[str], list[list[str]]]:
    labelled = any(column.label for column in found.columns)
    table = [
        [
            row.label,
            *([column.label] if labelled else []),
            _published(row, column.label),
            _words({**row.settings, **row.columns[column.label]}),
        ]
        for row, column in found.cells()
    ]
    return ["row", *(["column"] if labelled else []), "published", "settings"], table


def _published(row: Row, column: str) -> str:
    def text(number: Published) -> str:
        return f"{number.mean:g}" if number.spread is None else f"{number.mean:g} +- {number.spread:g}"

    return ", ".join(f"{metric}={text(number)}" for metric, number in row.published.get(column, {}).items())


@study.command("run", help=RUN_HELP, short_help="Run what is not finished, and report.")
@click.argument("name", metavar="STUDY")
@settings
@seeds
@click.option("--rows", metavar="LABEL,...", help="Run only these rows.")
@click.option("--columns", metavar="LABEL,...", help="Run only these columns.")
@click.option("--dry-run", is_flag=True, help="Show the cells and how they stand; run nothing.")
@click.option("--retry-failed", is_flag=True, help="Run failed and diverged cells again.")
@page
@click.option("--quiet", "-q", is_flag=True, help="No progress display.")
def run(
    name: str,
    settings: tuple[str, ...],
    seeds: int | None,
    rows: str | None,
    columns: str | None,
    dry_run: bool,
    retry_failed: bool,
    page: Path | None,
    quiet: bool,
) -> int:
    from bpfree.config import parse_words
    from bpfree.study import engine
    from bpfree.training.trainer import Interrupted

    plan, state = _prepared(name, settings, seeds)
    cells = plan.chosen(_labels(rows), _labels(columns))
    if dry_run:
        return _dry_run(plan, cells, state, retry_failed)
    left = [cell for cell in cells if engine.to_do(state.read(cell.id), retry_failed=retry_failed)]
    click.echo(f"{plan.study.name}: {len(left)} of {len(cells)} cells to run, the others are done", err=True)
    try:
        engine.execute(
            plan.study,
            left,
            state,
            overrides=parse_words(settings),
            retry_failed=retry_failed,
            quiet=quiet,
            say=lambda text: click.echo(text, err=True),
        )
    except (Interrupted, KeyboardInterrupt):
        click.echo("the study was interrupted: the same command goes on with it", err=True)
        raise
    _report(plan, state, _again(name, settings, seeds), page)
    return 0 if all((known := state.read(cell.id)) is not None and known.status == "finished" for cell in cells) else 1


@study.command("report", help=REPORT_HELP, short_help="Report on what is finished so far.")
@click.argument("name", metavar="STUDY")
@settings
@seeds
@page
def report(name: str, settings: tuple[str, ...], seeds: int | None, page: Path | None) -> int:
    plan, state = _prepared(name, settings, seeds)
    _report(plan, state, _again(name, settings, seeds), page)
    return 0


def _prepared(name: str, settings: Sequence[str], seeds: int | None) -> tuple[Plan, State]:
    from bpfree.config import parse_words
    from bpfree.study import cells
    from bpfree.study.file import find_study
    from bpfree.study.state import State

    plan = cells.plan(find_study(name), parse_words(settings), seeds=seeds)
    return plan, State(plan.output, plan.study.name)


def _labels(text: str | None) -> list[str] | None:
    return None if text is None else [label.strip() for label in text.split(",")]


def _again(name: str, settings: Sequence[str], seeds: int | None) -> list[str]:
    return [name, *settings, *([] if seeds is None else ["--seeds", str(seeds)])]


def _dry_run(plan: Plan, cells: Sequence[Cell], state: State, retry_failed: bool) -> int:
    from bpfree.cli.output import print_table
    from bpfree.study import engine

    known = [(cell, state.read(cell.id)) for cell in cells]
    table = [[cell.row, cell.column, cell.seed, "not run" if outcome is None else outcome.status, cell.id] for cell, outcome in known]
    print_table(["row", "column", "seed", "state", "cell"], table, right=[2])
    left = sum(engine.to_do(outcome, retry_failed=retry_failed) for _, outcome in known)
    for change in plan.changes:
        click.echo(f"not as written: {change}")
    click.echo(f"{left} of {len(cells)} cells would be run")
    return 0


def _report(plan: Plan, state: State, words: Sequence[str], page: Path | None) -> None:
    from bpfree.cli.output import print_table
    from bpfree.study.page import write_page
    from bpfree.study.report import report_on

    made = report_on(plan, state, words)
    click.echo(f"\n{plan.study.title}")
    if plan.study.paper:
        click.echo(f"Published: {plan.study.paper}")
    click.echo()
    print_table(made.headers, made.table, right=range(made.headers.index("n") - 1, len(made.headers)))
    if made.controls:
        click.echo("\nAgainst the controls\n")
        print_table(made.controls.headers, made.controls.table, right=made.controls.numeric)
        click.echo(f"\n{made.controls.legend}")
    click.echo()
    for text in (*made.remarks, *made.failures, plan.study.notes, made.environment, f"Again: {made.command}"):
        if text:
            click.echo(text)
    click.echo(f"\n{write_page(page or state.folder / made.page_name, made).resolve()}")
