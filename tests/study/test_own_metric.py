"""A plugin's task with a negative loss and a metric of its own, from training to the report of a study.

Oracles: the records of the runs, by the definition of each direction; the words that must not be said.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_kit import call, outcomes, plugin_on_path

from bpfree.plugins import installed_plugins
from bpfree.record.folder import read_run
from bpfree.run import Run
from bpfree.study.cells import plan
from bpfree.study.file import read_study
from bpfree.study.worklist import Worklist

CODE = '''
from dataclasses import dataclass

import torch

from bpfree import DataSource, Metric, Split, TaskSpec, hookimpl, mean_metric

bpfree_api = 2
NODES = 5


def cut_of(shares, weights):
    """Expected weight between the two sides, where node i is on the first with the probability shares[i]."""
    apart = shares[:, :, None] * (1 - shares[:, None, :])
    return (weights.reshape(-1, NODES, NODES) * apart).flatten(1).sum(1)


def cut(spec, outputs, batch):
    return cut_of((outputs > 0).float(), batch.inputs)


CUT = mean_metric("cut", cut, unit="edges", summary="weight that is cut")
TINY = mean_metric("tiny", lambda spec, outputs, batch: torch.full((len(outputs),), 1e-9), greater=False, summary="next to nothing")


@dataclass(frozen=True)
class MaxCut(TaskSpec):
    """Graphs of five nodes, to be divided so that much weight lies between the sides."""

    def loss(self, outputs, batch):
        return -cut_of(outputs.sigmoid(), batch.inputs).mean()


@dataclass(frozen=True)
class Scored(MaxCut):
    def metrics(self):
        return (CUT,)


def load(config, root):
    generator = torch.Generator().manual_seed(0)
    graphs = torch.rand(160, NODES, NODES, generator=generator).triu(1)
    graphs = (graphs + graphs.mT).flatten(1)
    return Split(graphs[:120], None), Split(graphs[120:], None)


def source(kind, name):
    return DataSource(lambda config, root: kind(name, (NODES * NODES,), NODES, targets="none"), load, summary=name)


@hookimpl
def bpfree_tasks():
    return {"max-cut": source(Scored, "max-cut"), "max-cut-plain": source(MaxCut, "max-cut-plain")}


@hookimpl
def bpfree_metrics():
    return {"tiny": TINY}
'''

STUDY = """
title: Cuts
settings: {task: max-cut, task.validation: 0.25, budget.epochs: 3, batch_size: 16, select: best-val, evaluation.metrics: [tiny]}
seeds: 3
target: 2.5
controls: [frozen]
tune:
  trials: 3
  space: {optimizer.lr: {low: 1.0e-4, high: 0.1, log: true}}
rows:
  - {label: BP, settings: {rule: backprop}, published: {test/cut: 3.5}}
  - {label: DFA, settings: {rule: dfa}}
  - {label: frozen, settings: {rule: frozen}}
"""


@pytest.fixture
def max_cut(workplace: Path) -> Iterator[Path]:
    """The plugin, installed."""
    with plugin_on_path(workplace / "site", "max_cut", CODE):
        yield workplace


def only_run() -> Run:
    (folder,) = (path for path in Path("runs").iterdir() if (path / "events.jsonl").is_file())
    return read_run(folder)


def trained(*words: str) -> Run:
    shutil.rmtree("runs", ignore_errors=True)
    assert call("train", "rule=backprop", "budget.epochs=4", "batch_size=16", "select=best-val", "tracking.enabled=false", *words) == 0
    return only_run()


def test_a_run_is_judged_by_the_metric_of_its_task(max_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Selected is the epoch with the greatest cut; the summary, the list of runs and the evaluation have it with its unit."""
    run = trained("task=max-cut", "evaluation.metrics=[tiny]", "rule.name=backprop")
    said = capsys.readouterr()
    assert list(run.measures) == ["cut", "loss", "tiny"]
    assert run.primary.greater
    assert run.primary.unit == "edges"
    assert run.result["val/cut_selected"] == max(metrics["val/cut"] for metrics in run.history)
    assert run.result["test/loss"] < 0
    shown = run.primary.text(run.result["test/cut"])
    last, best = run.history[-1]["val/cut"], run.result["val/cut_selected"]
    lines = [line.split("  ", 1) for line in said.out.splitlines()]
    summary = {name: text.strip() for name, text in lines}
    assert summary["test cut"] == shown
    assert summary["test tiny"] == "1e-09"
    assert summary["validation cut"] == f"{last:.4g} edges last, {best:.4g} edges best"
    assert f"finished: test cut {shown}, test tiny 1e-09" in said.err
    assert "val cut " in said.err
    assert call("runs") == 0
    listed = capsys.readouterr().out
    assert f"cut {shown}, tiny 1e-09" in listed
    assert call("runs", "--json") == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["test"] == {"cut": run.result["test/cut"], "tiny": pytest.approx(1e-9)}
    assert call("evaluate", run.folder.name if run.folder else "", "--split", "test") == 0
    evaluated = capsys.readouterr().out
    assert re.search(rf"^cut +{shown}$", evaluated, re.MULTILINE)
    assert re.search(r"^tiny +1e-09$", evaluated, re.MULTILINE)
    assert re.search(rf"^loss +{run.result['test/loss']:.4g}$", evaluated, re.MULTILINE)
    for text in (said.out, said.err, listed, evaluated):
        assert "accura" not in text


def test_a_negative_loss_is_selected_at_its_least_and_called_a_loss(max_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("task=max-cut-plain")
    said = capsys.readouterr()
    assert list(run.measures) == ["loss"]
    assert not run.primary.greater
    assert run.result["val/loss_selected"] == min(metrics["val/loss"] for metrics in run.history) < 0
    assert f"test loss        {run.result['test/loss']:.4g}" in said.out
    best = min(metrics["val/loss"] for metrics in run.history)
    assert f"{best:.4g} best" in said.out
    assert "accura" not in said.out + said.err
    assert not any("accura" in key for key in (*run.result, *run.history[-1]))


@pytest.mark.slow
def test_a_study_tunes_compares_and_reports_by_it(max_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chosen trial has the greatest cut on validation; ranks, targets, gains and texts follow; nothing speaks of accuracies."""
    Path("cuts.yaml").write_text(STUDY)
    assert call("study", "run", "cuts.yaml", "tracking.enabled=false") == 0
    said = capsys.readouterr()
    found = outcomes()
    for label in ("BP", "DFA"):
        trials = [each for each in found if each["row"] == label and each["trial"] is not None]
        best = max(trials, key=lambda each: max(metrics["val/cut"] for metrics in each["history"]))
        rates = {each["identity"]["config"]["optimizer.lr"] for each in found if each["row"] == label and each["trial"] is None}
        assert rates == {best["identity"]["config"]["optimizer.lr"]}
    cuts = {
        label: [each["result"]["test/cut"] for each in found if each["row"] == label and each["trial"] is None]
        for label in ("BP", "DFA", "frozen")
    }
    text = next(Path("runs/studies/cuts").glob("*.md")).read_text()
    page = next(Path("runs/studies/cuts").glob("*.html")).read_text()
    means = {label: sum(values) / len(values) for label, values in cuts.items()}
    assert "test cut, edges" in text
    ranked = sorted(means, key=lambda label: -means[label])
    places = [
        text.index(f"| {label}{' (control)' if label == 'frozen' else ''} | {place} |") for place, label in enumerate(ranked, start=1)
    ]
    assert places == sorted(places)
    assert f"{ranked[0]} has the highest mean test cut, {means[ranked[0]]:.4g} edges" in text
    assert "Target: validation cut of 2.5 edges or more." in text
    assert "Gain: the row's test cut minus the control's, so that positive means" in text
    assert f"{means['BP'] - means['frozen']:+.4g}" in text
    assert "validation cut, edges, over epochs" in page
    assert "validation cut, edges, over optimizer.lr" in page
    assert "test tiny" in text
    assert "| 1e-09 |" in text
    assert call("study", "status", "cuts.yaml", "tracking.enabled=false") == 0
    status = capsys.readouterr().out
    assert " edges" in status
    for words in (said.out, said.err, text, page, status):
        assert "accura" not in words.lower()
    assert "test cut" in said.err
    assert "test tiny 1e-09" in said.err


def test_a_search_goes_by_the_loss_where_that_is_primary(max_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tree-structured Parzen estimator minimises it, and the least is chosen. Oracle: the records of the trials."""
    text = STUDY.replace("task: max-cut,", "task: max-cut-plain,").replace("evaluation.metrics: [tiny]", "select: last")
    text = (
        text.replace("select: best-val, ", "")
        .replace("trials: 3", "trials: 4\n  search: tpe")
        .replace("{test/cut: 3.5}", "{test/loss: -3}")
    )
    Path("cuts.yaml").write_text(text.replace("target: 2.5", "target: -2.6").replace("seeds: 3", "seeds: 1"))
    made = Worklist(plan(read_study(Path("cuts.yaml"))))
    assert call("study", "run", "cuts.yaml", "--rows", "BP", "tracking.enabled=false", "-q") == 0
    found = outcomes()
    trials = [each for each in found if each["trial"] is not None]
    best = min(trials, key=lambda each: each["history"][-1]["val/loss"])
    (final,) = (each for each in found if each["trial"] is None)
    assert final["identity"]["config"]["optimizer.lr"] == best["identity"]["config"]["optimizer.lr"]
    assert len(trials) == 4
    assert best["history"][-1]["val/loss"] < 0
    tuner = next(iter(made._tuners.values()))
    tuner._ask(1)
    assert tuner._study.direction.name == "MINIMIZE"
    page = next(Path("runs/studies/cuts").glob("*.md")).read_text()
    assert "Target: validation loss of -2.6 or less." in page
    assert "accura" not in page.lower()


def test_the_metric_is_listed(max_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("metrics") == 0
    listed = capsys.readouterr().out
    assert "tiny" in listed
    assert "next to nothing" in listed
    assert set(installed_plugins().names("metrics")) <= set(listed.split())
    assert call("metrics", "macro-f1") == 0
    card = capsys.readouterr().out
    assert "test/macro_f1" in card
    assert "greater" in card
    assert "share of 0 to 1" in card
    assert "multilabel" in card
