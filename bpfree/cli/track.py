"""``bpfree track``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(short_help="Manage the tracking of runs.")
def track() -> None:
    """Manage the tracking of runs."""


@track.command("send", short_help="Send what an outage of a tracker has left behind.")
@click.argument("run")
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...")
def send(run: str, settings: tuple[str, ...]) -> int:
    """Send what the trackers of RUN (a run's folder, or its name) do not have of it.

    They are those that its configuration names, unless SETTINGS say otherwise: `tracking.to=[csv]`, `tracking.uri=...`.
    """
    from bpfree.config import resolve
    from bpfree.errors import BpfreeError, UsageError
    from bpfree.leaves import Leaf, last_said, parse_words, read_yaml
    from bpfree.legacy import refuse_version_1
    from bpfree.record.folder import RunFolder
    from bpfree.tracking.mlflow_tracker import settled
    from bpfree.tracking.sending import send as send_run

    leaves = parse_words(settings)
    output = last_said(leaves, "output", "runs")
    for path in (Path(run), Path(output) / run):
        refuse_version_1(path, "sent")
    folder = next((place for place in (RunFolder(run), RunFolder(Path(output) / run)) if place.log.size), None)
    if folder is None:
        raise UsageError("no such run", where=run, fix=f"give a run's folder, or the name of a run in {output}/")
    patient = Leaf("tracking.flush_timeout", 600.0, "bpfree track send")  # a run must end soon; this need not
    own = [leaf for leaf in read_yaml(folder.config) if leaf.key.startswith("tracking.")]  # what it was trained with need not be here
    config = resolve([*own, patient, *leaves]).settings.tracking
    if not any(leaf.key == "tracking.uri" for leaf in leaves):
        config = settled(config, folder.path)
    refused = send_run(folder.path, config)
    if refused is None:
        raise BpfreeError("not everything could be sent", where=str(folder.path), fix="try again when the server is back")
    if refused:
        lost = "; ".join(f"{each.get('path') or each.get('event', 'a line')}: {each['reason']}" for each in refused)
        raise BpfreeError(
            f"everything is sent, but {len(refused)} of its events: {lost}", where=str(folder.path), fix="nothing more can be sent"
        )
    click.echo("sent")
    return 0
