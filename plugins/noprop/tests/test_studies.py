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

# train / test accuracy in per cent: one-hot, dim 20, prototype of back-propagation, DT, (adjoint, one-hot), CT, FM
TABLE_1 = {
    "mnist": "100.00/99.46 99.99/99.43 99.99/99.44 99.92/99.47 99.93/99.49 99.97/99.54 98.70/98.62 "
    "97.88/97.84 97.70/97.70 97.18/97.17 99.97/99.21 99.99/99.29 99.27/98.52",
    "cifar10": "99.98/79.92 99.96/79.30 99.97/79.58 95.02/79.25 94.95/79.12 97.23/80.54 70.64/66.78 "
    "97.31/73.35 94.88/71.77 86.20/66.54 98.46/73.14 99.49/73.50 99.80/75.18",
    "cifar100": "98.63/45.85 94.28/46.57 99.19/47.80 84.97/45.93 83.25/45.19 90.70/46.06 26.72/25.03 "
    "75.10/33.66 74.22/33.99 40.88/21.31 12.69/6.38 83.49/31.14 96.37/37.57",
}
# GB of the one-hot rows: back-propagation, DT, adjoint, CT, FM
TABLE_2 = {"mnist": "0.87 0.49 2.32 1.05 1.06", "cifar10": "1.17 0.64 6.23 0.45 0.44", "cifar100": "1.73 1.23 6.45 0.50 0.49"}
ONE_HOT = [f"{method} one-hot" for method in ("Backprop", "DT", "Adjoint", "CT", "FM")]
COMMON = {
    "batch_size": 128,
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 1e-3,
    "task.augment": [],
    "task.validation": 0,
    "select": "last",
    "schedule.name": "constant",
    "rule.draws": 5,
    "rule.head": "softmax",
}
CHAIN = {"network.name": "noprop-paper", "rule.T": 10, "rule.inference": "sampled", "optimizer.name": "adamw"}
TIMED = {"network.name": "noprop-timed-paper", "rule.steps": 1000, "optimizer.name": "adam"}
TABLE_3 = {
    "Backprop": {"rule.name": "noprop-backprop", **CHAIN},
    "DT": {"rule.name": "noprop-dt", "rule.eta": 0.1, "rule.updates": "sequential", **CHAIN},
    "Adjoint": {
        **TIMED,
        "rule.name": "noprop-adjoint",
        "rule.training_steps": 1000,
        "rule.inference": "sampled",
        "optimizer.name": "adamw",
    },
    "CT": {"rule.name": "noprop-ct", "rule.eta": 1, "rule.inference": "sampled", **TIMED},
    "FM": {"rule.name": "noprop-fm", "rule.inference": "flow", **TIMED},
}
EPOCHS = {
    "mnist": {"Backprop": 100, "DT": 100, "Adjoint": 2, "CT": 100, "FM": 100},
    "cifar10": {"Backprop": 150, "DT": 150, "Adjoint": 4, "CT": 500, "FM": 500},
    "cifar100": {"Backprop": 150, "DT": 150, "Adjoint": 4, "CT": 1000, "FM": 1000},
}
PIXELS = {"mnist": 784, "cifar10": 3072, "cifar100": 3072}
CLAIMS = {"claims": 3, "claims-cifar10": 150}


def test_all_are_here() -> None:
    assert {f"noprop/table1-{task}" for task in TABLE_1} <= set(bpfree_studies())


@pytest.mark.parametrize("task", TABLE_1)
def test_the_papers_numbers(task: str) -> None:
    """The means alone: the paper's second number is a standard error over draws, and a study's is a deviation over seeds."""
    rows = find_study(f"noprop/table1-{task}").rows
    published = [row.published[""] for row in rows]
    assert " ".join(f"{found['train/accuracy'].mean:.2f}/{found['test/accuracy'].mean:.2f}" for found in published) == TABLE_1[task]
    assert all(number.spread is None for found in published for number in found.values())
    memory = {row.label: found["memory_mb"].mean for row, found in zip(rows, published, strict=True) if "memory_mb" in found}
    assert list(memory) == ONE_HOT
    assert " ".join(f"{value * 2**20 / 1e9:.2f}" for value in memory.values()) == TABLE_2[task]


@pytest.mark.parametrize("task", TABLE_1)
def test_the_papers_protocol(task: str) -> None:
    """Settings of Table 3, three seeds, and each row's embedding with the noised label that it makes."""
    made = plan(find_study(f"noprop/table1-{task}"), load=False)
    assert list(made.seeds) == [0, 1, 2]
    embeddings = {
        "one-hot": ("one-hot", 100 if task == "cifar100" else 10, "vector"),
        "dim 20": ("learned", 20, "vector"),
        "prototype": ("prototype", PIXELS[task], "input"),
    }
    for cell in made.cells:
        flat, (method, _, embedding) = cell.recipe.flat(), cell.key.row.partition(" ")
        wanted = COMMON | TABLE_3[method]
        assert {key: flat[key] for key in wanted} == wanted
        assert (flat["task.name"], flat["budget.epochs"]) == (task, EPOCHS[task][method])
        assert (flat["rule.embedding"], flat["network.state_dim"], flat["network.label"]) == embeddings[embedding]


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    """Against the reference of its column: one setting of the rule, or another rule; and the network that follows from it."""
    cells = {(cell.key.row, cell.key.column): cell.recipe.flat() for cell in plan(find_study("noprop/ablation"), load=False).cells}
    for (row, column), flat in cells.items():
        reference = cells["reference", column]
        if flat["rule.name"] == "noprop-dt":
            changed = {key for key in flat if key.startswith("rule.") and flat[key] != reference[key]}
            assert len(changed) == (0 if row == "reference" else 2 if row == "eta = 10 with dim 20" else 1), row
        assert all(flat[key] == reference[key] for key in flat if not key.startswith(("rule.", "network.", "optimizer.", "stream"))), row


@pytest.mark.slow
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
    """Every rule that shipped when they were measured has a row, each is tuned alike, and all have the same budget."""
    later = {"noprop-ct", "noprop-fm", "noprop-backprop", "noprop-adjoint"}
    shipped = ["noprop", "forward-gradient", "hebbian", "predictive-coding"]
    owners = {rule: owner.name for rule, _, owner in installed_plugins().items("rules")}
    if not set(shipped) <= set(owners.values()):
        pytest.skip("not all plugins are installed")
    rules = {rule for rule, owner in owners.items() if owner in ["core", *shipped]} - later
    study = find_study(name)
    made = plan(study, load=False)
    flats = [cell.recipe.flat() for cell in made.cells]
    assert rules <= {flat["rule.name"] for flat in flats}
    assert {(flat["budget.epochs"], flat["batch_size"], flat["select"]) for flat in flats} == {(CLAIMS[name], 128, "best-val")}
    assert {tuple(row.space) for row in study.rows} == {("optimizer.lr",)}
    assert study.jobs == 1
    for place in made.rows:
        with torch.random.fork_rng(devices=[]):
            place.recipe.build_rule(place.recipe.spec())
