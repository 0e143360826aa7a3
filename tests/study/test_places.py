"""Records of cells that name places elsewhere. Oracle: a run there, which is read where the record names it rightly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bpfree.files import write_text
from bpfree.study.examples import _examples
from bpfree.study.measures import measure_of
from bpfree.study.store import CellKey, CellRecord, CellStore
from bpfree.training.predictions import Predictions, write_predictions


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs with one run, another run beside it, and a link to that one."""
    for folder in (tmp_path / "runs" / "mine", tmp_path / "theirs"):
        folder.mkdir(parents=True)
        write_predictions(folder / "predictions.npz", Predictions(np.zeros(4, np.uint8), np.ones(4, np.uint8)))
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "theirs")
    return tmp_path / "runs"


def read(runs: Path, run: str) -> tuple[Path | None, bool]:
    """The folder that the record of a cell names, and whether a report finds predictions by it."""
    store = CellStore(runs, "study")
    record = CellRecord(CellKey("0", "row", "", 0), run=run, status="finished")
    write_text(store.path_of("0"), record.to_json())
    known = store.read("0")
    assert known is not None
    return known.place, _examples(known, measure_of("test/accuracy", {}), runs, "") is not None


def test_only_runs_in_the_folder_of_runs_are_read(runs: Path) -> None:
    assert read(runs, "mine") == (runs / "mine", True)
    for run in ("../theirs", str(runs.parent / "theirs"), "mine/../../theirs", "link"):
        assert read(runs, run) == (None, False), run
    (runs / "mine" / "predictions.npz").unlink()
    (runs / "mine" / "predictions.npz").symlink_to(runs.parent / "theirs" / "predictions.npz")
    assert read(runs, "mine") == (runs / "mine", False)
