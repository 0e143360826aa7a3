"""What a run says before it trains. Oracles: the figures of the digits and of the layers, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpfree import Split, Task, TaskSpec, Traits, always, installed_plugins
from bpfree.baselines import DFA
from bpfree.cli.main import main
from bpfree.config import parse_words, resolve
from bpfree.run import Run
from bpfree.summary import summary

FAST = ["budget.epochs=1", "device=cpu", "threads=1", "tracking.system=false", "pictures.every=0", "pictures.curves=false"]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


class InPlace(DFA):
    """Says that it updates in place."""

    traits_of = always(Traits(update="in-place"))


def lines_of(*words: str, task: Task | None = None) -> dict[str, str]:
    recipe = resolve(parse_words(words), installed_plugins().including(InPlace))
    task = task or recipe.build_task()
    rule = recipe.build_rule(task.spec)
    return dict(summary(recipe.pinned(rule), task, rule, Run("a", "a", folder=Path("runs/a")), []))


def test_train_says_first_what_it_will_do(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "network.widths=[7,5]", "batch_size=32", "schedule=cosine", *FAST) == 0
    error = capsys.readouterr().err
    (run,) = (workplace / "runs").iterdir()
    assert error.index("data  ") < error.index("started")
    told = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in error.splitlines() if "  " in line}
    assert told["data"] == "digits: 1,295 training, 143 validation, 359 test examples; inputs 1 x 8 x 8; 10 classes"
    assert told["network"] == f"mlp: 3 blocks (b1, b2, readout); {65 * 7 + 8 * 5 + 6 * 10} parameters"
    assert told["rule"] == "dfa"
    assert told["optimiser"] == "adam, rate 0.001, cosine schedule; batches of 32; 1 epoch"
    assert told["device"] == "cpu, 1 thread, fp32"
    assert told["recorded in"] == f"runs/{run.name}; mlflow, sqlite:///{workplace}/mlflow.db"
    assert call("train", "rule=dfa", "-q", "tracking.enabled=false", *FAST) == 0
    assert "inputs 1 x 8 x 8" not in capsys.readouterr().err


def test_compare_says_it_of_each_cell(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "dfa", "--only", "--seeds", "1", "tracking.enabled=false", "budget.epochs=1"]
    assert call(*words) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "inputs 1 x 8 x 8" in line]
    assert line.startswith("dfa seed 0: data digits: ")
    assert "; rule dfa; optimiser adam, rate 0.001; " in line
    assert call(*words, "output=again", "-q") == 0
    assert "inputs" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["budget.samples=1000"], "1,000 examples"),
        (["budget.seconds=2.5"], "2.5 seconds"),
        (["budget.operations=1e9"], "1,000,000,000.0 operations"),
        ([], "10 epochs"),
    ],
)
def test_budgets(words: list[str], text: str) -> None:
    assert lines_of("rule=dfa", *words)["optimiser"].endswith(f"; {text}")


def test_rules_of_other_kinds() -> None:
    assert lines_of("rule=InPlace", "optimizer.lr=0.1")["optimiser"].startswith("none, the rule updates in place, rate 0.1; ")
    assert lines_of("rule=dfa", "twin=true")["rule"] == "dfa, own-prediction twin"
    assert lines_of("rule=dfa", "network.depth=20")["network"].startswith("mlp: 21 blocks (b1, b2, ..., readout); ")


@pytest.mark.parametrize(
    ("kind", "targets", "text"),
    [("real", torch.rand(9, 10), "10 real targets"), ("soft", torch.rand(9, 10).softmax(1), "soft labels of 10 classes")],
)
def test_kinds_of_targets(kind: str, targets: torch.Tensor, text: str) -> None:
    split = Split(torch.rand(9, 1, 8, 8), targets)
    task = Task(TaskSpec("t", (1, 8, 8), 10, kind), split, None, split)  # type: ignore[arg-type]
    assert lines_of("rule=dfa", "network.depth=0", task=task)["data"].endswith(
        f"9 training, no validation, 9 test examples; inputs 1 x 8 x 8; {text}"
    )
