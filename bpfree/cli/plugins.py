"""``bpfree plugins``: those installed, and a new one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.errors import BpfreeError, unknown_name

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate
    from bpfree.plugins import PluginRecord, Plugins
    from bpfree.template import Kind


@click.group(short_help="Look at installed plugins, or begin one.")
def plugins() -> None:
    """Look at the installed plugins, or begin one. `bpfree --disable NAME ...` leaves one out, and so does the environment variable
    BPFREE_DISABLE_PLUGINS=NAME,NAME.
    """


@plugins.command("list", short_help="All plugins, also broken ones, with their state.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_plugins(as_json: bool) -> None:
    """All installed plugins: version, interface version, state, rules, how many of these are certified, and why one is not usable."""
    from bpfree.cli.output import print_table
    from bpfree.kept import kept

    described: list[dict[str, Any]] = kept("certified", described_plugins)
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    rows = [
        [
            record["name"],
            record["version"],
            "-" if record["api"] is None else record["api"],
            record["status"],
            ", ".join(record["certificates"]),
            count(record["certificates"]),
        ]
        for record in described
    ]
    print_table(["plugin", "version", "api", "status", "rules", "certified"], rows)
    for record in described:
        if record["reason"]:
            click.echo(f"\n{record['name']} is {record['status']}: {record['reason']}")
            if record["status"] not in ("ok", "disabled"):
                click.echo(f"leave it out: bpfree --disable {record['name']} ...")


def described_plugins() -> tuple[list[dict[str, Any]], list[Path] | None]:
    """All plugins as plain values, and what this depends on beside the plugins: their certificates."""
    from bpfree.plugins import installed_plugins
    from bpfree.registry import registry_folder

    installed, known = installed_plugins(), known_certificates()
    described = [plain(record, known, installed) for record in installed.records.values()]
    if not (known and installed.keepable):
        return described, None
    folder = registry_folder() / "certificates"
    return described, [folder, *folder.glob("*.json")]


@plugins.command(short_help="All about one plugin.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(name: str, as_json: bool) -> None:
    """What is known of the plugin NAME: package, what it registers, hooks, interface version, certificates, its entry in the registry."""
    from bpfree.plugins import installed_plugins

    installed = installed_plugins()
    if name not in installed.records:
        raise unknown_name("plugin", name, installed.records, where="command line")
    described = plain(installed.records[name], known_certificates(), installed)
    described["registry_entry"] = entry_file(name)
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    show(described)


def show(described: dict[str, Any]) -> None:
    from bpfree.cli.output import print_pairs, print_table
    from bpfree.hooks import API_VERSION
    from bpfree.plugins import KINDS

    api = "unknown" if described["api"] is None else f"{described['api']} (this bpfree: {API_VERSION})"
    lines = {
        "name": described["name"],
        "distribution": f"{described['distribution']} {described['version']}",
        "status": ": ".join(filter(None, [described["status"], described["reason"]])),
        "interface": api,
        "source": described["path"] or "not imported",
        "entry": described["registry_entry"] or "not in the registry",
        "hooks": ", ".join(described["hooks"]),
        **{kind: ", ".join(described["provides"].get(kind, [])) for kind in KINDS},
    }
    print_pairs(lines.items())
    if described["certificates"]:
        click.echo()
        print_table(["rule", "certificate", "date"], [[rule, c["state"], c["date"]] for rule, c in described["certificates"].items()])


def known_certificates() -> Mapping[str, Certificate]:
    """Those of the registry that came with bpfree; none, with a word about it, where they cannot be read."""
    from bpfree.registry import certificates, registry_folder

    try:
        return certificates(registry_folder())
    except BpfreeError as error:
        click.echo(f"certificates are not shown: {error}", err=True)
        return {}


def entry_file(name: str) -> str:
    """The plugin's entry in the registry that came with bpfree; empty if there is none."""
    from bpfree.registry import registry_folder

    try:
        path = registry_folder() / "plugins" / f"{name}.toml"
    except BpfreeError:
        return ""
    return str(path) if path.exists() else ""


def plain(record: PluginRecord, known: Mapping[str, Certificate], installed: Plugins) -> dict[str, Any]:
    """A plugin as plain values, with the state of each rule's certificate."""
    from bpfree.registry import state

    values = {key: value for key, value in dataclasses.asdict(record).items() if key != "trace"}
    rules = record.provides.get("rules", [])
    values["certificates"] = {
        rule: {"state": state(rule, known, installed), "date": known[rule].date if rule in known else ""} for rule in rules
    }
    return values


def count(states: Mapping[str, Mapping[str, str]]) -> str:
    """``4 of 5``, and how many are stale."""
    if not states:
        return "-"
    good = sum(entry["state"].startswith("certified") for entry in states.values())
    old = sum(entry["state"].startswith("stale") for entry in states.values())
    return f"{good} of {len(states)}{f' ({old} stale)' if old else ''}"


@plugins.command(short_help="Write a package with a rule, task, network or metric of your own.")
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write it.  [default: ./NAME]")
@click.option("--class-name", help="Of the rule, or of the options.  [default: made from NAME]")
@click.option("--rule", "kind", flag_value="rule", default=True, help="Bring a rule (default).")
@click.option("--task", "kind", flag_value="task", help="Bring a task.")
@click.option("--network", "kind", flag_value="network", help="Bring a network.")
@click.option("--metric", "kind", flag_value="metric", help="Bring a metric.")
def new(name: str, folder: Path | None, class_name: str | None, kind: Kind) -> None:
    """Write a package with a working rule NAME: its source, a test that runs the conformance checks, a method card, and an entry for the
    registry; or with a task, network or metric and its tests. It is written outside of bpfree, and is yours.
    """
    from bpfree.template import next_commands, write_plugin

    target = Path(name) if folder is None else folder
    for path in write_plugin(name, target, class_name=class_name, kind=kind):
        click.echo(f"wrote {path}")
    click.echo("\nNext:")
    for command in next_commands(name, target, kind):
        click.echo(f"  {command}")
