"""Writes the package of a new plugin."""

from __future__ import annotations

import builtins
import datetime
import importlib.util
import keyword
import re
from pathlib import Path

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
"""The files of a new plugin, each with its template."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 40
USED = {"Any", "Batch", "Step", "Tensor", "TaskSpec", "Trace"}
"""Names of the template's module that no rule's class may have."""


def write_plugin(name: str, folder: Path, *, class_name: str | None = None) -> list[Path]:
    """Write a package with a working rule.

    Args:
        name: of the plugin and its rule: lower case, with hyphens.
        folder: of the package; made, must not hold anything.
        class_name: of the rule; by default the name in camel case.

    Returns:
        What was written.

    Raises:
        UsageError: an unsuitable name, one that is taken, or a folder that holds something.
    """
    _check_name(name)
    class_name = class_name or "".join(part.capitalize() for part in name.split("-"))
    _check_class_name(class_name)
    _check_free(name)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            "there is something already where the plugin should be written", where=str(folder), fix="give another place with --dir"
        )
    words = _words(name, class_name)
    written = []
    for place, template in FILES.items():
        path = folder / _filled(place, words)
        text = _filled((TEMPLATES / template).read_text(encoding="utf-8"), words) if template else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def next_commands(name: str, folder: Path) -> list[str]:
    """What to run after :func:`write_plugin`, until the rule is certified and registered."""
    certificate = folder / f"{name}.json"
    return [
        f"pip install -e {folder if folder.is_absolute() else f'./{folder}'}",
        f"bpfree train rule={name} task=digits",
        f"bpfree certify {name} --output {certificate}",
        f"bpfree registry add {name} --entry {folder / 'registry-entry.toml'} --certificate {certificate}",
    ]


def _words(name: str, class_name: str) -> dict[str, str]:
    module = name.replace("-", "_")
    return {
        "name": name,
        "module": module,
        "package": f"bpfree_{module}",
        "distribution": f"bpfree-{name}",
        "class": class_name,
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
            f"{name!r} is no name for a plugin",
            where="command line",
            fix=f"small letters, digits and single hyphens, a letter first, at most {LONGEST}: {_suggestion(name)}",
        )


def _suggestion(name: str) -> str:
    made = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")[:LONGEST].strip("-")
    return made or "my-rule"


def _check_class_name(name: str) -> None:
    taken = name in USED or keyword.iskeyword(name) or hasattr(builtins, name)
    if taken or not name.isidentifier():
        raise UsageError(
            f"a rule's class cannot be called {name!r}" + (", which has a meaning already" if taken else ""),
            fix="give another with --class-name",
        )


def _check_free(name: str) -> None:
    """Also plugins that do not work here count: their names are taken."""
    from bpfree.plugins import installed_plugins

    installed = installed_plugins()
    owner = installed.records.get(name) or (installed.owner("rules", name) if name in installed.names("rules") else None)
    if owner is not None:
        what = "plugin" if name in installed.records else "rule"
        raise UsageError(f"there is a {what} {name!r} already, of {owner.distribution}", where="command line", fix="choose another name")
    package = f"bpfree_{name.replace('-', '_')}"
    if importlib.util.find_spec(package) is not None:
        raise UsageError(f"there is a package {package!r} installed already", where="command line", fix="choose another name")
