"""Runs that are killed outright and continue. Oracle: the same run undisturbed, its weights and what the store has of it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child
from killed_runs import NAME, TAGS, be_killed, go_on, recipe_in, start
from training_rules import assert_equal_bits

from bpfree import BpfreeError, Run, UsageError, runner
from bpfree.config import parse_words
from bpfree.record.folder import RunFolder, read_run
from bpfree.tracking.sending import complete, config_of, is_sent, send
from bpfree.training.checkpoint import read_checkpoint

TIMES = ("seconds", "processor_seconds", "samples_per_second", "step_ms", "load_start", "load_end")

pytestmark = pytest.mark.time_dependent


def files_of(run_id: str, uri: str) -> list[str]:
    from mlflow.artifacts import list_artifacts

    files, folders = [], [""]
    while folders:
        for entry in list_artifacts(run_id=run_id, artifact_path=folders.pop() or None, tracking_uri=uri):
            (folders if entry.is_dir else files).append(entry.path)
    return sorted(files)


def tracked(uri: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """The only run in the store, and the points of its metrics; each metric has one value per step."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("bpfree")
    (found,) = client.search_runs([experiment.experiment_id])
    points = {key: [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, key)] for key in found.data.metrics}
    for key, values in points.items():
        assert len(values) == len({step for step, _ in values}), key
    return found, points


def untimed(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {
        key: sorted(values)
        for key, values in points.items()
        if key.split("/")[-1] not in TIMES and not key.startswith(("system/", "step/"))
    }


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder / "runs" / NAME / "checkpoints" / name)["weights"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, template: Path) -> tuple[Path, str, Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(template, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return folder, uri, start(folder, uri)


@pytest.fixture(scope="module")
def killed() -> Callable[..., None]:
    """Runs in a process until it is killed."""

    def run(*arguments: Any) -> None:
        process = Child(be_killed, *arguments)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors

    return run


POINTS = [
    *(("store:created", True), ("run_start", True), ("run_start", False), ("step_end:10", True), ("epoch_end:1", True)),
    *(("epoch_end:1", False), ("checkpoint_saved:1", True), ("step_end:40", True), ("epoch_end:2", True), ("epoch_end:2", False)),
    *(("checkpoint_saved:3", True), ("run_end", True), ("run_end", False), ("store:file", True), ("store:end", True)),
    *(("store:is sent", True), ("afterwards", False)),
]


@pytest.mark.parametrize(("point", "patient"), POINTS)
def test_a_run_that_is_killed_anywhere_ends_as_if_nothing_had_happened(
    tmp_path: Path, uri: str, undisturbed: tuple[Path, str, Run], killed: Callable[..., None], point: str, patient: bool
) -> None:
    """With ``patient`` the store has all that was told before the kill; without, whatever it had time for."""
    folder, other_uri, straight = undisturbed
    killed(tmp_path, uri, point, patient, False)
    run = go_on(tmp_path, uri)
    assert (run.id, run.status) == (NAME, "finished")
    for name in ("last.pt", "selected.pt"):
        assert_equal_bits(weights_of(tmp_path, name), weights_of(folder, name))
    assert run.result["test/accuracy"] == straight.result["test/accuracy"]
    (found, points), (expected, wanted) = tracked(uri), tracked(other_uri)
    assert untimed(points) == untimed(wanted)
    assert points.keys() == wanted.keys()
    assert (found.info.status, found.data.tags["status"]) == ("FINISHED", "finished")
    assert found.data.params.keys() == expected.data.params.keys()
    assert found.data.tags.items() >= TAGS.items()
    assert found.data.tags.keys() - {"reason"} == expected.data.tags.keys() - {"reason"}
    assert found.data.tags["test_evaluations"] == "1"
    assert len(found.inputs.dataset_inputs) == 1
    assert files_of(found.info.run_id, uri) == files_of(expected.info.run_id, other_uri)
    assert is_sent(tmp_path / "runs" / NAME)


@pytest.mark.parametrize("point", ["step_end:20", "step_end:40"])
def test_samples_of_the_systems_use_keep_one_value_per_step(tmp_path: Path, uri: str, killed: Callable[..., None], point: str) -> None:
    """Their steps continue from the first attempt's beginning."""
    killed(tmp_path, uri, point, True, True)
    _, before = tracked(uri)
    began = tracked(uri)[0].info.start_time
    run = go_on(tmp_path, uri, system=True)
    found, points = tracked(uri)
    samples = {key: values for key, values in before.items() if key.startswith("system/")}
    assert samples
    for key, values in samples.items():
        assert points[key][: len(values)] == values
    assert found.info.status == "FINISHED"
    assert int(run.tracking["mlflow_started"]) == found.info.start_time == began


def test_completing_a_run_that_is_there_changes_nothing(tmp_path: Path, uri: str) -> None:
    run = start(tmp_path, uri)
    assert run.folder is not None
    before, points = tracked(uri)
    left = run.folder / ".sent-mlflow.json-0123abcd"  # of a writer that was killed
    left.write_bytes(b"half")
    assert complete(run.folder)
    assert not left.exists()
    again = runner.resume(str(run.folder))
    after, same = tracked(uri)
    assert (same, after.info.end_time, after.data.tags) == (points, before.info.end_time, before.data.tags)
    assert again.result == run.result
    assert [entry["epoch"] for entry in again.history] == [1, 2, 3]


def test_a_store_that_lost_the_run_gets_it_again(tmp_path: Path, uri: str, template: Path) -> None:
    """Another, empty store in its place: everything is sent once more, with the time at which the run began and ended."""
    run = start(tmp_path, uri)
    before, points = tracked(uri)
    for path in tmp_path.glob("mlflow.db*"):
        path.unlink()
    shutil.copy(template, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert run.folder is not None
    assert send(run.folder, dataclasses.replace(config_of(run), uri=other)) == []
    after, same = tracked(other)
    assert same == points
    assert after.info.status == "FINISHED"
    assert after.info.start_time == before.info.start_time
    assert abs(after.info.end_time - before.info.end_time) < 1000 * 60


def test_completing_where_it_cannot_be_done(tmp_path: Path, uri: str, closed_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is a warning; a run that is not tracked has nothing to complete; a folder without a run is an error."""
    run = start(tmp_path, uri)
    assert run.folder is not None
    RunFolder(run.folder).cursor("mlflow").unlink()
    log = run.folder / "events.jsonl"
    text = log.read_text()
    log.write_text(
        text.replace(uri, f"http://127.0.0.1:{closed_port}").replace('"tracking.flush_timeout": 30.0', '"tracking.flush_timeout": 0.1')
    )
    assert not complete(run.folder)
    assert "MLflow at" in caplog.text
    log.write_text(text.replace(uri, "nowhere://").replace('"tracking.enabled": true', '"tracking.enabled": false'))
    assert complete(run.folder)
    with pytest.raises(BpfreeError, match="no record of a run"):
        complete(tmp_path)


def test_what_an_attempt_left_behind_is_replaced(tmp_path: Path, uri: str) -> None:
    """Files of the run itself; those of others stay. A run with a checkpoint is not begun again."""
    folder = tmp_path / "runs" / NAME
    (folder / "pictures" / "b9").mkdir(parents=True)
    (folder / "events.jsonl").write_text('{"event": "epoch", "time": 1, "epoch": 9, "metrics": {"epoch": 9}}\n{"event"')
    (folder / "notes.txt").write_text("mine")
    run = start(tmp_path, uri)
    assert run.reopened
    assert (run.folder, run.id) == (folder, NAME)
    assert [metrics["epoch"] for metrics in read_run(folder).history] == [1, 2, 3]
    assert not (folder / "pictures" / "b9").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="has a checkpoint"):
        start(tmp_path, uri)
    for name in ("..", ".", "", "a/b"):
        with pytest.raises(UsageError, match="name of its folder"):
            runner.run(recipe_in(tmp_path, uri), run_id=name)


def test_tags_of_a_run_that_goes_on_reach_the_store(tmp_path: Path, uri: str) -> None:
    """New ones beside the old ones, which the log keeps."""
    run = start(tmp_path, uri)
    longer = runner.resume(str(run.folder), changes=parse_words(["budget.epochs=4"]), quiet=True, tags={"stage": "longer"})
    found, points = tracked(uri)
    for tags in (found.data.tags, longer.tags):
        assert tags.items() >= {**TAGS, "stage": "longer", "test_evaluations": "2"}.items()
    assert [step for step, _ in points["test/accuracy"]] == [3, 4]
    with contextlib.suppress(KeyError):
        assert found.data.tags["mlflow.user"] == longer.tags["mlflow.user"]


def test_a_task_that_is_loaded_already_is_used_when_a_run_goes_on(tmp_path: Path, uri: str) -> None:
    run = start(tmp_path, uri)
    task = recipe_in(tmp_path, uri).build_task()
    task.train.inputs.zero_()  # other examples would show
    fingerprint = task.fingerprint()
    with pytest.raises(BpfreeError, match="other data"):
        runner.resume(str(run.folder), changes=parse_words(["budget.epochs=4"]), quiet=True, task=task)
    assert task.fingerprint() == fingerprint


@pytest.mark.makes_database
def test_a_database_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended before the tables are all there, nothing has the database's name, and the next attempt makes it."""
    from bpfree.tracking import store
    from bpfree.tracking.events import Opening

    path = tmp_path / "mlflow.db"
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.Store(f"sqlite:///{path}", 10).connect()
    assert not path.exists()
    again = store.Store(f"sqlite:///{path}", 10)
    assert not again.open(Opening(again.uri, "bpfree", "a run", 1, {"bpfree.run": "x"}), search=True)
    assert again.open(Opening(again.uri, "bpfree", "a run", 1, {"bpfree.run": "x"}), search=True)
    assert not list(tmp_path.glob(".mlflow.db.new*"))
