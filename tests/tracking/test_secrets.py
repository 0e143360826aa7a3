"""A run and a study whose tracking store has a password. Oracle: the password, which is in no file and on no screen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from bpfree import UsageError, hookimpl, load
from bpfree.cli.main import main
from bpfree.config import parse_words, recipe_of, resolve
from bpfree.recipe import changed
from bpfree.record.folder import read_run
from bpfree.study import cells
from bpfree.study.command import Jobs
from bpfree.study.comparing import comparison
from bpfree.study.file import read_study
from bpfree.study.worker import Worker
from bpfree.study.worklist import Worklist
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.store import prepare_mlflow
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.trainer import Interrupted

SECRET = "hunter2"
URI = f"http://somebody:{SECRET}@127.0.0.1:1/?token={SECRET}"
SHOWN = "http://***@127.0.0.1:1/?***"
FAST = [
    "budget.epochs=1",
    "tracking.timeout=0.1",
    "tracking.flush_timeout=0",
    "tracking.system=false",
    "pictures.curves=false",
    "threads=1",
]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_run_is_recorded_without_it_and_resumed_with_it(
    workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("train", "rule=dfa", f"tracking.uri={URI}", *FAST) == 0
    (run,) = Path("runs").iterdir()
    assert not files_with(SECRET, workplace)
    checkpoint = run / "checkpoints" / "last.pt"
    assert read_run(run).config["tracking.uri"] == SHOWN
    assert read_checkpoint(checkpoint)["config"]["tracking"]["uri"] == SHOWN
    assert load(run).rule is not None  # nothing is tracked

    for words in (["--resume", str(run), "budget.epochs=2"], ["--config", str(run / "config.yaml")]):
        capsys.readouterr()
        assert call("train", *words) == 2
        said = capsys.readouterr().err
        assert f"tracking.uri={SHOWN}" in said
        assert "MLFLOW_TRACKING_URI" in said
    assert [path.name for path in Path("runs").iterdir()] == [run.name]  # nothing was begun
    assert call("track", "send", str(run)) == 2
    assert f"tracking.uri={SHOWN}" in capsys.readouterr().err
    assert call("track", "send", str(run), f"tracking.uri={URI}", "tracking.flush_timeout=0") == 1  # the store is away
    assert SHOWN in capsys.readouterr().err + caplog.text
    assert call("train", "--resume", str(run), "budget.epochs=2", f"tracking.uri={URI}") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    with caplog.at_level("INFO", logger="bpfree"):
        assert call("train", "--resume", str(run), "budget.epochs=3") == 0
    assert f"tracking to {SHOWN}, from MLFLOW_TRACKING_URI" in caplog.text
    assert len(read_run(run).history) == 3
    assert not files_with(SECRET, workplace)
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_what_the_store_is_asked_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrackingConfig(uri=URI).resolve_uri(tmp_path) == URI
    with pytest.raises(UsageError, match=r"tracking\.uri=http://\*\*\*@"):
        TrackingConfig(uri=SHOWN).resolve_uri(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    assert TrackingConfig(uri=SHOWN).resolve_uri(tmp_path) == URI
    assert TrackingConfig(uri="http://other").resolve_uri(tmp_path) == "http://other"


def test_screens_of_a_configuration_and_of_errors(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", f"tracking.uri={URI}", "--print-config") == 0
    assert SHOWN in capsys.readouterr().out
    assert call("train", f"tracking.experiment=[{URI}]", f"nothing={URI}") == 2
    assert call("--debug", "train", f"rule={URI}") == 2
    assert call("train", f"tracking.url={URI}") == 2
    assert call("train", "rule=dfa", f"tracking.uri={URI}", "tracking.required=true", *FAST) == 1
    assert call("train", "rule=dfa", f"tracking.uri=somebody:{SECRET}@host", *FAST) == 0  # no address: MLflow says so, the run continues
    assert SECRET not in "".join(capsys.readouterr())
    assert not files_with(SECRET, workplace)


STUDY = f"""
title: Secret
settings: {{task: digits, device: cpu, network.width: 8, budget.epochs: 1, tracking.uri: "{URI}", tracking.timeout: 0.1,
  tracking.flush_timeout: 0, tracking.system: false}}
seeds: 1
floor: false
probe: false
rules: [dfa]
"""


def test_a_study_is_reported_without_it(workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Given in the file, and in a word."""
    Path("file.yaml").write_text(STUDY)
    Path("word.yaml").write_text(STUDY.replace("Secret", "Word").replace(f'tracking.uri: "{URI}", ', ""))
    assert call("study", "show", "file.yaml") == 0
    assert SHOWN in capsys.readouterr().out
    assert call("study", "run", "file.yaml", "--quiet") == 0
    assert call("study", "run", "word.yaml", f"tracking.uri={URI}", "--quiet") == 0
    assert call("study", "report", "word.yaml", f"tracking.uri={URI}") == 0
    assert call("study", "status", "word.yaml", f"tracking.uri={URI}") == 0
    assert call("study", "run", "word.yaml", f"tracking.uri={URI}", "--dry-run") == 0
    reports = [path.read_text() for path in Path("runs/studies").rglob("*") if path.suffix in (".html", ".md", ".csv")]
    assert len(reports) == 6
    assert any("127.0.0.1:1" in report for report in reports)
    assert files_with(SECRET, workplace) == [workplace / "file.yaml"]
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_an_interrupted_cell_goes_on_with_the_address_of_its_study(workplace: Path) -> None:
    """Its checkpoint has none: the address comes from the study's file, not from the checkpoint or the environment."""
    Path("file.yaml").write_text(STUDY.replace("epochs: 1", "epochs: 2"))
    worklist = Worklist(cells.plan(read_study(Path("file.yaml"))))
    (cell,) = worklist.ready()
    job = Jobs(worklist).of(cell)
    assert [leaf.value for leaf in job.changes] == [URI]
    worker = Worker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpfree.study.worker.CellObserver.epoch_end", stop_once)
        with pytest.raises(Interrupted):
            worker.run(job)
    assert SECRET not in worklist.store.path_of(cell.key.id).read_text()
    record = worker.run(Jobs(worklist).of(cell))
    assert record is not None
    assert record.status == "finished", record.reason
    assert len(record.history) == 2
    assert not [path for path in files_with(SECRET, workplace) if path.name != "file.yaml"]


@hookimpl
def stop_once(self: Any, run: Any) -> None:
    """Stands in for an observer's hook, as a signal would end the run there."""
    raise Interrupted("asked to stop", None)


def test_other_addresses(workplace: Path) -> None:
    """An option of a task may be one: what is recorded cannot be loaded, and is no change where it is given again."""
    whole = resolve(parse_words(["task=npz", f"task.path={URI}"]), spec=resolve([]).spec())
    written = whole.recorded()
    assert written["task"]["path"] == SHOWN
    read = recipe_of(written, spec=resolve([]).spec(), where="a checkpoint")
    with pytest.raises(UsageError, match=r"task\.path=.*\n.*give it again: task\.path="):
        read.build_task()
    again = recipe_of(written, parse_words([f"task.path={URI}"]), spec=resolve([]).spec(), where="a checkpoint")
    assert again.options["task"].path == URI
    assert changed(read, again) == []


def test_rows_of_a_comparison_are_labelled_without_it() -> None:
    study = comparison([f"dfa,tracking.uri={URI}"], [], seeds=1, references=False)
    assert [row.label for row in study.rows] == [f"dfa,tracking.uri={SHOWN}"]
    assert study.rows[0].settings["tracking.uri"] == URI
    with pytest.raises(UsageError, match="not shown"):
        comparison([f"dfa,tracking.uri={URI}", f"dfa,tracking.uri={URI}&x=1"], [], seeds=1)


def test_loggers_of_libraries(caplog: pytest.LogCaptureFixture) -> None:
    prepare_mlflow(1.0)
    logger = logging.getLogger("mlflow.tracking.client")
    with caplog.at_level("ERROR"):
        logger.handlers, handlers = [*logger.handlers, caplog.handler], logger.handlers
        try:
            logger.error("no engine for %s", URI)
        finally:
            logger.handlers = handlers
    assert f"no engine for {SHOWN}" in caplog.text
    assert SECRET not in caplog.text
