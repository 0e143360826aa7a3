"""The shipped studies of NoProp: the settings of the paper's Table 3, the numbers of its Table 1, and rows that can be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bpfree_noprop.plugin import bpfree_studies

from bpfree.cli.main import main
from bpfree.plugins import installed_plugins
from bpfree.study.cells import plan
from bpfree.study.file import find_study

# train / test accuracy in per cent: one-hot, dim 20, prototype
TABLE_1 = {
    "mnist": "99.92/99.47 99.93/99.49 99.97/99.54",
    "cifar10": "95.02/79.25 94.95/79.12 97.23/80.54",
    "cifar100": "84.97/45.93 83.25/45.19 90.70/46.06",
}
EPOCHS = {"mnist": 100, "cifar10": 150, "cifar100": 150}
TABLE_3 = {
    "batch_size": 128,
    "rule.T": 10,
    "rule.eta": 0.1,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 1e-3,
    "task.augment": [],
}
PROTOCOL = {
    "network.name": "noprop-paper",
    "rule.updates": "sequential",
    "rule.head": "softmax",
    "rule.inference": "sampled",
    "rule.draws": 5,
    "task.validation": 0,
    "select": "last",
    "schedule.name": "constant",
}
PIXELS = {"mnist": 784, "cifar10": 3072, "cifar100": 3072}
CLAIMS = {"claims": 3, "claims-cifar10": 150}


def test_all_are_here() -> None:
    assert {f"noprop/table1-{task}" for task in TABLE_1} <= set(bpfree_studies())


@pytest.mark.parametrize("task", TABLE_1)
def test_the_papers_numbers(task: str) -> None:
    """The means alone: the paper's second number is a standard error over draws, and a study's is a deviation over seeds."""
    published = [row.published[""] for row in find_study(f"noprop/table1-{task}").rows]
    assert " ".join(f"{found['train/accuracy'].mean:.2f}/{found['test/accuracy'].mean:.2f}" for found in published) == TABLE_1[task]
    assert all(number.spread is None for found in published for number in found.values())


@pytest.mark.parametrize("task", TABLE_1)
def test_the_papers_protocol(task: str) -> None:
    """Settings of Table 3, three seeds, and each row's embedding with the noised label that it makes."""
    made = plan(find_study(f"noprop/table1-{task}"), load=False)
    assert list(made.seeds) == [0, 1, 2]
    embeddings = {}
    for cell in made.cells:
        flat = cell.recipe.flat()
        assert {key: flat[key] for key in TABLE_3} == TABLE_3
        assert {key: flat[key] for key in PROTOCOL} == PROTOCOL
        assert (flat["task.name"], flat["budget.epochs"]) == (task, EPOCHS[task])
        embeddings[cell.row] = (flat["rule.embedding"], flat["network.state_dim"], flat["network.label"])
    assert embeddings == {
        "DT one-hot": ("one-hot", 100 if task == "cifar100" else 10, "vector"),
        "DT dim 20": ("learned", 20, "vector"),
        "DT prototype": ("prototype", PIXELS[task], "input"),
    }


def test_a_row_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On small images and blocks: one epoch is a pass for each block, and the result is a mean over five draws."""
    monkeypatch.chdir(tmp_path)
    words = ["task=digits", "network=noprop-mlp", "network.width=8", "budget.epochs=1", "tracking.enabled=false", "device=cpu", "threads=1"]
    with pytest.raises(SystemExit) as ended:
        main(["study", "run", "noprop/table1-mnist", "--rows", "DT one-hot", "--seeds", "1", "--quiet", *words])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "DT prototype" in printed
    assert "99.47" in printed
    assert list(Path("runs/studies/noprop/table1-mnist/cells").glob("*.json"))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_claims(name: str) -> None:
    """Every rule that ships has a row, each is tuned alike, and all have the same budget."""
    shipped = ["noprop", "forward-gradient", "hebbian", "predictive-coding"]
    owners = {rule: owner.name for rule, _, owner in installed_plugins().items("rules")}
    if not set(shipped) <= set(owners.values()):
        pytest.skip("not all plugins are installed")
    rules = {rule for rule, owner in owners.items() if owner in ["core", *shipped]}
    study = find_study(name)
    made = plan(study, load=False)
    flats = [cell.recipe.flat() for cell in made.cells]
    assert rules <= {flat["rule.name"] for flat in flats}
    assert {(flat["budget.epochs"], flat["batch_size"], flat["select"]) for flat in flats} == {(CLAIMS[name], 128, "best-val")}
    assert {tuple(row.space) for row in study.rows} == {("optimizer.lr",)}
    assert study.jobs == 1
    for place in made.places:
        with torch.random.fork_rng(devices=[]):
            place.recipe.build_rule(place.recipe.spec())
