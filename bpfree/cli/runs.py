"""The command ``bpfree runs``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click


@click.command(short_help="List runs, and mark killed ones as interrupted.")
@click.argument("output", default="runs")
@click.option("--clean", is_flag=True, help="Remove runs that were killed before their first checkpoint: they cannot be resumed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(output: str, clean: bool, as_json: bool) -> None:
    """List the runs in OUTPUT (the folder of runs): their progress, and how they ended.

    A run whose process was killed is marked as interrupted, here and in its tracking store. With --clean, killed runs without a checkpoint
    are removed.
    """
    from bpfree.cli.output import print_table

    if not Path(output).is_dir():
        from bpfree.errors import UsageError

        raise UsageError("no such folder", where=output, fix="give the folder of runs (their setting output)")
    lines = [line for folder in sorted(Path(output).iterdir()) if (line := _line(folder, clean)) is not None]
    if as_json:
        click.echo(json.dumps([{key: value for key, value in line.items() if key != "shown"} for line in lines], indent=2))
    elif lines:
        print_table(["run", "status", "epoch", "test"], [_texts(line) for line in lines], right=(2, 3))
    else:
        click.echo(f"no runs in {output}")


def _line(folder: Path, clean: bool) -> dict[str, Any] | None:
    """Describe a run, and finish the records of a killed one; ``None`` if the folder is not a run's."""
    from bpfree.errors import BpfreeError
    from bpfree.record.folder import RunFolder, read_run

    place = RunFolder(folder)
    try:
        if place.end_if_killed():
            from bpfree.tracking.sending import complete

            complete(folder)  # ends its run in the store too
        run = read_run(folder)
    except BpfreeError:
        return None
    status: str = run.status
    if clean and status == "interrupted" and not place.last.is_file():
        shutil.rmtree(folder)
        status = "removed"
    return {
        "run": folder.name,
        "status": status,
        "reason": run.reason,
        "resumable": place.last.is_file() and status in ("interrupted", "failed"),
        "epoch": run.epoch,
        "total_epochs": run.total_epochs,
        "test": {metric.name: value for metric, value in run.scores("test")},
        "shown": ", ".join(f"{metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in run.scores("test")),
    }


def _texts(line: dict[str, Any]) -> list[str]:
    reason = f": {line['reason']}" if line["reason"] else ""
    total = f" of {line['total_epochs']}" if line["total_epochs"] else ""
    return [
        line["run"],
        f"{line['status']}{reason}",
        f"{line['epoch']}{total}",
        line["shown"],
    ]
