"""``${...}`` in words and in files.

Oracle: a secret in the environment, which a file of somebody else asks for, is in no message and in no recipe.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfree import UsageError, load
from bpfree.cli.main import main
from bpfree.config import parse_words, read_yaml, recipe_of, resolve
from bpfree.study import cells
from bpfree.study.comparing import comparison
from bpfree.study.file import read_study
from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

SECRET = "hunter2"
WORD = "${oc.env:THEIR_TOKEN}"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_TOKEN", SECRET)


def test_words_of_the_command_line_may_refer() -> None:
    assert resolve(parse_words([f"stream={WORD}"])).settings.stream == SECRET
    assert resolve(parse_words(["seed=3", "stream=of-${seed}"])).settings.stream == "of-3"
    study = comparison([f"dfa,stream={WORD}"], parse_words([f"output={WORD}"]), seeds=1, references=False)
    assert cells.plan(study).rows[0].recipe.settings.stream == SECRET
    assert cells.plan(study, parse_words(["output=there-${seed}"])).output == Path("there-0")


@pytest.mark.parametrize(
    "text",
    [
        "stream: ${oc.env:THEIR_TOKEN}",
        "stream: a-${seed}",
        "tracking: {experiment: '\\${oc.env:THEIR_TOKEN}'}",
        "diagnostics: ['${oc.env:THEIR_TOKEN}']",
        "optimizer: {options: {betas: [{'${oc.env:THEIR_TOKEN}': 1}, 0.9]}}",
        "optimizer: {options: {eps: {deep: ['${oc.env:THEIR_TOKEN}']}}}",
    ],
)
def test_a_configuration_file_may_not(tmp_path: Path, text: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(f"rule: dfa\n{text}\n")
    with pytest.raises(UsageError) as caught:
        resolve(read_yaml(path))
    message = str(caught.value)
    assert f"{path}, line 2" in message
    assert "write the value itself" in message
    assert text.split(":")[0] in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "part",
    [
        "settings: {stream: '${oc.env:THEIR_TOKEN}'}\nrows: [{label: a, settings: {rule: dfa}}]",
        "rows: [{label: a, settings: {rule: dfa, stream: '${oc.env:THEIR_TOKEN}'}}]",
        "columns: [{label: c, settings: {stream: '${oc.env:THEIR_TOKEN}'}}]\nrows: [{label: a, settings: {rule: dfa}}]",
        "columns: [{label: c}]\nrows: [{label: a, settings: {rule: dfa}, columns: {c: {stream: '${oc.env:THEIR_TOKEN}'}}}]",
        "rules: [{rule: dfa, settings: {stream: '${oc.env:THEIR_TOKEN}'}}]",
        "tune: {trials: 2, space: {stream: ['${oc.env:THEIR_TOKEN}', b]}}\nrows: [{label: a, settings: {rule: dfa}}]",
        "tune: {trials: 2, space: {stream: [a, b]}, settings: {threads: '${oc.env:THEIR_TOKEN}'}}\n"
        "rows: [{label: a, settings: {rule: dfa}}]",
        "tune: {trials: 2, space: {stream: [a, b]}}\nrows: [{label: a, settings: {rule: dfa}, tune: {stream: ['${seed}', b]}}]",
    ],
)
def test_a_study_file_may_not(tmp_path: Path, part: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(f"title: theirs\nnotes: costs ${{x}}\n{part}\n")
    with pytest.raises(UsageError) as caught:
        cells.plan(read_study(path))
    message = str(caught.value)
    assert str(path) in message
    assert "write the value itself" in message
    assert "stream" in message or "threads" in message
    assert SECRET not in message


def test_neither_may_a_checkpoint_or_the_configuration_of_a_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "rule=dfa", "budget.epochs=1", "tracking.enabled=false", "pictures.curves=false", "--quiet"])
    assert not ended.value.code
    (run,) = Path("runs").iterdir()
    checkpoint, written = run / "checkpoints" / "last.pt", run / "config.yaml"
    written.write_text(written.read_text().replace("experiment: bpfree", f"experiment: {WORD}"))
    with pytest.raises(UsageError, match=r"tracking\.experiment.*\n.*config\.yaml, line \d+"):
        resolve(read_yaml(written))
    content = read_checkpoint(checkpoint)
    content["config"]["tracking"]["experiment"] = WORD
    with pytest.raises(UsageError, match=r"tracking\.experiment.*\n.*last\.pt"):
        recipe_of(content["config"], where=str(checkpoint))
    write_checkpoint(checkpoint, content)
    with pytest.raises(UsageError, match=r"tracking\.experiment.*\n.*last\.pt"):
        load(run)
    for words in (["train", "--resume", str(run)], ["evaluate", str(run)], ["train", "--config", str(written)]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert SECRET not in "".join(capsys.readouterr())
