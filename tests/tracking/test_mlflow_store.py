"""What a run leaves in an MLflow store. The oracle is what MLflow's own client reads back."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import children
import pytest

from bpfree.errors import BpfreeError, UsageError
from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.recorder import Recorder
from bpfree.run import Run
from bpfree.tasks.facts import facts_of
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.mlflow_tracker import MLflowTracker
from bpfree.tracking.sending import Tracking, is_sent
from bpfree.tracking.store import file_lock


def finish(run, tracker, status="finished", **result):
    run.status, run.result = status, result
    tracker.run_end(run)


def test_a_run_arrives_whole(uri, new_run, track, epoch, stored):
    """Everything that was told is there: params, tags, every point, results, dataset, files."""
    config = {"rule.name": "dfa", "seed": 3, "task.augment": ["crop", "flip"], "note": "x" * 7000}
    run = new_run(config=config, tags={"task": "digits", "data_fingerprint": "f" * 64, "device": "cpu"}, total_epochs=3)
    (run.folder / "config.yaml").write_text("seed: 3\n")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "last.pt").write_bytes(b"weights")
    (run.folder / "plots").mkdir()
    run.artifacts["plots/curves.svg"] = run.folder / "plots" / "curves.svg"
    run.artifacts["plots/curves.svg"].write_bytes(b"<svg/>")
    tracker = track(uri, model="false")
    tracker.run_start(run)
    for number in (1, 2, 3):
        tracker.progress(run, {"step": 10.0 * number, "progress": number / 3, "rule/loss": 0.5})
        epoch(run, tracker, number)
    finish(run, tracker, **{"test/accuracy": 0.75})

    found, points = stored(run, uri)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert {key: found.data.params[key] for key in ("rule.name", "seed", "task.augment")} == {
        "rule.name": "dfa",
        "seed": "3",
        "task.augment": '["crop", "flip"]',
    }
    assert len(found.data.params["note"]) <= 6000
    assert found.data.params["note"].endswith("(7000 characters)")
    assert found.data.tags["status"] == "finished"
    assert found.data.tags["device"] == "cpu"
    assert points["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert points["step/rule/loss"] == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert points["test/accuracy"] == [(3, 0.75)]
    dataset = found.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("digits", "f" * 36)
    from mlflow.artifacts import list_artifacts

    paths = {
        a.path
        for folder in ("", "plots", "checkpoints")
        for a in list_artifacts(run_id=found.info.run_id, artifact_path=folder or None, tracking_uri=uri)
    }
    assert {"config.yaml", "environment.json", "plots/curves.svg", "checkpoints/last.pt"} <= paths
    assert is_sent(run.folder)
    assert run.tracking["mlflow_experiment_id"] == found.info.experiment_id


def test_experiments_open_as_training(uri, new_run, track, stored):
    """MLflow's interface reads the tag; an experiment that was made before gets it, and keeps its description."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.create_experiment("older", tags={"mlflow.note.content": "mine"})
    for name in ("older", "newer"):
        run = new_run(name)
        tracker = track(uri, experiment=name)
        tracker.run_start(run)
        finish(run, tracker)
    tags = {name: client.get_experiment_by_name(name).tags for name in ("older", "newer")}
    assert {name: each["mlflow.experimentKind"] for name, each in tags.items()} == dict.fromkeys(tags, "custom_model_development")
    assert tags["older"]["mlflow.note.content"] == "mine"
    assert "study_row" in tags["newer"]["mlflow.note.content"]


def test_tags_say_where_a_run_comes_from(uri, new_run, track, stored, tmp_path, monkeypatch):
    """Oracle: git itself. No tag is empty, and no address has its secrets."""

    def git(*words):
        done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/bpfree", "train", "rule=dfa", "tracking.uri=http://me:secret@host", "note=two words"])
    git("init", "-q", ".")
    Path("mine.py").write_text("1\n")
    git("add", "mine.py")
    git("commit", "-q", "-m", "first")
    tags = {"rule": "dfa", "task": "digits", "cuda": "", "seed": "3"}
    found = []
    for name, text in (("clean", "1\n"), ("changed", "2\n")):
        Path("mine.py").write_text(text)
        run = new_run(name, tags=dict(tags))
        tracker = track(uri)
        tracker.run_start(run)
        finish(run, tracker)
        found.append(stored(run, uri)[0].data.tags)
    assert {one["mlflow.source.git.commit"] for one in found} == {git("rev-parse", "HEAD")}
    assert [one["mlflow.source.git.dirty"] for one in found] == ["false", "true"]
    assert found[0]["command"] == "bpfree train rule=dfa 'tracking.uri=http://***@host' 'note=two words'"
    assert found[0]["mlflow.source.name"] == "bpfree"
    assert "`dfa` on `digits`" in found[0]["mlflow.note.content"]
    assert all(value for one in found for value in one.values())


def test_outside_of_a_repository_there_is_no_commit(uri, new_run, track, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    finish(run, tracker)
    assert "mlflow.source.git.commit" not in stored(run, uri)[0].data.tags


def test_a_cell_is_named_by_its_place(uri, new_run, track, stored):
    """Runs of a study have the same rule and task, so that their own names say little."""
    cells = {
        "DFA seed 2": {"study_row": "DFA", "study_column": "", "seed": "2"},
        "DFA [deep] seed 2": {"study_row": "DFA", "study_column": "deep", "seed": "2"},
        "DFA trial 5": {"study_row": "DFA", "seed": "2", "study_trial": "5"},
    }
    for number, (name, tags) in enumerate(cells.items()):
        run = new_run(f"run{number}", tags=tags)
        tracker = track(uri)
        tracker.run_start(run)
        finish(run, tracker)
        assert stored(run, uri)[0].info.run_name == name


def test_parameters_are_what_tells_runs_apart(uri, new_run, track, stored):
    """Others are in the configuration's file; one that a resumed run changes is a tag, though the run had not named it."""
    run = new_run(config={"rule.name": "dfa", "evaluation.every": 1}, parameters=("rule.name",))
    (run.folder / "config.yaml").write_text("rule: dfa\n")
    tracker = track(uri, artifacts=False)
    tracker.run_start(run)
    finish(run, tracker, "interrupted")
    assert stored(run, uri)[0].data.params == {"rule.name": "dfa"}
    config = {"rule.name": "dfa", "evaluation.every": 5}
    again = new_run(config=config, parameters=("rule.name", "evaluation.every"), resumed=True, tracking=dict(run.tracking))
    tracker = track(uri, artifacts=False)
    tracker.run_start(again)
    finish(again, tracker)
    found, _ = stored(again, uri)
    assert found.data.params == {"rule.name": "dfa"}
    assert found.data.tags["resumed/evaluation.every"] == "5"
    from mlflow.artifacts import list_artifacts

    assert [entry.path for entry in list_artifacts(run_id=found.info.run_id, tracking_uri=uri)] == ["config.yaml"]


def test_a_data_set_has_its_schema_and_its_sizes(uri, new_run, track, stored, digits):
    """Oracle: MLflow's own reader of schemas."""
    import json

    from mlflow.data.schema import TensorDatasetSchema

    run = new_run(tags={"task": "digits", "data_fingerprint": digits.fingerprint()}, data=facts_of(digits))
    tracker = track(uri)
    tracker.run_start(run)
    finish(run, tracker)
    dataset = stored(run, uri)[0].inputs.dataset_inputs[0].dataset
    schema = TensorDatasetSchema.from_dict(json.loads(dataset.schema))
    assert [(one.type, one.shape) for one in schema.features.inputs] == [("float32", (-1, 1, 8, 8))]
    assert [(one.type, one.shape) for one in schema.targets.inputs] == [("int64", (-1,))]
    sizes = {"train_rows": len(digits.train), "validation_rows": len(digits.validation), "test_rows": len(digits.test)}
    assert json.loads(dataset.profile) == {"num_rows": 1797} | sizes
    assert dataset.digest == digits.fingerprint()


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("diverged", "FAILED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_status(uri, new_run, track, stored, status, expected):
    """Oracle: MLflow's own states."""
    run = new_run(reason="because")
    tracker = track(uri)
    tracker.run_start(run)
    assert stored(run, uri)[0].info.status == "RUNNING"
    finish(run, tracker, status)
    found, _ = stored(run, uri)
    assert found.info.status == expected
    assert (found.data.tags["status"], found.data.tags["reason"]) == (status, "because")


def test_default_store_is_beside_the_output_folder(tmp_path, monkeypatch):
    """Documented rule: configured, else MLFLOW_TRACKING_URI, else mlflow.db in the output folder's parent."""
    assert TrackingConfig().resolve_uri(tmp_path / "runs") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert TrackingConfig().resolve_uri(tmp_path / "runs") == "http://elsewhere:5000"
    assert TrackingConfig(uri="sqlite:///x.db").resolve_uri(tmp_path / "runs") == "sqlite:///x.db"


def test_names_that_mlflow_refuses_are_mended(uri, new_run, track, stored):
    """Identity: one metric in, one metric out, whatever its name."""
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0, "rule/α (mean)": 2.0, "../up": 3.0})
    finish(run, tracker)
    _, points = stored(run, uri)
    assert points["rule/_ _mean_"] == [(1, 2.0)]
    assert points["_/up"] == [(1, 3.0)]


def test_non_finite_metrics(uri, new_run, track, stored):
    """NaN stays NaN; an infinite value, which MLflow stores as the largest float, is named by a tag."""
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0, "a": math.nan, "b": math.inf, "c": 1.0})
    tracker.epoch_end(run, {"epoch": 2.0, "a": 1.0, "b": -math.inf, "c": -math.inf})
    finish(run, tracker)
    found, points = stored(run, uri)
    assert math.isnan(points["a"][0][1])
    assert points["b"][0][1] > 1e308
    assert found.data.tags["infinite_metrics"] == "b at 1, c at 2"


def test_more_metrics_than_one_call_takes(uri, new_run, track):
    """MLflow takes 1000 per call; 2500 arrive."""
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0} | {f"rule/b{i}/loss": float(i) for i in range(2500)})
    finish(run, tracker)
    from mlflow import MlflowClient

    found = MlflowClient(uri).get_run(run.tracking["mlflow_run_id"]).data.metrics
    assert found == {"epoch": 1.0} | {f"rule/b{i}/loss": float(i) for i in range(2500)}


def test_resumed_run_goes_on_without_duplicates(uri, new_run, track, epoch, stored):
    """Stopped after epoch 4, resumed from a checkpoint of epoch 2, with one setting changed: one run, one point per key and step."""
    run = new_run(config={"budget.epochs": 5}, reason="stopped by SIGINT")
    tracker = track(uri)
    tracker.run_start(run)
    for number in (1, 2, 3, 4):
        tracker.progress(run, {"step": 10.0 * number, "rule/loss": 1.0})
        epoch(run, tracker, number)
    finish(run, tracker, "interrupted")

    again = new_run(config={"budget.epochs": 6}, resumed=True, epoch=2, history=run.history[:2], tracking=dict(run.tracking))
    tracker = track(uri)
    tracker.run_start(again)
    assert again.tracking["mlflow_run_id"] == run.tracking["mlflow_run_id"]
    assert stored(again, uri)[0].info.status == "RUNNING"
    for number in (3, 4, 5, 6):
        tracker.progress(again, {"step": 10.0 * number, "rule/loss": 1.0})
        epoch(again, tracker, number)
    finish(again, tracker, **{"test/accuracy": 0.5})
    found, points = stored(again, uri)
    assert found.info.status == "FINISHED"
    assert points["train/loss"] == [(n, 1 / n) for n in range(1, 7)]
    assert points["step/rule/loss"] == [(10 * n, 1.0) for n in range(1, 7)]
    assert found.data.params["budget.epochs"] == "5"
    assert found.data.tags["resumed/budget.epochs"] == "6"
    assert found.data.tags["status"] == "finished"
    assert "reason" not in found.data.tags


def test_run_resumed_on_another_store_brings_its_history(tmp_path, template, uri, new_run, track, epoch, stored):
    """The store never saw the run: a new one begins there, with every epoch."""
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    finish(run, tracker, "interrupted")
    first = run.tracking["mlflow_run_id"]
    shutil.copy(template, tmp_path / "other.db")
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    run = new_run(resumed=True, epoch=2)
    tracker = track(uri)
    tracker.run_start(run)
    epoch(run, tracker, 3)
    finish(run, tracker)
    assert run.tracking["mlflow_run_id"] != first
    _, points = stored(run, uri)
    assert points["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_deleted_run_costs_a_warning(uri, new_run, track, epoch, caplog):
    """Somebody deletes the run while it trains: what is refused is noted with the reason, nothing is raised."""
    run = new_run()
    tracker = track(uri)
    tracker.run_start(run)
    from mlflow import MlflowClient

    MlflowClient(uri).delete_run(run.tracking["mlflow_run_id"])
    epoch(run, tracker, 1)
    finish(run, tracker)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    refused = Cursor.read(RunFolder(run.folder).cursor("mlflow")).refused
    assert {event["event"] for event in refused if "active" in event["reason"]} >= {"epoch", "end"}


def test_folder_of_files_is_refused(tmp_path, new_run, track):
    """MLflow raises for it since 3.17: one error with the way out, before training."""
    if not hasattr(pytest.importorskip("mlflow.environment_variables"), "MLFLOW_ALLOW_FILE_STORE"):
        pytest.skip("this MLflow still tracks to folders")
    with pytest.raises(UsageError, match="sqlite:///") as caught:
        track(f"file://{tmp_path}/mlruns").run_start(new_run())
    assert caught.value.exit_code == 2


def test_required_store_that_cannot_be_made(tmp_path, new_run, track):
    """A file stands where the database's folder should be."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(BpfreeError, match="tracking store"):
        track(f"sqlite:///{tmp_path}/taken/mlflow.db", required=True).run_start(new_run())


def test_disabled_does_nothing(tmp_path, new_run, track):
    """Not even a file."""
    run = new_run()
    tracker = track(None, enabled=False)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0})
    tracker.run_end(run)
    assert list(tmp_path.rglob("*.db")) == []
    assert run.tracking == {}


def test_without_mlflow(new_run, track, monkeypatch, caplog):
    """An installation without MLflow trains; unless tracking is required."""
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    run = new_run()
    tracker = track(None)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0})
    tracker.run_end(run)
    assert len(caplog.records) == 1
    with pytest.raises(BpfreeError, match="pip install mlflow"):
        track(None, required=True).run_start(run)


def test_password_in_the_address_is_not_logged(new_run, uri, track, stored):
    """The address is a configuration key, hence a parameter."""
    run = new_run(config={"tracking.uri": "http://me:secret@host:5000"})
    tracker = track(uri)
    tracker.run_start(run)
    finish(run, tracker)
    assert stored(run, uri)[0].data.params["tracking.uri"] == "http://***@host:5000"


def one_process(folder: str, number: int, together: Barrier) -> None:
    import mlflow.tracking  # noqa: F401

    together.wait(120)
    run = Run(f"id{number}", f"run{number}", folder=Path(folder, "runs", f"id{number}"))
    tracker = Recorder([Tracking(TrackingConfig(system=False, interval=0.05, required=True), {"mlflow": MLflowTracker})])
    tracker.run_start(run)
    for epoch in range(1, 6):
        tracker.epoch_end(run, {"epoch": float(epoch), "loss": 1 / epoch})
    run.status = "finished"
    tracker.run_end(run)


@pytest.mark.time_dependent
def test_processes_that_meet_a_new_database(tmp_path, monkeypatch):
    """Without the lock all but one die in MLflow's migrations (measured); with it all four runs are complete."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    context = children.context()  # in which MLflow is loaded: they meet at once
    together = context.Barrier(4)
    workers = [context.Process(target=one_process, args=(str(tmp_path), number, together)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("bpfree").experiment_id])
    assert Counter(run.info.status for run in runs) == {"FINISHED": 4}
    assert all(len(client.get_metric_history(run.info.run_id, "loss")) == 5 for run in runs)


@pytest.mark.time_dependent
def test_a_lock_is_waited_for_and_released_by_a_kill(tmp_path):
    """Oracle: a process that holds the lock and is killed without a chance to release it."""
    code = (
        f"from pathlib import Path; from bpfree.tracking.store import *\nwith file_lock(Path({str(tmp_path)!r}) / 'lock'): print(); input()"
    )
    with subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(TimeoutError), file_lock(tmp_path / "lock", timeout=0.1):
            pass
        holder.kill()
        holder.wait()
        with file_lock(tmp_path / "lock", timeout=10):
            pass


def test_import_is_cheap_and_telemetry_is_off(tmp_path):
    """A process of its own, outside of a test's environment: nothing heavy until a run starts; then no telemetry client."""
    code = f"""
        import sys
        from pathlib import Path
        from bpfree.record import folder, recorder
        from bpfree.tracking import config, file_trackers, mlflow_tracker, plots, progress, sending, system
        heavy = [name for name in ("mlflow", "torch", "torchvision", "matplotlib", "rich") if name in sys.modules]
        assert not heavy, heavy
        from bpfree.run import Run
        options = config.TrackingConfig(uri="sqlite:///{tmp_path}/x/mlflow.db", required=True)
        tracker = recorder.Recorder([sending.Tracking(options, {{"mlflow": mlflow_tracker.MLflowTracker}})])
        run = Run("id", "name", folder=Path("{tmp_path}/runs/id"))
        tracker.run_start(run)
        tracker.run_end(run)
        import mlflow.telemetry
        assert mlflow.telemetry.get_telemetry_client() is None
    """
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
