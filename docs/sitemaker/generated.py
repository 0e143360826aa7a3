"""Pages that are made of what is installed and of the registry: the API, the rules, networks, tasks and keys."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bpfree
from bpfree.certify.certificate import Certificate
from bpfree.certify.heat import figure
from bpfree.certify.page import sections
from bpfree.cli.annotate import annotate
from bpfree.config import parse_words, resolve
from bpfree.document.markdown import markdown
from bpfree.document.svg import svg_file
from bpfree.document.tables import markdown_table
from bpfree.options import describe
from bpfree.plugins import installed_plugins
from bpfree.registry.certificates import certificates

__all__ = ["GROUPS", "MODULES", "write_generated"]

GROUPS = {
    "Train and use": [
        "train",
        "Trained",
        "Trainer",
        "TrainConfig",
        "BudgetConfig",
        "AlignmentConfig",
        "OptimizerConfig",
        "ScheduleConfig",
        "RunConfig",
        "TrackingConfig",
        "PicturesConfig",
        "Run",
        "Saved",
        "load",
    ],
    "Compare": ["compare", "run_study", "Study", "Row"],
    "Data and tasks": [
        *("Task", "TaskSpec", "load_task", "Split", "DatasetSplit", "ItemSplit", "StreamedSplit", "Examples", "InputPart", "DataSource"),
        *("class_stream", "Memory", "Stage", "Metric", "mean_metric", "whole_metric"),
    ],
    "Networks": ["Network", "mlp", "vgg", "split", "plan", "build_network", "Trace", "Traces"],
    "Rules": [
        *("Rule", "Streamed", "Broadcast", "Pure", "Gradients", "Solved", "RidgeSums", "Card", "Traits", "always"),
        *("Batch", "Step", "Stepper", "new_step", "Phase", "Budget", "Activations", "AddonKind"),
    ],
    "Plugins": [
        *("hookimpl", "API_VERSION", "option", "installed_plugins", "Maker", "Tracker", "Executor", "Program", "ProgramContext"),
        *("BpfreeError", "UsageError"),
    ],
}
"""The public names by what they are for; a name that is in none stands in a group of its own, the last."""
FURTHER = "Further names"
MODULES = {
    "bpfree.hooks": "What a plugin can implement: functions by which it registers what it brings, and those that observe a run.",
    "bpfree.network": "Helpers for authors of rules.",
    "bpfree.sklearn": "Rules as estimators of scikit-learn.",
    "bpfree.certify": "Examination of rules, and conformance checks as test cases.",
}
"""Public modules beside the package itself."""


def write_generated(folder: Path, registry: Path) -> dict[str, list[str]]:
    """Write the pages below the folder of the site's sources.

    Returns:
        By caption, the pages' names as a table of contents wants them.
    """
    known = certificates(registry)
    pages = {
        **{f"reference/api/{_slug(title)}": _api(title, names) for title, names in api_groups().items()},
        "reference/api/modules": _modules(),
        "reference/api/index": _api_index(),
        "reference/networks": _catalogue("networks", "network"),
        "reference/tasks": _catalogue("tasks", "task"),
        "reference/keys": _keys(),
        "rules/index": _rules(known),
        **{f"rules/{name}": _rule(name, known.get(name)) for name in installed_plugins().names("rules")},
    }
    for name, text in pages.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, certificate in known.items():
        (folder / "rules" / f"{name}.json").write_bytes((registry / "certificates" / f"{name}.json").read_bytes())
        (folder / "rules" / f"{name}.svg").write_text(svg_file("", figure(certificate.properties)), encoding="utf-8")
    return {"Reference": ["rules/index", "reference/keys", "reference/networks", "reference/tasks", "reference/api/index"]}


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _toctree(names: Sequence[str], *options: str) -> str:
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""])


# --- the API --------------------------------------------------------------------------------------------------------


def api_groups() -> dict[str, list[str]]:
    """Return every public name of the package, by group."""
    public = [name for name in bpfree.__all__ if name != "__version__"]
    groups = {title: [name for name in names if name in public] for title, names in GROUPS.items()}
    further = sorted(set(public) - {name for names in groups.values() for name in names})
    return {**groups, **({FURTHER: further} if further else {})}


def _api(title: str, names: Sequence[str]) -> str:
    parts = [f"# {title}", "```{eval-rst}", ".. currentmodule:: bpfree", ""]
    for name in names:
        parts += [_directive(f"bpfree.{name}", getattr(bpfree, name)), ""]
    return "\n".join([*parts, "```", ""])


def _directive(name: str, thing: Any) -> str:
    if isinstance(thing, type):
        inherits = [] if thing.__bases__ == (object,) else ["   :show-inheritance:"]
        return "\n".join([f".. autoclass:: {name}", "   :members:", *inherits])
    if inspect.isroutine(inspect.unwrap(thing) if callable(thing) else thing):
        return f".. autofunction:: {name}"
    own = name.rpartition(".")[2]
    home = f"bpfree.{bpfree._HOME[own]}.{own}" if own in bpfree._HOME else name  # where the text that describes it stands
    return f".. autodata:: {home}\n   :no-value:"


def _modules() -> str:
    parts = ["# Modules", ""]
    for name, summary in MODULES.items():
        module = importlib.import_module(name)
        hooks = [each for each, thing in vars(module).items() if hasattr(thing, "bpfree_spec")]
        own = hooks or [each for each in module.__all__ if each not in bpfree.__all__]
        shown = [_directive(f"{name}.{each}", getattr(module, each)) for each in own]
        parts += [f"## {name}", "", summary, "", "```{eval-rst}", *(line for text in shown for line in (text, "")), "```", ""]
    return "\n".join(parts)


def _api_index() -> str:
    rows = [[f"[{title}]({_slug(title)}.md)", ", ".join(f"`{name}`" for name in names)] for title, names in api_groups().items()]
    rows.append(["[Modules](modules.md)", ", ".join(f"`{name}`" for name in MODULES)])
    text = "The public names of the package; all are imported from `bpfree` itself. What is not here may change without notice."
    names = [*map(_slug, api_groups()), "modules"]
    return f"# Python API\n\n{text}\n\n{markdown_table(['for', 'names'], rows)}\n\n{_toctree(names, ':hidden:')}"


# --- what is installed ----------------------------------------------------------------------------------------------


def _options(config: type, section: str) -> Iterator[str]:
    rows = [
        [f"`{section}.{key}`", f"`{kind}`", "none" if default is None else f"`{default}`", _escaped(meaning)]
        for key, kind, default, meaning in describe(config)
    ]
    yield markdown_table(["key", "type", "default", "meaning"], rows) if rows else "No options."


def _escaped(text: str) -> str:
    for character in "\\*_<[":
        text = text.replace(character, f"\\{character}")
    return text


def _catalogue(kind: str, section: str) -> str:
    parts = [f"# {kind.capitalize()} and their options", f"What `bpfree {kind}` lists, and `bpfree {kind} NAME` shows."]
    for name, thing, plugin in installed_plugins().items(kind):
        parts += [f"## {name}", f"{_escaped(thing.summary)} (plugin `{plugin.name}`)", *_options(thing.Config, section)]
    return "\n\n".join(parts) + "\n"


def _keys() -> str:
    text = (
        "What `bpfree train --print-config rule=dfa` prints: every key of a configuration, its default, and its meaning. Options of "
        "[rules](../rules/index.md), [networks](networks.md) and [tasks](tasks.md) depend on the name; here: `dfa` on digits."
    )
    parts, rows, path = [f"# Keys\n\n{text}"], list[list[str]](), list[str]()
    for line in annotate(resolve(parse_words(["rule=dfa"]))).splitlines():
        setting, _, meaning = line.partition("  # ")
        key, _, value = setting.strip().partition(":")
        if key.startswith("-"):  # an entry of the list above
            rows[-1][1] += f" `{key.strip('- ')}`"
            continue
        path = [*path[: (len(setting) - len(setting.lstrip())) // 2], key]
        if value or meaning:
            rows.append([f"`{'.'.join(path)}`", f"`{value.strip()}`" if value else "", _escaped(meaning)])
    return "\n\n".join([*parts, markdown_table(["key", "default", "meaning"], rows)]) + "\n"


def _rules(known: Mapping[str, Certificate]) -> str:
    rows = []
    for name, rule, plugin in installed_plugins().items("rules"):
        credit = known[name].properties.get("credit", "not measured") if name in known else "no certificate"
        rows.append([f"[{name}]({name}.md)", plugin.name, _escaped(rule.card.summary), credit])
    text = "The learning rules that ship. *Credit* is what the rule's certificate measured: whose weights an update needs."
    names = installed_plugins().names("rules")
    return f"# Rules\n\n{text}\n\n{markdown_table(['rule', 'plugin', 'what it is', 'credit'], rows)}\n\n{_toctree(list(names), ':hidden:')}"


def _rule(name: str, certificate: Certificate | None) -> str:
    plugins = installed_plugins()
    rule, owner = plugins.get("rules", name), plugins.owner("rules", name)
    card, defaults = rule.card, rule.Config()
    traits = dataclasses.asdict(rule.traits_of(defaults))
    told = [
        ("plugin", f"`{owner.name}` ({owner.distribution})"),
        ("paper", _escaped(card.paper)),
        ("update", f"`{card.equation}`"),
        ("remarks", _escaped(card.notes)),
    ]
    parts = [
        f"# {name}",
        f"{_escaped(card.summary)}.",
        f"```bash\nbpfree train rule={name}\nbpfree compare {name} --seeds 3\n```",
        markdown_table(["", ""], [[key, value] for key, value in told if value.strip("`")]),
        "## Options",
        *_options(rule.Config, "rule"),
        "## Declared traits",
        "With the default options, for any network; [Traits](../reference/api/rules.md) says what they mean.",
        markdown_table(
            ["trait", "value"],
            [[f"`{key}`", f"`{value if isinstance(value, str) else json.dumps(value)}`"] for key, value in traits.items()],
        ),
    ]
    return "\n\n".join([*parts, *_certificate(name, certificate)]) + "\n"


def _certificate(name: str, certificate: Certificate | None) -> Iterator[str]:
    yield "## Certificate"
    if certificate is None:
        yield f"None in the registry. `bpfree certify {name}` measures what the rule does."
        return
    yield f"What `bpfree certify` measured; [Certificates](../docs/certificates.md) says how. [The certificate as a file]({name}.json)."
    text = markdown(name, list(sections(certificate))).partition("\n")[2]
    text = text.replace("\n## ", "\n### ").strip()
    yield text
    if figure(certificate.properties).panels:
        yield "### Whose weights an update needs"
        yield f"![Heat maps: a row is a block whose update is compared, a column a block that was changed]({name}.svg)"
