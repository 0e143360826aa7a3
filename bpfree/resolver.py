"""Resolution of leaves to a recipe: values of the right type, known names, no setting without effect."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bpfree.addons import configured
from bpfree.code_files import CodeName, replaced
from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.leaves import REFERENCE, Leaf, leaves_of, refers, said
from bpfree.named_networks import hinted, spelled_out
from bpfree.options import ALIASES, range_problems
from bpfree.plugins import Plugins
from bpfree.program import Program
from bpfree.recipe import CHOSEN, Recipe, RunConfig, quickened
from bpfree.rule import Rule
from bpfree.tasks.augment import check_augmentations
from bpfree.tasks.common import TaskCommon
from bpfree.tasks.task import TaskSpec
from bpfree.training.environment import check_device_name
from bpfree.training.idle import idle, idle_options
from bpfree.training.optimizers import check_optimizer
from bpfree.training.schedules import CLASSES, check_length, check_schedule
from bpfree.typed import Misfit, typed

__all__ = ["Resolver"]

Filled = TypeVar("Filled")
READ_BY_PROGRAMS = (
    *("seed", "stream", "data", "tracking", "pictures", "output", "quick", "threads", "deterministic", "device"),
    *(f"evaluation.{key}" for key in ("batch_size", "test", "metrics")),
)
"""Settings that every program reads, or is observed by."""
OF_BATCHES = ("augment", "class_weights", "sampling")
"""Of what every task has, what a program reads only if it says so."""


class Resolver:
    """Checks and completes leaves; collects problems instead of stopping at the first.

    Args:
        leaves: of canonical keys; later ones win.
        registry: of names.
        spec: the task's, if it is known already; otherwise the data set provides it.
    """

    def __init__(self, leaves: list[Leaf], registry: Plugins, spec: TaskSpec | None) -> None:
        self.leaves, self.registry, self.spec = leaves, registry, spec
        self.problems: list[str | BpfreeError] = []
        self.unused: dict[str, str] = {}
        self.idle: set[str] = set()
        self.names = {"rule": "backprop", "network": "auto", "task": "digits"}
        self.code: dict[str, str] = {}
        self.leaves = [each for leaf in leaves for each in self._spelled_out(leaf)]
        for leaf in self.leaves:
            section, _, rest = leaf.key.partition(".")
            if section in CHOSEN and rest == "name":
                self.names[section] = self._name(leaf)
            elif section in CHOSEN and not rest:
                self._nameless(section, leaf)
        self._choose()

    def _choose(self) -> None:
        """Decide whether a rule or a program trains: a row's own choice goes before a shared one."""
        named = {kind: [leaf for leaf in self.leaves if leaf.key == f"{kind}.name"] for kind in ("rule", "program")}
        if named["rule"] and named["program"] and named["rule"][-1].shared == named["program"][-1].shared:
            origins = " and ".join(leaves[-1].origin for leaves in named.values())
            self.problems.append(f"rule.name and program.name: either a rule trains or a program ({origins})")
        program = bool(named["program"]) and not (named["rule"] and named["program"][-1].shared)
        reason = "a program trains, and no rule" if program else "no program is named: program=NAME"
        for kind in ("rule", "network") if program else ("program",):
            self.names.pop(kind, None)
            keys = dict.fromkeys(leaf.key for leaf in self.leaves if leaf.key.split(".")[0] == kind)
            self._drop([(key, f"{key}: {reason}") for key in keys])

    def _spelled_out(self, leaf: Leaf) -> list[Leaf]:
        """Split ``network=torchvision:resnet18`` into the name and the model; return any other leaf unchanged."""
        try:
            text = typed(leaf.value, str, leaf.key) if leaf.key == "network.name" else ""
        except Misfit:
            text = ""
        try:
            name, implied = spelled_out(text, self.registry)
        except UsageError as error:
            self.problems.append(UsageError(error.what, where=leaf.origin, fix=error.fix, known=error.known))
            return []
        if not implied:
            return [leaf]
        more = [dataclasses.replace(leaf, key=f"network.{key}", value=value) for key, value in implied.items()]
        return [dataclasses.replace(leaf, value=name), *more]

    def _name(self, leaf: Leaf) -> str:
        section = leaf.key.partition(".")[0]
        try:
            name: str = typed(leaf.value, str, leaf.key)
        except Misfit:
            name = ""
        if not name.strip():
            self._nameless(section, leaf)
            return self.names.get(section, "")
        return name

    def _nameless(self, section: str, leaf: Leaf) -> None:
        what, fix = f"{section}={said(leaf.value)}: names no {section}", f"bpfree {section}s lists them"
        self.problems.append(UsageError(what, where=leaf.origin, fix=fix))

    def resolve(self) -> Recipe:
        nameless = bool(self.problems)
        settings = self._settings()
        if nameless:  # other problems would be about defaults that were not asked for
            self._stop_if_problems()
        if "program" in self.names:
            return self._of_program(settings)
        common, options = self._task()
        rule = self._class("rules", "rule")
        options["rule"] = None if rule is None else self._options(rule.Config(), "rule.")
        self._stop_if_problems()
        settings = self._without_idle(settings, self._settings, lambda filled: idle(filled, rule, options["rule"]))
        spec = self.spec or Recipe(self.names, options, common, settings, self.registry).spec()
        options["network"] = self._network(rule, spec, options["rule"])
        self._check_settings(rule, options["rule"], spec, common, settings)
        self._stop_if_problems()
        return Recipe(self.names, options, common, quickened(settings), self.registry, dict(sorted(self.unused.items())), self.code)

    def _of_program(self, settings: RunConfig) -> Recipe:
        common, options = self._task()
        program: Program | None = self._class("programs", "program")
        self._stop_if_problems()
        assert program is not None
        keys = [f"task.{key}" for key in OF_BATCHES if getattr(common, key) != getattr(TaskCommon(), key)]
        trains = f"does nothing with the program {self.names['program']}, which trains by itself"
        if self._drop([(key, f"{key} {trains}") for key in keys if key not in program.reads]):
            common, options = self._task()
        options["program"] = self._options(program.Config(), "program.")
        settings = self._without_idle(settings, self._settings, lambda filled: self._unread(program, filled))
        spec = self.spec or Recipe(self.names, options, common, settings, self.registry).spec()
        self.problems += program.check(options["program"], spec)
        self._check_names(spec, settings)
        self._check_each([lambda: settings.budget.resolve(1)])
        self._stop_if_problems()
        return Recipe(self.names, options, common, quickened(settings), self.registry, dict(sorted(self.unused.items())), self.code)

    def _unread(self, program: Program, filled: RunConfig) -> Iterator[tuple[str, str]]:
        """Yield the settings that differ from the defaults, but that a program does not read."""
        values, defaults = (leaves_of(dataclasses.asdict(each), "", "") for each in (filled, RunConfig()))
        known = {leaf.key: leaf.value for leaf in defaults}
        for leaf in values:
            read = any(f"{leaf.key}.".startswith(f"{key}.") for key in (*READ_BY_PROGRAMS, *program.reads))
            if not read and leaf.value != known.get(leaf.key):
                yield (
                    leaf.key,
                    f"{leaf.key}={said(leaf.value)} does nothing with the program {self.names['program']}, which trains by itself",
                )

    def _settings(self) -> RunConfig:
        filled: RunConfig = self._fill(RunConfig(), "", lambda section: section not in CHOSEN)
        return filled

    def _options(self, base: Any, prefix: str) -> Any:
        """Return ``base`` with the leaves under ``prefix``, without idle ones."""

        def fill() -> Any:
            return self._fill(base, prefix)

        return self._without_idle(fill(), fill, lambda filled: idle_options(filled, base, prefix))

    def _without_idle(self, filled: Filled, fill: Callable[[], Filled], find: Callable[[Filled], Iterable[tuple[str, str]]]) -> Filled:
        """Return the values without idle shared settings; other idle settings are problems."""
        for _ in range(len(self.leaves) + 1):
            if not self._drop(find(filled)):
                break
            filled = fill()
        return filled

    def _drop(self, found: Iterable[tuple[str, str]]) -> bool:
        """Move idle shared leaves to the unused ones, note the others as problems, and tell whether there were shared ones."""
        dropped = False
        for key, reason in list(found):
            given = [leaf for leaf in self.leaves if f"{leaf.key}.".startswith(f"{key}.")]
            if given and given[-1].shared:
                self.unused.update({leaf.key: reason for leaf in given})
                self.leaves = [leaf for leaf in self.leaves if leaf not in given]
                dropped = True
            elif given:
                self.idle.add(key.split(".")[0])
                self.problems.append(f"{reason} ({given[-1].origin})")
        return dropped

    # --- sections ---------------------------------------------------------------------------------------------------

    def _class(self, kind: str, section: str) -> Any:
        name = self.names[section]
        code = None if name in self.registry.names(kind) else CodeName.parse(name)
        try:
            return self.registry.get(kind, name, where=f"{section}.name") if code is None else self._coded(kind, section, code)
        except UsageError as error:
            self.problems.append(hinted(error, name) if section == "network" else error)
            return None

    def _coded(self, kind: str, section: str, code: CodeName) -> Any:
        """Return the object in a file, to which its short name refers from here on; the recorded name has the place and the hash."""
        thing, owner = self.registry.coded(kind, code, where=f"{section}.name")
        self.registry = self.registry.knowing(kind, code.short, thing, owner)
        self.names[section] = code.short
        self.code[section] = dataclasses.replace(code.resolved(), hash=owner.code).text
        return thing

    def _task(self) -> tuple[TaskCommon, dict[str, Any]]:
        source = self._class("tasks", "task")
        shared = {item.name for item in dataclasses.fields(TaskCommon)}
        known = shared | ({item.name for item in dataclasses.fields(source.Config)} if source else set())

        def fill() -> TaskCommon:
            filled: TaskCommon = self._fill(TaskCommon(), "task.", lambda name: name in shared)
            return filled

        common = self._without_idle(fill(), fill, lambda filled: idle_options(filled, TaskCommon(), "task."))
        own = None if source is None else self._fill(source.Config(), "task.", lambda name: name not in shared, known=known)
        return common, {"task": own}

    def _network(self, rule: type[Rule], spec: TaskSpec, rule_config: Any) -> Any:
        implied = dict(rule.network_options(spec, rule_config))
        name, more = spelled_out(implied.pop("name"), self.registry)
        implied |= more
        if self.names["network"] == "auto":
            self.names["network"] = name
        builder = self._class("networks", "network")
        if builder is None:
            return None
        base = builder.Config(**{key: value for key, value in implied.items() if _fits(builder.Config, key, value)})
        return self._with_code(self._options(base, "network."))

    def _with_code(self, options: Any) -> Any:
        """Register the networks in files that options of the network name, such as a part of it.

        An option has the file's name with the hash of the code, and no folder; the recorded one has the place as well.
        """

        def known(code: CodeName) -> str:
            thing, owner = self.registry.coded("networks", code, where="network")
            name = dataclasses.replace(code, path=Path(code.path).name, hash=owner.code).text
            self.registry = self.registry.knowing("networks", name, thing, owner)
            self.code[name] = dataclasses.replace(code.resolved(), hash=owner.code).text
            return name

        try:
            found = {item.name: replaced(getattr(options, item.name), known) for item in dataclasses.fields(options)}
        except UsageError as error:
            self.problems += error.problems
            return options
        return dataclasses.replace(options, **found)

    # --- values -----------------------------------------------------------------------------------------------------

    def _fill(self, base: Any, prefix: str, mine: Any = lambda name: True, *, known: set[str] | None = None) -> Any:
        """Return ``base`` with the leaves under ``prefix``, as an instance of its class, and note what does not fit."""
        node = _tree(base)
        for leaf in self.leaves:
            if not leaf.key.startswith(prefix):
                continue
            path = leaf.key[len(prefix) :].split(".")
            if not mine(path[0]) or (prefix and path == ["name"]):
                continue
            self._assign(node, path, leaf, prefix, known)
        try:
            filled = OmegaConf.to_object(node)
        except OmegaConfBaseException as error:  # its message may show what the reference leads to, which may be secret
            key = f"{prefix}{getattr(error, 'full_key', None) or ''}" or "configuration"
            self.problems.append(f"{key}: its reference ${{...}} leads nowhere, or to a value of another type: give the value itself")
            return base
        self.problems.extend(f"{problem}" for problem in range_problems(filled, prefix))
        return filled

    def _assign(self, node: DictConfig, path: list[str], leaf: Leaf, prefix: str, known: set[str] | None) -> None:
        kind: Any = OmegaConf.get_type(node)
        for depth, part in enumerate(path):
            if not dataclasses.is_dataclass(kind):
                break  # inside a free mapping
            names = {item.name for item in dataclasses.fields(kind)} | (known or set() if depth == 0 else set())
            if part not in names:
                problem = self._unknown(leaf, prefix + ".".join(path[:depth]), part, names)
                if leaf.shared and prefix:
                    self.unused[leaf.key] = problem.sentence
                else:
                    self.problems.append(problem)
                return
            if depth + 1 < len(path):
                node = node[part]
                kind = OmegaConf.get_type(node)
                if not isinstance(node, DictConfig):
                    self.problems.append(UsageError(f"{leaf.key}: {prefix}{'.'.join(path[: depth + 1])} has no parts", where=leaf.origin))
                    return
        key = path[-1]
        if isinstance(node._get_node(key), DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(node, key)):
            example = f"{leaf.key}.{next(iter(node[key]))}"
            what, fix = f"{leaf.key}={said(leaf.value)}: is a section", f"set one of its keys, such as {example}"
            self.problems.append(UsageError(what, where=leaf.origin, fix=fix))
            return
        reference = refers(leaf.value)
        if reference and not leaf.word:
            self.problems.append(UsageError(f"{leaf.key}={said(leaf.value)}: {REFERENCE}", where=leaf.origin))
            return
        try:
            value = leaf.value if reference and isinstance(leaf.value, str) else typed(leaf.value, _kind(kind, key), leaf.key)
            OmegaConf.update(node, key, value, merge=False)
        except (Misfit, OmegaConfBaseException) as error:
            reason = error.what if isinstance(error, Misfit) else "cannot be used here"
            self.problems.append(UsageError(f"{leaf.key}={said(leaf.value)}: {reason}", where=leaf.origin, fix=getattr(error, "fix", "")))

    def _unknown(self, leaf: Leaf, section: str, part: str, names: set[str]) -> UsageError:
        section = section.rstrip(".")
        everywhere = names | (set(CHOSEN) if not section else set())
        word = part.lower().replace("-", "_")
        word = ALIASES.get(word, ALIASES.get(nearest(word, ALIASES) or "", word) if not nearest(word, everywhere) else word)
        same = [key for key in self._all_keys() if key.rpartition(".")[2] == word]
        same = [key for key in same if key.rpartition(".")[0] == section] or same
        guess = nearest(word, everywhere)
        full = same[0] if same else f"{section}.{guess}" if section else guess
        owner = f" of {section} {self.names[section]!r}" if section in CHOSEN else ""
        fix = f"did you mean {full}?" if same or guess else "use one of the known keys" if everywhere else "leave it out: there are no keys"
        return UsageError(f"unknown key {leaf.key}{owner}", where=leaf.origin, fix=fix, known=[] if same or guess else sorted(everywhere))

    def _all_keys(self) -> list[str]:
        """List every key that is known by now: of the rule, the task and the rest."""
        known = {section: dataclasses.asdict(TaskCommon()) if section == "task" else {} for section in self.names}
        for section, keys in known.items():
            if self.names[section] in self.registry.names(f"{section}s"):
                keys.update(dataclasses.asdict(self.registry.get(f"{section}s", self.names[section]).Config()))
        return [leaf.key for leaf in leaves_of({**known, **dataclasses.asdict(RunConfig())}, "", "")]

    def _check_settings(self, rule: type[Rule], config: Any, spec: TaskSpec, common: TaskCommon, settings: RunConfig) -> None:
        if common.validation == 0 and settings.select == "best-val":
            self.problems.append("task.validation=0 leaves no validation split to select weights on: use select=last")
        if common.validation == 0 and settings.budget.patience is not None:
            self.problems.append("task.validation=0: budget.patience needs a validation split; leave one of them out")
        if settings.accumulate > settings.batch_size:
            self.problems.append(
                f"accumulate={settings.accumulate} needs at least as many examples per update, batch_size={settings.batch_size}"
            )
        self._augmentations_fit(Recipe(self.names, {}, common, settings, self.registry), rule.traits_of(config).targets, spec)
        self._check_names(spec, settings)
        checks: list[Callable[[], object]] = [
            lambda: check_device_name(settings.device),
            lambda: settings.budget.resolve(1),
            lambda: check_schedule(settings.schedule),
        ]
        if "optimizer" not in self.idle:
            kinds = {name: kind for name, kind, _ in self.registry.items("addons")}
            checks.append(lambda: configured(settings.optimizer.addons, kinds))
            checks.append(lambda: check_optimizer(settings.optimizer.over(rule.optimizer_of(config))))
        if settings.schedule.name in CLASSES and rule.phases is Rule.phases and settings.budget.samples is None:
            checks.append(lambda: check_length(settings.schedule, settings.budget.resolve(1).epochs))
        self._check_each(checks)

    def _check_names(self, spec: TaskSpec, settings: RunConfig) -> None:
        """Note names that are not registered, or that do not fit the task."""
        for name in settings.evaluation.protocols:
            self._named("protocols", name, "evaluation.protocols")
            self._protocol_fits(name, spec)
        for name in settings.evaluation.metrics:
            self._named("metrics", name, "evaluation.metrics")
            self._metric_fits(name, spec)
        for name in settings.diagnostics:
            self._named("diagnostics", name, "diagnostics")
        for name in settings.tracking.to if settings.tracking.enabled else ():
            self._named("trackers", name, "tracking.to")

    def _check_each(self, checks: Iterable[Callable[[], object]]) -> None:
        for check in checks:
            try:
                check()
            except UsageError as error:
                self.problems += error.faults

    def _augmentations_fit(self, recipe: Recipe, targets: tuple[str, ...], spec: TaskSpec) -> None:
        try:
            check_augmentations(recipe.augmentations(), spec, targets, f"rule {self.names['rule']!r}")
        except UsageError as error:
            self.problems += error.faults

    def _named(self, kind: str, name: str, where: str) -> None:
        try:
            self.registry.get(kind, name, where=where)
        except UsageError as error:
            self.problems.append(error)

    def _protocol_fits(self, name: str, spec: TaskSpec) -> None:
        if name in self.registry.names("protocols"):
            kinds = self.registry.get("protocols", name).kinds
            if spec.targets not in kinds:
                known = " or ".join(kinds)
                self.problems.append(f"evaluation.protocols: {name} scores {known}, but task {spec.name!r} has {spec.targets!r} targets")

    def _metric_fits(self, name: str, spec: TaskSpec) -> None:
        kinds = self.registry.get("metrics", name).kinds if name in self.registry.names("metrics") else ()
        if kinds and spec.targets not in kinds:
            known = " or ".join(kinds)
            self.problems.append(f"evaluation.metrics: {name} is of {known}, but task {spec.name!r} has {spec.targets!r} targets")

    def _stop_if_problems(self) -> None:
        if self.problems:
            raise UsageError.of(self.problems, "configuration")


def _fits(config: type, key: str, value: Any) -> bool:
    """Tell whether a value that a rule implies is valid for this network: presets are not the same everywhere."""
    if key not in {item.name for item in dataclasses.fields(config)}:
        return False
    try:
        typed(value, _kind(config, key), key)
    except Misfit:
        return False
    return True


@lru_cache(maxsize=1024)
def _kind(config: Any, key: str) -> Any:
    """Return the type of a key of a dataclass; anything inside a free mapping."""
    if not dataclasses.is_dataclass(config):
        return Any
    return typing.get_type_hints(config)[key]


@lru_cache(maxsize=256)
def _defaults(config: type) -> tuple[Any, DictConfig]:
    """Make an instance with the defaults, and its tree, which callers copy because it takes milliseconds to make."""
    tree: DictConfig = OmegaConf.structured(config())
    return config(), tree


def _tree(base: Any) -> DictConfig:
    needed = any(item.default is item.default_factory is dataclasses.MISSING for item in dataclasses.fields(base))
    kind: Any = type(base)
    given = needed or base != _defaults(kind)[0]
    tree: DictConfig = OmegaConf.structured(base) if given else copy.deepcopy(_defaults(kind)[1])
    return tree
