"""A cache of listings in the user's folder, valid until an installed package changes, so that a listing need not import torch.

A value is kept with the state of what it depends on: the installed plugins and their versions, where they are imported from, times and
sizes of their sources and the core's (an editable install changes without its version), and the folders of installed packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bpfree.files import write_text

__all__ = ["GROUP", "cache_folder", "disabled_plugins", "installed_state", "kept"]

GROUP = "bpfree"
DISABLE_VARIABLE = "BPFREE_DISABLE_PLUGINS"


def disabled_plugins() -> list[str]:
    """List the plugins that the environment variable ``BPFREE_DISABLE_PLUGINS`` names, separated by commas."""
    return [name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",") if name.strip()]


def kept(
    name: str, make: Callable[[], tuple[Any, Iterable[Path] | None]], *, words: Any = None, under: Any = None, folder: Path | None = None
) -> Any:
    """Return a value as JSON has it: the cached one if nothing has changed since, else a new one.

    A cache that is damaged, missing or not to be written is done without.

    Args:
        name: of the value.
        make: makes the value, and returns the files and folders that it depends on besides what is installed; ``None``: do not cache it.
        words: identify one of several values of this name.
        under: further conditions under which it holds.
        folder: where it is kept, if there is such a folder; ``None``: in the user's cache.
    """
    began = time.time_ns()
    try:
        place = cache_folder() / "listings" if folder is None else folder
        path, state = place / f"{name}-{_hash([_installation(), words])[:16]}.json", _hash([installed_state(), under])
    except (OSError, ImportError, ValueError, RuntimeError):  # no sources that could be watched, or no home
        return make()[0]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["state"] == state and content["files"] == [_seen(place) for place, *_ in content["files"]]:
            return content["value"]
    value, files = make()
    if files is not None and (folder is None or folder.is_dir()):
        seen = [_seen(place) for place in sorted({*map(os.path.abspath, files), *_edited()})]
        if all(when is None or when < began for _, _, when in seen):  # else one may have changed since it was read
            with contextlib.suppress(OSError, ValueError, TypeError):
                write_text(path, json.dumps({"state": state, "files": seen, "value": value}))
    return value


def cache_folder() -> Path:
    """Return the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpfree"


def _entries() -> Sequence[importlib.metadata.EntryPoint]:
    return _entries_in(tuple((path, *_seen(path)[1:]) for path in sys.path))


@lru_cache(maxsize=1)
def _entries_in(state: object) -> Sequence[importlib.metadata.EntryPoint]:
    """List the entry points, read again only when packages are installed or removed."""
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def _roots(entries: Iterable[importlib.metadata.EntryPoint]) -> list[str]:
    """List folders or files of the core's package and of plugins; nothing is imported.

    Raises:
        ImportError, ValueError: one cannot be found.
    """
    specs = [importlib.util.find_spec(name) for name in dict.fromkeys(entry.module.partition(".")[0] for entry in entries)]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or [spec.origin or ""]]
    return [str(Path(__file__).parent), *places]


def _installation() -> list[Any]:
    """Identify this installation among several (or its search path, or its set of disabled plugins)."""
    return [sys.version, _roots(_entries()), _packages(), disabled_plugins()]


def installed_state() -> str:
    """Return a hash that changes with the installed packages.

    Raises:
        OSError, ImportError, ValueError: sources cannot be seen.
    """
    found = _entries()
    entries = [(e.name, e.value, *((e.dist.name, e.dist.version) if e.dist is not None else ())) for e in found]
    seen = [_seen(path) for path in sorted({path for root in _roots(found) for path in _sources(root)})]
    if any(when is None for _, _, when in seen):
        raise FileNotFoundError
    return _hash([entries, [_seen(path)[2] for path in _packages()], seen])


def _packages() -> list[str]:
    """List the folders of installed packages, whose times change on installation; the working folder's changes with each run."""
    return [path for path in sys.path if path not in ("", os.getcwd())]


def _edited() -> list[str]:
    """List the files imported from outside the folders of packages, such as those of a library that is edited in place."""
    import sysconfig

    watched = (*(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), *_roots(_entries()))
    files = {getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values())}  # lazy ones stay lazy
    return sorted(path for path in files if isinstance(path, str) and os.path.isabs(path) and not path.startswith(watched))


def _sources(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.join(folder, name) for name in names)


def _seen(path: str) -> list[Any]:
    """Return a file's path, size and time."""
    try:
        found = os.stat(path)
    except OSError:
        return [path, None, None]
    return [path, found.st_size, found.st_mtime_ns]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
