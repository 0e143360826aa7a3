"""Write the package of a new plugin."""

from __future__ import annotations

import builtins
import datetime
import importlib.util
import keyword
import re
from pathlib import Path
from typing import Literal

from bpfree.errors import UsageError
from bpfree.hooks import API_VERSION
from bpfree.version import __version__

__all__ = ["next_commands", "write_plugin"]

TEMPLATES = Path(__file__).parent
FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "registry-entry.toml": "registry-entry.toml.tmpl",
    "src/{{package}}/__init__.py": "init.py.tmpl",
    "src/{{package}}/plugin.py": "plugin.py.tmpl",
    "src/{{package}}/py.typed": "",
    "tests/test_{{module}}.py": "test.py.tmpl",
}
"""The files of a new plugin with a rule, each with its template."""
Kind = Literal["rule", "task", "network", "metric"]
DESCRIPTIONS: dict[Kind, str] = {
    "rule": "The learning rule {name} for bpfree",
    "task": "The task {name} for bpfree",
    "network": "The network {name} for bpfree",
    "metric": "The metric {name} for bpfree",
}
TRIED: dict[Kind, str] = {
    "rule": "bpfree train rule={name} task=digits",
    "task": "bpfree train rule=dfa task={name} budget.epochs=20",
    "network": "bpfree train rule=dfa network={name} task=digits",
    "metric": "bpfree train rule=dfa task=digits evaluation.metrics=[{name}]",
}
"""Command that shows that the plugin works, by its kind."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 40
USED = {"Any", "Batch", "Step", "Tensor", "TaskSpec", "Trace"}
"""Names of the template's module that no rule's class may have."""


def files_of(kind: Kind) -> dict[str, str]:
    """Name the files of a plugin of a kind, each with its template."""
    if kind == "rule":
        return FILES
    own = {"plugin.py.tmpl", "test.py.tmpl", "README.md.tmpl"}
    return {
        place: f"{kind}/{template}" if template in own else template
        for place, template in FILES.items()
        if template != "registry-entry.toml.tmpl"  # the registry lists rules
    }


def write_plugin(name: str, folder: Path, *, class_name: str | None = None, kind: Kind = "rule") -> list[Path]:
    """Write a package with a working rule, task, network or metric.

    Args:
        name: of the plugin and of what it brings: lower case, with hyphens.
        folder: of the package; made, must not hold anything.
        class_name: of the rule, or of the options; by default the name in camel case.
        kind: of the plugin.

    Returns:
        The written files.

    Raises:
        UsageError: an unsuitable name, one that is taken, or a folder that holds something.
    """
    _check_name(name)
    class_name = class_name or "".join(part.capitalize() for part in name.split("-"))
    _check_class_name(class_name)
    _check_free(name, kind)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError("the folder of the plugin exists and is not empty", where=str(folder), fix="choose another folder with --dir")
    words = _words(name, class_name, kind)
    written = []
    for place, template in files_of(kind).items():
        path = folder / _filled(place, words)
        text = _filled((TEMPLATES / template).read_text(encoding="utf-8"), words) if template else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def next_commands(name: str, folder: Path, kind: Kind = "rule") -> list[str]:
    """List the commands to run after :func:`write_plugin`; for a rule, until it is certified and registered."""
    certificate = folder / f"{name}.json"
    first = [f"pip install -e {folder if folder.is_absolute() else f'./{folder}'}", TRIED[kind].format(name=name)]
    if kind != "rule":
        return [*first, f"python -m pytest {folder}"]
    return [
        *first,
        f"bpfree certify {name} --output {certificate}",
        f"bpfree registry add {name} --entry {folder / 'registry-entry.toml'} --certificate {certificate}",
    ]


def _words(name: str, class_name: str, kind: Kind) -> dict[str, str]:
    module = name.replace("-", "_")
    return {
        "name": name,
        "module": module,
        "package": f"bpfree_{module}",
        "distribution": f"bpfree-{name}",
        "class": class_name,
        "constant": module.upper(),
        "description": DESCRIPTIONS[kind].format(name=name),
        "try": TRIED[kind].format(name=name),
        "api": str(API_VERSION),
        "bpfree_version": ".".join(__version__.split(".")[:2]),
        "today": datetime.date.today().isoformat(),
    }


def _filled(text: str, words: dict[str, str]) -> str:
    for key, value in words.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise UsageError(
            f"{name!r} is not a valid plugin name",
            where="command line",
            fix=f"use lower-case letters, digits and single hyphens, a letter first, at most {LONGEST}: {_suggestion(name)}",
        )


def _suggestion(name: str) -> str:
    made = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")[:LONGEST].strip("-")
    return made or "my-rule"


def _check_class_name(name: str) -> None:
    taken = name in USED or keyword.iskeyword(name) or hasattr(builtins, name)
    if taken or not name.isidentifier():
        raise UsageError(
            f"a rule's class cannot be called {name!r}" + (", which has a meaning already" if taken else ""),
            fix="choose another with --class-name",
        )


def _check_free(name: str, kind: Kind) -> None:
    """Refuse a name that is taken, also by a plugin that does not work here."""
    from bpfree.plugins import installed_plugins

    installed = installed_plugins()
    owner = installed.records.get(name) or (installed.owner(f"{kind}s", name) if name in installed.names(f"{kind}s") else None)
    if owner is not None:
        what = "plugin" if name in installed.records else kind
        raise UsageError(f"the {what} {name!r} already exists in {owner.distribution}", where="command line", fix="choose another name")
    package = f"bpfree_{name.replace('-', '_')}"
    if importlib.util.find_spec(package) is not None:
        raise UsageError(f"the package {package!r} is already installed", where="command line", fix="choose another name")
