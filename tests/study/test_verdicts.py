"""Floors and verdicts of a study. Oracles: differences by hand from numbers that are written down here; one small study that is run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_studies import cell_record
from study_kit import call, outcomes

from bpfree.config import parse_words
from bpfree.errors import BpfreeError
from bpfree.metric import ACCURACY, LOSS
from bpfree.study import floors as floors_module
from bpfree.study.cells import Plan, plan
from bpfree.study.file import read_study
from bpfree.study.floors import FloorRecord, Floors, floor_key, measure_floor_of, measure_floors
from bpfree.study.measures import Measure
from bpfree.study.report import report_on
from bpfree.study.report.floor import floor_finding
from bpfree.study.rows import Cell, TableRow, Trial, Tuned
from bpfree.study.store import CellRecord, CellStore
from bpfree.study.verdicts import Verdict, converged, verdicts
from bpfree.study.worker import TaskCache
from bpfree.tasks.task import Split, Task, TaskSpec
from bpfree.training.trainer import Interrupted

TEXT = """title: Judged
settings: {task: digits, threads: 1, device: cpu, network.width: 16}
seeds: 5
rows:
  - {label: linear, settings: {rule: linear}}
  - {label: twin, settings: {rule: frozen}}
  - {label: dfa, settings: {rule: dfa}}
  - {label: bp, settings: {rule: backprop}}
"""
FLOOR = [0.900, 0.902, 0.898, 0.901, 0.899]
REPORTED = Measure("test", ACCURACY, "accuracy")


def planned(folder: Path, text: str = TEXT) -> Plan:
    (folder / "judged.yaml").write_text(text)
    return plan(read_study(folder / "judged.yaml"), parse_words([f"output={folder}"]))


def floor_record(network: str = "mlp", test: list[float] = FLOOR, **changes: Any) -> FloorRecord:
    content: dict[str, Any] = {
        "network": network,
        "source": "b1",
        "penalty": 1e-3,
        "real": False,
        "chosen": True,
        "seeds": [0, 1, 2, 3, 4],
        "validation": [0.91] * 5,
        "test": test,
        "inputs": [0.88] * 5,
        "readings": [("inputs", 1e-3, 0.88), ("b1", 1e-3, 0.91)],
        "skipped": [],
        "gradient": 1e-4,
        "chance": 0.103,
        "nearest_mean": 0.9025,
    }
    return FloorRecord(**content | changes)


def judged(
    made: Plan, results: Mapping[str, Mapping[str, list[float]]], *, record: FloorRecord | None = None, twins: Any = None
) -> dict[str, Verdict]:
    """Verdicts of rows with these results by seed; histories rise to the own prediction in four epochs."""
    lines = lines_of(made, results)
    for line in lines:
        if twins and line.written.label in twins:
            records = [finished(line.cells[seed], {"test/accuracy": value}) for seed, value in enumerate(twins[line.written.label])]
            line.twin = dataclasses.replace(line, records=records)
    floors = Floors(made, CellStore(made.output, made.study.name).folder)
    for line in lines:
        floors.write(floors.id_of(line.cells[0]), record or floor_record())
    return {each.row.written.label: each for each in verdicts(made, lines, floors, REPORTED)}


def finished(cell: Cell, result: dict[str, float]) -> CellRecord:
    own = result["test/accuracy"]
    history = [{"epoch": n, "val/accuracy": own * n / 4, "forwards": 100.0 * n} for n in (1.0, 2.0, 3.0, 4.0)]
    whole = {"forward_operations": 50.0, **result}
    return cell_record(cell.key, "finished", run=f"{cell.key.row}-{cell.key.seed}", result=whole, history=history)


def lines_of(made: Plan, results: Mapping[str, Mapping[str, list[float]]]) -> list[TableRow]:
    def known(cell: Cell) -> CellRecord | None:
        values = {key: each[cell.key.seed] for key, each in results.get(cell.key.row, {}).items()}
        return finished(cell, values) if values else None

    return [dataclasses.replace(row, records=[known(cell) for cell in row.cells]) for row in made.rows]


def around(mean: float, spread: float = 0.001) -> list[float]:
    return [mean + spread * step for step in (-2, -1, 0, 1, 2)]


OWN, PROBE = "test/accuracy", "test/linear_probe/accuracy"


def test_three_numbers_and_three_verdicts(tmp_path: Path) -> None:
    made = planned(tmp_path)
    rows = {"dfa": {OWN: around(0.93), PROBE: around(0.95)}, "bp": {OWN: around(0.98), PROBE: around(0.979)}}
    found = judged(made, rows, twins={"dfa": around(0.80)[::-1]})
    dfa = found["dfa"]
    assert dfa.features is not None
    assert dfa.delivered is not None
    assert dfa.equal is not None
    gains = [100 * (own - floor) for own, floor in zip(around(0.93), FLOOR, strict=True)]
    assert dfa.delivered.gains == pytest.approx(gains)
    assert dfa.features.gain == pytest.approx(100 * (0.95 - statistics.fmean(FLOOR)))
    assert dfa.equal.gain == pytest.approx(13)
    assert dfa.text == "above its floor"
    assert found["bp"].equal is None
    # a fifth of 93 % at each quarter: 0.91 is first reached at the last epoch, of 400 passes of 50 operations
    assert dfa.operations == 400 * 50
    share, interval = dfa.share or (math.nan, None)
    assert share == pytest.approx((0.93 - 0.9) / (0.98 - 0.9))
    assert interval is not None
    assert found["bp"].share is None  # the ceiling has none


@pytest.mark.parametrize(
    ("own", "probed", "twin", "text"),
    [
        (0.93, 0.95, 0.80, "above its floor"),
        (0.93, 0.95, 0.95, "above its floor; not above its twin at equal operations"),
        (0.93, 0.90, 0.80, "above its floor; its features alone are not shown to be"),
        (0.90, 0.95, 0.80, "has not paid for its features in this budget"),
        (0.85, 0.95, 0.80, "has not paid for its features in this budget"),
        (0.85, 0.95, 0.85, "its features are above the floor; its predictions are not, nor above its twin at equal operations"),
        (0.90, 0.90, 0.80, "not shown to learn more than its floor"),
        (0.85, 0.85, 0.80, "below its floor"),
    ],
)
def test_verdicts_in_words(own: float, probed: float, twin: float, text: str, tmp_path: Path) -> None:
    found = judged(planned(tmp_path), {"dfa": {OWN: around(own), PROBE: around(probed)}}, twins={"dfa": around(twin)[::-1]})
    assert found["dfa"].text == text


def test_one_seed_and_untrained_rows_have_no_verdict(tmp_path: Path) -> None:
    made = planned(tmp_path)
    found = judged(made, {row: {OWN: around(0.9)} for row in ("linear", "twin")})
    assert {each.text for each in found.values()} == {""}
    one = planned(tmp_path, TEXT.replace("seeds: 5", "seeds: 1"))
    single = floor_record(seeds=[0], test=[0.9], validation=[0.9], inputs=[0.9])
    assert judged(one, {"dfa": {OWN: [0.95]}}, record=single)["dfa"].text == "one seed only"


def test_another_readout_recipe_that_does_better_is_the_floor(tmp_path: Path) -> None:
    """The twin has 0.92 on validation, above the 0.91 of the converged readouts: the floor is its own prediction, or more."""
    made = planned(tmp_path)
    found = judged(made, {"dfa": {OWN: around(0.93)}, "twin": {OWN: around(0.92)}})
    assert found["dfa"].floor.name == "twin"
    assert found["dfa"].floor.at_least
    assert found["dfa"].delivered is not None
    assert found["dfa"].delivered.gain == pytest.approx(1)
    assert judged(made, {"dfa": {OWN: around(0.93)}, "twin": {OWN: around(0.905)}})["dfa"].floor.name == "b1"


def test_what_counts_as_a_converged_recipe(tmp_path: Path) -> None:
    text = TEXT + "  - {label: twice, settings: {rule: frozen, budget.epochs: 20}}\n"
    made = planned(tmp_path, text.replace("{rule: frozen}}", "{rule: frozen, budget.epochs: 10}}"))
    lines = {line.written.label: line for line in lines_of(made, {"twin": {OWN: around(0.9)}, "twice": {OWN: around(0.9)}})}

    def tuned(best: float, rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)) -> Tuned:
        trials = [Trial({}, "finished", 90 - abs(math.log10(rate / best)), values={"optimizer.lr": rate}) for rate in rates]
        return Tuned(["optimizer.lr"], trials, len(rates))

    twin, everything = lines["twin"], list(lines.values())
    assert not converged(twin, everything)
    twin.tuned = tuned(0.01)
    assert converged(twin, everything)
    twin.tuned = tuned(0.1)  # at the edge
    assert twin.tuned.at_edge == ["optimizer.lr"]
    assert not converged(twin, everything)
    twin.tuned = tuned(0.01, (0.003, 0.01, 0.03))
    assert not converged(twin, everything)
    twin.tuned = tuned(0.01)
    assert not converged(twin, [line for line in everything if line.written.label != "twice"])
    better = {line.written.label: line for line in lines_of(made, {"twin": {OWN: around(0.9)}, "twice": {OWN: around(0.92)}})}
    better["twin"].tuned = tuned(0.01)
    assert not converged(better["twin"], list(better.values()))
    # the test split has no say in it, and what is not known on validation may be better
    for outcome in better["twice"].finished:
        outcome.seen().history = lines["twin"].finished[0].history
    assert converged(better["twin"], list(better.values()))
    for outcome in better["twice"].finished:
        outcome.seen().history = []
    assert not converged(better["twin"], list(better.values()))


def test_of_real_targets_twice_the_budget_is_judged_by_the_loss(tmp_path: Path) -> None:
    text = TEXT + "  - {label: twice, settings: {rule: frozen, budget.epochs: 20}}\n"
    made = planned(tmp_path, text.replace("{rule: frozen}}", "{rule: frozen, budget.epochs: 10}}"))
    lines = {line.written.label: line for line in lines_of(made, {"twin": {OWN: around(0.9)}, "twice": {OWN: around(0.9)}})}
    trials = [Trial({}, "finished", float(place == 2), values={"optimizer.lr": 10.0**-place}) for place in range(5)]
    lines["twin"].tuned = Tuned(["optimizer.lr"], trials, 5)
    for better, expected in ((0.3, False), (0.5, True), (0.7, True)):
        for label, loss in (("twin", 0.5), ("twice", better)):
            for place, outcome in enumerate(lines[label].finished):
                outcome.seen().history, outcome.seen().result = [{"val/loss": loss + 0.001 * place}], {}
        assert converged(lines["twin"], list(lines.values()), LOSS) is expected


def test_untrained_rows_have_no_part_in_the_family(tmp_path: Path) -> None:
    """Holm's correction is for what is claimed: with two rows the smaller p counts twice, whatever controls stand beside them."""
    made = planned(tmp_path)
    rows = {"dfa": {OWN: around(0.902)}, "bp": {OWN: around(0.901)}, "twin": {OWN: around(0.7)}, "linear": {OWN: around(0.97)}}
    found = judged(made, rows)
    assert found["twin"].delivered is None
    assert found["linear"].delivered is None
    small, large = (found[label].delivered for label in ("dfa", "bp"))
    assert small is not None
    assert large is not None
    assert small.p < large.p
    assert small.adjusted == pytest.approx(2 * small.p)


def test_predictions_of_single_examples_widen_the_error(tmp_path: Path) -> None:
    """Row and floor differ in 30 of 300 examples, 20 to 10: Var_j(d_j) / N by hand."""
    made = planned(tmp_path)
    ours, floor = np.ones(300), np.ones(300)
    floor[:20], ours[20:30] = 0, 0
    for seed in range(5):
        (tmp_path / f"dfa-{seed}").mkdir()
        values = ours.astype(np.uint8)
        np.savez(tmp_path / f"dfa-{seed}" / "predictions.npz", predicted=values, correct=values)
    rows = {"dfa": {OWN: [290 / 300] * 5}}
    exact = floor_record(test=[280 / 300] * 5, examples={seed: floor.astype(np.uint8) for seed in range(5)})
    found = judged(made, rows, record=exact)["dfa"].delivered
    assert found is not None
    assert found.gain == pytest.approx(10 / 3)
    assert found.over_seeds == pytest.approx(0)
    assert found.error == pytest.approx(100 * np.std(ours - floor, ddof=1) / math.sqrt(300))


def test_the_report_has_numbers_and_verdicts(tmp_path: Path) -> None:
    made = planned(tmp_path)
    lines = lines_of(made, {"dfa": {OWN: around(0.93), PROBE: around(0.95)}, "bp": {OWN: around(0.98)}, "twin": {OWN: around(0.7)}})
    floors = Floors(made, CellStore(made.output, made.study.name).folder)
    bare = report_on(made, lines, ["study"], floors=floors)
    assert bare.floors == []
    assert "The floor was not measured for twin, dfa, bp." in bare.remarks
    for line in lines:
        floors.write(floors.id_of(line.cells[0]), floor_record(skipped=["b9 (9,000 features)"]))
    report = report_on(made, lines, ["study"], floors=floors)
    numbers, words = report.floors
    row = dict(zip(numbers.headers, next(cells for cells in numbers.table if cells[0] == "dfa"), strict=True))
    assert row == {
        "row": "dfa",
        "own test accuracy": "93.00",
        "probed": "95.00",
        "readout loses": "+2.00",
        "floor": "at least 90.00",
        "share of gap %": row["share of gap %"],
        "operations to floor": "20.0k",
        "of": "b1 (mlp)",
    }
    assert [cells[0] for cells in words.table] == ["dfa", "bp"]
    assert [cells[-1] for cells in words.table] == ["above its floor", "above its floor"]
    assert "nearest class mean of the inputs 90.25 %" in numbers.legend
    assert "5 % over the comparisons of each kind (features: 1, as delivered: 2; Holm)" in words.legend
    found = {each.row.written.label: each for each in verdicts(made, lines, floors, REPORTED)}
    sizes = [each.detectable or math.nan for label in ("dfa", "bp") if (each := found[label].delivered) is not None]
    assert f"as delivered {min(sizes):.2f}" in words.legend
    assert "Seeds for 1 point: features " in words.legend
    text = report.text()
    assert "Beside the floor" in text
    assert floor_finding(report.floors) == "Beside the floor: above its floor: dfa, bp."
    assert floor_finding([]) == ""
    assert "Too large to be read for the floor of mlp: b9 (9,000 features)." in text


def test_rows_share_a_floor_if_they_share_task_network_and_initialisation(tmp_path: Path) -> None:
    rows = "  - {label: wide, settings: {rule: dfa, network.width: 32}}\n  - {label: soft, settings: {rule: softhebb}}\n"
    rows += "  - {label: oja, settings: {rule: oja}}\n"
    made = planned(
        tmp_path, TEXT.replace("network.width: 16", "batch_size: 32").replace("{rule: dfa}", "{rule: dfa, optimizer.lr: 0.1}") + rows
    )
    keys = {cell.key.row: floor_key(cell) for cell in made.cells}
    assert keys["twin"] == keys["dfa"] == keys["bp"]
    assert len(set(keys.values())) == 5


def test_a_damaged_file_of_examples_costs_the_examples(tmp_path: Path) -> None:
    made = planned(tmp_path)
    name, right = Floors(made, tmp_path).id_of(made.cells[0]), np.array([1, 0, 1], np.uint8)
    Floors(made, tmp_path).write(name, floor_record(examples={0: right}))
    assert sorted(path.name for path in (tmp_path / "floors").iterdir()) == [f"{name}.json", f"{name}.npz"]
    known = Floors(made, tmp_path).read(name)
    assert known is not None
    assert known.examples[0].tolist() == right.tolist()
    whole = (tmp_path / "floors" / f"{name}.npz").read_bytes()
    for part in (b"", whole[: len(whole) // 2], b"PK" + whole[4:]):
        (tmp_path / "floors" / f"{name}.npz").write_bytes(part)
        assert Floors(made, tmp_path).read(name) == known
        assert Floors(made, tmp_path).read(name).examples == {}  # type: ignore[union-attr]


def test_who_stops_a_study_stops_the_floor_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What fails is a warning and the others are measured; what is asked to stop stops."""
    made = planned(tmp_path)
    lines = lines_of(made, {"dfa": {OWN: around(0.9)}, "linear": {OWN: around(0.9)}})
    asked: list[str] = []

    def stop(error: Exception) -> None:
        def measure(recipe: Any, *others: Any) -> FloorRecord:
            asked.append(recipe.names["rule"])
            raise error

        monkeypatch.setattr(floors_module, "measure_floor_of", measure)

    stop(RuntimeError("no features"))
    measure_floors(made, lines, tmp_path, lambda text: None)
    assert asked == ["linear", "frozen"]  # the first row of each network
    assert "RuntimeError: no features" in caplog.text
    stop(Interrupted("stopped by SIGINT", None))
    with pytest.raises(Interrupted):
        measure_floors(made, lines, tmp_path, lambda text: None)


def test_tasks_without_targets_have_no_floor_and_miss_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(tmp_path)
    lines = lines_of(made, {"dfa": {OWN: around(0.9)}})
    floors = Floors(made, tmp_path)
    assert "The floor was not measured for dfa." in report_on(made, lines, ["study"], floors=floors).remarks
    without = TaskSpec("bare", (1, 8, 8), 1, "none")
    monkeypatch.setattr(type(made.cells[0].recipe), "spec", lambda recipe: without)
    said: list[str] = []
    measure_floors(made, lines, tmp_path, said.append)
    assert said == []
    assert not any("floor" in remark for remark in report_on(made, lines, ["study"], floors=floors).remarks)


class OwnLoss(TaskSpec):
    """Real targets, absolute errors."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return (outputs - batch.targets).abs().mean()


def test_a_loss_of_the_tasks_own_is_not_compared_with_squared_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(4, 2), torch.zeros(4, 1))
    tasks = TaskCache()
    monkeypatch.setattr(tasks, "get", lambda recipe: Task(OwnLoss("own", (2,), 1, "real"), split, None, split))
    with pytest.raises(BpfreeError, match="a loss of its own"):
        measure_floor_of(planned(tmp_path).cells[0].recipe, [0], tasks, {})


def test_a_study_measures_probes_and_twins(workplace: Path) -> None:
    """One that is run: records of floors, features that are read, and a twin with as many operations; run again, nothing is."""
    text = TEXT.replace("seeds: 5", "seeds: 2\nequal_budget: true").replace("network.width: 16", "network.width: 8, network.depth: 1")
    Path("judged.yaml").write_text(text)
    words = ["study", "run", "judged.yaml", "budget.epochs=2", "tracking.enabled=false", "--quiet", "--rows", "twin,dfa"]
    assert call(*words) == 0
    records = {(each["row"], each["seed"]): each for each in outcomes()}
    assert set(records) == {(row, seed) for row in ("twin", "dfa", "dfa (twin)") for seed in (0, 1)}
    for seed in (0, 1):
        spent = [records[row, seed]["result"]["train/operations"] for row in ("dfa", "dfa (twin)")]
        step = 64 * 2 * 8 * 10 * 10  # more than a step of the twin
        assert spent[0] <= spent[1] < spent[0] + 64 * 2 * (64 * 8 + 3 * 8 * 10) + step
        assert PROBE in records["dfa", seed]["result"]
        assert records["dfa", seed]["result"]["linear_probe/penalty_on_validation"] == 1
        assert PROBE not in records["dfa (twin)", seed]["result"]
    kept = sorted(Path("runs/studies/judged/floors").glob("*.json"))
    contents = [json.loads(path.read_text()) for path in kept]
    assert [each["network"] for each in contents] == ["mlp"]
    assert contents[0]["gradient"] <= 1e-4
    made = [*Path("runs").rglob("floors/*"), *Path("runs").rglob("cells/*.json")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert call(*words) == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
