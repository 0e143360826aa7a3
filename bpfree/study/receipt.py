"""The receipt of a finished study: with it the same command answers at once, without torch.

It holds what was printed, and the state of everything that the answer depends on: sources of the core and the plugins, versions, the
study's file, data files, the environment, and the cells. If any of it has changed, the study is planned again, which is always right.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_receipt", "write_receipt"]

PACKAGES = ("torch", "numpy", "scikit-learn", "optuna", "bpfree")
VARIABLES = ("BPFREE_DATA", "BPFREE_DISABLE_PLUGINS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MLFLOW_TRACKING_URI")
SUFFIXES = {".py", ".so", ".yaml"}


def write_receipt(folder: Path, words: Sequence[str], text: str, page: Path, files: Iterable[Path], sources: Iterable[Path]) -> None:
    """Keep what was printed.

    Args:
        folder: of the study.
        words: of the command line.
        text: what was printed.
        page: the report.
        files: that the answer depends on: the study's file, data, cells.
        sources: folders of packages.
    """
    listed = sorted({path.absolute() for path in (*files, page)})
    roots = sorted({path.absolute() for path in sources})
    content = {
        "text": text,
        "page": str(page),
        "files": [str(path) for path in listed],
        "sources": [str(path) for path in roots],
        "state": _state(listed, roots),
    }
    path = _path(folder, words)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def read_receipt(folder: Path, words: Sequence[str]) -> str | None:
    """What was printed, if nothing has changed since."""
    try:
        content: dict[str, Any] = json.loads(_path(folder, words).read_text(encoding="utf-8"))
        state = _state([Path(name) for name in content["files"]], [Path(name) for name in content["sources"]])
        return str(content["text"]) if state == content["state"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(folder: Path, words: Sequence[str]) -> Path:
    digest = hashlib.sha256(json.dumps([os.getcwd(), *words]).encode()).hexdigest()[:8]
    return folder / f".receipt-{digest}.json"


def _state(files: Sequence[Path], sources: Sequence[Path]) -> str:
    """A hash that moves with whatever the answer depends on.

    Raises:
        OSError: a file is gone.
    """
    found = sorted(path for root in sources for path in (root.rglob("*") if root.is_dir() else [root]) if path.suffix in SUFFIXES)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *found)]
    entries = sorted((entry.name, entry.value) for entry in importlib.metadata.entry_points(group="bpfree"))
    variables = [os.environ.get(name) for name in VARIABLES]
    gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    places = _places(value for _, value in entries)
    content = [stats, entries, places, [_version(name) for name in PACKAGES], variables, gpus, os.cpu_count()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _places(values: Iterable[str]) -> list[str]:
    """Where this process would import the plugins from: another copy may come first on its path. Nothing is imported."""
    names = sorted({value.partition(":")[0].partition(".")[0].strip() for value in values} | {"bpfree"})
    found = []
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        found.append("" if spec is None else str(spec.origin or list(spec.submodule_search_locations or ())))
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
