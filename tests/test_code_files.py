"""Code that is named by its file: executed where the command line names that file, and nowhere else.

Oracles: a mark that the code leaves on the disk when it is executed; the exit code; the hash of the code.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from code_kit import FAST, MINE, OURS, written

import bpfree
from bpfree import UsageError, scoring
from bpfree.cli.main import main
from bpfree.code_files import CodeFile, CodeName
from bpfree.config import allowing, parse_words, read_yaml, resolve
from bpfree.leaves import Leaf
from bpfree.record.folder import read_run


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def only_run(folder: Path = Path("runs")) -> Path:
    (run,) = [path for path in folder.iterdir() if path.name != "studies"]
    return run


def recipe(*words: str) -> bpfree.config.Recipe:
    leaves = parse_words(words)
    return resolve(leaves, allowing(leaves))


# --- what a name is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dfa", "mine.py", "mine:Mine", "mine.py:", "mine.py:a b", "mine.py@12:Mine", "mine.pyc:Mine"])
def test_other_names_are_none_of_code(text: str) -> None:
    assert CodeName.parse(text) is None


def test_a_name_says_file_name_and_hash(tmp_path: Path) -> None:
    code = CodeName.parse(f"a b/x.py:y.py@{'0' * 16}:Mine")
    assert code == CodeName("a b/x.py:y.py", "Mine", "0" * 16)
    assert code.short == "x.py:y.py:Mine"
    written(tmp_path)
    (tmp_path / "link.py").symlink_to(tmp_path / "mine.py")
    assert CodeName("link.py", "Mine").resolved(tmp_path).path == str((tmp_path / "mine.py").resolve())


def test_paths_of_words_and_of_files(workplace: Path) -> None:
    """Of a word relative to the working folder, of a configuration relative to that file."""
    (workplace / "sub").mkdir()
    (workplace / "sub" / "c.yaml").write_text("rule: mine.py:Mine\n")
    assert parse_words(["rule=mine.py:Mine"])[0].value == f"{workplace.resolve()}/mine.py:Mine"
    assert read_yaml(Path("sub/c.yaml"))[0].value == f"{workplace.resolve()}/sub/mine.py:Mine"


# --- training, with what is recorded ------------------------------------------------------------------------------------


def test_train_then_evaluate_and_resume(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(workplace)
    assert call("train", *OURS, "network.width=5", "task.noise=0.2", *FAST) == 0
    first, digest = only_run(), CodeFile.read(path).hash
    run = read_run(first)
    assert ":" not in first.name
    assert run.tags["rule"] == "mine.py:Mine"
    assert (run.tags["plugin"], run.tags["plugin_version"]) == ("mine.py", digest)
    assert run.config["rule.name"] == f"{path.resolve()}@{digest}:Mine"
    assert run.config["network.width"] == 5
    assert (first / "code" / "mine.py").read_bytes() == path.read_bytes()
    assert run.artifacts["code/mine.py"] == first / "code" / "mine.py"

    capsys.readouterr()
    for words in (["evaluate", str(first)], ["train", "--resume", str(first), "budget.epochs=2", "-q"]):
        assert call(*words) == 2
        error = capsys.readouterr().err
        assert f"the code in {path.resolve()} is executed only if the command line names it" in error
        assert f"--allow-code {path.resolve()}" in error
        assert call(*words, "--allow-code", "mine.py") == 0
    assert read_run(first).status == "finished"
    assert len(read_run(first).history) == 2
    assert call("train", "--config", str(first / "config.yaml"), "--allow-code", "mine.py", "output=again", "budget.epochs=2", "-q") == 0
    same, again = (torch.load(folder / "checkpoints" / "last.pt")["weights"] for folder in (first, only_run(Path("again"))))
    assert all(torch.equal(same[name], again[name]) for name in same)


def test_changed_code_is_refused_until_it_is_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(workplace)
    assert call("train", *OURS, *FAST, "-q") == 0
    run, before = only_run(), CodeFile.read(path).hash
    path.write_text(MINE.replace("error @", "0.5 * error @") + "\n# a comment\n")
    now = CodeFile.read(path).hash
    assert now != before
    assert call("train", "--resume", str(run), "budget.epochs=2", "--allow-code", "mine.py", "-q") == 2
    error = capsys.readouterr().err
    assert f"has changed: it was {before}, and is {now}" in error
    assert f"name it as it is now: rule={path.resolve()}:Mine" in error
    with pytest.raises(UsageError, match="has changed"):
        bpfree.load(run, allow_code=["mine.py"])
    assert call("train", "--resume", str(run), "budget.epochs=2", *OURS, "-q") == 0
    assert {each.name for each in (run / "code").iterdir()} == {"mine.py", f"mine-{now}.py"}
    assert (run / "code" / "mine.py").read_text() == MINE
    assert read_run(run).config["rule.name"].endswith(f"@{now}:Mine")


def test_comments_are_no_change(workplace: Path) -> None:
    path = written(workplace)
    assert call("train", *OURS, *FAST, "-q") == 0
    path.write_text("# a comment\n" + MINE)
    assert bpfree.load(only_run(), allow_code=[path]).spec.name == "mine.py:data"


def test_another_class_of_the_file_is_another_rule(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(workplace, MINE + "\n\nclass Other(Mine):\n    pass\n")
    assert call("train", *OURS, *FAST, "-q") == 0
    assert call("train", "--resume", str(only_run()), "budget.epochs=2", *OURS, "rule=mine.py:Other") == 1
    assert "the checkpoint is of another rule: mine.py:Mine, not mine.py:Other" in capsys.readouterr().err


def test_a_file_that_moved_is_named_in_its_new_place(workplace: Path) -> None:
    path = written(workplace)
    assert call("train", *OURS, *FAST, "-q") == 0
    (workplace / "new").mkdir()
    path.rename(workplace / "new" / "mine.py")
    moved = [word.replace("=mine", "=new/mine") for word in OURS]
    scores = scoring.score(str(only_run()), parse_words(moved), registry=allowing(parse_words(moved))).values
    assert scores["loss"] > 0


def test_load_in_python(workplace: Path) -> None:
    path = written(workplace)
    assert call("train", *OURS, *FAST, "-q") == 0
    with pytest.raises(UsageError, match="only if the command line names it"):
        bpfree.load(only_run())
    saved = bpfree.load(only_run(), allow_code=[path])
    assert type(saved.rule).__name__ == "Mine"
    assert saved.predict(torch.zeros(2, 4)).shape == (2, 3)
    given = type(saved.rule)(saved.network, saved.spec)
    assert torch.equal(bpfree.load(only_run(), rule=given).predict(torch.ones(2, 4)), saved.predict(torch.ones(2, 4)))


def test_a_run_of_a_file_is_sent_without_its_code(workplace: Path) -> None:
    """What it was trained with need not be executed to send its record."""
    mark = workplace / "mark"
    written(workplace, mark=mark)
    words = [word for word in FAST if word != "tracking.enabled=false"]
    assert call("train", *OURS, *words, "tracking.to=[csv]", "-q") == 0
    mark.unlink()
    forget(workplace)
    assert call("track", "send", str(only_run())) == 0
    assert not mark.exists()


def forget(folder: Path) -> None:
    """Have this process execute the files of a folder again when they are asked for."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(folder.resolve())):
            del sys.modules[name]
    bpfree.installed_plugins()._coded.clear()


# --- code of somebody else ------------------------------------------------------------------------------------------------

TABLE = """
title: Theirs
rows: [{label: a, settings: {rule: evil.py:Mine}}]
settings: {budget.epochs: 1}
seeds: 1
"""
GRID = """
title: Theirs
rules: [evil.py:Mine]
networks: [{label: n, settings: {network: evil.py:Net}}]
tasks: [evil.py:data]
settings: {budget.epochs: 1}
seeds: 1
"""


@pytest.fixture
def theirs(workplace: Path) -> Path:
    """Files of somebody else: a configuration, two studies, a run; the mark that their code leaves."""
    mark = workplace / "mark"
    written(workplace, mark=mark, name="evil.py")
    written(workplace, name="harmless.py")
    for name, text in (("table", TABLE), ("grid", GRID), ("config", "rule: evil.py:Mine\nnetwork: evil.py:Net\ntask: evil.py:data\n")):
        Path(f"{name}.yaml").write_text(text)
    assert call("train", "-c", "config.yaml", *FAST, "output=theirs", "--allow-code", "evil.py", "-q") == 0
    only_run(Path("theirs")).rename("theirs/run")
    assert mark.exists()  # it is noticed
    mark.unlink()
    forget(workplace)
    return mark


REQUESTS = {
    "train a configuration": ["train", "-c", "config.yaml", *FAST],
    "print a configuration": ["train", "-c", "config.yaml", "--print-config"],
    "plan a configuration": ["train", "-c", "config.yaml", "--print-plan"],
    "train a run's configuration": ["train", "-c", "theirs/run/config.yaml", *FAST],
    "resume": ["train", "--resume", "theirs/run", "budget.epochs=2"],
    "evaluate": ["evaluate", "theirs/run"],
    "run a table": ["study", "run", "table.yaml"],
    "plan a table": ["study", "run", "table.yaml", "--dry-run"],
    "retry a table": ["study", "retry", "failed", "table.yaml"],
    "report a table": ["study", "report", "table.yaml"],
    "status of a table": ["study", "status", "table.yaml"],
    "run a grid": ["study", "run", "grid.yaml"],
    "show a grid": ["study", "show", "grid.yaml"],
}


@pytest.mark.parametrize("words", REQUESTS.values(), ids=REQUESTS)
def test_nothing_is_executed_that_the_command_line_does_not_name(theirs: Path, words: list[str]) -> None:
    for more in ([], ["--allow-code", "harmless.py"]):
        assert call(*words, *more) == 2
        assert not theirs.exists()
    assert call(*words, "--allow-code", "evil.py") == 0
    assert theirs.exists()


def test_reading_commands_execute_nothing(theirs: Path) -> None:
    assert call("study", "show", "table.yaml") == 0
    assert call("runs", "theirs") == 0
    with pytest.raises(UsageError, match="names it"):
        bpfree.load("theirs/run", allow_code=["harmless.py"])
    assert not theirs.exists()


def test_the_copy_of_a_run_is_a_record(workplace: Path) -> None:
    """It is never executed: neither where the file is there, nor in its place."""
    path, mark = written(workplace), workplace / "mark"
    assert call("train", *OURS, *FAST, "-q") == 0
    run = only_run()
    written(run / "code", mark=mark)
    forget(workplace)
    assert call("evaluate", str(run), "--allow-code", "mine.py") == 0
    path.unlink()
    assert call("evaluate", str(run)) == 2
    assert call("evaluate", str(run), "--allow-code", "mine.py") == 2
    assert call("evaluate", str(run), "--allow-code", str(run / "code" / "mine.py")) == 2
    assert not mark.exists()


def test_a_word_allows_its_own_file_alone(theirs: Path) -> None:
    """A later name of a word stands for that of the file, which is not executed."""
    assert call("train", "-c", "config.yaml", "rule=harmless.py:Mine", *FAST) == 2
    words = [f"{each}=harmless.py:{name}" for each, name in (("rule", "Mine"), ("network", "Net"), ("task", "data"))]
    assert call("train", "-c", "config.yaml", *words, *FAST, "-q") == 0
    assert not theirs.exists()


def test_leaves_of_files_allow_nothing(workplace: Path) -> None:
    written(workplace)
    leaf = Leaf("rule", f"{workplace}/mine.py:Mine", "somebody's file")
    assert not allowing([leaf]).given.files
    assert allowing(parse_words(["rule=mine.py:Mine"])).given.files


def test_links_lead_to_the_file_that_is_allowed(theirs: Path, workplace: Path) -> None:
    (workplace / "link.py").symlink_to("evil.py")
    Path("linked.yaml").write_text("rule: link.py:Mine\nnetwork: link.py:Net\ntask: link.py:data\n")
    (workplace / "other.py").symlink_to("harmless.py")
    assert call("train", "-c", "linked.yaml", *FAST, "--allow-code", "other.py") == 2
    assert not theirs.exists()
    assert call("train", "-c", "linked.yaml", *FAST, "--allow-code", "evil.py", "-q") == 0


def test_files_beside_are_not_importable(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = workplace / "mark"
    written(workplace, "", mark=mark, name="beside_mine.py")
    written(workplace, "import beside_mine\n" + MINE)
    assert call("train", *OURS, *FAST) == 2
    error = capsys.readouterr().err
    assert "mine.py, line 1" in error
    assert "no neighbouring file" in error
    assert not mark.exists()


# --- what is wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (MINE, ["rule=mien.py:Mine"], r"cannot read the file of code: No such file"),
        (MINE, ["rule=mine.py:Mien"], r"unknown name in mine.py 'Mien': did you mean 'Mine'"),
        (MINE, ["rule=mine.py:Net"], r"mine.py:Net is the class Net, not a subclass of bpfree.Rule"),
        (MINE, ["rule=mine.py:data"], r"mine.py:data is the function data, not a subclass of bpfree.Rule"),
        (MINE, ["task=mine.py:Net"], r"mine.py:Net is the class Net, not a bpfree.Task, a function"),
        (MINE + "\nx = 3\n", ["network=mine.py:x"], r"mine.py:x is of type int, not a function that returns a network"),
        (MINE + "\nmade = Net((4,), 3)\n", ["network=mine.py:made"], r"give the class, or a function that makes it"),
        ("x = 1\ny = 1 / 0\n", ["rule=mine.py:x"], r"mine.py fails in its import: ZeroDivisionError.*mine.py, line 2"),
        ("x = 1\n\nif:\n", ["rule=mine.py:x"], r"mine.py fails in its import: SyntaxError.*mine.py, line 3"),
        ("import sys\nsys.exit(0)\n", ["rule=mine.py:x"], r"mine.py calls sys.exit\(0\)"),
        ("import torch\ntorch.set_default_dtype(torch.float64)\n", ["rule=mine.py:x"], r"changes torch's default dtype"),
        ("def net(spec, width):\n    pass\n", ["network=mine.py:net"], r"the parameter 'width' of mine.py:net has no default"),
        ("def net(spec, width=object()):\n    pass\n", ["network=mine.py:net"], r"'width' of mine.py:net is of type object"),
        ("def load():\n    return 3\n", ["task=mine.py:load"], r"mine.py:load returns of type int, not a Task or \(train, test\)"),
        (MINE, [*OURS, "network.widht=3"], r"did you mean network.width"),
        (MINE, [*OURS, "task.noise=loud"], r"task.noise='loud'"),
    ],
)
def test_what_is_wrong_is_one_sentence(workplace: Path, code: str, words: list[str], message: str) -> None:
    written(workplace, code)
    with pytest.raises(UsageError) as caught:
        recipe(*words)
    assert re.search(message, " ".join(caught.value.problems), re.DOTALL), caught.value.problems
    assert torch.get_default_dtype() == torch.float32


def test_a_network_function_that_returns_nothing(workplace: Path) -> None:
    written(workplace, "def net(spec):\n    pass\n")
    made = recipe("network=mine.py:net")
    with pytest.raises(bpfree.BpfreeError, match="net returns of type NoneType, not a network or module"):
        made.build_rule(made.spec())


# --- what may be named --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outputs"),
    [
        ("def f(): return (torch.rand(20, 3), torch.arange(20) % 4), (torch.rand(8, 3), torch.arange(8) % 4)", (4, "classes")),
        ("def f(): return (np.random.rand(20, 3), np.arange(20) % 4), (np.random.rand(8, 3), np.arange(8) % 4)", (4, "classes")),
        ("def f(): return (torch.rand(20, 3), torch.rand(20)), (torch.rand(8, 3), torch.rand(8))", (1, "real")),
        ("def f(): return (torch.rand(20, 3), torch.rand(20, 2)), (torch.rand(8, 3), torch.rand(8, 2))", (2, "real")),
        ("def f(): return Split(torch.rand(20, 3), torch.arange(20) % 4), Split(torch.rand(8, 3), torch.arange(8) % 4)", (4, "classes")),
        ("def f(root): return Task(TaskSpec('t', (3,), 4), S(20), S(8), S(8))", (4, "classes")),
        ("f = Task(TaskSpec('t', (3,), 4), S(20), None, S(8))", (4, "classes")),
        ("f = DataSource(lambda config, root: TaskSpec('t', (3,), 4), lambda config, root: (S(20), S(8)))", (4, "classes")),
    ],
)
def test_tasks(workplace: Path, code: str, outputs: tuple[int, str]) -> None:
    head = "import numpy as np, torch\nfrom bpfree import Split, Task, TaskSpec\nfrom bpfree.tasks.task import DataSource\n"
    written(workplace, head + "S = lambda n: Split(torch.rand(n, 3), torch.arange(n) % 4)\n" + code)
    task = recipe("task=mine.py:f", *([] if "S(8), S(8)" in code else ["task.validation=0.2"])).build_task()
    assert (task.spec.outputs, task.spec.targets) == outputs
    assert len(task.test) == 8
    assert task.validation is not None
    assert len(task.train) == (20 if len(task.validation) == 8 else 20 - len(task.validation))


def test_a_task_with_a_validation_split_keeps_it(workplace: Path) -> None:
    head = "import torch\nfrom bpfree import Split, Task, TaskSpec\nS = lambda n: Split(torch.rand(n, 3), torch.arange(n) % 4)\n"
    written(workplace, head + "f = Task(TaskSpec('t', (3,), 4), S(20), S(6), S(8))")
    assert len(recipe("task=mine.py:f").build_task().validation or ()) == 6
    with pytest.raises(UsageError, match="has a validation split of its own"):
        recipe("task=mine.py:f", "task.validation=0.3").build_task()


def test_soft_labels_are_ambiguous(workplace: Path) -> None:
    written(workplace, "import torch\ndef f():\n    s = torch.rand(9, 3), torch.rand(9, 2).softmax(1)\n    return s, s")
    with pytest.raises(UsageError, match="soft labels, or real values"):
        recipe("task=mine.py:f")


@pytest.mark.parametrize(
    ("code", "words", "parameters"),
    [
        ("def f(spec): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, spec.outputs))", [], 65 * 7 + 80),
        ("def f(task, width=3): return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))", ["width=4"], 65 * 4 + 50),
        ("def f(outputs, bias: bool = True): return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs, bias))", ["bias=no"], 640),
        ("def f(spec, widths=[5, 6]): return bpfree.mlp(spec, MLPConfig(widths=widths))", ["widths=[7]"], 65 * 7 + 80),
        ("f = NetworkBuilder(bpfree.mlp, MLPConfig)", ["depth=0"], 650),
        ("def f(spec, config: MLPConfig): return bpfree.mlp(spec, config)", ["depth=0"], 650),
        ("class f(nn.Sequential):\n    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 10))", [], 650),
    ],
)
def test_networks(workplace: Path, code: str, words: list[str], parameters: int) -> None:
    """Oracle: the parameters of the layers, counted by hand. On the 8 x 8 digits, ten classes."""
    head = "import bpfree\nfrom torch import nn\nfrom bpfree.network.builders import MLPConfig, NetworkBuilder\n"
    written(workplace, head + code)
    made = recipe("network=mine.py:f", *(f"network.{word}" for word in words))
    rule = made.build_rule(made.spec())
    assert sum(p.numel() for p in rule.network.parameters()) == parameters


def test_recipes_are_whole(workplace: Path) -> None:
    """Oracle: what is written resolves to the same; the flat form has no place of this machine."""
    path = written(workplace)
    made = recipe(*OURS)
    again = resolve(made.to_dict(), allowing(files=[path]))
    assert again.to_dict() == made.to_dict()
    assert made.flat()["rule.name"] == "mine.py:Mine"
    assert str(workplace) not in str(made.flat())


@pytest.mark.parametrize(("kind", "name"), [("rules", "Mine"), ("networks", "Net"), ("tasks", "data")])
def test_options_are_shown(workplace: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str) -> None:
    written(workplace)
    assert call(kind, f"mine.py:{name}") == 0
    text = capsys.readouterr().out
    assert f"mine.py:{name}" in text
    assert {"rules": "Options (rule.KEY=VALUE): none", "networks": "width", "tasks": "noise"}[kind] in text


def test_certify(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(workplace)
    assert call("certify", "mine.py:Mine", "--only", "trait-update", "--json") == 0
    text = capsys.readouterr().out
    assert '"rule": "mine.py:Mine"' in text
    assert f'"mine.py:Mine": "{CodeFile.read("mine.py").hash}"' in text
    assert call("certify", "dfa", "network=mine.py:Net", "--only", "trait-update") in (0, 1)
    shutil.copy("mine.py", "other.py")
    assert call("certify", "nowhere.py:Mine") == 2
