"""Hashes of the sources that a result depends on.

A version number does not move when an editable install is edited; these do. Comments, docstrings and blank lines of Python files do not
count, so that a better explanation costs no computing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import FunctionType

from bpfree import code_hash
from bpfree.code_files import MODULE
from bpfree.code_hash import hash_of_python
from bpfree.errors import UsageError
from bpfree.files import write_text
from bpfree.kept import cache_folder
from bpfree.named_networks import spelled_out
from bpfree.plugins import Plugins
from bpfree.recipe import Recipe
from bpfree.tasks.augment import augmentation_names

__all__ = ["CONTRACT", "EXAMINER", "REST", "certificate_hashes", "core_parts", "floor_hash", "source_hashes", "source_of"]

SUFFIXES = {".py", ".pyx", ".c", ".cpp", ".cu", ".cuh", ".h", ".so"}
SHOWING = (
    "__init__.py",
    "cli",
    "document",
    "code_hash.py",
    "kept.py",
    "legacy.py",
    "record",
    "redaction.py",
    "registry",
    "search_path.py",
    "sources.py",
    "sklearn.py",
    "study",
    "system.py",
    "template",
    "tracking",
    "version.py",
)
WITHOUT_EFFECT = (*SHOWING, "certify")
"""Parts of the core that show and record results. Editing a table's page must not cost a week of computing."""
OF_PROGRAMS = ("program.py", "program_run.py", "programs")
"""Parts of the core that no rule's number depends on."""
NOT_IN_A_FLOOR = (
    "accumulation",
    "alignment",
    "batches",
    "budget",
    "compiling",
    "crossfit",
    "divergence",
    "evaluation",
    "meters",
    "operations",
    "probes",
    "saving",
    "selection",
    "session",
    "setup",
    "state",
    "stepper",
    "team",
    "trainer",
    "updater",
)
"""Files of the training loop, which a floor does without."""
NOT_EXAMINED = (
    *SHOWING,
    *(f"certify/{name}.py" for name in ("__init__", "cases", "certificate", "heat", "page", "show", "table")),
    *OF_PROGRAMS,
    *(
        "code_lines.py",
        "library.py",
        "python_recipe.py",
        "ray_cluster.py",
        "recorded.py",
        "ray_team.py",
        "runner.py",
        "saved.py",
        "scoring.py",
    ),
)
"""Parts of the core that a certificate does not depend on."""
OF_CONTRACT = (
    "addons.py",
    "baselines.py",
    "network",
    "pure.py",
    "rule.py",
    "solved.py",
    "seeds.py",
    "step.py",
    *(f"training/{name}.py" for name in ("accumulation", "optimizers", "phases", "schedules", "stepper", "updater")),
)
"""What a step executes from the rule's credit to the changed parameters, and the rules that others inherit from or are compared with."""
OF_EXAMINER = ("certify",)
CONTRACT, EXAMINER, REST = "bpfree contract", "bpfree examiner", "bpfree"
"""Names of the parts of the core in a certificate."""
MOST_KNOWN = 5000
"""Largest number of cached hashes."""


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """Hash each package on which the recipe's numbers depend: the core, and the plugins that own what it names.

    Plugins that own a class which the rule inherits from count too.
    """
    named = [(f"{kind}s", name) for kind, name in recipe.names.items()]
    named += [("augmentations", name) for name in augmentation_names(recipe.task.augment)]
    named += [("protocols", name) for name in recipe.settings.evaluation.protocols]
    without = (*WITHOUT_EFFECT, "certify") if recipe.is_program else (*WITHOUT_EFFECT, *OF_PROGRAMS)
    return _hashes(recipe.registry, recipe.names.get("rule"), named, without)


def floor_hash(recipe: Recipe) -> dict[str, str]:
    """Hash the sources of a floor: untrained networks, their tasks, and the readouts that are solved on them.

    The core's training loop has no part in it.
    """
    named = [("networks", recipe.names["network"]), ("tasks", recipe.names["task"]), ("rules", recipe.names["rule"])]
    others = (*WITHOUT_EFFECT, *OF_PROGRAMS, *(f"training/{name}.py" for name in NOT_IN_A_FLOOR))
    return _hashes(recipe.registry, recipe.names["rule"], named, others)


def certificate_hashes(registry: Plugins, rule: str) -> dict[str, str]:
    """Hash the sources of a certificate: the plugins of the rule and of its specimens' networks, and the parts of the core."""
    shapes = (("dense", 2, 16), ("convolutional", 2, 8))
    settings = [registry.get("rules", rule).specimen(*shape) or {} for shape in shapes]
    named = {spelled_out(words["network.name"], registry)[0] for words in settings if "network.name" in words}
    networks = sorted(named & set(registry.names("networks")))
    hashes = _hashes(registry, rule, [("rules", rule), *(("networks", name) for name in networks)], NOT_EXAMINED)
    return hashes | core_parts(Path(__file__).parent)


def core_parts(core: Path) -> dict[str, str]:
    """Hash the three parts of the core that an examination executes, each file in one of them.

    The contract is what a step of the rule executes: rule, step, networks, updater with its optimisers, schedules and phases, the
    generators of its draws, and the core's own rules. The examiner is ``certify/`` without its rendering. A certificate is of what a rule
    is, which the contract defines and the examiner finds: a change of either makes it stale. The rest (configuration, tasks, training
    loop, meters) is executed too; a change there can move a figure, such as an accuracy, and does not change what the rule is.
    """
    return {
        CONTRACT: hash_of(core, NOT_EXAMINED, OF_CONTRACT),
        EXAMINER: hash_of(core, NOT_EXAMINED, OF_EXAMINER),
        REST: hash_of(core, (*NOT_EXAMINED, *OF_CONTRACT, *OF_EXAMINER)),
    }


def source_of(made: type | FunctionType) -> str:
    """Hash the source of a class or function: of its module's file, of its package if it is in one; of itself in a session.

    Raises:
        UsageError: there is no source, as of what was typed into an interpreter.
    """
    root = _root(made.__module__)
    if root is not None and root.exists():
        return hash_of(root, NOT_EXAMINED if root.name == "bpfree" else ())
    try:
        return hash_of_python(textwrap.dedent(inspect.getsource(made)).encode())[:16]
    except (OSError, TypeError) as error:
        what = f"the source of {made.__qualname__} cannot be read, so a change would go unnoticed"
        raise UsageError(what, where=made.__module__, fix="write it into a file") from error


def _hashes(registry: Plugins, rule: str | None, named: Iterable[tuple[str, str]], skipped: tuple[str, ...]) -> dict[str, str]:
    named = [*named, *([] if rule is None else [("rules", rule)])]
    coded = {name: owner.code for kind, name in named if (owner := registry.owner(kind, name)).code}
    owners = {_root_of_plugin(registry, registry.owner(kind, name).name) for kind, name in named}
    plugins = {_root_of_plugin(registry, name) for name in registry.records}
    roots = {_root("bpfree"), *owners}
    if rule is not None:
        kind = registry.get("rules", rule)
        own = _roots_of_bases(kind) if registry.owner("rules", rule).code else {_root(kind.__module__)}
        roots |= {_root(base.__module__) for base in kind.__mro__} & plugins | own
    return {
        root.stem: hash_of(root, skipped if root.name == "bpfree" else ()) for root in sorted(root for root in roots if root is not None)
    } | coded


def _roots_of_bases(kind: type) -> set[Path | None]:
    """Return the places of a class's bases that no plugin has registered, except files of code, torch and Python."""
    foreign = {"torch", *sys.stdlib_module_names}
    modules = {base.__module__ for base in kind.__mro__ if base.__module__.partition(".")[0] not in foreign}
    return {_root(module) for module in modules if not module.startswith(MODULE)}


def _root_of_plugin(registry: Plugins, name: str) -> Path | None:
    module = registry.manager.get_plugin(name)
    return _root(getattr(module, "__name__", type(module).__module__))


def _root(module: str) -> Path | None:
    """Return the folder of the package that a module belongs to, or its file; above a namespace package there is none."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        package = sys.modules.get(".".join(parts[:length]))
        file = getattr(package, "__file__", None)
        if file is not None:
            return Path(file).parent if hasattr(package, "__path__") else Path(file)
    return None


@lru_cache(maxsize=64)
def hash_of(root: Path, skipped: tuple[str, ...] = (), chosen: tuple[str, ...] = ()) -> str:
    """Hash (SHA-256, 16 hex digits) names and contents of all or the chosen files, without the skipped ones (paths below the root).

    Once per process: what runs is what was there when it began.
    """
    digest, known = hashlib.sha256(), _known_hashes()
    before = len(known)
    for name, path in sorted(_files(root, skipped, chosen)):
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if path.suffix == ".py":
            if found not in known:
                known[found] = hash_of_python(content)
            found = known[found]
        digest.update(f"{name}\0{found}\0".encode())
    if len(known) > before:
        with suppress(OSError, RuntimeError):
            write_text(_place_of_hashes(), json.dumps(dict(list(known.items())[-MOST_KNOWN:])))
    return digest.hexdigest()[:16]


def _known_hashes() -> dict[str, str]:
    """Return the cached hashes of code by the hashes of the files' bytes: parsing takes a hundred times as long."""
    try:
        known = json.loads(_place_of_hashes().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return known if isinstance(known, dict) else {}


def _place_of_hashes() -> Path:
    """Return the file of the cache, named by the code that computes the hashes and the version of Python that parses."""
    digest = hashlib.sha256(Path(code_hash.__file__).read_bytes() + sys.version.encode()).hexdigest()
    return cache_folder() / f"code-{digest[:16]}.json"


def _files(root: Path, skipped: tuple[str, ...], chosen: tuple[str, ...]) -> Iterable[tuple[str, Path]]:
    if root.is_file():
        return [(root.name, root)]
    found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return ((place, path) for place, path in found if not _is_within(place, skipped) and (not chosen or _is_within(place, chosen)))


def _is_within(place: str, parts: tuple[str, ...]) -> bool:
    return any(place == part or place.startswith(f"{part}/") for part in parts)
