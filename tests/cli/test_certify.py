"""``bpfree certify`` as a person types it. Oracles: exit codes, files, streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpfree.certify import read_certificate
from bpfree.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["certify", *words])
    streams = capsys.readouterr()
    return int(ended.value.code or 0), streams.out, streams.err


@pytest.mark.slow
def test_certificate_page_and_summary(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "linear", "--quick", "--output", "linear.json", "--page", "linear.html")
    assert code == 0
    assert "linear: passed (quick)" in out
    assert "written: linear.json" in out
    assert "same-seed" in err
    assert "passed" in err
    assert read_certificate(Path("linear.json")).rule == "linear"
    assert Path("linear.html").read_text().startswith("<!doctype html>")


def test_json_and_nothing_else(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "dfa", "rule.scale=2", "--only", "config-roundtrip", "--json")
    assert code == 0
    assert err == ""
    content = json.loads(out)
    assert content["config"] == {"scale": 2.0, "error": "full", "placement": "blocks"}
    assert content["settings"] == ["rule.scale=2"]
    assert content["kind"] == "partial"


def test_the_checks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--list")
    assert code == 0
    assert "trait-downstream-weights" in out
    assert "cannot be waived" in out
    assert "not in --quick" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a rule"),
        (("dfaa",), "did you mean 'dfa'"),
        (("dfa", "--only", "learnin"), "did you mean 'learning'"),
        (("dfa", "--waive", "learning"), "CHECK=REASON"),
        (("dfa", "--waive", "learning="), "gives no reason"),
        (("dfa", "--output", "nowhere/x.json"), "no folder 'nowhere'"),
        (("dfa", "rule.scale=-1"), "out of range"),
    ],
)
def test_wrong_words(workplace: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2
    assert message in err
