"""The commands ``bpfree registry``: the index of known plugins, their certificates and reference results."""

from __future__ import annotations

import contextlib
import datetime
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.output import json_option, print_json, print_pairs, print_table, say
from bpfree.errors import BpfreeError, UsageError, unknown_name

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate
    from bpfree.plugins import PluginRecord, Plugins
    from bpfree.registry import Entry

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(short_help="Show the index of known plugins, and add to it.")
def registry() -> None:
    """Show or change the index of known plugins: their rules, measured properties and reference results."""


def reading(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose the index to a command."""
    command = click.option("--index", type=FILE, help="Read this index file instead of the installed one.")(command)
    return click.option("--folder", type=FOLDER, help="Read the entries and certificates of this registry folder.")(command)


def records(index: Path | None, folder: Path | None) -> list[dict[str, Any]]:
    """Read the plugins of the chosen index.

    Raises:
        BpfreeError: it cannot be read.
    """
    from bpfree.registry import build_index, read_index, registry_folder

    if index is not None and folder is not None:
        raise UsageError("both an index and a folder are given", where="--index, --folder", fix="give only one of them")
    if folder is not None:
        return build_index(existing(folder))["plugins"]  # type: ignore[no-any-return]
    return read_index(index or registry_folder() / "index.json")


def existing(folder: Path) -> Path:
    """Return a registry's folder after checking it.

    Raises:
        UsageError: it has no entries.
    """
    if not (folder / "plugins").is_dir():
        raise UsageError(
            "this is not a registry: it has no folder plugins", where=str(folder), fix="create one with bpfree registry add PLUGIN"
        )
    return folder


@registry.command("list", short_help="List all known plugins.")
@reading
@json_option
def list_known(index: Path | None, folder: Path | None, as_json: bool) -> None:
    """List all known plugins: their rules, and the number of certified ones, with the date of the oldest certificate."""
    from bpfree.registry.index import certified

    found = records(index, folder)
    if as_json:
        print_json(found)
        return
    print_table(
        ["plugin", "rules", "status", "certified"],
        [[record["name"], ", ".join(record["rules"]), record["status"], certified(record)] for record in found],
    )


@registry.command(short_help="Show a plugin's entry, certificates and results.")
@click.argument("name")
@reading
@json_option
def show(name: str, index: Path | None, folder: Path | None, as_json: bool) -> None:
    """Show a plugin's entry in the registry. NAME is the name of the plugin, or of one of its rules."""
    found = records(index, folder)
    chosen = [record for record in found if record["name"] == name] or [record for record in found if name in record["rules"]]
    if not chosen:
        known = [record["name"] for record in found] + [rule for record in found for rule in record["rules"]]
        raise unknown_name("plugin or rule", name, known, where="bpfree registry show")
    if as_json:
        print_json(chosen[0])
        return
    show_record(chosen[0])


def show_record(record: dict[str, Any]) -> None:
    from bpfree.registry.index import value_of

    first, last = record["api"]
    versions = str(first) if first == last else f"{first} to {last}"
    pairs = [(key, record[key] or "") for key in ("name", "distribution", "summary", "licence", "repository", "status", "added")]
    print_pairs([*pairs, ("interface", versions), ("papers", "\n".join(record["papers"]))])
    click.echo()
    print_table(["rule", "certificate", "date", "credit", "waived"], [certificate_row(rule, record) for rule in record["rules"]])
    if record["results"]:
        click.echo()
        rows = [[r["rule"], r.get("row", ""), r["task"], r["metric"], value_of(r), r["seeds"]] for r in record["results"]]
        print_table(["rule", "row", "task", "metric", "mean", "seeds"], rows, right=[5])


def certificate_row(rule: str, record: dict[str, Any]) -> list[str]:
    """Summarise a rule's certificate as a row of a table."""
    short = record["certificates"].get(rule)
    if short is None:
        return [rule, "none", "", "", ""]
    status = "; ".join(filter(None, (short["status"], short.get("remark", ""))))
    return [rule, status, short["date"], str(short["properties"].get("credit", "")), ", ".join(short["waived"])]


@registry.command(short_help="Write the entry of an installed plugin.")
@click.argument("plugin")
@click.option(
    "--certificate", "files", type=FILE, multiple=True, help="Certificate written by bpfree certify RULE --output FILE (repeatable)."
)
@click.option(
    "--entry",
    "entry_file",
    type=FILE,
    help="Take repository, status and results from this entry; the summary too, if there are several rules.",
)
@click.option("--folder", type=FOLDER, default="registry", show_default=True, help="Folder of the registry; created if missing.")
def add(plugin: str, files: tuple[Path, ...], entry_file: Path | None, folder: Path) -> None:
    """Write the entry of an installed PLUGIN into a registry's folder, copy the given certificates there, and update index and tables.

    What is not read from the package is kept from an existing entry.
    """
    from bpfree.files import write_text
    from bpfree.plugins import installed_plugins
    from bpfree.registry import entry_of, read_entry, renew, to_toml
    from bpfree.registry.certificates import certificate_file

    plugins = installed_plugins()
    if plugin not in plugins.records:
        raise unknown_name("plugin", plugin, plugins.records, where="command line")
    record = plugins.records[plugin]
    place = folder / "plugins" / f"{plugin}.toml"
    there = read_entry(place) if place.exists() else None
    known = said_by(entry_file, record) if entry_file else there
    entry = entry_of(record, plugins, added=there.added if there else datetime.date.today().isoformat(), known=known)
    accepted = [(path, accept(path, record, plugins)) for path in files]
    write_text(place, to_toml(entry))  # replaces a symbolic link instead of writing through it
    for path, certificate in accepted:
        target = certificate_file(folder, certificate.rule)
        if path.resolve() != target.resolve():
            write_text(target, path.read_text(encoding="utf-8"))
    renew(folder)
    without = [rule for rule in entry.rules if not certificate_file(folder, rule).exists()]
    say(f"{place}: {len(entry.rules)} rules, {len(entry.rules) - len(without)} with a certificate")
    for _, certificate in accepted:
        for finding in certificate.findings:
            if finding.status == "waived":
                say(f"waived for {certificate.rule}: {finding.id} ({finding.waiver})")
    for rule in without:
        say(f"no certificate of {rule} yet: run bpfree certify {rule} --output {certificate_file(folder, rule)}")


def said_by(path: Path, record: PluginRecord) -> Entry:
    """Read the entry that an author wrote.

    Raises:
        BpfreeError: it cannot be read, or is another plugin's.
    """
    from bpfree.registry import read_entry

    entry = read_entry(path)
    if entry.name != record.name:
        raise UsageError(
            f"this is the entry of {entry.name!r}, not of {record.name!r}", where=str(path), fix=f"run bpfree registry add {entry.name}"
        )
    return entry


def accept(path: Path, record: PluginRecord, plugins: Plugins) -> Certificate:
    """Read a certificate of this plugin, and check that a registry accepts it.

    Raises:
        BpfreeError: it is another plugin's, failed, not full, stale, or cannot be read.
    """
    from bpfree.certify.certificate import read_certificate
    from bpfree.registry.validation import acceptable

    certificate = read_certificate(path)
    if certificate.rule not in record.provides.get("rules", []):
        raise UsageError(f"this is the certificate of {certificate.rule!r}, which {record.name!r} does not register", where=str(path))
    for fault in acceptable(certificate, plugins, path):
        raise fault
    return certificate


@registry.command(short_help="Check entries, certificates and index.")
@click.option("--folder", type=FOLDER, help="Folder of the registry.  [default: the installed registry]")
@click.option("--recheck", is_flag=True, help="Repeat a drawn check of each certificate whose rule is installed.")
@click.option("--draw", type=int, help="Seed by which --recheck draws the checks.  [default: a new one]")
@json_option
def validate(folder: Path | None, recheck: bool, draw: int | None, as_json: bool) -> int:
    """Check the entries, certificates, index and tables of a registry's folder.

    Entries must fit the schema and the installed plugins; certificates must be readable, passed, full and not stale. Exit code 1 if
    anything is wrong. Rules without a certificate, and certificates measured before a change of the core outside contract and examiner,
    are only mentioned. Certificates must have every check and the digest of their content; with --recheck a drawn check of each is
    repeated, and must end as it says.
    """
    from bpfree.plugins import installed_plugins
    from bpfree.registry import OTHER_CHANGE, measured_on_another_core, missing, problems, registry_folder

    folder = registry_folder() if folder is None else existing(folder)
    found = problems(folder, installed_plugins())
    if recheck:
        found += repeated(folder, installed_plugins(), draw)
    without: list[str] = []
    other: list[str] = []
    with contextlib.suppress(BpfreeError):  # a file that cannot be read is among the problems
        without = missing(folder)
        other = measured_on_another_core(folder, installed_plugins())
    if as_json:
        plain = [{"what": problem.what, "where": problem.where, "fix": problem.fix} for problem in found]
        print_json({"problems": plain, "without_certificate": without, "measured_on_another_core": other})
        return int(bool(found))
    for problem in found:
        say(f"error: {problem}\n")
    if without:
        say(f"without a certificate: {', '.join(without)}")
    if other:
        say(f"{OTHER_CHANGE}: {', '.join(other)}")
    say(f"{folder}: {f'{len(found)} problems' if found else 'valid'}")
    return int(bool(found))


def repeated(folder: Path, plugins: Plugins, draw: int | None) -> list[BpfreeError]:
    """Repeat a drawn check of each certificate, and list the contradictions; progress goes to standard error."""
    from bpfree.registry.certificates import rechecked

    draw = secrets.randbelow(2**31) if draw is None else draw
    say(f"repeating a check of each certificate (--draw {draw})", err=True)
    found = []
    try:
        for rule, check, contradiction in rechecked(folder, plugins, draw):
            say(f"{rule}: {check} {'as before' if contradiction is None else 'differs'}", err=True)
            found += [] if contradiction is None else [contradiction]
    except BpfreeError as error:  # also among the problems
        say(f"stopped: {error.what}", err=True)
    return found


@registry.command("index", short_help="Update index and tables.")
@click.option("--folder", type=FOLDER, default="registry", show_default=True, help="Folder of the registry.")
def write_index(folder: Path) -> None:
    """Write index.json and the tables in README.md from the entries and certificates of a registry's folder."""
    from bpfree.registry import renew

    changed = renew(existing(folder))
    say("\n".join(f"wrote {path}" for path in changed) or "index and tables were up to date")
