"""The commands ``bpfree track``."""

from __future__ import annotations

from pathlib import Path

import click

from bpfree.cli.completion import run_name, setting


@click.group(short_help="Manage experiment tracking.")
def track() -> None:
    """Manage experiment tracking."""


@track.command("send", short_help="Upload data that could not be sent while a tracker was unavailable.")
@click.argument("run", shell_complete=run_name)
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...", shell_complete=setting)
def send(run: str, settings: tuple[str, ...]) -> int:
    """Upload the data that the trackers of RUN (a run's folder, or its name) do not have.

    The trackers are those of the run's configuration, unless SETTINGS change them: `tracking.to=[csv]`, `tracking.uri=...`.
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
    patient = Leaf("tracking.flush_timeout", 600.0, "bpfree track send")  # the end of a run should not wait this long, but this command may
    own = [leaf for leaf in read_yaml(folder.config) if leaf.key.startswith("tracking.")]  # the run's plugins need not be installed
    config = resolve([*own, patient, *leaves]).settings.tracking
    if not any(leaf.key == "tracking.uri" for leaf in leaves):
        config = settled(config, folder.path)
    refused = send_run(folder.path, config)
    if refused is None:
        raise BpfreeError("not everything could be sent", where=str(folder.path), fix="try again when the server is available")
    if refused:
        lost = "; ".join(f"{each.get('path') or each.get('event', 'a line')}: {each['reason']}" for each in refused)
        raise BpfreeError(
            f"{len(refused)} events were refused, and all others sent: {lost}",
            where=str(folder.path),
            fix="the refused events cannot be sent",
        )
    click.echo("sent")
    return 0
