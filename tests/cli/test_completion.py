"""Completion by the shells. Oracles: a bash, the registered names, and what the command line accepts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bpfree import installed_plugins
from bpfree.cli.main import main
from bpfree.config import parse_words, resolve

PROBE = """
import sys
from bpfree.cli.main import main
try:
    main([])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def completed(capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    """What bash would offer behind a line, and put in place of what follows its last ``=``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_BPFREE_COMPLETE", "bash_complete")
        patch.setenv("COMP_WORDS", line)
        with pytest.raises(SystemExit):
            main([])
    return [found.partition(",")[2] for found in capsys.readouterr().out.splitlines() if found]


def test_names_keys_and_values(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = installed_plugins()
    for line, expected in {
        "bpfree tra": ["train", "track"],
        "bpfree study st": ["status"],
        "bpfree rules n": [name for name in registry.names("rules") if name.startswith("n")],
        "bpfree train rule=n": [name for name in registry.names("rules") if name.startswith("n")],
        "bpfree train op": ["optimizer=", "optimizer."],
        "bpfree train rule=dfa rule.": [
            "rule.scale=",
            *[key for key in completed(capsys, "bpfree train rule=dfa rule.") if "scale" not in key],
        ],
        "bpfree train rule=noprop-dt rule.emb": ["rule.embedding=", "rule.embedding_dim="],
        "bpfree train rule=noprop-dt rule.head=": ["softmax", "radial"],
        "bpfree train optimizer=adamw optimizer.l": ["optimizer.lr="],
        "bpfree train optimizer=sg": ["sgd"],
        "bpfree train schedule=mi": ["milestones"],
        "bpfree train tracking.enabled=": ["true", "false"],
        "bpfree train evaluation.metrics=[top": ["[top5]"],
        "bpfree train evaluation.metrics=[top5,macro": ["[top5,macro-f1]"],
        "bpfree compare dfa task=mni": ["mnist", "mnist-angle"],
        "bpfree certify df": ["dfa"],
        "bpfree plugins info nop": ["noprop"],
        "bpfree study run quickst": ["quickstart"],
    }.items():
        assert completed(capsys, line) == expected, line


def test_every_key_that_is_offered_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [word for word in completed(capsys, "bpfree train rule=dfa network=mlp ") if word.endswith(".")]
    keys = [key for section in sections for key in completed(capsys, f"bpfree train rule=dfa network=mlp {section}")]
    recipe = resolve(parse_words(["rule=dfa", "network=mlp"]))
    assert {key.rstrip("=") for key in keys} == {key for key in recipe.flat() if "." in key and not key.endswith(".name")} | {
        "optimizer.name",
        "schedule.name",
    }


def test_runs_studies_and_their_rows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("old", "new")):
        (workplace / "runs" / name).mkdir(parents=True)
        (workplace / "runs" / name / "config.yaml").touch()
        os.utime(workplace / "runs" / name / "config.yaml", (number, number))
    (workplace / "elsewhere" / "third").mkdir(parents=True)
    (workplace / "elsewhere" / "third" / "config.yaml").touch()
    rows = "rows: [{label: one, settings: {rule: dfa}}, {label: two, settings: {rule: backprop}}]"
    (workplace / "mine.yaml").write_text(f"title: T\n{rows}\n")
    assert completed(capsys, "bpfree evaluate ") == ["new", "old"]
    assert completed(capsys, "bpfree train --resume n") == ["new"]
    assert completed(capsys, "bpfree train output=elsewhere --resume ") == ["third"]
    assert completed(capsys, "bpfree study status mi") == ["mine.yaml"]
    assert completed(capsys, "bpfree study run mine.yaml --rows ") == ["one", "two"]
    assert completed(capsys, "bpfree study run mine.yaml --rows one,") == ["one,two"]
    (workplace / "mine.yaml").write_text(f"title: T\n{rows.replace('two', 'other')}\n")
    assert completed(capsys, "bpfree study run mine.yaml --rows o") == ["one", "other"]
    assert completed(capsys, "bpfree study run none.yaml --rows o") == []


def test_after_the_first_time_torch_is_not_imported(workplace: Path) -> None:
    words = dict(os.environ, _BPFREE_COMPLETE="zsh_complete", COMP_WORDS="bpfree train rule=dfa rule.", COMP_CWORD="3")
    words["XDG_CACHE_HOME"] = str(workplace)
    said = [subprocess.run([sys.executable, "-c", PROBE], env=words, capture_output=True, text=True, check=False) for _ in range(2)]
    assert said[0].stdout == said[1].stdout
    assert "part\nrule.scale=\n_" in said[0].stdout
    assert said[1].stderr.strip() == "False"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_in_a_shell(workplace: Path) -> None:
    script = subprocess.run([sys.executable, "-m", "bpfree", "completion", "bash"], capture_output=True, text=True, check=True).stdout
    bin_folder = workplace / "bin"
    bin_folder.mkdir()
    (bin_folder / "bpfree").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bpfree "$@"\n')
    (bin_folder / "bpfree").chmod(0o755)
    probe = """
    compopt() { :; }
    COMP_LINE="bpfree train rule=dfa task=mni"; COMP_POINT=${#COMP_LINE}
    _bpfree_completion bpfree
    echo "${COMPREPLY[@]}"
    """
    environment = dict(os.environ, PATH=f"{bin_folder}:{os.environ['PATH']}")
    said = subprocess.run(["bash", "-c", script + probe], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["mnist", "mnist-angle"]


def test_one_command_installs_it_once(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    (workplace / ".bashrc").write_text("alias l=ls")
    for shell, file in (("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish/completions/bpfree.fish")):
        monkeypatch.setenv("SHELL", f"/bin/{shell}")
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                main(["completion", "--install"])
            assert end.value.code == 0
        text = (workplace / file).read_text()
        assert text.count("# completion of bpfree") == (shell != "fish")
        assert str(workplace / file) in capsys.readouterr().out
    assert (workplace / ".bashrc").read_text().startswith("alias l=ls\nsource ")
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(SystemExit):
        main(["completion", "--install"])
    assert "fix:   name one: bpfree completion bash" in capsys.readouterr().err
