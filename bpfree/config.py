"""Configurations of runs: from files and ``key=value`` words to typed, checked settings.

A configuration is a tree of plain values. Three of its sections, ``rule``, ``network`` and ``task``, have a ``name`` and the options of
the named object; ``rule: dfa`` and ``rule=dfa`` are short for ``rule.name``. All problems are reported at once, before any data is
loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bpfree.code_files import CodeFile, codes_in, files_of, shown
from bpfree.errors import BpfreeError
from bpfree.leaves import Leaf, canonical, leaves_of, names_code, once, parse_words, read_yaml
from bpfree.plugins import Plugins, installed_plugins
from bpfree.recipe import CHOSEN, Recipe, TaskCommon
from bpfree.resolver import Resolver
from bpfree.tasks.task import Task, TaskSpec
from bpfree.typed import Misfit, typed

__all__ = ["allowing", "load_task", "parse_words", "read_yaml", "recipe_of", "resolve"]


def resolve(leaves: Iterable[Leaf] | Mapping[str, Any], registry: Plugins | None = None, *, spec: TaskSpec | None = None) -> Recipe:
    """Check and complete a configuration; later leaves win over earlier ones.

    Args:
        leaves: or a nested mapping.
        registry: of names; the installed plugins by default.
        spec: the task's, if it is known already; otherwise the data set provides it.

    Raises:
        UsageError: with a list of all problems.
    """
    registry = registry or installed_plugins()
    registry.report()
    listed = once(leaves_of(leaves, "", "configuration")) if isinstance(leaves, Mapping) else list(leaves)
    listed = [dataclasses.replace(leaf, key=canonical(leaf.key, leaf.value)) for leaf in listed]
    return Resolver(listed, registry, spec).resolve()


def allowing(words: Iterable[Leaf] = (), files: Iterable[str | Path] = ()) -> Plugins:
    """Return the installed plugins, with permission to execute the named files of code.

    Args:
        words: settings; those that were typed as words of the command line (``Leaf.word``) allow the files that they name.
        files: further files to allow.

    Raises:
        UsageError: there is no such file.
    """
    typed_in = [code.text for leaf in words if leaf.word and names_code(leaf) for code in codes_in(leaf.value)]
    return installed_plugins().allowing([*files_of(typed_in), *map(CodeFile.read, files)])


def recipe_of(
    saved: Mapping[str, Any] | None,
    changes: Iterable[Leaf] = (),
    *,
    spec: TaskSpec | None = None,
    where: str,
    registry: Plugins | None = None,
) -> Recipe:
    """Read the recipe of a checkpoint, with changes.

    Args:
        saved: the nested configuration.
        changes: later leaves. Another task drops the options of the saved one.
        spec: the task's, where its data need not be there.
        where: the checkpoint, for errors.
        registry: of names; the installed plugins by default.

    Raises:
        BpfreeError: it holds none, because its network or rule was made in Python; or the changes name another rule.
    """
    changes = list(changes)
    if saved is None:
        raise BpfreeError(
            "the checkpoint does not say how to build its rule", where=where, fix="build the rule in Python: bpfree.load(path, rule=rule)"
        )
    wanted = {leaf.key.removesuffix(".name"): _name_in(leaf) for leaf in changes if leaf.key.removesuffix(".name") in CHOSEN}
    wanted = {section: name for section, name in wanted.items() if name}  # an empty name is refused below
    rule, now = shown(saved["rule"]["name"]), shown(wanted.get("rule", saved["rule"]["name"]))
    if now != rule:
        raise BpfreeError(f"the checkpoint is of another rule: {rule}, not {now}", where=where)
    kept = dict(saved)
    if shown(wanted.get("task", saved["task"]["name"])) != shown(saved["task"]["name"]):
        common = {item.name for item in dataclasses.fields(TaskCommon)}
        kept["task"] = {key: value for key, value in saved["task"].items() if key in common}
    before = [
        dataclasses.replace(leaf, shared=True) for leaf in leaves_of(kept, "", where)
    ]  # a saved setting that is no longer read is no reason to refuse the checkpoint
    return resolve([*before, *changes], registry, spec=spec)


def _name_in(leaf: Leaf) -> str:
    """Return the name given for a section; empty where the value is not a name."""
    try:
        return str(typed(leaf.value, str, leaf.key)).strip()
    except Misfit:
        return ""


def load_task(name: str, *, root: str | Path | None = None, validation: float = 0.1, split_seed: int = 0, **options: Any) -> Task:
    """Load a registered task with its splits, for use from Python.

    Args:
        name: such as ``digits`` or ``mnist``.
        root: folder of data sets; by default the environment's ``BPFREE_DATA``, else the user's cache.
        validation: share of the training examples held out.
        split_seed: of that cut.
        options: the data set's own.

    Raises:
        UsageError: an unknown name or option.
        BpfreeError: the data are not there.
    """
    settings = {"data": {"root": None if root is None else str(root)}}
    recipe = resolve({"task": {"name": name, "validation": validation, "split_seed": split_seed, **options}, **settings})
    return recipe.build_task()
