"""Hashes of the sources that a result depends on.

A version number does not move when an editable install is edited; these do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from bpfree.plugins import Plugins
from bpfree.recipe import Recipe

__all__ = ["all_roots", "certificate_hashes", "floor_hash", "rule_hashes", "source_hashes"]

SUFFIXES = {".py", ".pyx", ".c", ".cpp", ".cu", ".cuh", ".h", ".so"}
SHOWING = (
    "__init__.py",
    "cli",
    "kept.py",
    "registry",
    "sources.py",
    "study",
    "template",
    "tracking",
    "version.py",
)
WITHOUT_EFFECT = (*SHOWING, "certify")
"""Parts of the core that show and record results. Editing a table's page must not cost a week of computing."""
NOT_IN_A_FLOOR = (
    "alignment",
    "compiling",
    "divergence",
    "evaluation",
    "limits",
    "meters",
    "operations",
    "saving",
    "selection",
    "state",
    "supply",
    "team",
    "trainer",
    "updater",
)
"""Files of the training loop, which a floor does without."""
NOT_EXAMINED = (
    *SHOWING,
    *(f"certify/{name}.py" for name in ("__init__", "cases", "certificate", "heat", "page", "show", "table")),
    *("runner.py", "saved.py", "scoring.py", "yaml_values.py"),
)
"""Parts of the core that a certificate does not depend on."""


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """A hash for each package that the recipe's numbers come from: the core, and the plugins that own what it names.

    Plugins that own a class which the rule inherits from count too.
    """
    named = [(f"{kind}s", recipe.names[kind]) for kind in ("rule", "network", "task")]
    named += [("augmentations", name) for name in recipe.task.augment]
    named += [("protocols", name) for name in recipe.settings.evaluation.protocols]
    return _hashes(recipe.registry, recipe.names["rule"], named, WITHOUT_EFFECT)


def floor_hash(recipe: Recipe) -> dict[str, str]:
    """Hash what a floor comes from: untrained networks, their tasks, and the readouts that are solved on them.

    The core's training loop has no part in it.
    """
    named = [("networks", recipe.names["network"]), ("tasks", recipe.names["task"]), ("rules", recipe.names["rule"])]
    others = (*WITHOUT_EFFECT, *(f"training/{name}.py" for name in NOT_IN_A_FLOOR))
    return _hashes(recipe.registry, recipe.names["rule"], named, others)


def rule_hashes(registry: Plugins, rule: str, networks: Iterable[str] = ()) -> dict[str, str]:
    """The same for what is measured of a rule on the named networks; of the core, what an examination executes."""
    return _hashes(registry, rule, [("rules", rule), *(("networks", name) for name in networks)], NOT_EXAMINED)


def certificate_hashes(registry: Plugins, rule: str) -> dict[str, str]:
    """The same for what a certificate is measured on: the rule, and the networks of its specimens."""
    shapes = (("dense", 2, 16), ("convolutional", 2, 8))
    settings = [registry.get("rules", rule).specimen(*shape) or {} for shape in shapes]
    named = {words["network.name"] for words in settings if "network.name" in words}
    return rule_hashes(registry, rule, sorted(named & set(registry.names("networks"))))


def all_roots(registry: Plugins) -> list[Path]:
    """Folders (or files) of the core's package and of all plugins'."""
    roots = {_root("bpfree"), *(_root_of_plugin(registry, name) for name, record in registry.records.items() if record.status == "ok")}
    return sorted(root for root in roots if root is not None)


def _hashes(registry: Plugins, rule: str, named: Iterable[tuple[str, str]], skipped: tuple[str, ...]) -> dict[str, str]:
    owners = {_root_of_plugin(registry, registry.owner(kind, name).name) for kind, name in named}
    plugins = {_root_of_plugin(registry, name) for name in registry.records}
    bases = {_root(base.__module__) for base in registry.get("rules", rule).__mro__}
    own = _root(registry.get("rules", rule).__module__)
    roots = {_root("bpfree"), *owners, *(bases & plugins), own}
    return {
        root.stem: hash_of(root, skipped if root.name == "bpfree" else ()) for root in sorted(root for root in roots if root is not None)
    }


def _root_of_plugin(registry: Plugins, name: str) -> Path | None:
    module = registry.manager.get_plugin(name)
    return _root(getattr(module, "__name__", type(module).__module__))


def _root(module: str) -> Path | None:
    """The folder of the package that a module belongs to, or its file; above a namespace package there is none."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        package = sys.modules.get(".".join(parts[:length]))
        file = getattr(package, "__file__", None)
        if file is not None:
            return Path(file).parent if hasattr(package, "__path__") else Path(file)
    return None


@lru_cache(maxsize=64)
def hash_of(root: Path, skipped: tuple[str, ...] = ()) -> str:
    """SHA-256 over names and contents but those skipped (paths below the root), 16 hex digits.

    Once per process: what runs is what was there when it began.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(root, skipped)):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(root: Path, skipped: tuple[str, ...]) -> Iterable[tuple[str, Path]]:
    if root.is_file():
        return [(root.name, root)]
    found = ((path.relative_to(root), path) for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return ((place.as_posix(), path) for place, path in found if place.parts[0] not in skipped and place.as_posix() not in skipped)
