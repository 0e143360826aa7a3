"""The commands ``bpfree plugins``: list installed plugins, or create one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.completion import names_of
from bpfree.cli.output import json_option, print_json, print_pairs, print_table, say
from bpfree.errors import BpfreeError, unknown_name

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate
    from bpfree.plugins import PluginRecord, Plugins
    from bpfree.template import Kind


@click.group(short_help="List installed plugins, or create one.")
def plugins() -> None:
    """List the installed plugins, or create one.

    `bpfree --disable NAME ...` or the environment variable BPFREE_DISABLE_PLUGINS=NAME,NAME disables plugins.
    """


@plugins.command("list", short_help="List all plugins, also broken ones, with their status.")
@json_option
def list_plugins(as_json: bool) -> None:
    """List all plugins: version, interface version, status, number of certified rules, and why a plugin cannot be used."""
    from bpfree.kept import kept

    described: list[dict[str, Any]] = kept("certified", described_plugins)
    if as_json:
        print_json(described)
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
            say(f"\n{record['name']} is {record['status']}: {record['reason']}")
            if record["status"] not in ("ok", "disabled"):
                say(f"disable it: bpfree --disable {record['name']} ...")


def described_plugins() -> tuple[list[dict[str, Any]], list[Path] | None]:
    """Describe all plugins by plain values; return also the certificate files, on which the description depends."""
    from bpfree.plugins import installed_plugins
    from bpfree.registry import registry_folder

    installed, known = installed_plugins(), known_certificates()
    described = [plain(record, known, installed) for record in installed.records.values()]
    if not (known and installed.keepable):
        return described, None
    folder = registry_folder() / "certificates"
    return described, [folder, *folder.glob("*.json")]


@plugins.command(short_help="Show details of a plugin.")
@click.argument("name", shell_complete=names_of("plugins"))
@json_option
def info(name: str, as_json: bool) -> None:
    """Show the plugin NAME: package, what it registers, hooks, interface version, certificates, its entry in the registry."""
    from bpfree.plugins import installed_plugins

    installed = installed_plugins()
    if name not in installed.records:
        raise unknown_name("plugin", name, installed.records, where="command line")
    described = plain(installed.records[name], known_certificates(), installed)
    described["registry_entry"] = entry_file(name)
    if as_json:
        print_json(described)
        return
    show(described)


def show(described: dict[str, Any]) -> None:
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
    """Read the certificates of the installed registry; if they cannot be read, warn and return none."""
    from bpfree.registry import certificates, registry_folder

    try:
        return certificates(registry_folder())
    except BpfreeError as error:
        say(f"certificates are not shown: {error}", err=True)
        return {}


def entry_file(name: str) -> str:
    """Return the path of a plugin's entry in the installed registry; empty if there is none."""
    from bpfree.registry import registry_folder

    try:
        path = registry_folder() / "plugins" / f"{name}.toml"
    except BpfreeError:
        return ""
    return str(path) if path.exists() else ""


def plain(record: PluginRecord, known: Mapping[str, Certificate], installed: Plugins) -> dict[str, Any]:
    """Describe a plugin by plain values, with the status of each rule's certificate."""
    from bpfree.registry import state

    values = {key: value for key, value in dataclasses.asdict(record).items() if key != "trace"}
    rules = record.provides.get("rules", [])
    values["certificates"] = {
        rule: {"state": state(rule, known, installed), "date": known[rule].date if rule in known else ""} for rule in rules
    }
    return values


def count(states: Mapping[str, Mapping[str, str]]) -> str:
    """Format the number of certified rules, such as ``4 of 5 (1 stale)``."""
    if not states:
        return "-"
    good = sum(entry["state"].startswith("certified") for entry in states.values())
    old = sum(entry["state"].startswith("stale") for entry in states.values())
    return f"{good} of {len(states)}{f' ({old} stale)' if old else ''}"


@plugins.command(short_help="Write a package with a rule, task, network or metric of your own.")
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the package.  [default: ./NAME]")
@click.option("--class-name", help="Class name of the rule, or of the options.  [default: made from NAME]")
@click.option("--rule", "kind", flag_value="rule", default=True, help="Create a rule (default).")
@click.option("--task", "kind", flag_value="task", help="Create a task.")
@click.option("--network", "kind", flag_value="network", help="Create a network.")
@click.option("--metric", "kind", flag_value="metric", help="Create a metric.")
def new(name: str, folder: Path | None, class_name: str | None, kind: Kind) -> None:
    """Write a package with a working rule NAME, or with a task, network or metric.

    A rule comes with a test that runs the conformance checks, a method card, and an entry for the registry; the others come with tests.
    The package is separate from bpfree, and yours.
    """
    from bpfree.template import next_commands, write_plugin

    target = Path(name) if folder is None else folder
    for path in write_plugin(name, target, class_name=class_name, kind=kind):
        say(f"wrote {path}")
    say("\nNext:")
    for command in next_commands(name, target, kind):
        say(f"  {command}")
