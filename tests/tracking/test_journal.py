"""The run's own record, read back with a strict JSON reader."""

from __future__ import annotations

import json
import math

from bpfree.tracking.journal import Journal


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def read(path):
    return json.loads(path.read_text(), parse_constant=refuse)


def lines(run):
    return [json.loads(line, parse_constant=refuse) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run(new_run, epoch):
    """Round trip: what observers were told is what the files say, at any time."""
    run = new_run(tags={"rule": "dfa"}, total_epochs=2, tracking={"mlflow_run_id": "abc"})
    journal = Journal()
    journal.run_start(run)
    begun = read(run.folder / "run.json")
    assert (begun["status"], begun["epoch"], begun["total_epochs"]) == ("running", 0, 2)
    told = [epoch(run, journal, number) for number in (1, 2)]
    run.status, run.result = "finished", {"test/accuracy": 0.5}
    run.artifacts["plots/curves.png"] = run.folder / "plots" / "curves.png"
    journal.run_end(run)
    assert lines(run) == told
    ended = read(run.folder / "run.json")
    assert (ended["id"], ended["name"], ended["status"], ended["epoch"]) == (run.id, run.name, "finished", 2)
    assert ended["result"] == {"test/accuracy": 0.5}
    assert ended["tracking"] == {"mlflow_run_id": "abc"}
    assert ended["tags"] == {"rule": "dfa"}
    assert ended["artifacts"] == {"plots/curves.png": "plots/curves.png"}
    assert ended["started"] <= ended["ended"]
    assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.jsonl", "run.json"]


def test_resume_drops_later_epochs(new_run, epoch):
    """Written up to epoch 4 and into a torn line, resumed at 2: then 3 and 4 again, each once."""
    run = new_run()
    journal = Journal()
    journal.run_start(run)
    told = [epoch(run, journal, number) for number in (1, 2, 3, 4)]
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5.0, "tra')
    started = read(run.folder / "run.json")["started"]

    again = new_run(resumed=True, epoch=2, history=run.history[:2])
    journal = Journal()
    journal.run_start(again)
    assert lines(again) == told[:2]
    epoch(again, journal, 3)
    epoch(again, journal, 4)
    assert lines(again) == told
    assert read(run.folder / "run.json")["started"] == started
    assert len(read(run.folder / "run.json")["resumed"]) == 1


def test_resume_elsewhere_writes_the_history(new_run):
    """The folder was lost, the checkpoint was not."""
    run = new_run(resumed=True, epoch=2, history=[{"epoch": 1.0, "a": 1.0}, {"epoch": 2.0, "a": 2.0}])
    Journal().run_start(run)
    assert lines(run) == run.history


def test_a_new_run_begins_anew(new_run, epoch):
    """Leftovers of another run in the same folder are not its epochs."""
    run = new_run()
    (run.folder / "metrics.jsonl").write_text('{"epoch": 9}\n')
    journal = Journal()
    journal.run_start(run)
    epoch(run, journal, 1)
    assert [line["epoch"] for line in lines(run)] == [1.0]


def test_non_finite_numbers(new_run):
    """Strict JSON, and ``float`` gives the number back."""
    run = new_run(result={"test/loss": math.inf}, tags={"a": "b"})
    journal = Journal()
    journal.run_start(run)
    journal.epoch_end(run, {"epoch": 1.0, "a": math.nan, "b": math.inf, "c": -math.inf})
    journal.run_end(run)
    (line,) = lines(run)
    assert math.isnan(float(line["a"]))
    assert (float(line["b"]), float(line["c"])) == (math.inf, -math.inf)
    assert float(read(run.folder / "run.json")["result"]["test/loss"]) == math.inf


def test_without_a_folder(new_run, tmp_path):
    """Nothing is written."""
    run = new_run()
    run.folder = None
    before = sorted(tmp_path.rglob("*"))
    journal = Journal()
    journal.run_start(run)
    journal.epoch_end(run, {"epoch": 1.0})
    journal.run_end(run)
    assert sorted(tmp_path.rglob("*")) == before
