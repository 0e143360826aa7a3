"""Studies as a person runs them: in process, in an empty folder, with a real plugin on the path.

Oracles: the number of run folders; the weights of an undisturbed run, bit for bit; the runs' own records.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from study_kit import call, outcomes, plugin_on_path

from bpfree import sources
from bpfree.record.folder import read_run
from bpfree.study import command
from bpfree.study.store import ABOUT, CellStore
from bpfree.study.worker import garbage_collected
from bpfree.training.evaluation import Evaluator

PLUGIN = '''
import os
import signal
from pathlib import Path

import bpfree
from bpfree.baselines import DFA

bpfree_api = 2


class Crashing(DFA):
    def credit(self, batch, step):
        if step.index == 5:
            raise ZeroDivisionError("in the rule")
        return super().credit(batch, step)


class Diverging(DFA):
    def credit(self, batch, step):
        next(self.parameters()).data.fill_(float("nan"))
        return super().credit(batch, step)


class Stopping(DFA):
    """Is stopped once, in the middle of its second epoch, while the file `stop` is there."""

    def credit(self, batch, step):
        if step.index == 30 and Path("stop").exists():
            Path("stop").unlink()
            os.kill(os.getpid(), signal.SIGINT)
        return super().credit(batch, step)


@bpfree.hookimpl
def bpfree_rules():
    return {"crashing": Crashing, "diverging": Diverging, "stopping": Stopping}


@bpfree.hookimpl
def bpfree_studies():
    return {"theirs": Path(__file__).parent / "theirs.yaml", "broken": Path(__file__).parent / "none.yaml"}
'''
COMMON = "settings: {task: digits, threads: 1, device: cpu, tracking.enabled: false, network.width: 16}\n"
BARE = COMMON + "floor: false\nprobe: false\n"
TABLE = f"""
title: Two by two
paper: "Someone, Table 1"
notes: Nothing like the paper's network.
{COMMON}
seeds: 2
columns:
  - {{label: short, settings: {{budget.epochs: 1}}}}
  - {{label: long, settings: {{budget.epochs: 2, task.validation: 0}}}}
rows:
  - label: DFA
    settings: {{rule: dfa}}
    published: {{short: {{test/error: 12.34, train/error: 7.5}}, long: {{test/error: null}}}}
  - label: BP
    settings: {{rule: backprop}}
"""


@pytest.fixture
def site(workplace: Path) -> Iterator[Path]:
    """A folder on the path with the distribution `bpfree-troubled`; its package is `troubled`."""
    folder = workplace / "site"
    with plugin_on_path(folder, "troubled", PLUGIN):
        theirs = f"title: Theirs\n{BARE}rows: [{{label: one, settings: {{rule: stopping}}}}]\n"
        (folder / "troubled" / "theirs.yaml").write_text(theirs)
        yield folder


def study(text: str) -> str:
    Path("table.yaml").write_text(text)
    return "table.yaml"


def runs() -> list[Path]:
    return sorted(path for path in Path("runs").glob("*") if (path / "config.yaml").exists())


def table_lines(text: str, *rows: str) -> list[list[str]]:
    table = text.partition("Beside the floor")[0]  # which has the rows again
    return [line.split() for line in table.splitlines() if line.split()[:1] and line.split()[0] in rows]


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_end_to_end_and_once(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TABLE)
    assert call("study", "run", name, "--quiet") == 0
    output = capsys.readouterr()
    assert "8 of 8 cells to run" in output.err
    assert len(runs()) == 8

    # ours are the runs' own numbers; the published one stands beside them, and what is not known stays blank
    lines = {(line[0], line[1]): line for line in table_lines(output.out, "DFA", "BP")}
    records = [read_run(path) for path in runs()]
    errors = [
        100 - 100 * record.result["test/accuracy"]
        for record in records
        if record.config["rule.name"] == "dfa" and record.config["budget.epochs"] == 1
    ]
    mean = sum(errors) / 2
    deviation = abs(errors[0] - errors[1]) / 2**0.5
    assert lines["DFA", "short"][2:8] == [f"{mean:.2f}", "+-", f"{deviation:.2f}", "12.34", f"{mean - 12.34:+.2f}", "2"]
    assert lines["DFA", "short"][11] == "7.50"
    assert lines["DFA", "long"][5] == "2"  # the number of seeds follows the deviation at once
    assert lines["BP", "short"][5] == "2"
    assert "Nothing like the paper's network." in output.out
    assert "DFA [long], BP [long]: trained on the whole training set; the last weights are tested, without selection" in output.out
    assert "DFA [short], BP [short]: 10 % of the training examples are held out" in output.out
    page = Path(output.out.strip().splitlines()[-1])
    assert page.name == "report.html"
    text = page.read_text()
    for said in ("Someone, Table 1", "<td>12.34</td>", f"{mean:.2f} ± {deviation:.2f}", "bpfree study run table.yaml", "threads 1", "<svg"):
        assert said in text
    assert "not the study as written" not in text
    assert {record.tags["study_row"] for record in records} == {"DFA", "BP"}

    # the training error is over the whole training split
    assert call("evaluate", str(runs()[0]), "--split", "train", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    outcome = next(known for known in outcomes() if known["run"] == runs()[0].name)
    assert outcome["result"]["train/accuracy"] == pytest.approx(scores["accuracy"])  # type: ignore[index]

    # again: nothing is computed
    assert call("study", "run", name, "--quiet") == 0
    again = capsys.readouterr()
    assert "0 of 8 cells to run" in again.err
    assert len(runs()) == 8
    assert again.out == output.out


def test_a_dry_run_trains_and_writes_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("study", "run", study(TABLE), "--dry-run", "budget.epochs=1") == 0
    text = capsys.readouterr().out
    assert "8 of 8 cells to run" in text
    assert "not as written: budget.epochs=1 instead of 2" in text
    assert [path.name for path in workplace.iterdir()] == ["table.yaml"]


def test_a_shortened_study_says_so_and_has_a_page_of_its_own(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TABLE)
    words = [name, "budget.epochs=1", "--seeds", "1"]
    assert call("study", "run", *words, "--rows", "BP", "--columns", "long", "--quiet") == 0
    output = capsys.readouterr().out
    said = "The study was shortened: this is not the study as written. budget.epochs=1 instead of 2; seeds 0 instead of 0, 1."
    assert said in output
    assert "1 of 4 cells are finished." in output
    page = Path(output.strip().splitlines()[-1])
    assert page.name != "report.html"
    assert said in page.read_text()
    assert len(runs()) == 1

    # the report of the study as written does not take it in, and says that it is there
    assert call("study", "report", name) == 0
    output = capsys.readouterr().out
    assert "0 of 8 cells are finished." in output
    assert "Not shown: 1 finished cells" in output
    assert call("study", "report", *words) == 0
    assert "1 of 4 cells are finished." in capsys.readouterr().out


def test_wrong_requests(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TABLE)
    for words, said in (
        (["--rows", "DFB"], "did you mean 'DFA'"),
        (["--columns", "middle"], "known: short, long"),
        (["seed=1"], "--seeds N"),
        (["rule.nothing=1"], "unknown key rule.nothing"),
        (["device=tpu"], "unknown device"),
    ):
        assert call("study", "run", name, *words) == 2
        assert said in capsys.readouterr().err
    assert runs() == []


def test_listing_and_showing(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("study", "list") == 0
    text = capsys.readouterr().out
    assert ["theirs", "Theirs", "3", "troubled"] in [line.split() for line in text.splitlines()]
    assert "broken: cannot read the study" in text
    assert call("plugins", "info", "core") == 0
    assert "digits-floor-ceiling" in capsys.readouterr().out
    assert call("study", "show", study(TABLE)) == 0
    shown = capsys.readouterr().out
    for said in ("test/error=12.34, train/error=7.5", "network.width=16", "seeds 0, 1", "rule=backprop", "Someone, Table 1"):
        assert said in shown


# --- trouble ----------------------------------------------------------------------------------------------------------

TROUBLE = f"""
title: Trouble
{BARE}
seeds: 1
rows:
  - {{label: crash, settings: {{rule: crashing}}}}
  - {{label: diverge, settings: {{rule: diverging}}}}
  - {{label: fine, settings: {{rule: dfa, budget.epochs: 1}}}}
"""


def test_trouble_is_a_row_with_its_reason_and_the_rest_goes_on(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TROUBLE)
    assert call("study", "run", name, "--quiet") == 1
    output = capsys.readouterr().out
    assert table_lines(output, "crash", "diverge", "fine")[0][:5] == ["crash", "failed", "0", "of", "1"]
    assert "crash seed 0: failed: ZeroDivisionError: in the rule" in output
    assert "diverge seed 0: diverged: " in output
    assert {outcome["row"]: outcome["status"] for outcome in outcomes()} == {"crash": "failed", "diverge": "diverged", "fine": "finished"}
    assert "ZeroDivisionError: in the rule" in Path(output.strip().splitlines()[-1]).read_text()

    before = len(runs())
    assert call("study", "run", name, "--quiet") == 1
    assert len(runs()) == before
    times = {outcome["row"]: outcome["started"] for outcome in outcomes()}
    assert call("study", "retry", "diverged", name, "--quiet") == 1
    assert call("study", "retry", "failed", name, "--quiet") == 1
    assert len(runs()) == before  # in their own folders, and under their own names in MLflow
    assert {outcome["row"]: outcome["status"] for outcome in outcomes()} == {"crash": "failed", "diverge": "diverged", "fine": "finished"}
    assert next(outcome["started"] for outcome in outcomes() if outcome["row"] == "fine") == times["fine"]


def test_a_cell_that_cannot_begin_is_tried_again(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are not there yet."""
    from bpfree import BpfreeError
    from bpfree.recipe import Recipe

    build = Recipe.build_task
    tried = []

    def away(recipe: Recipe) -> object:
        tried.append(recipe.names["task"])
        raise BpfreeError("the data are not there", where="data.root")

    monkeypatch.setattr(Recipe, "build_task", away)
    name = study(f"title: Away\n{BARE}seeds: 2\nrows: [{{label: one, settings: {{rule: dfa, budget.epochs: 1}}}}]\n")
    assert call("study", "run", name, "--quiet") == 1
    assert "refused: the data are not there (data.root)" in capsys.readouterr().out
    assert tried == ["digits"]  # one set is asked for once
    assert runs() == []
    monkeypatch.setattr(Recipe, "build_task", build)
    assert call("study", "run", name, "--quiet") == 0
    assert len(runs()) == 2


STOPPING = f"title: Stopping\n{BARE}seeds: 2\nrows: [{{label: stop, settings: {{rule: stopping, budget.epochs: 3}}}}]\n"


@pytest.mark.parametrize("status", ["interrupted", "running"])
def test_interrupted_and_resumed_ends_with_the_same_bits(site: Path, capsys: pytest.CaptureFixture[str], status: str) -> None:
    """``running`` is what a process that was killed leaves behind."""
    name = study(STOPPING)
    assert call("study", "run", name, "--quiet", "output=undisturbed") == 0
    Path("stop").touch()
    assert call("study", "run", name, "--quiet") == 130
    assert "run the same command to resume it" in capsys.readouterr().err
    (known,) = outcomes()
    assert known["status"] == "interrupted"
    CellStore(Path("runs"), "table").path_of(str(known["cell"])).write_text(json.dumps({**known, "status": status}))
    assert call("study", "report", name) == 0
    assert table_lines(capsys.readouterr().out, "stop")[0] == ["stop", "interrupted", "0", "of", "2"]
    assert call("study", "run", name) == 0
    assert "resumes" in capsys.readouterr().err
    assert len(runs()) == 2
    first = next(outcome for outcome in outcomes() if outcome["seed"] == 0)
    assert first["run"] == known["run"]
    assert first["started"] == known["started"]
    (undisturbed,) = Path("undisturbed").glob("*-s0-*")
    weights, others = (
        torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["weights"]
        for folder in (Path("runs") / str(known["run"]), undisturbed)
    )
    assert all(torch.equal(weights[key], others[key]) for key in others)


def test_a_run_that_finished_before_it_was_noted_is_not_tested_again(workplace: Path) -> None:
    name = study(f"title: One\n{BARE}seeds: 1\nrows: [{{label: one, settings: {{rule: dfa, budget.epochs: 1}}}}]\n")
    assert call("study", "run", name, "--quiet") == 0
    (known,) = outcomes()
    CellStore(Path("runs"), "table").path_of(str(known["cell"])).write_text(
        json.dumps({name: value for name, value in known.items() if name not in ABOUT} | {"status": "running"})
    )
    assert call("study", "run", name, "--quiet", "log_interval=2") == 0
    (again,) = outcomes()
    timings = {"updated": "", "elapsed": 0}
    assert {**again, **timings} == {**known, **timings}
    assert read_run(runs()[0]).tags["test_evaluations"] == "1"


def test_an_interruption_between_training_and_the_last_number_loses_neither(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpfree import scoring

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    row = "{label: one, settings: {rule: dfa, budget.epochs: 1}, published: {train/error: 1}}"
    name = study(f"title: One\n{BARE}seeds: 1\nrows: [{row}]\n")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stop)
        assert call("study", "run", name, "--quiet") == 130
    assert call("study", "run", name, "--quiet") == 0
    (known,) = outcomes()
    assert known["status"] == "finished"
    assert "train/accuracy" in known["result"]  # type: ignore[operator]
    assert len(runs()) == 1


def test_a_cell_that_another_process_runs_is_left_to_it(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = study(f"title: Two\n{BARE}seeds: 2\nrows: [{{label: one, settings: {{rule: dfa, budget.epochs: 1}}}}]\n")
    assert call("study", "run", name, "--dry-run") == 0
    first = next(line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("one"))
    with contextlib.ExitStack() as other:
        assert other.enter_context(CellStore(Path("runs"), "table").lock(first))
        waits = []

        def wait(seconds: float) -> None:
            waits.append(len(runs()))
            other.close()  # the other process dies

        monkeypatch.setattr(command, "time", types.SimpleNamespace(sleep=wait))  # of the study's loop alone
        assert call("study", "run", name) == 0
    assert set(waits) == {1}  # what no one else has comes first; a child that begins just then may hold the lock a moment longer
    assert "another process runs it" in capsys.readouterr().err
    assert len(runs()) == 2


# --- identity ---------------------------------------------------------------------------------------------------------


def cell_ids(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    sources.hash_of.cache_clear()
    assert call("study", "run", *words, "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[-1] for line in lines if line and re.fullmatch("[0-9a-f]{16}", line[-1])}


IDENTITY = f"""
title: Identity
{BARE}
seeds: 1
rows:
  - {{label: theirs, settings: {{rule: stopping}}}}
  - {{label: ours, settings: {{rule: dfa}}}}
"""


def test_an_edited_source_makes_other_cells_of_its_own_rules_only(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(IDENTITY)
    before = cell_ids(capsys, name)
    assert before == cell_ids(capsys, name)
    source = site / "troubled" / "__init__.py"
    source.write_text(source.read_text().replace("step.index == 30", "step.index == 31"))
    after = cell_ids(capsys, name)
    assert after["theirs"] != before["theirs"]
    assert after["ours"] == before["ours"]


def test_what_can_change_a_number_makes_another_cell_and_nothing_else_does(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(IDENTITY)
    before = cell_ids(capsys, name)
    for word in ("budget.epochs=9", "optimizer.lr=0.5", "threads=2", "evaluation.draws=2", "task.split_seed=1"):
        assert not set(cell_ids(capsys, name, word).values()) & set(before.values()), word
    for word in ("output=elsewhere", "tracking.enabled=true", "data.root=/data", "checkpoint.every=0", "log_interval=5"):
        assert cell_ids(capsys, name, word) == before, word
    shutil.copy(name, "renamed.yaml")
    assert cell_ids(capsys, "renamed.yaml") == before


def test_the_core_is_hashed_without_what_only_shows_results(tmp_path: Path) -> None:
    core = tmp_path / "bpfree"
    (core / "cli").mkdir(parents=True)
    (core / "rule.py").write_text("a = 1")
    (core / "cli" / "main.py").write_text("a = 1")
    first = sources.hash_of(core, sources.WITHOUT_EFFECT)
    (core / "cli" / "main.py").write_text("a = 2")
    sources.hash_of.cache_clear()
    assert sources.hash_of(core, sources.WITHOUT_EFFECT) == first
    (core / "rule.py").write_text("a = 2")
    sources.hash_of.cache_clear()
    assert sources.hash_of(core, sources.WITHOUT_EFFECT) != first


def test_the_content_of_a_data_file_counts_and_not_its_path(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    def save(place: str, seed: int) -> None:
        np.savez(place, x=np.random.default_rng(seed).normal(size=(50, 4)).astype("float32"), y=np.arange(50) % 2)

    save("a.npz", 0)
    save("b.npz", 1)
    shutil.copy("a.npz", "c.npz")
    name = study("title: Arrays\nsettings: {task: npz, threads: 1}\nseeds: 1\nrows: [{label: one, settings: {rule: dfa}}]\n")
    a, b, c = (cell_ids(capsys, name, f"task.path={place}.npz") for place in "abc")
    assert a == c
    assert a != b
    assert call("study", "run", name, "task.path=a.npz", "--dry-run") == 0
    assert "not as written: task.path=a.npz" in capsys.readouterr().out


def test_what_a_cell_leaves_in_cycles_is_freed_when_it_ends() -> None:
    """Oracle: weak references; Python's own collection is off, and what was frozen for the time is not frozen afterwards."""

    class Held:
        def __init__(self) -> None:
            self.itself = self

    before = gc.get_freeze_count()
    gc.disable()
    try:
        with garbage_collected():
            seen = weakref.ref(Held())
            assert seen() is not None
        assert seen() is None
    finally:
        gc.enable()
    assert gc.get_freeze_count() == before


def test_a_signal_while_a_run_ends_begins_no_further_cell(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the records of the cells, before and after the study is run again."""
    name = study(f"title: Two\n{BARE}seeds: 2\nrows: [{{label: one, settings: {{rule: dfa, budget.epochs: 1}}}}]\n")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "keep_predictions", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        assert call("study", "run", name, "--quiet") == 143
    assert [(cell["seed"], cell["status"]) for cell in outcomes()] == [(0, "interrupted")]
    assert call("study", "run", name, "--quiet") == 0
    assert [(cell["seed"], cell["status"]) for cell in outcomes()] == [(0, "finished"), (1, "finished")]
    assert len(runs()) == 2


def test_counts_agree_and_the_command_is_whole(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three rows share a cell. Oracle: the records on disk."""
    rows = "[{label: one, settings: {rule: dfa}}, {label: same, settings: {rule: dfa}}, {label: two, settings: {rule: backprop}}]"
    name = study(f"title: Three\n{BARE}seeds: 1\nrows: {rows}\n")
    short = "budget.epochs=1"
    assert call("study", "retry", "failed", name, short) == 0
    assert "nothing to run again" in capsys.readouterr().err
    assert not outcomes()
    assert call("study", "run", name, short, "--dry-run") == 0
    assert "2 of 2 cells to run" in capsys.readouterr().out
    assert call("study", "run", name, short, "--rows", "same", "--quiet") == 0
    out, err = capsys.readouterr()
    assert "1 of 1 cells to run" in err
    assert f"Again: bpfree study run {name} {short} --rows same" in out
    assert len(outcomes()) == 1
    assert call("study", "run", name, short, "--quiet") == 0
    assert "1 of 2 cells to run, 1 are finished" in capsys.readouterr().err
    assert call("study", "status", name, short) == 0
    assert "2 cells: 2 finished\n" in capsys.readouterr().out
    assert call("study", "status", name) == 0
    assert "2 cells: 2 not run\n2 finished cells of a variant: repeat budget.epochs=1 to see them" in capsys.readouterr().out
