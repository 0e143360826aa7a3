"""What is misspelt: each error says what, where, and what was probably meant. Oracle: the right names, and the layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bpfree.cli.main import main

LAYOUT = re.compile(r"error: [^\n]+\n(  where: +[^\n]+\n)?(  fix: +[^\n]+\n)?(  known: +[^\n]+\n)?")
FOREIGN = re.compile(r"OmegaConf|ListConfig|ConfigKey|No such|Invalid value|torch\.load|weights_only|Traceback|\bclick\b")
"""Words of the libraries below."""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code in (1, 2)
    said = capsys.readouterr().err
    assert not FOREIGN.search(said), said
    return said


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("trian", "did you mean train?"),
        ("study sttus quickstart", "did you mean status?"),
        ("train --rule dfa", "settings are words without dashes: rule=dfa"),
        ("train --epochs=3", "settings are words without dashes: epochs=3"),
        ("train --lr", "settings are words without dashes: lr=VALUE"),
        ("train --quite", "did you mean --quiet?"),
        ("evaluate r --split valid", "did you mean validation?"),
        ("study retry dfa x.yaml", "use one of the known values"),
        ("study run", "usage: bpfree study run"),
        ("rules a b", "usage: bpfree rules"),
        ("train optimizer.leraning_rate=0.1", "did you mean optimizer.lr?"),
        ("train learning_rate=0.1", "did you mean optimizer.lr?"),
        ("train wd=0.1", "did you mean optimizer.weight_decay?"),
        ("train batch-size=3", "did you mean batch_size?"),
        ("train rule=dfa network=resnet18", "did you mean network=torchvision network.model=resnet18?"),
        ("train rule=noprop", "did you mean 'noprop-dt', 'noprop-ct' or 'noprop-fm'?"),
        ("compare dfa noprop", "did you mean 'noprop-dt', 'noprop-ct' or 'noprop-fm'?"),
        ("train schedule=cos", "did you mean 'cosine'?"),
        ("train task=cifar", "did you mean 'cifar10'?"),
        ("train network.widths=256,128", "network.widths=[256,128]"),
        ("train network.activation=Tahn", "did you mean 'tanh'?"),
        ("train precision=bf61", "did you mean 'bf16'?"),
        ("train optimizer=adam optimizer.options={beta:3}", "write a space behind the colon: {beta: 3}"),
        ("rules nosuch", "use one of the known names"),
        ("plugins info nopropp", "did you mean 'noprop'?"),
        ("study show quickstrat", "did you mean 'quickstart'?"),
    ],
)
def test_a_misspelt_word_has_one_layout_and_the_right_hint(line: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *line.split(" ", 3 if "{" in line else -1))
    assert f"  fix:   {fix}" in said
    assert LAYOUT.fullmatch(said), said
    assert "  where: " in said


def test_a_folder_that_is_no_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "runs" / "20260101-dfa").mkdir(parents=True)
    assert "the folder is not a run's" in refused(capsys, "evaluate", "runs")
    (workplace / "runs" / "20260101-dfa" / "config.yaml").touch()
    assert "  fix:   name one of its runs: 20260101-dfa" in refused(capsys, "evaluate", "runs")
    assert "the run has no checkpoint yet" in refused(capsys, "evaluate", "runs/20260101-dfa")
    assert "did you mean '20260101-dfa'?" in refused(capsys, "evaluate", "20260101-dfaa")


def test_a_damaged_checkpoint_is_told_without_torchs_advice(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = workplace / "runs" / "broken" / "checkpoints"
    place.mkdir(parents=True)
    (place / "last.pt").write_text("junk")
    said = refused(capsys, "train", "--resume", "broken")
    assert "it is damaged, or was not written by bpfree" in said
    assert "  fix:   use another file of its folder checkpoints, or train again: bpfree train --config" in said


def test_a_study_is_reported_whole(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Misspelt keys are taken for what they mean, so that what is wrong below them is seen too, and nothing that is not."""
    (workplace / "mine.yaml").write_text("ruels: [dfa]\nseed: 3\ntasks: [cifar]\nsettings: {budget.epoch: 3}\n")
    said = refused(capsys, "study", "run", "mine.yaml")
    assert said.startswith("error: 5 problems in the study:\n")
    faults = re.findall(r"^  - (.*)(?:\n    where: .*)?(?:\n    fix:   (.*))?", said, re.M)
    assert faults == [
        ("unknown key 'ruels'", "did you mean 'rules'?"),
        ("unknown key 'seed'", "did you mean 'seeds'?"),
        ("the study has no title: add title: TEXT", ""),
        ("unknown key budget.epoch", "did you mean budget.epochs?"),
        ("unknown task 'cifar'", "did you mean 'cifar10'?"),
    ]


def test_long_lists_of_names_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", "rule=dfa", "network=torchvision", "network.model=resnet1", "task=digits")
    known = next(line for line in said.splitlines() if line.startswith("  known:"))
    assert re.search(r" and \d+ others$", known)
    assert "did you mean 'resnet18'?" in said
