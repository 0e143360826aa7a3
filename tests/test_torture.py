"""Faults that are injected. Oracles: undisturbed runs bit for bit, logs point by point, files as they were; see docs/reliability.md.

Each kind of `make torture` in its short form, and the program's own judgement: what is lost is seen.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FAST = ("kill-run", "sqlite-locked", "disk-full", "fuzz")
SLOW = (
    *("kill-study", "two-studies", "server-restarted", "server-stopped", "server-slow", "server-500", "server-reset", "server-lost"),
    *("sqlite-four", "cost", "disk-full-for-good", "read-only"),
)


@pytest.fixture(scope="module")
def torture() -> Iterator[Any]:
    """The program, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("torture")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torture", "faults", "measure")]:
        del sys.modules[name]


def run(torture: Any, folder: Path, name: str) -> dict[str, Any]:
    code = torture.main(["--quick", "--faults", name, "--save", str(folder)])
    (line,) = json.loads((folder / "torture-cpu.json").read_text())["results"]["faults"]
    assert code == int(bool(line["failures"]))
    return dict(line)


@pytest.mark.slow  # half a minute to minutes each, and they wait for the machine
@pytest.mark.parametrize("name", FAST)
def test_nothing_is_lost(torture: Any, tmp_path: Path, name: str) -> None:
    line = run(torture, tmp_path, name)
    assert line["failures"] == []
    assert line["injected"] > 0
    assert line["lost"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_nothing_is_lost_in_what_takes_longer(torture: Any, tmp_path: Path, name: str) -> None:
    test_nothing_is_lost(torture, tmp_path, name)


def test_every_kind_has_a_test(torture: Any) -> None:
    assert sorted(kind.name for kind in torture.KINDS) == sorted((*FAST, *SLOW))


def test_the_page_is_that_of_the_results(torture: Any) -> None:
    """The table in docs/reliability.md comes from the result file, and names every kind that was tried."""
    results = json.loads((ROOT / "benchmarks" / "results" / "torture-cpu.json").read_text())["results"]
    text = (ROOT / "docs" / "reliability.md").read_text()
    shown = text.partition(torture.page.BEGIN)[2].partition(torture.page.END)[0].strip()
    assert shown == torture.page.table(results["faults"])


def test_what_is_lost_is_seen(torture: Any, tmp_path: Path) -> None:
    """A point that is missing, one that is there twice, one of nowhere, and one with another value."""
    (tmp_path / "events.jsonl").write_text(
        '{"event": "begin", "time": 5}\n'
        '{"event": "epoch", "time": 6, "epoch": 1, "metrics": {"loss": 0.5}}\n'
        '{"event": "epoch", "time": 7, "epoch": 2, "metrics": {"loss": 0.25}}\n'
        '{"event": "system", "time": 8, "metrics": {"system/cpu": 3.0}}\n'
    )
    kit = sys.modules["faults.kit"]

    def lost(values: dict[tuple[str, int], list[float]]) -> list[str]:
        return kit.points_lost({"values": values}, tmp_path)  # type: ignore[no-any-return]

    whole = {("loss", 1): [0.5], ("loss", 2): [0.25], ("system/cpu", 3): [3.0]}
    assert lost(whole) == []
    assert lost({key: value for key, value in whole.items() if key != ("loss", 2)}) == ["loss at 2 is not there"]
    assert lost(whole | {("loss", 1): [0.5, 0.5]}) == ["loss at 1 has 2 values"]
    assert lost(whole | {("loss", 3): [0.5]}) == ["loss at 3 is of nowhere"]
    assert lost(whole | {("loss", 2): [0.3]}) == ["loss at 2 is 0.3, not {0.25}"]


MESSAGES = {
    "": "no message",
    "error: no\n": "without where: and fix:",
    "error: no\n  where: here\n": "without fix:",
    "Traceback (most recent call last)\n": "a traceback",
    "error: unexpected ValueError: x\n  fix:   run again\n": "an unexpected error",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_a_bad_message_is_seen(torture: Any, text: str) -> None:
    messages = sys.modules["faults.messages"]
    (found,) = messages.faults_of(text, 1, refused=True)
    assert MESSAGES[text] in found
    assert messages.faults_of("error: no\n  where: here\n  fix:   do that\n", 2, refused=True) == []
    assert "exit code 0" in messages.faults_of("", 0, refused=True)[0]
    assert "exit code -9" in messages.faults_of("", -9, refused=False)[0]


@pytest.fixture(scope="module")
def undisturbed(torture: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to, with its store."""
    plan = sys.modules["faults.kit"].Plan(1, 0, tmp_path_factory.mktemp("plain"))
    return sys.modules["faults.runs"].Undisturbed(plan).of("softhebb in its phases")[0]  # type: ignore[no-any-return]


SPOILT = {
    "a point is missing": "delete from metrics where key = 'val/accuracy' and step = 2",
    "a point is there twice": "insert into metrics select key, value, timestamp + 1, run_uuid, step, is_nan from metrics where step = 2",
    "it runs still": "update runs set status = 'RUNNING'",
}


@pytest.mark.parametrize("spoil", ["weights", "file", *SPOILT])
def test_a_run_that_differs_is_seen(undisturbed: Path, spoil: str, tmp_path: Path) -> None:
    """A run that nothing happened to is like its copy, until one thing in that is changed."""
    runs = sys.modules["faults.runs"]
    site = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    place = site / "runs" / runs.NAME
    assert runs.differences(site, undisturbed) == []
    if spoil == "weights":
        content = read_checkpoint(place / "checkpoints" / "last.pt")
        name = next(name for name, tensor in content["weights"].items() if tensor.is_floating_point())
        content["weights"][name] += 1e-3
        write_checkpoint(place / "checkpoints" / "last.pt", content)
    elif spoil == "file":
        (place / "checkpoints" / ".last.pt-00000000").touch()
    else:
        with contextlib.closing(sqlite3.connect(site / "mlflow.db", isolation_level=None)) as store:
            store.execute(SPOILT[spoil])
    assert runs.differences(site, undisturbed) != []
