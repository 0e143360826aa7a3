"""Every listing fits the terminal. Oracles: the number of columns; without a width, the same words in lines of any length."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfree.cli.main import main
from bpfree.document.terminal import duration

STUDY = """
title: A small study of two rules with a title that is longer than the narrowest of the terminals
settings: {task: digits, budget.epochs: 1, tracking.enabled: false}
seeds: 1
rules: [dfa, backprop]
networks: [{label: narrow, settings: {network.width: 4, network.depth: 1}}]
floor: false
probe: false
"""
LISTINGS = [
    ["rules"],
    ["rules", "noprop-dt"],
    ["rules", "softhebb"],
    ["networks"],
    ["networks", "torchvision"],
    ["tasks"],
    ["tasks", "npz"],
    ["programs"],
    ["programs", "sklearn"],
    ["metrics"],
    ["metrics", "top5"],
    ["plugins", "list"],
    ["plugins", "info", "noprop"],
    ["registry", "list"],
    ["registry", "show", "noprop"],
    ["registry", "validate"],
    ["study", "list"],
    ["study", "show", "noprop/table1-mnist"],
    ["study", "show", "quickstart"],
    ["certify", "--list"],
    ["train", "--print-config"],
    ["train", "--print-config", "rule=noprop-dt", "task=npz", "task.path=none.npz", "network=noprop-cnn"],
    ["train", "--print-plan", "rule=predictive-coding"],
    ["train", "--print-plan", "rule=noprop-dt"],
]
OF_A_STUDY = [
    ["study", "run", "small.yaml", "--dry-run"],
    ["study", "status", "small.yaml"],
    ["study", "report", "small.yaml"],
    ["study", "run", "small.yaml"],
    ["compare", "dfa", "--only", "--seeds", "1", "budget.epochs=1", "network.width=4", "tracking.enabled=false"],
    ["runs"],
]


def shown(words: list[str], columns: int | None, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        if columns is not None:
            patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            main(words)
    return "".join(capsys.readouterr())


def too_long(text: str, columns: int) -> list[str]:
    """The lines that do not fit, except for a path behind a label, which must be copied as a whole."""
    lines = [line for line in text.splitlines() if len(line) > columns]
    return [line for line in lines if not ("/" in (path := line.split()[-1]) and len(path) > columns - 22)]


@pytest.mark.parametrize("words", LISTINGS, ids=" ".join)
def test_a_listing_fits(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for columns in (60, 80, 120):
        assert too_long(shown(words, columns, capsys), columns) == []


def test_what_is_said_of_studies_fits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "small.yaml").write_text(STUDY)
    shown(["study", "run", "small.yaml"], None, capsys)
    for words in OF_A_STUDY:
        for columns in (60, 80, 120) if "status" in words else (60,):
            assert too_long(shown(words, columns, capsys), columns) == [], words


def test_a_run_and_a_certificate_fit(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(["train", "rule=dfa", "budget.epochs=1", "network.width=4", "alignment.every=5", "tracking.enabled=false"], 60, capsys)
    assert "cosine with the true gradient" in said
    assert too_long(said, 60) == []
    assert too_long(shown(["certify", "dfa", "--only", "shapes"], 60, capsys), 60) == []


@pytest.mark.parametrize("words", [["rules", "nosuch"], ["train", "rule=nosuch", "seed=x", "network=nosuch"], ["trian"], ["study", "run"]])
def test_an_error_fits(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(words, 60, capsys)
    assert said.startswith("error: ")
    assert too_long(said, 60) == []


@pytest.mark.parametrize("words", [["rules"], ["plugins", "list"], ["study", "list"]])
def test_into_a_pipe_each_row_is_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    wide, narrow = shown(words, None, capsys), shown(words, 60, capsys)
    names = [line.split()[0] for line in wide.splitlines()[2:] if line and not line.startswith("not loaded")]
    assert len(names) == len(set(names))
    assert len(narrow.splitlines()) > len(wide.splitlines())


def test_times_have_the_unit_that_suits_them() -> None:
    """Oracle: by hand."""
    times = {0: "0 s", 0.04: "0.04 s", 4.23: "4.2 s", 45: "45 s", 186: "3.1 min", 1200: "20 min", 7200: "2.0 h", 200_000: "55.6 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_help_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command and its subcommands."""
    from bpfree.cli.main import cli

    context = cli.make_context("bpfree", ["--help"], resilient_parsing=True)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        for sub in ([], *([each] for each in getattr(command, "commands", {}))):
            assert too_long(shown([name, *sub, "--help"], 80, capsys), 80) == [], name
    assert too_long(shown(["--help"], 80, capsys), 80) == []
