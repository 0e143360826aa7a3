"""Fingerprints and numbers of examples of data sets, which a study must know before it trains.

Both are computed once from the loaded set, and kept with the studies' cells, together with size and time of the files that were
read, so that the next plan need not read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.files import write_text
from bpfree.recipe import Recipe
from bpfree.tasks.task import Task

__all__ = ["Fingerprints", "KnownData", "digest"]

NAME = "data.json"


@dataclass(frozen=True)
class KnownData:
    """A data set on this machine.

    Attributes:
        fingerprint: of the training and test examples, whatever the validation split.
        examples: for training, before a validation split is cut.
    """

    fingerprint: str
    examples: int


class Fingerprints:
    """Fingerprints of data sets.

    Args:
        folder: where they are kept, that of all studies; ``None``: nowhere.
        load: whether a set may be loaded (and downloaded) to know them.

    Attributes:
        files: that they depend on; ``None`` where a set does not say what it is read from.
    """

    def __init__(self, folder: Path | None, *, load: bool) -> None:
        self._path, self._load = None if folder is None else folder / NAME, load
        self._known: dict[str, KnownData | None] = {}
        self.files: set[Path] | None = set() if self._path is None else {self._path}

    def of(self, recipe: Recipe) -> KnownData | None:
        """Look up the recipe's data; ``None`` if they cannot be loaded, or are not on this machine and must not be loaded."""
        source = recipe.registry.get("tasks", recipe.names["task"])
        options = _options(recipe)
        files = None if source.files is None else list(source.files(recipe.options["task"], recipe.root()))
        self.files = None if files is None or self.files is None else self.files.union(files)
        state = None if files is None else [_state(path) for path in files]
        key = digest([recipe.task_id, options, str(recipe.root()), state])
        if key not in self._known:
            self._known[key] = self._find(recipe, source, key, there=state is not None and all(part[1] is not None for part in state))
        return self._known[key]

    def _find(self, recipe: Recipe, source: Any, key: str, *, there: bool) -> KnownData | None:
        # a set that does not name its files must be loaded; where loading is not allowed, the last fingerprint is used
        trusted = not self._load if source.files is None else there and bool(source.files(recipe.options["task"], recipe.root()))
        kept = self._kept().get(key) if trusted else None
        if kept is not None:
            return KnownData(str(kept["fingerprint"]), int(kept["examples"]))
        if not there and not self._load:
            return None
        try:
            task = Task.from_source(source, recipe.options["task"], root=recipe.root(), validation=0, subset=recipe.task.subset)
        except BpfreeError:  # the cells will report the error
            return None
        found = KnownData(task.fingerprint(), len(task.train))
        if source.files is not None:
            files = [_state(path) for path in source.files(recipe.options["task"], recipe.root())]  # a download has changed the files
            key = digest([recipe.task_id, _options(recipe), str(recipe.root()), files])
        self._keep(key, found)
        return found

    def _kept(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8")) if self._path else {}
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _keep(self, key: str, data: KnownData) -> None:
        if self._path is not None and self._load:
            content = self._kept() | {key: dataclasses.asdict(data)}
            with contextlib.suppress(OSError):  # without the cache, the set is read again the next time
                write_text(self._path, json.dumps(content, indent=2) + "\n")


def _options(recipe: Recipe) -> dict[str, Any]:
    """Select the options that determine the examples."""
    return dataclasses.asdict(recipe.options["task"]) | ({} if recipe.task.subset is None else {"subset": recipe.task.subset})


def _state(path: Path) -> tuple[str, int | None, int | None]:
    try:
        found = path.stat()
    except OSError:
        return str(path), None, None
    return str(path), found.st_size, found.st_mtime_ns


def digest(content: Any) -> str:
    """Hash plain values, 16 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
