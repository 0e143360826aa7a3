"""``bpfree plugins new``: what it writes installs, trains, and is certified (`make lint types` checks its style); what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ci_scripts
import pytest

from bpfree.cli.main import main
from bpfree.plugins import Plugins
from bpfree.registry import read_entry
from bpfree.template import next_commands, write_plugin

ROOT = Path(__file__).parents[2]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def test_the_way_from_nothing_to_a_registered_rule_is_at_most_five_commands(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plugins", "new", "my-rule") == 0
    shown = capsys.readouterr().out
    commands = next_commands("my-rule", Path("my-rule"))
    assert len(commands) + 1 <= 5
    assert all(command in shown for command in commands)
    assert {path.relative_to("my-rule").as_posix() for path in Path("my-rule").rglob("*") if path.is_file()} == {
        "pyproject.toml",
        "README.md",
        "registry-entry.toml",
        "src/bpfree_my_rule/__init__.py",
        "src/bpfree_my_rule/plugin.py",
        "src/bpfree_my_rule/py.typed",
        "tests/test_my_rule.py",
    }
    assert not any("{{" in path.read_text() for path in Path("my-rule").rglob("*") if path.is_file())
    assert len(Path("my-rule/src/bpfree_my_rule/plugin.py").read_text().splitlines()) < 60
    assert read_entry(Path("my-rule/registry-entry.toml")).rules == ["my-rule"]  # read_entry checks it against the schema


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["My_Rule"], "my-rule"),
        (["my--rule"], "my-rule"),
        (["3d"], "a letter first"),
        (["rule/../x"], "not a valid plugin name"),
        (["a" * 41], "at most 40"),
        (["noprop"], "the plugin 'noprop' already exists in bpfree-noprop"),
        (["noprop-dt"], "the rule 'noprop-dt' already exists in bpfree-noprop"),
        (["core"], "the plugin 'core' already exists"),
        (["forward_gradient"], "not a valid plugin name"),
        (["none"], "a rule's class cannot be called 'None'"),
        (["batch"], "a rule's class cannot be called 'Batch'"),
        (["mine", "--class-name", "not a name"], "a rule's class cannot be called 'not a name'"),
        (["taken"], "the folder of the plugin exists"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written then; every refusal says what to do."""
    (workplace / "taken").mkdir()
    (workplace / "taken/file").write_text("mine")
    assert call("plugins", "new", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "fix:" in error
    assert sorted(path.name for path in workplace.rglob("*")) == ["file", "taken"]


def test_another_place_and_class(workplace: Path) -> None:
    (workplace / "empty").mkdir()
    assert call("plugins", "new", "none", "--class-name", "NoRule", "--dir", "empty") == 0
    assert "class NoRule(bpfree.Streamed)" in (workplace / "empty/src/bpfree_none/plugin.py").read_text()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path, Path]:
    """The script, an environment in which the core and a new plugin are installed, and the folder of both."""
    script, folder = ci_scripts.load("downstream"), tmp_path_factory.mktemp("clean")
    write_plugin("my-rule", folder / "my-rule")
    interpreter = script.clean_environment(folder / "environment")
    script.install(interpreter, ROOT, folder / "sources")
    script.install(interpreter, folder / "my-rule", folder / "sources")
    return script, interpreter, folder


@pytest.mark.slow
@pytest.mark.xdist_group("new plugin")  # in one environment
def test_a_new_plugin_in_a_clean_environment(clean: tuple[ModuleType, Path, Path]) -> None:
    """Only it and the core are there; it trains to more than a frozen network's recorded 74.7 % after 30 epochs, and is certified."""
    script, interpreter, folder = clean
    bpfree = interpreter.parent / "bpfree"
    assert {name: record["status"] for name, record in script.plugins_seen(interpreter, folder).items()} == {"core": "ok", "my-rule": "ok"}
    words = ["rule=my-rule", "task=digits", "budget.epochs=5", "device=cpu", "threads=1", "tracking.enabled=false"]
    script.call(bpfree, "train", *words, cwd=folder)
    (run,) = (folder / "runs").glob("*/events.jsonl")
    assert json.loads(run.read_text().splitlines()[-1])["result"]["test/accuracy"] > 0.85
    script.call(bpfree, "certify", "my-rule", "--quick", "--output", folder / "my-rule.json", cwd=folder)
    assert json.loads((folder / "my-rule.json").read_text())["status"] == "passed (quick)"
    refused = script.call(bpfree, "registry", "add", "my-rule", "--certificate", folder / "my-rule.json", cwd=folder, check=False)
    assert "is quick, not full" in refused.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("new plugin")  # in one environment
def test_the_tests_of_a_new_plugin_pass(clean: tuple[ModuleType, Path, Path]) -> None:
    """The conformance checks, and its own."""
    script, interpreter, folder = clean
    tests = folder / "my-rule" / "tests"
    said = script.call(interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "300", tests, cwd=folder).stdout
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > 10, said


@pytest.mark.slow
@pytest.mark.xdist_group("new plugin")  # in one environment
def test_its_certificate_makes_a_valid_registry(clean: tuple[ModuleType, Path, Path]) -> None:
    """The commands that `plugins new` names, as they are, from certification on: the full examination."""
    script, interpreter, folder = clean
    bpfree = interpreter.parent / "bpfree"
    for command in next_commands("my-rule", Path("my-rule"))[-2:]:
        script.call(bpfree, *shlex.split(command)[1:], cwd=folder)
    script.call(bpfree, "registry", "validate", "--folder", "registry", cwd=folder)
    assert "1 of 1" in script.call(bpfree, "registry", "list", "--folder", "registry", cwd=folder).stdout


@pytest.mark.parametrize("kind", ["task", "network", "metric"])
def test_a_plugin_brings_a_task_a_network_or_a_metric(kind: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is registered under its name, and its own tests pass."""
    name = f"my-{kind}"
    assert call("plugins", "new", name, f"--{kind}") == 0
    folder = Path(name)
    assert not any("{{" in path.read_text() for path in folder.rglob("*") if path.is_file())
    assert not (folder / "registry-entry.toml").exists()
    monkeypatch.syspath_prepend(str(folder / "src"))
    module = __import__(f"bpfree_my_{kind}.plugin", fromlist=["plugin"])
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"bpfree_my_{kind}")]:
        del sys.modules[loaded]  # or other tests would find the package installed

    class Entry:
        dist = None

        def load(self) -> ModuleType:
            return module

    entry = Entry()
    entry.name = name  # type: ignore[attr-defined]
    found = Plugins(entry_points=[entry])
    assert found.records[name].status == "ok", found.records[name].reason
    assert found.records[name].provides[f"{kind}s"] == [name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str((folder / "src").resolve()), *filter(None, sys.path)])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
        str(folder / "tests"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
