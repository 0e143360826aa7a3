"""The examination of a run by forks. Oracles: the run's own later checkpoints; a rule that cheats late."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpfree import Batch, Step, UsageError, runner
from bpfree.baselines import DFA
from bpfree.certify.certificate import read_certificate
from bpfree.certify.forks import certify_run
from bpfree.certify.show import render
from bpfree.certify.subject import Subject
from bpfree.rule import Rule
from bpfree.training.checkpoint import read_checkpoint


class Late(DFA):
    """Direct feedback for two epochs, and end to end from then on."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.epoch < 2:
            return super().credit(batch, step)
        traces = self.network.traces(batch.inputs, input_grad=True)
        signal: Any = self.spec.error(traces[-1].output, batch)
        for trace in reversed(traces):
            signal = trace.backward(signal)
        return {"loss": torch.zeros(())}


def trained(rule: str | type[Rule], folder: Path, **settings: Any) -> tuple[Path, Subject]:
    subject = Subject(rule)
    keep = {"output": str(folder), "budget.epochs": 4, "checkpoint.keep": "all", "tracking.enabled": False, "device": "cpu", "threads": 1}
    run = runner.run(subject.resolve({**keep, "pictures.every": 0, **settings}), quiet=True)
    assert run.folder is not None
    return run.folder, subject


def test_each_checkpoint_is_kept(tmp_path: Path) -> None:
    folder, _ = trained("dfa", tmp_path)
    names = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert names == ["epoch-0001.pt", "epoch-0002.pt", "epoch-0003.pt", "epoch-0004.pt", "last.pt"]
    first, last = (read_checkpoint(folder / "checkpoints" / name)["weights"] for name in (names[0], names[3]))
    assert any(not torch.equal(first[name], value) for name, value in last.items())


@pytest.mark.slow
def test_an_honest_run_lands_and_passes(tmp_path: Path) -> None:
    folder, _ = trained("dfa", tmp_path)
    made = certify_run(folder, draw=1)
    assert made.status == "passed (run)"
    assert [fork["lands_on_the_run"] for fork in made.properties["run"]["forks"]] == [True, True]
    (tmp_path / "made.json").write_text(made.to_json())
    assert read_certificate(tmp_path / "made.json").kind == "run"


@pytest.mark.slow
def test_what_a_rule_does_late_is_seen_where_it_does_it(tmp_path: Path) -> None:
    """The fork of the first epochs is honest, that of the last ones is not; the weights of the run are known to both."""
    folder, subject = trained(Late, tmp_path)
    found = {}
    for draw in range(20):
        made = certify_run(folder, registry=subject.registry, draw=draw, moments=1)
        (fork,) = made.properties["run"]["forks"]
        assert fork["lands_on_the_run"]
        found[fork["from_epoch"]] = made.status
        if len(found) == 3:
            break
    assert found == {1: "passed (run)", 2: "failed", 3: "failed"}


@pytest.mark.slow
def test_a_fork_that_lands_elsewhere_says_nothing(tmp_path: Path) -> None:
    """Oracle: the later checkpoints of another seed."""
    folder, _ = trained("dfa", tmp_path / "a")
    other, _ = trained("dfa", tmp_path / "b", seed=1)
    for epoch in range(2, 5):
        shutil.copy(other / "checkpoints" / f"epoch-{epoch:04d}.pt", folder / "checkpoints")
    for draw in range(20):
        made = certify_run(folder, draw=draw, moments=1)
        if made.properties["run"]["forks"][0]["from_epoch"] == 1:
            break
    assert made.status == "failed"
    assert "does not land on the run's own later checkpoint" in made.findings[0].what


def test_a_run_without_its_checkpoints_is_refused(tmp_path: Path) -> None:
    folder, _ = trained("dfa", tmp_path, **{"checkpoint.keep": "last"})
    with pytest.raises(UsageError, match="has not kept the checkpoints") as caught:
        certify_run(folder)
    assert "checkpoint.keep=all" in caught.value.fix


def test_a_run_of_several_threads_is_forked_with_as_many(tmp_path: Path) -> None:
    """Sums over several threads are rounded in another order, and would land elsewhere with one."""
    folder, _ = trained("dfa", tmp_path, **{"threads": 2, "network.width": 300, "budget.epochs": 2})
    made = certify_run(folder, draw=1)
    assert made.properties["run"]["forks"][0]["lands_on_the_run"]
    assert made.command == f"bpfree certify --run {folder.name}"
    lines = list(render(made))
    assert any(line.startswith("epochs 1 to 2") and "no block learns from weights above" in line for line in lines)


def test_a_run_on_another_device_is_refused(tmp_path: Path) -> None:
    folder, _ = trained("dfa", tmp_path)
    log = folder / "events.jsonl"
    log.write_text(log.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(UsageError, match="was trained on cuda"):
        certify_run(folder)


def test_data_from_a_folder_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process has no data folder: what the run needs is loaded before."""
    x = torch.rand(120, 6, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "arrays.npz", x_train=x, y_train=(x.sum(1) > 3).astype(int), x_test=x[:20], y_test=(x[:20].sum(1) > 3).astype(int))
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path))
    folder, _ = trained("dfa", tmp_path / "runs", **{"task.name": "npz", "task.path": "arrays.npz", "data.root": str(tmp_path)})
    assert certify_run(folder, draw=1).status == "passed (run)"
