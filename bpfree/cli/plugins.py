"""``bpfree plugins``."""

from __future__ import annotations

import dataclasses
import json

import click


@click.group(short_help="Look at installed plugins.")
def plugins() -> None:
    """Look at the installed plugins. The environment variable BPFREE_DISABLE_PLUGINS=NAME,NAME leaves some out."""


@plugins.command("list", short_help="All plugins, also broken ones, with their state.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_plugins(as_json: bool) -> None:
    """All installed plugins: version, state, what they register, and why one is not usable."""
    from bpfree.cli.output import print_table
    from bpfree.plugins import installed_plugins

    records = list(installed_plugins().records.values())
    if as_json:
        plain = [{key: value for key, value in dataclasses.asdict(record).items() if key != "trace"} for record in records]
        click.echo(json.dumps(plain, indent=2))
        return
    rows = [
        [r.name, r.distribution, r.version, r.status, ", ".join(name for names in r.provides.values() for name in names)] for r in records
    ]
    print_table(["plugin", "distribution", "version", "status", "provides"], rows)
    for record in records:
        if record.reason:
            click.echo(f"\n{record.name} is {record.status}: {record.reason}")
