"""A run's MLflow model. Oracles: MLflow's own loader and client; what ``bpfree.load`` predicts; the files themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bpfree
from bpfree import runner
from bpfree.config import resolve
from bpfree.record.folder import Cursor, RunFolder, read_run
from bpfree.run import Run
from bpfree.tasks.check import check_inputs
from bpfree.tasks.spec import TaskSpec
from bpfree.tracking import model
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.sending import send
from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

FILES = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "data/weights.pt"}
EXAMPLE = {"input_example.json", "serving_input_example.json"}
Train = Callable[..., Run]


@pytest.fixture
def train(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train for an epoch, and track it."""
    monkeypatch.chdir(tmp_path)

    def make(**settings: Any) -> Run:
        quick = {"rule": "dfa", "task": "digits", "budget.epochs": 1, "tracking.system": False, "tracking.uri": uri, "pictures.every": 0}
        return runner.run(resolve(quick | settings), quiet=True)

    return make


@pytest.fixture
def mlflow(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow with its global address set to the store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # its thread would outlive the test
    mlflow.set_tracking_uri(uri)
    yield mlflow
    mlflow.set_tracking_uri(None)


def logged(mlflow: Any, run: Run) -> list[Any]:
    """The models of a run, the latest first."""
    return list(
        mlflow.MlflowClient().search_logged_models(
            [run.tracking["mlflow_experiment_id"]], filter_string=f"source_run_id = '{run.tracking['mlflow_run_id']}'"
        )
    )


def files(mlflow: Any, found: Any, target: Path) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"models:/{found.model_id}", dst_path=str(target)))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_a_model_that_predicts(train: Train, mlflow: Any, tmp_path: Path, digits: bpfree.Task) -> None:
    run = train(**{"tracking.register": "digits"})
    place = f"runs:/{run.tracking['mlflow_run_id']}/model"
    found, saved = mlflow.pyfunc.load_model(place), bpfree.load(run.folder)
    inputs = digits.test.inputs[:7].numpy()
    table = found.predict(inputs)
    assert table["prediction"].tolist() == saved.predict_classes(inputs)
    np.testing.assert_array_equal(table.filter(like="probability_").to_numpy(), saved.predict_proba(inputs))
    assert list(table.columns) == found.metadata.signature.outputs.input_names()
    np.testing.assert_array_equal(found.predict(inputs, params={"scores": True}), saved.predict(inputs).numpy())
    assert len(found.predict(found.input_example)) == 1

    (known,) = logged(mlflow, run)
    assert (known.status, known.name) == ("READY", "model")
    assert {metric.key: metric.value for metric in known.metrics}["test/accuracy"] == run.result["test/accuracy"]
    assert {metric.dataset_digest for metric in known.metrics} == {run.tags["data_fingerprint"]}
    (version,) = mlflow.MlflowClient().search_model_versions("name = 'digits'")
    assert (version.source, version.run_id) == (known.artifact_location, run.tracking["mlflow_run_id"])

    folder = files(mlflow, known, tmp_path / "fetched")
    (folder / "registered_model_meta").unlink(missing_ok=True)  # MLflow writes it into whatever it loads
    assert names(folder) == FILES | EXAMPLE  # nothing is pickled beside the weights
    assert "training" not in torch.load(folder / "data/weights.pt", weights_only=True)
    needed = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert needed.keys() == {"mlflow", "bpfree", "torch", "numpy", "pandas"}
    assert needed["bpfree"] == bpfree.__version__
    held = {entry.path for entry in mlflow.MlflowClient().list_artifacts(run.tracking["mlflow_run_id"])}
    assert "checkpoints" not in held  # the model has it
    assert mlflow.pyfunc.load_model("models:/digits/1").predict(inputs)["prediction"].tolist() == table["prediction"].tolist()


def test_a_model_is_registered_where_its_run_is(train: Train, mlflow: Any, tmp_path: Path, uri: str) -> None:
    """The process's own address is another one."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'another.db'}")
    run = train(**{"tracking.register": "digits"})
    (version,) = mlflow.MlflowClient(uri, uri).search_model_versions("name = 'digits'")
    assert version.run_id == run.tracking["mlflow_run_id"]
    assert not (tmp_path / "another.db").exists()


def test_what_is_sent_again_is_there_once(train: Train, mlflow: Any) -> None:
    """The place in the log is lost: all events are sent again."""
    run = train(**{"tracking.register": "digits"})
    before = logged(mlflow, run)
    RunFolder(run.folder).cursor("mlflow").unlink()
    assert send(run.folder, TrackingConfig(uri=mlflow.get_tracking_uri(), register="digits")) == []
    assert [one.model_id for one in logged(mlflow, run)] == [one.model_id for one in before]
    assert len(mlflow.MlflowClient().search_model_versions("name = 'digits'")) == 1


def test_a_run_that_trains_on_gets_a_second_model(train: Train, mlflow: Any, digits: bpfree.Task) -> None:
    run = train()
    again = runner.resume(str(run.folder), changes=bpfree.config.parse_words(["budget.epochs=2"]), quiet=True)
    assert len(logged(mlflow, again)) == 2
    inputs = digits.test.inputs[:20].numpy()
    found = mlflow.pyfunc.load_model(f"runs:/{again.tracking['mlflow_run_id']}/model")
    np.testing.assert_array_equal(found.predict(inputs, params={"scores": True}), bpfree.load(again.folder).predict(inputs).numpy())


def test_an_outage_is_made_up_for(train: Train, mlflow: Any, closed_port: int, uri: str) -> None:
    run = train(**{"tracking.uri": f"http://127.0.0.1:{closed_port}", "tracking.flush_timeout": 0.1})
    assert send(run.folder, TrackingConfig(uri=uri)) == []
    sent = read_run(run.folder)
    assert [one.status for one in logged(mlflow, sent)] == ["READY"]
    assert sent.tracking["mlflow_model_id"] == logged(mlflow, sent)[0].model_id


@pytest.mark.parametrize(
    ("settings", "models", "checkpoints"),
    [
        ({"tracking.model": "false"}, 0, True),
        ({"tracking.checkpoint": False}, 0, False),
        ({"tracking.checkpoint": False, "tracking.model": "true"}, 1, False),
    ],
)
def test_without_a_model_the_checkpoint_is_an_artifact(
    train: Train, mlflow: Any, settings: dict[str, Any], models: int, checkpoints: bool
) -> None:
    run = train(**settings)
    assert len(logged(mlflow, run)) == models
    held = {entry.path for entry in mlflow.MlflowClient().list_artifacts(run.tracking["mlflow_run_id"])}
    assert ("checkpoints" in held) == checkpoints


def test_a_damaged_checkpoint_is_refused(train: Train, mlflow: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = train(**{"tracking.enabled": False})
    folder = RunFolder(run.folder)
    folder.last.write_bytes(b"no weights")
    refused = send(run.folder, TrackingConfig(uri=mlflow.get_tracking_uri()))
    assert refused is not None
    assert [event["event"] for event in refused] == ["end"]
    assert "the model was not logged" in refused[0]["reason"]
    known = Cursor.read(folder.cursor("mlflow")).known["mlflow_run_id"]
    assert mlflow.get_run(known).info.status == "FINISHED"


def test_a_table_is_read_by_its_columns(train: Train, mlflow: Any, tmp_path: Path) -> None:
    import pandas as pd

    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"height": draw.normal(size=60), "width": draw.normal(size=60)})
    frame["kind"] = np.where(frame["height"] > frame["width"], "tall", "wide")
    frame.to_csv(tmp_path / "mine.csv", index=False)
    run = train(task="csv", **{"task.path": str(tmp_path / "mine.csv"), "task.target": "kind"})
    found = mlflow.pyfunc.load_model(f"runs:/{run.tracking['mlflow_run_id']}/model")
    assert found.metadata.get_input_schema().input_names() == ["height", "width"]
    expected = bpfree.load(run.folder).predict_classes(frame[["height", "width"]].to_numpy())
    assert set(expected) <= {"tall", "wide"}
    assert found.predict(frame[["width", "height"]])["prediction"].tolist() == expected
    assert found.predict(frame[["width", "height"]]).columns.tolist() == ["prediction", "probability_tall", "probability_wide"]


@pytest.mark.slow
def test_a_server_gets_it_too(train: Train, server: Any, mlflow: Any, digits: bpfree.Task) -> None:
    run = train(**{"tracking.uri": server.uri, "tracking.register": "digits"})
    mlflow.set_tracking_uri(server.uri)
    found = mlflow.pyfunc.load_model(f"runs:/{run.tracking['mlflow_run_id']}/model")
    inputs = digits.test.inputs[:5].numpy()
    assert mlflow.pyfunc.load_model("models:/digits/1").metadata.model_id == found.metadata.model_id
    assert found.predict(inputs)["prediction"].tolist() == bpfree.load(run.folder).predict_classes(inputs)
    held = {entry.path for entry in mlflow.MlflowClient().list_artifacts(run.tracking["mlflow_run_id"])}
    assert "checkpoints" not in held


@pytest.mark.slow
def test_another_process_predicts(train: Train, uri: str) -> None:
    run = train()
    code = f"""
        import mlflow
        mlflow.set_tracking_uri({uri!r})
        found = mlflow.pyfunc.load_model("runs:/{run.tracking["mlflow_run_id"]}/model")
        print(found.predict(found.input_example).prediction[0])
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in range(10)


# --- signatures -------------------------------------------------------------------------------------------------------


SPECS = {
    "vectors": TaskSpec("a", (5,), 3, mean=(1.0,), std=(2.0,)),
    "names": TaskSpec("a", (2,), 2, class_names=("no", "yes"), input_names=("x", "y")),
    "bytes": TaskSpec("a", (3, 16, 16), 4, mean=(0.5,), std=(0.2,), scale=255.0, limits=(0.0, 255.0)),
    "labels": TaskSpec("a", (5,), 3, "multilabel"),
    "numbers": TaskSpec("a", (5,), 2, "real"),
    "tokens": TaskSpec("a", (6,), 9, "tokens", vocabulary=9),
    "large": TaskSpec("a", (3, 224, 224), 4),
}


@pytest.mark.parametrize("name", SPECS)
def test_signatures_describe_the_task(name: str, tmp_path: Path) -> None:
    """The example passes MLflow's check against the schema, and the task's own."""
    from mlflow.models.utils import _enforce_schema

    spec = SPECS[name]
    schema, example = model._inputs(spec.recorded(), model.input_dtype(spec.recorded(), {}))
    signature = model._signature(spec.recorded(), schema)
    assert (example is None) == (name == "large")
    if example is not None:
        checked = np.asarray(_enforce_schema(example, schema))
        assert checked.shape == (1, *spec.input_shape)
        check_inputs(spec, torch.tensor(checked), "here")
    outputs = signature.outputs
    assert len(outputs.inputs) == (1 if name in ("numbers", "tokens") else 1 + spec.outputs)


def test_parts_are_named_tensors() -> None:
    parts = {"values": bpfree.InputPart((-1, 3)), "lengths": bpfree.InputPart((), "integer")}
    schema, example = model._inputs(TaskSpec("a", (), 2, structure=parts).recorded(), "float32")
    assert schema.input_names() == ["values", "lengths"]
    assert example is None


def test_a_model_without_a_known_spec_has_no_signature(tmp_path: Path, train: Train) -> None:
    """Nested parts cannot be described to MLflow; the model is written all the same."""
    run = train(**{"tracking.enabled": False})
    content = read_checkpoint(RunFolder(run.folder).last)
    content["task"]["structure"] = [[{"shape": [3], "dtype": "real", "vocabulary": None, "input part": True}]]
    write_checkpoint(tmp_path / "nested.pt", content)
    model.save(tmp_path / "model", tmp_path / "nested.pt", run, model_id="m", run_id="r")
    assert names(tmp_path / "model") == FILES
