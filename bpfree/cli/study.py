"""The commands ``bpfree study``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.code import allow_code
from bpfree.cli.completion import labels_of, names_of, setting, study_name
from bpfree.cli.output import json_option, print_json, print_pairs, print_table, say
from bpfree.document.terminal import duration, width_of

if TYPE_CHECKING:
    from bpfree.leaves import Leaf
    from bpfree.study.command import Options
    from bpfree.study.model import Published, Row, Study
    from bpfree.study.report import Report
    from bpfree.study.worklist import Worklist

RUN_HELP = """Run the unfinished cells of a study, and write its report.

STUDY is the name of an installed study or the path of a study file. SETTINGS are KEY=VALUE words that override the settings of all cells,
such as `budget.epochs=1` for a test; the report then states that the study was changed. You may interrupt it: the same command resumes it.
Finished cells are not run again, and a cell that crashes, diverges or times out is reported with its reason. Several processes may run
the same study.

\b
  bpfree study run quickstart
  bpfree study run quickstart budget.epochs=1 --seeds 1 --rows dfa,backprop
  bpfree study run mine.yaml --jobs 4          four processes
  bpfree study run mine.yaml --executor ray    on a Ray cluster (or slurm)
  bpfree study run mine.yaml --dry-run         the cells and their cost

A cell computes with one thread unless `threads` says otherwise, so that its numbers do not depend on --jobs. Timings of cells that ran at
the same time are marked, and left out of plots of speed: use --jobs 1 for comparable timings.
"""
REPORT_HELP = """Report on the finished cells of a study. Give the SETTINGS and --seeds that it was run with.

\b
  bpfree study report quickstart
  bpfree study report quickstart budget.epochs=1 --seeds 1 --to paper/
"""
STATUS_HELP = """Show the status of a study's cells, also while it runs. Give the SETTINGS and --seeds that it was run with.

\b
  bpfree study status quickstart
"""
RETRY_HELP = """Run failed cells again: WHICH is `failed` (crashed, diverged or timed out), or one of `diverged` and `timeout`.

Crashed and diverged cells start again; cells that timed out resume from their checkpoints. Other unfinished cells are run too.

\b
  bpfree study retry failed quickstart
  bpfree study retry timeout mine.yaml --timeout 3600
"""
Command = Callable[..., int]
WHICH = {"failed": ("failed", "diverged", "timeout"), "diverged": ("diverged",), "timeout": ("timeout",)}


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _labels(context: click.Context, parameter: click.Parameter, text: str | None) -> list[str] | None:
    return None if text is None else [label.strip() for label in text.split(",")]


def settings(command: Command) -> Command:
    """Add the argument SETTINGS and the option ``--quick`` to a command."""

    @functools.wraps(command)
    def merged(*arguments: Any, settings: tuple[str, ...], quick: bool, **options: Any) -> int:
        return command(*arguments, settings=(*settings, "quick=true") if quick else settings, **options)

    option = click.option("--quick", is_flag=True, help="Smoke run with a few batches of each split (quick=true).")
    return click.argument("settings", nargs=-1, metavar="[SETTINGS]...", shell_complete=setting)(option(merged))


seeds = click.option("--seeds", type=click.IntRange(1, 10_000), help="Number of repetitions.  [default: as in the study]")
to = click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report.  [default: the folder of the cells]"
)
running = _options(
    seeds,
    click.option("--rows", metavar="LABEL,...", callback=_labels, shell_complete=labels_of("rows"), help="Run only these rows."),
    click.option("--columns", metavar="LABEL,...", callback=_labels, shell_complete=labels_of("columns"), help="Run only these columns."),
    click.option(
        "--jobs", "-j", type=click.IntRange(1, 1024), help="Number of parallel cells.  [default: as in the study, or one per GPU]"
    ),
    click.option(
        "--executor",
        default="local",
        show_default=True,
        metavar="NAME",
        shell_complete=names_of("executors"),
        help="Executor of the cells.",
    ),
    click.option("--address", help="Address of the Ray cluster, or `auto`: short for --with address=..."),
    click.option("--gpus", help="GPUs to request from the cluster per cell: short for --with gpus=..."),
    click.option(
        "--with",
        "settings_of_executor",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the executor, such as `minutes=60` (repeatable).",
    ),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Time limit of a cell."),
    to,
    allow_code,
    click.option("--quiet", "-q", is_flag=True, help="Show no progress."),
    json_option,
)


@click.group(short_help="Compare rules over networks, tasks and seeds, or repeat a paper's table.")
def study() -> None:
    r"""Run comparative studies: files that name rules, networks, tasks and seeds, from plugins or written by you.

    \b
      bpfree study list
      bpfree study run quickstart
    """


@study.command("list", short_help="List the installed studies.")
@json_option
def list_studies(as_json: bool) -> None:
    """List all installed studies: title, number of cells, and plugin."""
    from bpfree.kept import kept

    headers, rows = ["study", "title", "cells", "plugin"], kept("studies", _studies)
    if as_json:
        print_json([{**dict(zip(headers, row, strict=True)), "cells": int(row[2] or 0)} for row in rows])
        return
    print_table(headers, rows, right=[2])


def _studies() -> tuple[list[list[str]], list[Path] | None]:
    """Make a table row for each study, and list the studies' files."""
    from bpfree.plugins import installed_plugins

    registry = installed_plugins()
    rows = [[name, *_listed(name), owner.name] for name, _, owner in registry.items("studies")]
    return rows, [Path(place) for _, place, _ in registry.items("studies")] if registry.keepable else None


def _listed(name: str) -> tuple[str, str]:
    from bpfree.errors import UsageError
    from bpfree.study.file import find_study

    try:
        found = find_study(name)
    except UsageError as error:
        return f"broken: {' '.join(error.what.split())}", ""
    return found.title, str(_count(found))


def _count(found: Study) -> int:
    cells = list(found.cells())
    tuned = sum(bool(row.space) for row, _ in cells) * len(found.tune.seeds) * found.tune.trials if found.tune is not None else 0
    return len(cells) * len(found.seeds) + tuned


@study.command("show", short_help="Show the rows of a study, and the published numbers.")
@click.argument("name", metavar="STUDY", shell_complete=study_name)
@allow_code
@json_option
def show(name: str, allow_code: tuple[str, ...], as_json: bool) -> None:
    """Show the rows of a study with their settings, and the published numbers."""
    from bpfree.config import allowing
    from bpfree.study.file import find_study

    found = find_study(name, allowing(files=allow_code))
    cells = len(list(found.cells()))
    lines = [("study", found.name), ("title", found.title), ("paper", found.paper), ("settings", _words(found.settings))]
    lines.append(("cells", f"{cells * len(found.seeds)}: {cells} with the seeds {', '.join(map(str, found.seeds))}"))
    lines.append(("tuning", _tuning(found)))
    lines.append(("controls", ", ".join(found.controls)))
    lines += [(f"column {column.label}", _words(column.settings)) for column in found.columns if column.label]
    lines += [("target", ", ".join(f"{value:g}{f' ({label})' if label else ''}" for label, value in found.targets.items()))]
    headers, rows = _shown(found)
    if as_json:
        about = {key: text for key, text in lines if text}
        print_json({**about, "rows": [dict(zip(headers, row, strict=True)) for row in rows], "notes": found.notes})
        return
    print_pairs(lines)
    click.echo()
    print_table(headers, rows)
    if found.notes:
        say("\n" + "\n\n".join(" ".join(part.split()) for part in found.notes.split("\n\n")))


def _tuning(found: Study) -> str:
    if found.tune is None:
        return ""
    keys = dict.fromkeys(key for row in found.rows for key in row.space)
    pruned = f"; {found.tune.pruning}" if found.tune.pruning else ""
    return f"{found.tune.trials} trials of each row, {found.tune.search}, of {', '.join(keys)}; chosen on validation{pruned}"


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


@study.command("run", help=RUN_HELP, short_help="Run the unfinished cells, and report.")
@click.argument("name", metavar="STUDY", shell_complete=study_name)
@settings
@running
@click.option("--dry-run", is_flag=True, help="Show the cells, their status and their estimated cost; run nothing.")
def run(name: str, settings: tuple[str, ...], dry_run: bool, **options: Any) -> int:
    if dry_run:
        _chosen(options)
        chosen = {"rows": options["rows"], "columns": options["columns"]}
        return _dry_run(_worklist(name, settings, options["seeds"], options["allow_code"], load=False, **chosen), options["as_json"])
    return _run(name, settings, options)


@study.command("retry", help=RETRY_HELP, short_help="Run failed cells again.")
@click.argument("which", type=click.Choice(list(WHICH)))
@click.argument("name", metavar="STUDY", shell_complete=study_name)
@settings
@running
def retry(which: str, name: str, settings: tuple[str, ...], **options: Any) -> int:
    return _run(name, settings, options, retry=WHICH[which])


@study.command("report", help=REPORT_HELP, short_help="Report on the finished cells.")
@click.argument("name", metavar="STUDY", shell_complete=study_name)
@settings
@seeds
@to
@allow_code
@json_option
def report(name: str, settings: tuple[str, ...], seeds: int | None, to: Path | None, allow_code: tuple[str, ...], as_json: bool) -> int:
    from bpfree.study import command

    worklist = _worklist(name, settings, seeds, allow_code, load=False, older=True)
    _print(*command.report(worklist, ["study", "run", *_again(name, settings, seeds, allow_code)], to), as_json)
    return 0


@study.command("status", help=STATUS_HELP, short_help="Show the status of the cells, also while a study runs.")
@click.argument("name", metavar="STUDY", shell_complete=study_name)
@settings
@seeds
@allow_code
@json_option
def status(name: str, settings: tuple[str, ...], seeds: int | None, allow_code: tuple[str, ...], as_json: bool) -> int:
    from bpfree.leaves import last_said, parse_words
    from bpfree.study.status import status_table

    folder = Path(last_said(parse_words(settings), "output", "runs")) / "studies"
    words = [name, settings, seeds, allow_code]
    table, summary = status_table(lambda: _worklist(name, settings, seeds, allow_code, load=False, older=True), folder, words=words)
    if as_json:
        cells = [{key: value for key, value in line.items() if key != "shown"} for line in table]
        print_json({"study": name, "cells": cells, "summary": summary.splitlines()})
        return 0
    rows = [
        [
            *(line["row"], line["column"], _number(line), ": ".join(filter(None, [line["state"], line["reason"]])), line["epoch"]),
            *("" if line["seconds"] is None else duration(line["seconds"]), line["shown"], line["cell"]),
        ]
        for line in table
    ]
    print_table(["row", "column", "seed", "state", "epoch", "time", "validation", "cell"], rows, right=[2, 4, 5, 6])
    say(f"\n{summary}")
    return 0


def _number(line: dict[str, Any]) -> str:
    return str(line["seed"]) if line["trial"] is None else f"trial {line['trial']}"


# --- shared helpers ---------------------------------------------------------------------------------------------------


def _run(name: str, settings: tuple[str, ...], options: dict[str, Any], retry: Sequence[str] = ()) -> int:
    from bpfree.leaves import parse_words

    chosen = _chosen(options)
    files, labels = options["allow_code"], {"rows": options["rows"], "columns": options["columns"]}
    worklist = _worklist(name, settings, options["seeds"], files, **labels, retry=retry)
    if retry and not worklist.to_retry():
        say(f"no cell of {worklist.plan.study.name} is {' or '.join(retry)}: there is nothing to run again", err=True)
        if options["as_json"]:
            print_json({"study": worklist.plan.study.name, "cells_run": 0})
        return 0
    trials = sum(cell.key.trial is not None and worklist.to_do(cell) for cell in worklist.cells())
    kinds = f" ({trials} tuning trials, then {worklist.left() - trials} final runs)" if trials else ""
    counts = f"{worklist.left()} of {worklist.count()} cells to run{kinds}{_others(worklist, _again(name, settings, None, files))}"
    say(f"{worklist.plan.study.name}: {counts}", err=True)
    words = ["study", "run", *_again(name, settings, options["seeds"], files, **labels)]
    return run_worklist(worklist, parse_words(settings), words, chosen, options["as_json"])


def _chosen(options: dict[str, Any]) -> Options:
    """Make the options of execution, and refuse an unknown executor or executor option even if no cell is to run."""
    from bpfree.study.command import Options, asked_for

    short = [f"{key}={options[key]}" for key in ("address", "gpus") if options[key] is not None]
    own = [*options["settings_of_executor"], *short]
    chosen = Options(options["executor"], options["jobs"], own, options["timeout"], options["to"], options["quiet"])
    asked_for(chosen)
    return chosen


def run_worklist(worklist: Worklist, overrides: Sequence[Leaf], words: Sequence[str], options: Options, as_json: bool) -> int:
    """Run a study or a comparison with its progress, and print the report."""
    from bpfree.study import command
    from bpfree.study.progress import StudyProgress
    from bpfree.training.trainer import Interrupted

    progress = StudyProgress(worklist.plan.study.name, worklist.count(), worklist.left(), quiet=options.quiet)
    try:
        _print(*command.run(worklist, overrides, words, options, progress.of), as_json)
    except (Interrupted, KeyboardInterrupt):
        say(f"the {'comparison' if words[0] == 'compare' else 'study'} was interrupted; run the same command to resume it", err=True)
        raise
    return 0 if worklist.complete() else 1


def _print(made: Report, page: Path, as_json: bool) -> None:
    if as_json:
        print_json({**made.plain(), "report": str(page.resolve())})
        return
    width = width_of(sys.stdout)
    click.echo(f"{made.text(width)}\n\n{page.resolve()}")


def _others(worklist: Worklist, words: Sequence[str]) -> str:
    """Summarise the cells that are not run."""
    import shlex

    from bpfree.redaction import redact_word

    done = [cell for cell in worklist.cells() if not worklist.to_do(cell)]
    without = sum(not worklist.finished([cell]) for cell in done)
    parts = [f"{len(done) - without} are finished"] if len(done) > without else []
    again = shlex.join(["bpfree", "study", "retry", "failed", *map(redact_word, words)])
    parts += [f"{without} ended without a result (to run them again: {again})"] if without else []
    return "".join(f", {part}" for part in parts)


def _worklist(name: str, settings: Sequence[str], seeds: int | None, files: Sequence[str], *, load: bool = True, **chosen: Any) -> Worklist:
    from bpfree.config import allowing
    from bpfree.leaves import parse_words
    from bpfree.study import cells
    from bpfree.study.file import find_study
    from bpfree.study.worklist import Worklist

    words = parse_words(settings)
    registry = allowing(words, files)
    return Worklist(cells.plan(find_study(name, registry), words, seeds=seeds, load=load, registry=registry), **chosen)


def _again(name: str, settings: Sequence[str], seeds: int | None, files: Sequence[str], **chosen: Sequence[str] | None) -> list[str]:
    """Return the command-line words that select the same cells."""
    labels = [word for kind, given in chosen.items() if given is not None for word in (f"--{kind}", ",".join(given))]
    allowed = [word for file in files for word in ("--allow-code", file)]
    return [name, *settings, *([] if seeds is None else ["--seeds", str(seeds)]), *labels, *allowed]


def _dry_run(worklist: Worklist, as_json: bool) -> int:
    from bpfree.study.costs import costs
    from bpfree.study.rows import unused

    told = [*(f"not as written: {change}" for change in worklist.plan.changes), *unused(worklist.table())]
    table, summary = costs(worklist)
    if as_json:
        print_json({"study": worklist.plan.study.name, "remarks": told, "cells": table, "summary": summary.splitlines()})
        return 0
    for text in told:
        say(text)
    rows = [[line["row"], line["column"], _number(line), line["state"], _cost(line), line["cell"]] for line in table]
    print_table(["row", "column", "seed", "state", "time", "cell"], rows, right=[2, 4])
    say(f"\n{summary}")
    return 0


def _cost(line: dict[str, Any]) -> str:
    if not line["to_run"]:
        return ""
    return "?" if line["seconds"] is None else duration(line["seconds"])
