"""Executors by name: SLURM jobs on this machine, one of a plugin, and requests that make no sense.

Oracle: the same study in this process, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from study_kit import DYING, call, outcomes, plugin_on_path, untimed

from bpfree.study import command

STUDY = """
title: Cells elsewhere
settings: {task: digits, device: cpu, network.width: 16, budget.epochs: 2, tracking.to: [lines], tracking.system: false}
seeds: 2
floor: false
probe: false
rules: [dying]
"""
PLUGIN = (
    DYING
    + '''
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import bpfree
from bpfree import option
from bpfree.baselines import DFA
from bpfree.study.executor import Ended, run_job

bpfree_api = 2


class Lines(bpfree.Tracker):
    """Notes each epoch in a file."""

    shown = "lines.txt"

    def send(self, events):
        with (self.folder.path / "lines.txt").open("a") as file:
            file.writelines(f"{event['epoch']} {event['metrics']['val/accuracy']}\\n" for event in events if event["event"] == "epoch")
        return []


class Backwards:
    """Runs the jobs that it was given one after the other, the last one first."""

    @dataclass
    class Config:
        most: int = option(3, "cells at a time", ge=1)

    def __init__(self, request, config):
        self.slots, self.jobs = config.most, []
        request.folder.mkdir(parents=True, exist_ok=True)
        request.folder.joinpath("asked.txt").write_text(f"{request.left} {request.threads} {request.jobs} {config.most}")

    def start(self, job):
        self.jobs.append(job)

    def wait(self):
        job = self.jobs.pop()
        with Path("order.txt").open("a") as file:
            file.write(f"{job.key.label}\\n")
        return [Ended(job.key.id, run_job(job))]

    def close(self):
        Path("order.txt").open("a").write("closed\\n")


@bpfree.hookimpl
def bpfree_rules():
    return {"dying": Dying}


@bpfree.hookimpl
def bpfree_trackers():
    return {"lines": bpfree.Maker(Lines, "a line for each epoch")}


@bpfree.hookimpl
def bpfree_executors():
    return {"backwards": bpfree.Maker(Backwards, "the last one first"), "nothing": bpfree.Maker(lambda request, config: 7)}
'''
)
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def site(workplace: Path) -> Iterator[Path]:
    Path("s.yaml").write_text(STUDY)
    Path("lives").write_text("0")
    with plugin_on_path(workplace / "site", "elsewhere", PLUGIN):
        yield workplace


def assert_same(one: str, other: str, count: int) -> None:
    """Weights, results and what a plugin's tracker wrote."""
    ours, theirs = outcomes(f"{one}/studies"), outcomes(f"{other}/studies")
    assert len(ours) == len(theirs) == count
    for first, second in zip(ours, theirs, strict=True):
        assert (first["cell"], first["status"], second["status"]) == (second["cell"], "finished", "finished")
        assert untimed(first["result"]) == untimed(second["result"])
        mine, yours = (Path(root) / known["run"] for root, known in ((one, first), (other, second)))
        weights = [torch.load(path / "checkpoints" / "last.pt", weights_only=True)["weights"] for path in (mine, yours)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
        lines = [f"{metrics['epoch']:.0f} {metrics['val/accuracy']}" for metrics in first["history"]]
        assert (mine / "lines.txt").read_text().splitlines() == (yours / "lines.txt").read_text().splitlines() == lines


@pytest.mark.slow
@needs_submitit
def test_cells_as_jobs_one_of_which_is_killed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With submitit's own processes in the place of a cluster: a killed job is submitted again, and continues from its checkpoint."""
    assert call("study", "run", "s.yaml", "output=here", "--seeds", "1", "-q") == 0
    Path("lives").write_text("1")
    words = ("--executor", "slurm", "--with", "cluster=local", "--with", "minutes=5")
    assert call("study", "run", "s.yaml", "output=there", "--seeds", "1", *words) == 0
    assert "died (FINISHED: " in capsys.readouterr().err
    assert Path("lives").read_text() == "0"
    assert_same("here", "there", 1)
    folder = Path("there/studies/s/slurm")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.glob("*_submitted.pkl"))) == 2
    assert "PYTHONSAFEPATH" not in os.environ


@needs_submitit
def test_no_cluster_and_no_such_parameter(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert call("study", "run", "s.yaml", "--executor", "slurm") == 1
    assert "no SLURM on this machine" in capsys.readouterr().err
    words = ("--executor", "slurm", "--with", "cluster=local")
    assert call("study", "run", "s.yaml", *words, "--with", "parameters.flavour=vanilla") == 2
    assert "flavour" in capsys.readouterr().err
    assert call("study", "run", "s.yaml", *words, "--with", "minutes=soon", "--with", "gpus=-1", "--with", "no_such=1") == 2
    problems = capsys.readouterr().err
    assert "minutes='soon': must be a whole number" in problems
    assert "gpus=-1 is out of range" in problems
    assert "no option no_such (its options: minutes, partition, gpus, memory, parameters, cluster)" in problems
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert call("study", "run", "s.yaml", *words) == 1
    assert "pip install 'bpfree[slurm]'" in capsys.readouterr().err


def test_an_executor_of_a_plugin(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chosen by name, with options of its own, and listed with its plugin."""
    assert call("study", "run", "s.yaml", "output=here", "-q") == 0
    assert call("study", "run", "s.yaml", "output=there", "--executor", "backwards", "--with", "most=2", "-q") == 0
    assert_same("here", "there", 2)
    assert Path("order.txt").read_text().splitlines() == ["dying seed 1", "dying seed 0", "closed"]
    assert Path("there/studies/s/asked.txt").read_text() == "2 1 None 2"
    capsys.readouterr()
    assert call("plugins", "info", "elsewhere") == 0
    shown = capsys.readouterr().out
    assert "\nexecutors     backwards, nothing\n" in shown
    assert "\ntrackers      lines\n" in shown


def test_wrong_requests(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, text in (
        (("--executor", "no-such"), 2, "known: backwards, local, nothing, ray, slurm"),
        (("--executor", "nothing"), 2, "the executor 'nothing' is not a bpfree.Executor: 7"),
        (("--executor", "backwards", "--with", "most=0"), 2, "most=0 is out of range: must be >= 1"),
        (("--gpus", "1"), 2, "the executor 'local' has no option gpus (--executor ray or --executor slurm)"),
        (("--address", "auto"), 2, "the executor 'local' has no option address (--executor ray)"),
        (("--with", "most"), 2, "expected key=value"),
    ):
        assert call("study", "run", "s.yaml", *words) == code
        assert text in capsys.readouterr().err
    assert outcomes() == []


def test_what_is_registered_must_be_a_maker() -> None:
    """A class itself, and an address that is none, are refused when the plugin is loaded; one that leads nowhere, when it is used."""
    from bpfree import Maker
    from bpfree.kinds import misfit

    assert "bpfree.Maker" in misfit("executors", command.Jobs)
    assert "bpfree.Maker" in misfit("trackers", Maker("not an address"))
    assert misfit("trackers", Maker("package.module:Class")) == ""
    for address in ("bpfree.nowhere:Thing", "bpfree.kinds:Nothing"):
        with pytest.raises(ImportError):
            Maker(address).target


@pytest.mark.parametrize("mode", [(), ("--dry-run",)])
def test_an_executor_that_is_not_there_is_refused_although_nothing_is_to_run(
    mode: tuple[str, ...], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished study with a wrong word is not the request that was made."""
    Path("s.yaml").write_text(
        "title: S\nsettings: {task: digits, budget.samples: 64, tracking.enabled: false}\nseeds: 1\nfloor: false\nrules: [linear]\n"
    )
    assert call("study", "run", "s.yaml", "--quiet") == 0
    for words, message in ((("--executor", "slrum"), "unknown executor 'slrum'"), (("--with", "minutes=3"), "has no option minutes")):
        assert call("study", "run", "s.yaml", "--quiet", *words, *mode) == 2
        assert message in capsys.readouterr().err
