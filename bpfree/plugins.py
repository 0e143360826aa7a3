"""Discovery of plugins: one at a time, isolated, checked against the hook interface."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import logging
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pluggy

from bpfree import hooks
from bpfree.code_files import CodeFile, CodeName
from bpfree.errors import UsageError, unknown_name
from bpfree.kept import GROUP, disabled_plugins, installed_state, kept

__all__ = ["Given", "PluginIndex", "PluginRecord", "Plugins", "installed_plugins", "plugin_index"]

logger = logging.getLogger("bpfree")

KINDS = (
    *("rules", "networks", "programs", "tasks", "augmentations", "metrics", "optimizers", "addons", "protocols", "diagnostics"),
    *("presets", "studies", "trackers", "executors"),
)
CODED = ("rules", "networks", "tasks")
"""Kinds of which a name may lead to a file of code."""
Status = Literal["ok", "broken", "incompatible", "disabled"]


@dataclass
class PluginRecord:
    """The facts about one installed plugin.

    Attributes:
        name: of its entry point.
        distribution, version: of the package that installed it; the core's for the built-in one.
        status: ``ok``, ``broken`` (fails to import, changes settings of the process, or implements hooks wrongly), ``incompatible``
            (written for another version of the interface), or ``disabled``.
        reason: why it is not ok, or soon will not be.
        provides: registered names by kind.
        hooks: the hooks that it implements.
        api: the interface version that it states; ``None``: none, or it was not imported.
        path: of its module's source; empty if it was not imported.
        code: hash of what was named by its file, or made in Python; empty for a plugin.
    """

    name: str
    distribution: str
    version: str
    status: Status = "ok"
    reason: str = ""
    provides: dict[str, list[str]] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)
    trace: str = ""
    api: int | None = None
    path: str = ""
    code: str = ""


@dataclass(frozen=True)
class Given:
    """Files of code and objects that names may refer to besides registered ones; sent to other processes.

    Attributes:
        files: of code that may be executed, by absolute path.
        things: objects made in Python, with their records, by kind and name.
    """

    files: Mapping[str, CodeFile] = field(default_factory=dict)
    things: Mapping[tuple[str, str], tuple[Any, PluginRecord]] = field(default_factory=dict)

    def __or__(self, other: Given) -> Given:
        return Given({**self.files, **other.files}, {**self.things, **other.things})


class Broken(Exception):
    """A fault of a plugin; the message is the end of a sentence that begins with its name."""


@contextmanager
def contained(doing: str) -> Iterator[None]:
    """Run a plugin's code inside so that this process continues as before, with its output kept apart from ours.

    Args:
        doing: what the plugin does, for messages.

    Raises:
        Broken: it has failed, asked to end the process, or changed settings of the whole process.
    """
    from bpfree.process_state import unchanged  # which imports torch, as listings from the index do not

    try:
        with contextlib.redirect_stdout(sys.stderr), unchanged() as changed:
            yield
    except (Broken, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise Broken(f"calls sys.exit({error.code!r}) in {doing}") from error
    except BaseException as error:
        raise Broken(f"fails in {doing}: {type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")) from error
    if changed:
        raise Broken(f"changes {' and '.join(changed)} in {doing}, for everything else in this process")


class Plugins:
    """The plugins of this process and what they register.

    Args:
        disabled: names of plugins that are not loaded.
        entry_points: for tests; by default those installed in the group ``bpfree``.

    Attributes:
        reported: whether the excluded plugins have been reported.
        given: what names may lead to beside what plugins register.
    """

    def __init__(self, disabled: Iterable[str] = (), entry_points: Iterable[Any] | None = None) -> None:
        self._state = _state()
        self.manager = pluggy.PluginManager("bpfree")
        self.manager.add_hookspecs(hooks)
        self.records: dict[str, PluginRecord] = {}
        self._registered: dict[str, dict[str, tuple[Any, PluginRecord]]] = {kind: {} for kind in KINDS}
        self._disabled, self.reported = set(disabled), False
        self.given = Given()
        self._coded: dict[tuple[str, ...], tuple[Any, PluginRecord]] = {}
        self._load_builtin()
        found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        for entry in sorted(found, key=lambda entry: entry.name):
            self._load_entry(entry)

    def _load_builtin(self) -> None:
        from bpfree import builtin, version

        record = PluginRecord("core", "bpfree", version.__version__, api=builtin.bpfree_api, path=builtin.__file__)
        self.records["core"] = record
        self._register(builtin, record)

    def _load_entry(self, entry: Any) -> None:
        dist = getattr(entry, "dist", None)
        record = PluginRecord(entry.name, dist.name if dist else "?", dist.version if dist else "?")
        if entry.name in self.records:
            other = self.records[entry.name]
            record.status, record.reason = "broken", f"has a name that {other.distribution} has taken already"
            self.records[f"{entry.name} ({record.distribution})"] = record
            return
        self.records[entry.name] = record
        if entry.name in self._disabled:
            record.status, record.reason = "disabled", "disabled by name"
            return
        try:
            with contained("its import"):
                module = entry.load()
                api, path = getattr(module, "bpfree_api", None), getattr(module, "__file__", None)
        except Broken as error:
            self._fail(record, "broken", str(error))
            return
        record.api, record.path = api if isinstance(api, int) else None, str(path or "")
        if not isinstance(api, int) or not hooks.OLDEST_API <= api <= hooks.API_VERSION:
            said = "states no bpfree_api" if api is None else f"is written for interface version {api}"
            self._fail(record, "incompatible", f"{said}; this is version {hooks.API_VERSION}: install a matching {record.distribution}")
            return
        if api < hooks.API_VERSION:
            record.reason = f"written for interface version {api}, which works for this release alone: docs/from-1-to-2.md"
        self._register(module, record)

    def _fail(self, record: PluginRecord, status: Status, reason: str) -> None:
        record.status, record.reason, record.trace = status, reason, traceback.format_exc()

    def _register(self, module: Any, record: PluginRecord) -> None:
        """Register with pluggy, then collect what it provides; undo everything if any of it fails."""
        try:
            with contained("its hooks"):
                self.manager.register(module, record.name)
                self.manager.check_pending()
                hooks = sorted(caller.name for caller in self.manager.get_hookcallers(module) or ())
            provided = {kind: self._provided(module, kind) for kind in KINDS}
        except Broken as error:
            if self.manager.get_plugin(record.name) is not None:
                self.manager.unregister(name=record.name)
            self._fail(record, "broken", str(error))
            return
        for kind, things in provided.items():
            self._registered[kind].update({name: (thing, record) for name, thing in things.items()})
            record.provides[kind] = sorted(things)
        record.hooks = hooks

    def _provided(self, module: Any, kind: str) -> dict[str, Any]:
        from bpfree.kinds import misfit

        with contained(f"bpfree_{kind}"):
            function = getattr(module, f"bpfree_{kind}", None)
            given = {} if function is None else function()
            if not isinstance(given, Mapping):
                raise Broken(f"returns from bpfree_{kind} what must be a mapping of names, not {type(given).__name__}")
            things = dict(given)
            for name, thing in things.items():
                if not isinstance(name, str) or not name.strip() or not name.isprintable():
                    raise Broken(f"registers the {singular(kind)} {name!r}: a name must be text of one line")
                if wanted := misfit(kind, thing):
                    raise Broken(f"registers the {singular(kind)} {name!r}, which must be {wanted}, not {thing!r:.80}")
                if name in self._registered[kind]:
                    owner = self._registered[kind][name][1].name
                    raise Broken(f"registers the {singular(kind)} {name!r}, which plugin {owner!r} has registered already")
        return things

    def report(self) -> None:
        """Log once which plugins were left out against their users' wish, and why."""
        for record in [] if self.reported else self.records.values():
            if record.status in ("broken", "incompatible"):
                logger.warning("the plugin %s is left out, because it %s", record.name, record.reason)
        self.reported = True

    @property
    def keepable(self) -> bool:
        """Whether listings of these plugins may be cached.

        They may if no source has changed since the plugins were loaded, and none is broken or incompatible: a repair of those (an
        installed library, say) is not among the compared files. Given files and objects are not cached either.
        """
        unchanged = self._state == _state() and not self.given.files and not self.given.things
        return unchanged and all(record.status in ("ok", "disabled") for record in self.records.values())

    def names(self, kind: str) -> list[str]:
        """List the registered names of a kind, one of ``KINDS``."""
        return sorted(self._registered[kind])

    def get(self, kind: str, name: str, *, where: str = "") -> Any:
        """Return the registered object of a name, or the object in a file for a name of code.

        Raises:
            UsageError: unknown name; says so if a plugin that is not ok may have had it. Code that is not allowed, or wrong.
        """
        if name in self._registered[kind]:
            return self._registered[kind][name][0]
        if kind in CODED and (code := CodeName.parse(name)) is not None:
            return self.coded(kind, code, where=where)[0]
        error = unknown_name(singular(kind), name, self._registered[kind], where=where)
        ill = [f"{record.name} ({record.status}: {record.reason})" for record in self.records.values() if record.status != "ok"]
        if ill:
            raise UsageError(error.what, where=error.where, fix=f"{error.fix} (not loaded: {'; '.join(ill)})", known=error.known)
        raise error

    def including(self, rule: type[Any]) -> Plugins:
        """Copy the plugins, and add a rule by its class's name, as if a plugin of its module had registered it."""
        name, module = rule.__name__, rule.__module__
        return self.knowing("rules", name, rule, PluginRecord(module, module, "?", provides={"rules": [name]}))

    def knowing(self, kind: str, name: str, thing: Any, record: PluginRecord) -> Plugins:
        """Copy the plugins, and add an object by a name, in place of another of this name."""
        copied = copy.copy(self)
        copied._registered = {**self._registered, kind: {**self._registered[kind], name: (thing, record)}}
        return copied

    def extended(self, given: Given) -> Plugins:
        """Copy the plugins, and add further files and objects, also those that another process was given."""
        if not given.files and not given.things:
            return self
        from bpfree.objects import registered

        self.report()  # once, and not for each copy
        copied = copy.copy(self)
        for (kind, name), (thing, record) in given.things.items():
            copied = copied.knowing(kind, name, registered(kind, thing, name), record)
        copied.given = self.given | given
        return copied

    def allowing(self, files: Iterable[CodeFile]) -> Plugins:
        """Copy the plugins, and let names lead to code in these files, which is executed at the first use of such a name."""
        return self.extended(Given({str(file.path): file for file in files}))

    def coded(self, kind: str, code: CodeName, *, where: str = "") -> tuple[Any, PluginRecord]:
        """Return the object of a name of code, as a plugin would register it; the code is executed once in this process.

        Raises:
            UsageError: the file is not allowed, has changed, or fails; it has no such name, or something of another kind.
        """
        code = code.resolved()
        file = self.given.files.get(code.path)
        if file is None:
            what = f"the code in {code.path} is executed only if the command line names it"
            raise UsageError(what, where=where, fix=f"--allow-code {shlex.quote(code.path)}, if you trust it")
        if code.hash not in ("", file.hash):
            what = f"the code in {file.path} has changed: it was {code.hash}, and is {file.hash}"
            fix = f"restore it (a run keeps a copy in code/), or name it as it is now: {singular(kind)}={file.path}:{code.name}"
            raise UsageError(what, where=where, fix=fix)
        key = kind, code.path, file.hash, code.name
        if key not in self._coded:  # a task's data are loaded once
            self._coded[key] = self._coded_in(file, kind, code)
        return self._coded[key]

    def _coded_in(self, file: CodeFile, kind: str, code: CodeName) -> tuple[Any, PluginRecord]:
        from bpfree.objects import registered

        try:
            with contained("its import"):
                module = file.module()
        except Broken as error:
            missing = isinstance(error.__cause__, ImportError)
            fix = (
                "a file of code may import installed packages, but no neighbouring file: write a plugin for several files"
                if missing
                else "correct the file"
            )
            raise UsageError(f"{file.path.name} {error}", where=file.line_of(error.__cause__), fix=fix) from error
        if not hasattr(module, code.name):
            names = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
            raise unknown_name(f"name in {file.path.name}", code.name, names, where=str(file.path))
        thing = registered(kind, getattr(module, code.name), code.short)
        return thing, PluginRecord(file.path.name, file.path.name, file.hash, path=str(file.path), code=file.hash)

    def owner(self, kind: str, name: str) -> PluginRecord:
        """Return the plugin that registered a name."""
        return self._registered[kind][name][1]

    def items(self, kind: str) -> Iterator[tuple[str, Any, PluginRecord]]:
        """Yield ``(name, object, plugin)`` of a kind, sorted by name."""
        for name in self.names(kind):
            yield name, *self._registered[kind][name]


def _state() -> str:
    """Return a hash of what is installed; empty where it cannot be computed."""
    try:
        return installed_state()
    except (OSError, ImportError, ValueError):
        return ""


def singular(kind: str) -> str:
    """Return the singular of a kind's name."""
    return "study" if kind == "studies" else kind.removesuffix("s")


@dataclass(frozen=True)
class PluginIndex:
    """The part of the installed plugins that listings show.

    Attributes:
        records: as :class:`Plugins` has them, without traces.
        summaries: ``(name, plugin, summary)`` of what is registered, sorted by name, by kind.
    """

    records: list[PluginRecord]
    summaries: dict[str, list[list[str]]]


def _indexed(plugins: Plugins) -> tuple[dict[str, Any], list[Path] | None]:
    """Return the index as plain values, and what it depends on besides the plugins."""
    records = [{**dataclasses.asdict(record), "trace": ""} for record in plugins.records.values()]
    summaries = {kind: [[name, owner.name, _summary(thing)] for name, thing, owner in plugins.items(kind)] for kind in KINDS}
    return {"records": records, "summaries": summaries}, [] if plugins.keepable else None


def _summary(thing: Any) -> str:
    return str(getattr(getattr(thing, "card", thing), "summary", ""))


@lru_cache(maxsize=1)
def installed_plugins() -> Plugins:
    """Return the plugins installed here, loaded on first use.

    The environment variable ``BPFREE_DISABLE_PLUGINS`` names plugins, separated by commas, that are left out.
    """
    loaded: list[Plugins] = []

    def load() -> tuple[dict[str, Any], list[Path] | None]:
        loaded.append(Plugins(disabled_plugins()))
        return _indexed(loaded[0])

    kept("plugins", load)  # for listings to come
    return loaded[0] if loaded else Plugins(disabled_plugins())


def plugin_index() -> PluginIndex:
    """Return the index of the installed plugins from the cache, if nothing has changed since they were last loaded."""
    found = kept("plugins", lambda: _indexed(installed_plugins()))
    return PluginIndex([PluginRecord(**record) for record in found["records"]], found["summaries"])
