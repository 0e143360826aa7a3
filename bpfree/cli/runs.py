"""The commands ``bpfree runs``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bpfree.record.runs import Known
    from bpfree.run import Run

BARS = "▁▂▃▄▅▆▇█"
CURVE = 30
"""Epochs of a curve that are drawn."""
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
of_folder = click.option("--output", default="runs", show_default=True, help="Folder of runs.")


class _Runs(click.Group):
    """Commands on runs; without one of their names, the list."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["list", *args]
        return super().parse_args(context, args)

    def get_command(self, context: click.Context, name: str) -> click.Command:
        return self.commands.get(name) or self.commands["list"]


HELP = """List, show, compare and delete runs. `bpfree runs [OUTPUT]` lists those in a folder.

\b
Examples:
  bpfree runs rule=dfa status=finished --sort accuracy --limit 5
  bpfree runs show RUN
  bpfree runs compare RUN RUN
  bpfree runs delete --failed --yes
"""


@click.group(cls=_Runs, help=HELP, short_help="List, show, compare and delete runs.")
def runs() -> None:
    pass


@runs.command("list", short_help="List runs, and mark killed ones as interrupted.")
@click.argument("words", nargs=-1, metavar="[OUTPUT] [FILTERS]...")
@click.option("--since", "begun", metavar="WHEN", help="Begun since: 2026-11-30, today, 12h or 7d ago.")
@click.option("--sort", metavar="METRIC", help="Best first: accuracy (test), val/loss, seconds; or date.")
@click.option("--limit", type=click.IntRange(min=1), help="Show at most n runs.")
@click.option("--clean", is_flag=True, help="Remove runs that were killed before their first checkpoint: they cannot be resumed.")
@as_json
def listed(words: tuple[str, ...], begun: str | None, sort: str | None, limit: int | None, clean: bool, as_json: bool) -> int:
    """List the runs in OUTPUT (the folder of runs): their progress, and how they ended.

    FILTERS are `status=`, `study=`, `rule=`, `task=` or any setting, such as `optimizer.lr=0.01`; values may have wildcards
    (`rule=noprop*`). A run whose process was killed is marked as interrupted, here and in its tracking store. With --clean, killed runs
    without a checkpoint are removed.
    """
    from bpfree.cli.output import print_table
    from bpfree.record.runs import delete, find_runs, selected, since, sorted_by

    output, filters = _parsed(words)
    found = selected([_ended(known) for known in find_runs(output)], filters, None if begun is None else since(begun))
    found = (sorted_by(found, sort) if sort else found)[:limit]
    lines = []
    for known in found:
        removed = clean and known.run.status == "interrupted" and not known.resumable
        if removed:
            delete(known.folder, studies=True)
        lines.append(_line(known, "removed" if removed else known.run.status, sort))
    if as_json:
        click.echo(json.dumps([{key: value for key, value in line.items() if key != "shown"} for line in lines], indent=2))
    elif lines:
        print_table(["run", "status", "epoch", sort if sort and sort != "date" else "test"], [_texts(line) for line in lines], right=(2, 3))
    else:
        click.echo(f"no runs in {output}" + (" that match" if filters or begun else ""))
    return 0


def _parsed(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Separate the folder of runs from the filters among words."""
    from bpfree.errors import UsageError

    filters = dict(word.split("=", 1) for word in words if "=" in word and not Path(word).exists())
    places = [word for word in words if "=" not in word or Path(word).exists()]
    if len(places) > 1:
        raise UsageError(f"two folders of runs: {places[0]} and {places[1]}", where="command line", fix="filters are KEY=VALUE")
    return Path(places[0] if places else "runs"), filters


def _ended(known: Known) -> Known:
    """Finish the records of a run whose process was killed."""
    from bpfree.record.folder import RunFolder
    from bpfree.record.runs import known_at

    if RunFolder(known.folder).end_if_killed():
        from bpfree.tracking.sending import complete

        complete(known.folder)  # ends its run in the store too
        return known_at(known.folder) or known
    return known


def _line(known: Known, status: str, sort: str | None) -> dict[str, Any]:
    from bpfree.record.runs import value_of

    run, shown = known.run, [(metric, value) for metric, value in known.run.scores("test")]
    text = ", ".join(f"{metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in shown)
    if sort and sort != "date":
        value = value_of(run, sort)
        text = "" if math.isnan(value) else run.metric(sort).text(value)
    return {
        "run": known.folder.name,
        "status": status,
        "reason": run.reason,
        "resumable": known.resumable,
        "began": known.began.isoformat(timespec="seconds"),
        "epoch": run.epoch,
        "total_epochs": run.total_epochs,
        "test": {metric.name: value for metric, value in shown},
        "shown": text,
    }


def _texts(line: dict[str, Any]) -> list[str]:
    reason = f": {line['reason']}" if line["reason"] else ""
    total = f" of {line['total_epochs']}" if line["total_epochs"] else ""
    return [line["run"], f"{line['status']}{reason}", f"{line['epoch']}{total}", line["shown"]]


def _find(name: str, output: str) -> Known:
    """Find a run by its folder, or by its name under the output folder."""
    from bpfree.errors import UsageError, nearest
    from bpfree.record.runs import known_at

    for folder in (Path(name), Path(output) / name):
        if (known := known_at(folder)) is not None:
            return _ended(known)
    names = [path.name for path in Path(output).iterdir()] if Path(output).is_dir() else []
    guess = nearest(name, names)
    where = next((str(place) for place in (Path(name), Path(output) / name) if place.exists()), name)
    what = "no run's folder" if Path(where).exists() else "no such run"
    raise UsageError(what, where=where, fix=f"did you mean {guess}?" if guess else "bpfree runs lists them")


# --- one, and several beside each other -----------------------------------------------------------------------------------------


@runs.command("show", short_help="Show a run: how it ended, its results and curves, its files.")
@click.argument("run")
@of_folder
@as_json
def show(run: str, output: str, as_json: bool) -> int:
    """Show a run: how it ended, its results and curves, its files. RUN is its folder, or its name."""
    from bpfree.cli.output import print_pairs, print_result
    from bpfree.record.folder import RunFolder
    from bpfree.record.log import strict
    from bpfree.record.runs import size_of

    known = _find(run, output)
    found, place = known.run, RunFolder(known.folder)
    if as_json:
        facts = {name: getattr(found, name) for name in ("id", "name", "status", "reason", "epoch", "total_epochs", "config", "tags")}
        facts |= {"began": known.began.isoformat(timespec="seconds"), "resumable": known.resumable, "folder": str(known.folder)}
        click.echo(json.dumps(strict({**facts, "result": found.result, "history": found.history}), indent=2, default=str))
        return 0
    print_pairs(
        [
            ("run", found.name),
            ("began", known.began.strftime("%Y-%m-%d %H:%M:%S")),
            ("epochs", f"{found.epoch}{f' of {found.total_epochs}' if found.total_epochs else ''}"),
            ("study", " ".join(filter(None, (found.tags.get(key) for key in ("study", "study_row", "study_column"))))),
        ]
    )
    click.echo()
    print_result(found)
    click.echo()
    print_pairs([(name, _curve(found, name, *_span([found], name))) for name in _curves([found])])
    click.echo()
    print_pairs(
        [
            ("files", f"{size_of(known.folder) / 1e6:.1f} MB"),
            ("repeat", f"bpfree train --config {place.config}" if place.config.is_file() else ""),
            ("resume", f"bpfree train --resume {known.folder}" if known.resumable else ""),
        ]
    )
    return 0


@runs.command("compare", short_help="Compare runs: settings that differ, results, curves.")
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@of_folder
@as_json
def compare(names: tuple[str, ...], output: str, as_json: bool) -> int:
    """Compare runs, named by folder or name: the settings in which they differ, and their results and curves beside each other."""
    from bpfree.cli.output import print_pairs, print_table
    from bpfree.errors import UsageError
    from bpfree.record.log import strict
    from bpfree.record.runs import differing, value_of

    if len(names) < 2:
        raise UsageError("one run is nothing to compare", where="bpfree runs compare", fix="name two runs or more")
    known = [_find(name, output) for name in names]
    found = [each.run for each in known]
    settings, keys = differing(found), _results(found)
    if as_json:
        values = {key: [value_of(run, key) for run in found] for key in keys}
        drawn = {key: [[epoch.get(key) for epoch in run.history] for run in found] for key in _curves(found)}
        content = {"runs": [str(each.folder) for each in known], "status": [run.status for run in found], "settings": settings}
        click.echo(json.dumps(strict({**content, "results": values, "curves": drawn}), indent=2, default=str))
        return 0
    letters = [chr(ord("A") + place) if len(found) <= 26 else str(place + 1) for place in range(len(found))]
    print_pairs([(letter, f"{each.folder} ({each.run.status})") for letter, each in zip(letters, known, strict=True)])
    right = range(1, len(found) + 1)
    for title, rows in (
        ("setting", [[key, *(("" if value is None else str(value)) for value in values)] for key, values in settings.items()]),
        ("result", [[key, *(_number(run, key, value_of(run, key)) for run in found)] for key in keys]),
    ):
        click.echo()
        if rows:
            print_table([title, *letters], rows, right=right if title == "result" else ())
        else:
            click.echo(f"no {title} differs" if title == "setting" else "no results")
    if curves := _curves(found):
        click.echo()
        lines = [
            (f"{key}  {letter}", _curve(run, key, *_span(found, key))) for key in curves for letter, run in zip(letters, found, strict=True)
        ]
        print_pairs(lines)
    return 0


def _results(found: Sequence[Run]) -> list[str]:
    """List the keys of results of which people think first: tests, last validations, and costs."""
    scores = [f"{split}/{metric.name}" for split in ("test", "val") for run in found for metric in run.measures.values()]
    costs = ["train/seconds", "train/steps", "train/peak_memory_mb", "parameters"]
    present = {key for run in found for key in (*run.result, *(run.history[-1] if run.history else ()))}
    return [key for key in dict.fromkeys([*scores, *costs]) if key in present]


def _number(run: Run, key: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return run.metric(key).text(value) if key.startswith(("test/", "val/")) else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def _curves(found: Sequence[Run]) -> list[str]:
    """List the metrics whose curves are shown: the primary one and the loss on validation, else on training examples."""
    wanted = dict.fromkeys(name for run in found for name in (run.primary.name, "loss"))
    keys = {key for run in found for epoch in run.history for key in epoch}
    return [
        next(key for key in (f"val/{name}", f"train/{name}") if key in keys) for name in wanted if {f"val/{name}", f"train/{name}"} & keys
    ]


def _span(found: Sequence[Run], key: str) -> tuple[float, float]:
    values = [value for run in found for epoch in run.history if math.isfinite(value := epoch.get(key, math.nan))]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _curve(run: Run, key: str, low: float, high: float) -> str:
    """Draw the values of epochs as bars, with the first and the last as numbers; the empty string without any."""
    values = [value for epoch in run.history if math.isfinite(value := epoch.get(key, math.nan))]
    if not values:
        return ""
    shown = values if len(values) <= CURVE else [values[round(i * (len(values) - 1) / (CURVE - 1))] for i in range(CURVE)]
    bars = "".join(BARS[round((len(BARS) - 1) * (value - low) / (high - low))] if high > low else BARS[0] for value in shown)
    metric = run.metric(key)
    return f"{bars}  {metric.text(values[0])} to {metric.text(values[-1])}" if len(values) > 1 else metric.text(values[0])


# --- deleting -----------------------------------------------------------------------------------------------------------------


@runs.command("delete", short_help="Delete runs: failed ones, or those named.")
@click.argument("words", nargs=-1, metavar="[RUN | FILTER]...")
@click.option("--failed", is_flag=True, help="Those that failed or diverged, or were killed before their first checkpoint.")
@click.option("--with-studies", is_flag=True, help="Runs of studies too, whose reports then lack them.")
@click.option("--yes", is_flag=True, help="Delete them; without it, only say which.")
@of_folder
@as_json
def remove(words: tuple[str, ...], failed: bool, with_studies: bool, yes: bool, output: str, as_json: bool) -> int:
    """Delete runs: those that came to nothing (--failed), those that FILTERS match (`status=interrupted`), or those named.

    Without --yes nothing is deleted. A run in use stays, and so does whatever is no run's folder, or a symbolic link. What MLflow or other
    trackers know of a run stays, too.
    """
    from bpfree.cli.output import print_table
    from bpfree.record.runs import delete, size_of

    lines: list[dict[str, Any]] = []
    for folder, reason in _chosen(words, failed, output, with_studies):
        size = 0 if reason else size_of(folder)
        if yes and not reason:
            delete(folder, studies=with_studies)
        lines.append({"run": str(folder), "bytes": size, "deleted": yes and not reason, "kept": reason})
    if as_json:
        click.echo(json.dumps(lines, indent=2))
        return 0
    if not lines:
        click.echo("no run to delete")
        return 0
    gone = [line for line in lines if not line["kept"]]
    done = "deleted" if yes else "to delete"
    print_table(
        ["run", "", "size"],
        [[line["run"], f"kept: {line['kept']}" if line["kept"] else done, f"{line['bytes'] / 1e6:.1f} MB"] for line in lines],
        right=(2,),
    )
    total = f"{len(gone)} of {len(lines)} runs, {sum(line['bytes'] for line in gone) / 1e6:.1f} MB"
    click.echo(f"{total} deleted" if yes else f"{total}; nothing was deleted yet: --yes deletes them" if gone else "nothing to delete")
    return 0


def _chosen(words: Sequence[str], failed: bool, output: str, studies: bool) -> list[tuple[Path, str]]:
    """Find the folders to delete, each with the reason why it stays, if it does.

    Raises:
        UsageError: nothing says which; or a named one is not there.
    """
    from bpfree.errors import UsageError
    from bpfree.record.runs import find_runs, refusal, selected

    names = [word for word in words if "=" not in word]
    filters = dict(word.split("=", 1) for word in words if "=" in word)
    if not names and not filters and not failed:
        raise UsageError(
            "which runs?", where="bpfree runs delete", fix="name them, or give --failed or filters, such as status=interrupted"
        )
    found: dict[Path, str] = {}
    for name in names:
        folder = next((place for place in (Path(name), Path(output) / name) if place.exists() or place.is_symlink()), None)
        if folder is None:
            raise UsageError("no such run", where=name, fix="bpfree runs lists them")
        found[folder] = refusal(folder, studies=studies)
    if filters or failed:
        for known in selected([_ended(each) for each in find_runs(Path(output))], filters):
            if not failed or known.failed:
                found.setdefault(known.folder, refusal(known.folder, studies=studies))
    return list(found.items())
