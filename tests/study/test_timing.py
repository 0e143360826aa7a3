"""Which seconds of a study can be compared. Oracle: shares of the processor that are written down beside each case."""

from __future__ import annotations

import pytest
from made_studies import cell_record

from bpfree.study.store import CellKey, CellRecord


def outcome(wall: float | None, processor: float | None, *, threads: str = "1", device: str = "cpu", parallel: int = 1) -> CellRecord:
    known = {"train/seconds": wall, "train/processor_seconds": processor}
    result = {name: value for name, value in known.items() if value is not None}
    return cell_record(
        CellKey("a", "row", "", 0), "finished", result=result, tags={"threads": threads, "device": device}, parallel=parallel
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (outcome(10, 9.1), True),
        (outcome(10, 9.0), False),  # a share above nine tenths
        (outcome(4.3, 0.3), False),  # a busy machine, though no other cell
        (outcome(10, 9.9, parallel=4), True),  # other cells, but a core of its own
        (outcome(10, 18.1, threads="2"), True),
        (outcome(10, 9.9, threads="2"), False),
        (outcome(10, 0.5, device="cuda"), True),
        (outcome(10, 9.9, device="cuda", parallel=2), False),
        (outcome(10, None), True),  # an older run
        (outcome(10, None, parallel=2), False),
        (outcome(10, 9.9, threads="", parallel=2), False),
        (outcome(0, 0.0), True),
        (outcome(None, None), True),
    ],
)
def test_seconds_that_can_be_compared(made: CellRecord, expected: bool) -> None:
    assert made.comparable is expected


def test_a_cell_without_a_result_is_judged_by_its_last_epoch() -> None:
    made = outcome(None, None)
    made.seen().history = [{"seconds": 1.0, "processor_seconds": 1.0}, {"seconds": 4.0, "processor_seconds": 2.0}]
    assert made.processor_share == 0.5
    assert not made.comparable
