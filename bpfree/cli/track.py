"""``bpfree track``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(short_help="Manage the tracking of runs.")
def track() -> None:
    """Manage the tracking of runs."""


@track.command("send", short_help="Send what an outage of the tracking server has left behind.")
@click.argument("run")
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...")
def send(run: str, settings: tuple[str, ...]) -> int:
    """Send what the tracking store could not take when RUN (a run's folder, or its name) was tracked.

    The store is the one that the run's configuration names, unless SETTINGS say otherwise: `tracking.uri=...`.
    """
    from bpfree.config import resolve
    from bpfree.errors import BpfreeError, UsageError
    from bpfree.leaves import Leaf, last_said, parse_words, read_yaml
    from bpfree.tracking.events import SPOOL_NAME
    from bpfree.tracking.mlflow_tracker import send_unsent

    leaves = parse_words(settings)
    output = last_said(leaves, "output", "runs")
    folder = next((path for path in (Path(run), Path(output) / run) if (path / "config.yaml").exists()), None)
    if folder is None:
        raise UsageError("no such run", where=run, fix=f"give a run's folder, or the name of a run in {output}/")
    if not (folder / SPOOL_NAME).exists():
        click.echo("nothing is left to send")
        return 0
    patient = Leaf("tracking.flush_timeout", 600.0, "bpfree track send")  # a run must end soon; this need not
    recipe = resolve([*read_yaml(folder / "config.yaml"), patient, *leaves])
    if not send_unsent(folder, recipe.settings.tracking, Path(recipe.settings.output)):
        raise BpfreeError("not everything could be sent", where=str(folder / SPOOL_NAME), fix="try again when the server is back")
    click.echo("sent")
    return 0
