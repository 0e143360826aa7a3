"""Hashes of the sources that a result depends on.

A version number does not move when an editable install is edited; these do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from bpfree.config import Recipe
from bpfree.plugins import Plugins

__all__ = ["source_hashes"]

SUFFIXES = {".py", ".pyx", ".c", ".cpp", ".cu", ".cuh", ".h", ".so"}
WITHOUT_EFFECT = {"bpfree": ("cli", "study", "tracking", "comparison.py", "comparison_page.py")}
"""Parts of the core that show and record results. Editing a table's page must not cost a week of computing."""


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """A hash for each package that the recipe's numbers come from: the core, and the plugins that own what it names.

    Plugins that own a class which the rule inherits from count too.
    """
    registry = recipe.registry
    named = [(f"{kind}s", recipe.names[kind]) for kind in ("rule", "network", "task")]
    named += [("augmentations", name) for name in recipe.task.augment]
    named += [("protocols", name) for name in recipe.settings.evaluation.protocols]
    owners = {_root_of_plugin(registry, registry.owner(kind, name).name) for kind, name in named}
    plugins = {_root_of_plugin(registry, name) for name in registry.records}
    inherited = {_root(base.__module__) for base in registry.get("rules", recipe.names["rule"]).__mro__} & plugins
    roots = {_root("bpfree"), *owners, *inherited}
    return {root.stem: hash_of(root) for root in sorted(root for root in roots if root is not None)}


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
def hash_of(root: Path) -> str:
    """SHA-256 over names and contents, 16 hex digits. Once per process: what runs is what was there when it began."""
    digest = hashlib.sha256()
    for name, path in sorted(_files(root)):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(root: Path) -> Iterable[tuple[str, Path]]:
    if root.is_file():
        return [(root.name, root)]
    skipped = WITHOUT_EFFECT.get(root.name, ())
    found = ((path.relative_to(root), path) for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return ((place.as_posix(), path) for place, path in found if place.parts[0] not in skipped)
