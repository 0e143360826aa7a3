"""MLflow's interface on what bpfree has tracked. Oracles: what a reader looks for stands on the page; the log of the runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.kit import opened
from tracking.conftest import Server

import bpfree
from bpfree import runner
from bpfree.config import resolve
from bpfree.record.folder import Cursor
from bpfree.run import Run

pytestmark = pytest.mark.browser
TRAINING = "workflowType=machine_learning"
SETTINGS = {"budget.epochs": 2, "tracking.system": False, "threads": 1}


class Tracked:
    """A server with a study of two rows and a single run, made once for all tests."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.uri = server.uri
        settings = SETTINGS | {"tracking.uri": server.uri}
        words = {"rule": "dfa", "task": "digits", "output": str(folder / "runs"), "tracking.register": "digits-dfa"}
        self.run: Run = runner.run(resolve(settings | words), quiet=True)
        bpfree.compare(["dfa", "frozen"], seeds=1, references=False, settings=settings, output=folder / "runs")
        (place,) = (folder / "runs/studies").glob("*/sent-mlflow.json")
        self.study_name, self.study = place.parent.name, str(Cursor.read(place).known["mlflow_run_id"])
        import mlflow

        client = mlflow.MlflowClient(server.uri)
        self.study_experiment = client.get_run(self.study).info.experiment_id
        self.description = client.get_run(self.study).data.tags["mlflow.note.content"]

    def at(self, place: str) -> str:
        return f"{self.uri}/#{place}{'&' if '?' in place else '?'}{TRAINING}"


@pytest.fixture(scope="module")
def tracked(chromium: Any, tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Tracked]:
    server = Server(tmp_path_factory.mktemp("server"), template)
    try:
        server.wait()
        yield Tracked(server, tmp_path_factory.mktemp("tracked"))
    finally:
        server.kill()


def unseen(page: Any, *texts: str) -> list[str]:
    """Wait for each text, and list those that cannot be read on the page within a minute."""
    missing = []
    for text in texts:
        try:
            page.get_by_text(text).first.wait_for(timeout=60_000)
        except Exception as error:  # playwright's own TimeoutError, whose package may be missing where this file is collected
            missing.append(f"{text}: {type(error).__name__}")
    return missing


def test_the_experiments_have_descriptions(chromium: Any, tracked: Tracked) -> None:
    with opened(chromium, tracked.at("/experiments")) as found:
        assert not unseen(found.page, "Runs of bpfree", tracked.study_name)
        assert found.outside == []


def test_a_study_is_described_with_links_that_hold(chromium: Any, tracked: Tracked) -> None:
    with opened(chromium, tracked.at(f"/experiments/{tracked.study_experiment}/runs/{tracked.study}")) as found:
        assert not unseen(found.page, "A study of bpfree", "dfa seed 0", "frozen seed 0", "best_row", "No metrics recorded")
        assert not found.page.get_by_role("link", name="Evaluation runs").count()  # of the view of generative AI
        assert found.page.get_by_role("link", name="Models", exact=True).count()
    links = dict(re.findall(r"\[([^]]+)\]\((#[^)]+)\)", tracked.description))
    wanted = {
        "Report": "report.html",
        "table of means": "test/accuracy",
        "curves": "val/accuracy",
        "comparison of the cells": "Comparing 2 Runs from 1 Experiment",
    }
    assert links.keys() == wanted.keys()
    for name, text in wanted.items():
        with opened(chromium, f"{tracked.uri}/{links[name]}") as found:
            assert not unseen(found.page, text)


def test_cells_unfold_below_their_study(chromium: Any, tracked: Tracked) -> None:
    with opened(chromium, tracked.at(f"/experiments/{tracked.study_experiment}/runs")) as found:
        assert not unseen(found.page, "Group by", tracked.study_name)
        found.page.locator("[data-testid='runs-table-expander'], .ag-cell button").first.click()
        assert not unseen(found.page, "dfa seed 0", "frozen seed 0")


def test_a_run_shows_its_metrics_and_its_model(chromium: Any, tracked: Tracked) -> None:
    known = tracked.run.tracking
    place = f"/experiments/{known['mlflow_experiment_id']}/runs/{known['mlflow_run_id']}"
    with opened(chromium, tracked.at(place)) as found:
        assert not unseen(found.page, "dfa on digits with the network mlp", "Parameters (8)", "Logged models (1)")
        for name in ("val/accuracy", "test/accuracy"):  # the list shows as many as fit
            found.page.get_by_placeholder("Search metrics").fill(name)
            assert not unseen(found.page, name)
    with opened(chromium, tracked.at(f"{place}/model-metrics")) as found:
        assert not unseen(found.page, f"{tracked.run.name} (rule/loss)")


def test_a_model_shows_version_data_and_results(chromium: Any, tracked: Tracked) -> None:
    known = tracked.run.tracking
    with opened(chromium, tracked.at(f"/experiments/{known['mlflow_experiment_id']}/models/{known['mlflow_model_id']}")) as found:
        assert not unseen(found.page, "Ready", "digits-dfa", "test/accuracy", str(tracked.run.result["test/accuracy"]), tracked.run.name)
    with opened(chromium, tracked.at("/models/digits-dfa/versions/1")) as found:
        assert not unseen(found.page, "Inputs (1)", "Outputs (11)")


def test_the_kind_of_experiment_is_what_mlflow_knows(chromium: Any, tracked: Tracked) -> None:
    """The page itself asks for the tag: read what the server answers to it."""
    with opened(chromium, tracked.at("/experiments")) as found:
        answer = found.page.request.get(f"{tracked.uri}/api/2.0/mlflow/experiments/get?experiment_id={tracked.study_experiment}")
        tags = {tag["key"]: tag["value"] for tag in json.loads(answer.text())["experiment"]["tags"]}
        assert tags["mlflow.experimentKind"] == "custom_model_development"
