"""A trainer in Python keeps the record of the command line. Oracles: a run of the command line; files, logs and predictions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bpfree
from bpfree import BpfreeError, RunConfig, Task, TrainConfig, Trainer, UsageError
from bpfree.baselines import DFA, Backprop
from bpfree.cli.main import main
from bpfree.network import mlp as unremembered
from bpfree.record.folder import RunFolder, read_run
from bpfree.recorded import known_run

CSV: dict[str, Any] = {"to": ["csv"], "system": False}
QUIET: dict[str, Any] = {"pictures": {"every": 0}, "device": "cpu", "threads": 1}


@pytest.fixture
def task() -> Task:
    return bpfree.load_task("digits", validation=0.2)


def config(epochs: int = 1, **more: Any) -> RunConfig:
    return RunConfig(**{"budget": {"epochs": epochs}, "tracking": CSV, **QUIET, **more})


def new(task: Task, folder: Path | str | None, epochs: int = 1, network: nn.Module | None = None, **more: Any) -> Trainer:
    torch.manual_seed(0)
    options = {key: more.pop(key) for key in ("callbacks", "tracking", "augment") if key in more}
    rule = DFA(bpfree.mlp(task.spec) if network is None else network, task.spec, DFA.Config(scale=0.5))
    return Trainer(rule, task, config(epochs, **more), folder=folder, progress=False, **options)


def command(*words: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_from_python_leaves_what_the_command_line_leaves(task: Task, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files, configuration and tags are the same; so is the command that resumes it."""
    run = new(task, "runs/mine").fit()
    words = ["rule=dfa", "rule.scale=0.5", "task.validation=0.2", "budget.epochs=1", "tracking.to=[csv]", "tracking.system=false"]
    assert command("train", *words, "pictures.every=0", "device=cpu", "threads=1", "output=other", "-q") == 0
    (other,) = Path("other").iterdir()
    assert files(Path("runs/mine")) == files(other)
    ours, theirs = read_run("runs/mine"), read_run(other)
    different = {key for key in ours.config.keys() | theirs.config.keys() if ours.config.get(key) != theirs.config.get(key)}
    assert different == {"output"}
    assert {key: ours.tags[key] for key in theirs.tags} == theirs.tags
    assert ours.result == run.result
    assert command("train", "--resume", "runs/mine", "budget.epochs=2", "-q") == 0
    assert read_run("runs/mine").epoch == 2


def test_without_a_folder_nothing_is_written(task: Task, workplace: Path) -> None:
    new(task, None, tracking=True).fit()
    assert files(workplace) == set()


def test_trackers_are_asked_as_the_configuration_or_the_argument_says(task: Task, workplace: Path) -> None:
    assert new(task, "a").setup.run.config["tracking.to"] == ["csv"]
    new(task, "a").fit()
    new(task, "b", tracking=False).fit()
    new(task, "c", tracking=dataclasses.replace(bpfree.TrackingConfig(**CSV), folder=str(workplace / "there"))).fit()
    assert Path("a/metrics.csv").is_file()
    assert not list(Path("b").rglob("metrics.csv"))
    assert [path.name for path in workplace.rglob("there/*/*.csv")] == ["metrics.csv"]
    with pytest.raises(UsageError, match="unknown tracker 'cvs'"):
        new(task, "d", tracking=bpfree.TrackingConfig(to=["cvs"]))
    assert not Path("d").exists()


def test_plain_options_of_training_are_tracked_by_mlflow(task: Task, workplace: Path) -> None:
    import mlflow

    options = TrainConfig(budget={"epochs": 1})  # type: ignore[arg-type]
    trainer = Trainer(Backprop(bpfree.mlp(task.spec), task.spec), task, options, folder="mine", progress=False)
    run = trainer.fit()
    assert run.tracking["mlflow_uri"] == f"sqlite:///{workplace}/mlflow.db"  # beside the folder, not beside the folder above
    found = mlflow.tracking.MlflowClient(run.tracking["mlflow_uri"]).get_run(run.tracking["mlflow_run_id"])
    assert (found.info.status, found.data.tags["rule"]) == ("FINISHED", "backprop")
    assert found.data.metrics["test/accuracy"] == run.result["test/accuracy"]


# --- the folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(task: Task, workplace: Path) -> None:
    trainer = new(task, "runs/mine")
    trainer.fit()
    before = {name: (workplace / "runs/mine" / name).read_bytes() for name in files(workplace / "runs/mine")}
    for again in (trainer, new(task, "runs/mine")):
        with pytest.raises(UsageError, match=r"holds a run already: dfa-digits-s0, finished[\s\S]*fit\(resume=True\)"):
            again.fit()
    assert {name: (workplace / "runs/mine" / name).read_bytes() for name in files(workplace / "runs/mine")} == before
    Path("file").touch()
    with pytest.raises(UsageError, match="the run's folder is a file"):
        new(task, "file")


def test_a_folder_in_which_a_run_is_training_is_refused(task: Task, workplace: Path) -> None:
    refused, other = list[str](), new(task, "runs/mine")

    def second(run: Any) -> None:
        for resume in (None, True):
            with pytest.raises(UsageError) as caught:
                other.fit(resume)
            refused.append(caught.value.what)

    assert new(task, "runs/mine", callbacks=[second]).fit().status == "finished"
    assert refused == ["a run in this folder is training"] * 2


def test_a_refused_run_leaves_no_folder(task: Task, workplace: Path) -> None:
    with pytest.raises(UsageError, match="no such run or checkpoint"):
        new(task, "runs/mine").fit("runs/none")
    with pytest.raises(BpfreeError, match="unknown optimizer"):
        new(task, "runs/mine", optimizer="adamm").fit()
    assert files(workplace) == set()
    assert not Path("runs/mine").exists()


# --- resuming -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed_to_the_same_bits(task: Task, workplace: Path) -> None:
    whole = new(task, "whole", 3).fit()
    trainer = new(task, "runs/mine", 3, callbacks=[lambda run: trainer.stop() if run.epoch == 2 else None])
    with pytest.raises(BpfreeError, match="asked to stop"):
        trainer.fit()
    before = read_run("runs/mine")
    assert (before.status, before.epoch) == ("interrupted", 2)
    run = new(task, "runs/mine", 3).fit(resume=True)
    assert (run.status, run.id) == ("finished", before.id)
    assert run.result["test/accuracy"] == whole.result["test/accuracy"]
    assert [m["train/loss"] for m in run.history] == [m["train/loss"] for m in whole.history]
    assert read_run("runs/mine").tags["test_evaluations"] == "1"


def test_a_finished_run_is_given_back_and_trained_further_with_a_larger_budget(task: Task, workplace: Path) -> None:
    first = new(task, "runs/mine", 1).fit()
    size = RunFolder("runs/mine").log.size
    again = new(task, "runs/mine", 1).fit(resume=True)
    assert (again.result, RunFolder("runs/mine").log.size) == (first.result, size)
    longer = new(task, "runs/mine", 2).fit("runs/mine")
    assert (longer.epoch, longer.tags["test_evaluations"]) == (2, "2")
    with pytest.raises(UsageError, match="lies outside the run's folder"):
        new(task, "elsewhere", 3).fit("runs/mine")


# --- loading ------------------------------------------------------------------------------------------------------------


def vgg(task: Task) -> nn.Module:
    return bpfree.vgg(task.spec, bpfree.network.VGGConfig(channels=[4], pool_after=[1]))


@pytest.mark.parametrize("build", [None, vgg, lambda task: bpfree.build_network("mlp", task.spec, depth=1)])
def test_what_bpfree_built_loads_without_being_built_by_hand(task: Task, workplace: Path, build: Any) -> None:
    trainer = new(task, "runs/mine", network=None if build is None else build(task))
    trainer.fit()
    saved, x = bpfree.load("runs/mine"), task.spec.normalise(task.test.inputs)
    assert torch.equal(saved.predict(task.test.inputs), trainer.rule.eval().predict(x, torch.Generator()))
    assert saved.rule.config.scale == 0.5


def test_what_cannot_be_built_again_says_so(task: Task, workplace: Path) -> None:
    """A network of one's own, one that was changed since it was built, and a rule of one's own."""
    changed = bpfree.mlp(task.spec)
    changed.blocks["b1"][2] = nn.Tanh()
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for number, network in enumerate((own, changed, unremembered(task.spec))):
        new(task, f"runs/{number}", network=network).fit()
        with pytest.raises(BpfreeError, match=r"bpfree\.load\(path, rule=rule\)"):
            bpfree.load(f"runs/{number}")
    rule = type("Mine", (DFA,), {})(bpfree.mlp(task.spec), task.spec)
    run = Trainer(rule, task, config(), folder="runs/rule", progress=False).fit()
    assert known_run(Path("runs/rule")).config["rule.name"] == "Mine"  # type: ignore[union-attr]
    assert math.isfinite(bpfree.load("runs/rule", rule=rule).predict(task.test.inputs).sum().item())
    assert run.name == "Mine-digits-s0"


def test_a_task_made_of_data_loads_without_it_and_cannot_be_resumed_by_its_name(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.rand(60, 5)
    mine = Task.of((x, torch.arange(60) % 3), (x, torch.arange(60) % 3), name="mine")
    run = new(mine, "runs/mine").fit()
    assert run.name == "dfa-mine-s0"
    assert bpfree.load("runs/mine").predict(x).shape == (60, 3)
    assert command("train", "--resume", "runs/mine", "budget.epochs=2") == 2
    assert "unknown task 'mine'" in capfd.readouterr().err
