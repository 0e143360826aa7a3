"""What the tests of studies share: commands in process and as processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpfree import sources
from bpfree.cli.main import main
from bpfree.plugins import installed_plugins
from bpfree.study.store import CellStore

DYING = '''
import os
import signal
from pathlib import Path

from bpfree.baselines import DFA


class Dying(DFA):
    """Takes its process with it, in the middle of its second epoch, as often as the file `lives` says."""

    def credit(self, batch, step):
        lives = Path("lives")
        if step.index == 30 and int(lives.read_text()):
            lives.write_text(str(int(lives.read_text()) - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().credit(batch, step)
'''
"""The source of a rule that kills its worker, for plugins of tests."""

UNTIMED = ("second", "step_ms", "elapsed", "system/", "load_")
"""Parts of the names of metrics that differ from run to run."""


@contextlib.contextmanager
def plugin_on_path(folder: Path, name: str, code: str) -> Iterator[None]:
    """The distribution ``bpfree-NAME`` with the package NAME in a folder, first on the path while the context lasts."""
    info = folder / f"bpfree_{name}-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bpfree-{name}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[bpfree]\n{name} = {name}\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        forget_plugins()
        yield
    forget_plugins()
    sys.modules.pop(name, None)


def forget_plugins() -> None:
    """Look again at what is installed, and at its sources."""
    installed_plugins.cache_clear()
    sources.hash_of.cache_clear()


def call(*words: str) -> int:
    """A command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def outcomes(folder: str | Path = "runs/studies") -> list[dict[str, Any]]:
    """The records of all cells with what is known of their runs, in the order of the table."""
    found = []
    for path in Path(folder).rglob("cells/*.json"):
        store = CellStore(path.parents[3], path.parents[1].name)
        known = store.read(path.stem)
        assert known is not None
        facts = {"result": known.result, "history": known.history, "tags": known.tags, "tracking": known.tracking}
        found.append(facts | json.loads(path.read_text()))
    return sorted(found, key=lambda outcome: (outcome["row"], outcome["column"], outcome["seed"], outcome["trial"] or 0))


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics that a repetition must have again, bit for bit."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in UNTIMED)}


def mlflow_runs(database: str | Path = "mlflow.db") -> list[dict[str, Any]]:
    """The runs of a store: name, status, tags, and how many values each metric has at each step."""
    with sqlite3.connect(database) as store:
        runs = [
            {"id": key, "name": name, "status": status} for key, name, status in store.execute("select run_uuid, name, status from runs")
        ]
        for run in runs:
            run["tags"] = dict(store.execute("select key, value from tags where run_uuid = ?", (run["id"],)))
            query = "select key, step, count(*) from metrics where run_uuid = ? group by key, step"
            run["counts"] = {(key, step): count for key, step, count in store.execute(query, (run["id"],))}
            values = store.execute("select key, step, value from metrics where run_uuid = ?", (run["id"],))
            run["metrics"] = {(key, step): value for key, step, value in values}
    return runs
