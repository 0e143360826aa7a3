"""``bpfree rules``, ``bpfree networks``, ``bpfree tasks``, ``bpfree metrics``: list installed entries, or show one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from bpfree.cli.code import named
from bpfree.cli.completion import names_of
from bpfree.cli.output import json_option

REMARKS = {
    "optimizer": " (with the default options; other settings default to the network's, or torch's)",
    "traits": " (with the default options, for any network)",
}
"""Remarks on single lines of a card."""


def options_table(config: type) -> list[list[str]]:
    from bpfree.options import describe

    return [[name, kind, "none" if default is None else str(default) or "''", meaning] for name, kind, default, meaning in describe(config)]


def options_of(config: type) -> list[dict[str, str]]:
    return [dict(zip(("key", "type", "default", "meaning"), row, strict=True)) for row in options_table(config)]


def show_options(config: type, section: str) -> None:
    from bpfree.cli.output import print_table

    rows = options_table(config)
    click.echo(f"Options ({section}.KEY=VALUE):{'' if rows else ' none'}")
    if rows:
        print_table(["key", "type", "default", "meaning"], rows)


@click.command(short_help="List learning rules, or show one's method card.")
@click.argument("name", required=False, shell_complete=names_of("rules"))
@json_option
def rules(name: str | None, as_json: bool) -> None:
    """List the learning rules of all installed plugins; with NAME, show its method card.

    A card has the rule's summary, its source, its update, its declared traits, and its options.
    """
    from bpfree.cli.output import print_json, print_table, say
    from bpfree.plugins import installed_plugins, plugin_index

    if name is not None:
        name, registry = named("rules", name)
        rule = registry.get("rules", name, where="bpfree rules")
        card = dict(rule_card(name, rule, registry.owner("rules", name)), certificate=certificate_of(name, registry))
        print_json(card) if as_json else show_card(card, rule)
        return
    if as_json:
        print_json([dict(rule_card(*item)) for item in installed_plugins().items("rules")])
        return
    index = plugin_index()
    print_table(["rule", "plugin", "what it is"], index.summaries["rules"])
    ill = [record for record in index.records if record.status != "ok"]
    if ill:
        say(f"\nnot loaded: {', '.join(f'{r.name} ({r.status})' for r in ill)}; see bpfree plugins list", err=True)


def rule_card(name: str, rule: Any, owner: Any) -> Iterator[tuple[str, Any]]:
    """Make a rule's card of plain values; traits and optimiser are those of the default options, before the network is known."""
    import dataclasses

    card, defaults = rule.card, rule.Config()
    yield "name", name
    yield "plugin", f"{owner.name} ({owner.distribution} {owner.version})"
    yield from dataclasses.asdict(card).items()
    yield "traits", dataclasses.asdict(rule.traits_of(defaults))
    yield "optimizer", {key: value for key, value in dataclasses.asdict(rule.optimizer_of(defaults)).items() if value not in (None, {}, [])}
    yield "options", options_of(rule.Config)


def certificate_of(name: str, registry: Any) -> str:
    """Describe a rule's certificate in the registry: its status, its date, and the measured reach of credit."""
    from bpfree.cli.plugins import known_certificates
    from bpfree.registry import state

    known = known_certificates()
    if name not in known:
        return f"none; bpfree certify {name} measures what it does"
    return f"{state(name, known, registry)}, {known[name].date}; credit: {known[name].properties.get('credit', 'not measured')}"


def show_card(card: dict[str, Any], rule: Any) -> None:
    from bpfree.cli.output import print_pairs

    pairs = [(key, str(card[key] or "").strip()) for key in ("name", "plugin", "summary", "paper", "equation", "notes")]
    for key in ("optimizer", "traits", "certificate"):
        value = card[key]
        text = value if isinstance(value, str) else ", ".join(f"{k}={plain(v)}" for k, v in value.items())
        pairs.append((key, f"{text}{REMARKS.get(key, '')}"))
    print_pairs(pairs)
    show_options(rule.Config, "rule")


def plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def list_kind(kind: str, name: str | None, as_json: bool) -> None:
    from bpfree.cli.output import print_json, print_table, say
    from bpfree.plugins import plugin_index

    if name is None:
        listed = plugin_index().summaries[kind]
        if as_json:
            print_json([dict(zip(("name", "plugin", "summary"), row, strict=True)) for row in listed])
        else:
            print_table([kind[:-1], "plugin", "what it is"], listed)
        return
    name, registry = named(kind, name)
    if kind == "networks":
        from bpfree.named_networks import spelled_out

        name = spelled_out(name, registry)[0]
    thing = registry.get(kind, name, where=f"bpfree {kind}")
    if as_json:
        print_json({"name": name, "summary": thing.summary, "options": options_of(thing.Config)})
        return
    say(f"{name}: {thing.summary}")
    show_options(thing.Config, kind[:-1])


@click.command(short_help="List network builders, or show one's options.")
@click.argument("name", required=False, shell_complete=names_of("networks"))
@json_option
def networks(name: str | None, as_json: bool) -> None:
    """List the networks that can be named with network=NAME; with NAME, show its options."""
    list_kind("networks", name, as_json)


@click.command(short_help="List tasks, or show one's options.")
@click.argument("name", required=False, shell_complete=names_of("tasks"))
@json_option
def tasks(name: str | None, as_json: bool) -> None:
    """List the tasks that can be named with task=NAME; with NAME, show its options (for all settings: bpfree train --print-config)."""
    list_kind("tasks", name, as_json)


@click.command(short_help="List programs (other trainers), or show one's options.")
@click.argument("name", required=False, shell_complete=names_of("programs"))
@json_option
def programs(name: str | None, as_json: bool) -> None:
    """List the other trainers that a study can have as rows (`program: NAME`); with NAME, show its options."""
    list_kind("programs", name, as_json)


@click.command(short_help="List metrics, or describe one.")
@click.argument("name", required=False, shell_complete=names_of("metrics"))
@json_option
def metrics(name: str | None, as_json: bool) -> None:
    """List the metrics that can be named with evaluation.metrics=[NAME,...]; with NAME, describe it and its display."""
    if name is None:
        list_kind("metrics", None, as_json)
        return
    from bpfree.cli.output import print_json, print_pairs
    from bpfree.plugins import installed_plugins

    metric = installed_plugins().get("metrics", name, where="bpfree metrics")
    lines = {
        "name": name,
        "key": f"test/{metric.name}, val/{metric.name}",
        "what it is": metric.summary,
        "better": "greater" if metric.greater else "smaller",
        "unit": "share of 0 to 1, shown in per cent" if metric.share else metric.unit or "none",
        "targets": ", ".join(metric.kinds) or "all",
    }
    print_json(lines) if as_json else print_pairs(lines.items())
