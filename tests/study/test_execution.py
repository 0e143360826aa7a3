"""Workers, budgets of time, and what is left when processes die.

Oracles: an undisturbed study, bit for bit; the MLflow database, read with SQL; the number of processes that are there.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from children import Child, command
from study_kit import DYING, call, mlflow_runs, outcomes, plugin_on_path, untimed
from waiting import until

from bpfree.study import executors
from bpfree.study.concurrency import present
from bpfree.study.executor import Ended
from bpfree.study.executors import Pool

COMMON = "settings: {task: digits, device: cpu, network.width: 16}\n"
BARE = COMMON + "floor: false\nprobe: false\n"
PLUGIN = (
    DYING
    + """
import os
import signal
import time
from pathlib import Path

import bpfree
from bpfree.baselines import DFA

bpfree_api = 2


class Slow(DFA):
    def credit(self, batch, step):
        time.sleep(0.05)
        return super().credit(batch, step)


@bpfree.hookimpl
def bpfree_rules():
    return {"dying": Dying, "slow": Slow}
"""
)


@pytest.fixture
def site(workplace: Path) -> Iterator[Path]:
    """A plugin whose rules make trouble, for this process and those that it starts."""
    with plugin_on_path(workplace / "site", "troubled", PLUGIN):
        yield workplace


def work(connection: Connection) -> None:
    executors.serve(connection.fileno(), os.getppid())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of pools are forked, where their beginning is not what a test is about."""

    def start(command: list[str], *, env: dict[str, str], pass_fds: list[int], **options: Any) -> Child:
        with Connection(os.dup(pass_fds[0])) as connection:
            return Child(work, connection, group=True, **env)

    monkeypatch.setattr(
        executors, "subprocess", SimpleNamespace(Popen=start, **{n: getattr(subprocess, n) for n in ("DEVNULL", "TimeoutExpired")})
    )


def study(text: str, name: str = "table.yaml") -> str:
    Path(name).write_text(text)
    return name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["weights"]  # type: ignore[no-any-return]


def assert_same(one: Path, other: Path) -> None:
    """Weights, results and learning curves of all cells, but for timings."""
    ours, theirs = outcomes(one / "studies"), outcomes(other / "studies")
    assert [outcome["cell"] for outcome in ours] == [outcome["cell"] for outcome in theirs]
    for first, second in zip(ours, theirs, strict=True):
        assert first["status"] == second["status"] == "finished"
        assert untimed(first["result"]) == untimed(second["result"])
        assert [untimed(metrics) for metrics in first["history"]] == [untimed(metrics) for metrics in second["history"]]
        mine, yours = weights(one / first["run"]), weights(other / second["run"])
        assert all(torch.equal(mine[key], yours[key]) for key in yours)


FOUR = f"title: Four\n{BARE}seeds: 2\nrules: [dfa, backprop]\n"


def test_a_pool_gives_the_same_numbers_and_marks_its_timings(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(FOUR)
    words = ("budget.epochs=3", "tracking.enabled=false", "--quiet")
    assert call("study", "run", name, *words, "output=alone") == 0
    assert {outcome["parallel"] for outcome in outcomes("alone/studies")} == {1}
    assert call("study", "run", name, *words, "output=pool", "--jobs", "2") == 0
    assert max(outcome["parallel"] for outcome in outcomes("pool/studies")) == 2
    assert_same(Path("alone"), Path("pool"))
    assert not any("executors import serve" in " ".join(child.cmdline()) for child in psutil.Process().children())


@pytest.mark.time_dependent
def test_cells_that_run_at_the_same_time_are_counted_and_dead_ones_are_not(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bpfree.study.concurrency import present\n"
        "with present(Path(sys.argv[1])):\n    print('there', flush=True)\n    time.sleep(60)\n"
    )
    with present(tmp_path) as alone:
        assert alone.most == 1
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        alone.look()
        assert alone.most == 2
        other.kill()
        other.wait()
        other.stdout.close()
        with present(tmp_path) as later:
            assert later.most == 2  # the first one, and not the one that was killed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.time_dependent
def test_a_cell_that_takes_its_worker_with_it_goes_on_in_another(site: Path, forked: None, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(f"title: Dying\n{BARE}seeds: 1\nrules: [dying, dfa]\n")
    words = ("budget.epochs=3", "tracking.enabled=false")
    Path("lives").write_text("0")
    assert call("study", "run", name, *words, "output=undisturbed", "--quiet") == 0
    Path("lives").write_text("2")
    assert call("study", "run", name, *words, "--jobs", "2") == 0
    assert "its worker died (SIGKILL); another worker resumes it" in capsys.readouterr().err
    assert_same(Path("undisturbed"), Path("runs"))


def test_a_cell_that_kills_its_worker_again_and_again_has_failed(site: Path, forked: None, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(f"title: Dying\n{BARE}seeds: 1\nrules: [dying, dfa]\n")
    words = ("budget.epochs=3", "tracking.enabled=false", "--quiet", "--jobs", "2", "checkpoint.every=0")
    Path("lives").write_text("9")
    assert call("study", "run", name, *words) == 1
    known = {outcome["row"]: (outcome["status"], outcome["reason"]) for outcome in outcomes()}
    assert known == {"dying": ("failed", "its worker died (SIGKILL)"), "dfa": ("finished", "")}
    Path("lives").write_text("0")
    assert call("study", "retry", "failed", name, *words) == 0


LATE = PLUGIN.replace(
    "        time.sleep(0.05)",
    """        from bpfree.study import worker
        while step.index == 5 and Path("late").exists() and not hasattr(worker.time, "late"):
            worker.time = Late()""",
).replace(
    "@bpfree.hookimpl",
    """class Late:
    late = True

    def monotonic(self):
        return time.monotonic() + 1e6


@bpfree.hookimpl""",
)
"""The rule `slow` puts its worker's clock forward, once, so that the test takes no time."""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_cell_whose_time_is_up_is_a_row_and_goes_on_with_more_of_it(
    site: Path, forked: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    from bpfree.study import worker

    monkeypatch.setattr(worker, "time", time)  # back again at the end
    (site / "site" / "troubled" / "__init__.py").write_text(LATE)
    Path("late").touch()
    name = study(f"title: Slow\n{BARE}seeds: 1\ntimeout: 50000\nrules: [dfa, slow]\n")
    words = ("budget.epochs=2", "tracking.enabled=false", "--quiet", "--jobs", jobs)
    assert call("study", "run", name, *words) == 1
    known = {outcome["row"]: (outcome["status"], outcome["reason"]) for outcome in outcomes()}
    assert known["dfa"] == ("finished", "")
    assert known["slow"][0] == "timeout"
    assert known["slow"][1].startswith("not done after 50000 s, in epoch")
    assert "timeout" in capsys.readouterr().out
    assert call("study", "run", name, *words) == 1  # it is left alone
    Path("late").unlink()
    monkeypatch.setattr(worker, "time", time)
    assert call("study", "retry", "timeout", name, *words) == 0
    assert {outcome["status"] for outcome in outcomes()} == {"finished"}


HANGING = """
            if index == 3:
                Path("alarm").write_text(str(signal.getitimer(signal.ITIMER_REAL)[0]))
                signal.raise_signal(signal.SIGALRM)  # the time is up now
                time.sleep(600)
"""


@pytest.mark.time_dependent
def test_a_rule_that_hangs_ends_with_its_time_in_the_same_process(site: Path) -> None:
    """Oracle: the kernel's own timer, which the rule reads, and runs down."""
    code = PLUGIN.replace("        time.sleep(0.05)\n", "        index = step.index\n" + HANGING.replace(" " * 12, " " * 8))
    (site / "site" / "troubled" / "__init__.py").write_text(code)
    name = study(f"title: Slow\n{BARE}seeds: 1\nrules: [slow, dfa]\n")
    assert call("study", "run", name, "budget.epochs=1", "tracking.enabled=false", "--quiet", "--timeout", "50000") == 1
    known = {outcome["row"]: (outcome["status"], outcome["reason"]) for outcome in outcomes()}
    assert known == {"slow": ("timeout", "not done after 50000 s, and the cell does not check its time limit"), "dfa": ("finished", "")}
    assert 49000 < float(Path("alarm").read_text()) < 50006
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_time_of_a_cell_begins_when_its_worker_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock that is put forward while the worker starts, and afterwards."""
    ours, theirs = socket.socketpair()
    connection, there = Connection(ours.detach()), Connection(theirs.detach())
    process: Any = SimpleNamespace(returncode=None, wait=lambda patience=None: 0, kill=lambda: None)
    pool, job = Pool(1), SimpleNamespace(key=SimpleNamespace(id="cell"), timeout=10.0)
    worker = executors._WorkerProcess(process, connection, 0, job)  # type: ignore[arg-type]
    pool._workers.append(worker)
    now = [0.0]
    monkeypatch.setattr(executors, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker.begin()
    now[0] = 1e6
    assert pool._look(worker) is None
    there.send(executors.READY)
    assert pool._look(worker) is None
    now[0] += 1.5 * job.timeout + executors.GRACE - 1
    assert pool._look(worker) is None
    now[0] += 2
    ended = pool._look(worker)
    assert ended is not None
    assert ended.final


@pytest.mark.time_dependent
def test_a_worker_that_hangs_is_killed(site: Path, forked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the run is called any more, so that it cannot see that its time is up. The parent's clock is put forward."""

    heard: list[Ended] = []
    wait = Pool.wait

    def waiting(pool: Pool) -> list[Ended]:
        ended = wait(pool)
        heard.extend(ended)
        return ended

    class Late:
        """Put forward by each look at it from the moment on that the parent has heard of the other cell."""

        forward = 0.0

        def monotonic(self) -> float:
            self.forward += 1e6 * bool(heard)
            return time.monotonic() + self.forward

    monkeypatch.setattr(Pool, "wait", waiting)
    monkeypatch.setattr(executors, "time", Late())
    (site / "site" / "troubled" / "__init__.py").write_text(PLUGIN.replace("time.sleep(0.05)", "time.sleep(600)"))
    name = study(f"title: Slow\n{BARE}seeds: 1\nrules: [slow, dfa]\n")
    assert call("study", "run", name, "budget.epochs=1", "tracking.enabled=false", "--quiet", "--jobs", "2", "--timeout", "50000") == 1
    known = {outcome["row"]: (outcome["status"], outcome["reason"]) for outcome in outcomes()}
    assert known == {"slow": ("timeout", "killed: it did not stop after its timeout of 50000 s"), "dfa": ("finished", "")}


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.time_dependent
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pool_saves_what_it_does_and_leaves_nobody_behind(site: Path, number: signal.Signals) -> None:
    name = study(f"title: Slow\n{BARE}seeds: 2\nrules: [slow]\n")
    words = ("study", "run", name, "budget.epochs=999", "tracking.enabled=false", "--jobs", "2")
    process = command(*words, group=True)
    until(lambda: len(list(Path("runs").glob("slow-*/events.jsonl"))) == 2, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert "run the same command to resume it" in errors
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert {outcome["status"] for outcome in outcomes()} == {"interrupted"}
    assert len(list(Path("runs").glob("slow-*/checkpoints/last.pt"))) == 2
    assert list(Path("runs/studies").glob("table/report*.html"))  # on what there is


@pytest.mark.time_dependent
def test_workers_do_not_outlive_a_killed_study(site: Path) -> None:
    name = study(f"title: Slow\n{BARE}seeds: 2\nrules: [slow]\n")
    process = command("study", "run", name, "budget.epochs=999", "tracking.enabled=false", "--jobs", "2", group=True)
    until(lambda: len(list(Path("runs").glob("slow-*/events.jsonl"))) == 2, process)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert len(workers) == 2
    psutil.wait_procs(workers)  # as long as it takes


@pytest.mark.slow
@pytest.mark.time_dependent
def test_a_study_killed_ten_times_ends_like_one_that_was_not(workplace: Path) -> None:
    """SIGKILL at random moments; the whole process group with its workers, or the parent alone."""
    name = study(f"title: Killed\n{COMMON}seeds: 2\ntasks: [digits]\nrules: [dfa, backprop, noprop-dt]\n")
    words = ["study", "run", name, "budget.epochs=12", "rule.T=2"]
    name = study(Path(name).read_text().replace("noprop-dt]", "{rule: noprop-dt, settings: {rule.T: 2}}]"))
    words = ["study", "run", name, "budget.epochs=12", "log_interval=0.2"]
    assert call(*words, "output=undisturbed/runs", "--quiet") == 0

    def written() -> int:
        """Bytes in the logs of all runs: how far the study is."""
        return sum(path.stat().st_size for path in Path("runs").rglob("events.jsonl"))

    random_moments = random.Random(20)
    kills = 0
    while kills < 10:
        process = command(*words, "--jobs", str(1 + kills % 2), group=True)
        moment = written() + random_moments.randrange(8000)
        until(lambda moment=moment, process=process: written() > moment or process.poll() is not None)  # type: ignore[misc]
        if process.poll() is not None:  # it was faster: what is left of the kills meets a finished study
            process.communicate()
            break
        children = psutil.Process(process.pid).children(recursive=True)
        if kills % 3:
            for child in children:
                child.kill()
        process.kill()
        process.communicate()
        psutil.wait_procs(children, timeout=30)
        kills += 1
    assert kills > 2
    assert call(*words, "--quiet") == 0
    assert_same(Path("undisturbed/runs"), Path("runs"))

    # one committed result and one MLflow run for each cell, one value per metric and step, all of them children of one parent
    runs = mlflow_runs()
    cells = [run for run in runs if "study_cell" in run["tags"]]
    (parent,) = [run for run in runs if "study_cell" not in run["tags"]]
    assert sorted(run["tags"]["study_cell"] for run in cells) == sorted(outcome["cell"] for outcome in outcomes())
    assert {run["tags"]["mlflow.parentRunId"] for run in cells} == {parent["id"]}
    assert {run["status"] for run in runs} == {"FINISHED"}
    for run in cells:
        assert {key: count for key, count in run["counts"].items() if count > 1} == {}
        (known,) = [outcome for outcome in outcomes() if outcome["cell"] == run["tags"]["study_cell"]]
        epochs = {step: value for (key, step), value in run["metrics"].items() if key == "val/accuracy"}
        assert epochs == {int(metrics["epoch"]): metrics["val/accuracy"] for metrics in known["history"]}
        assert run["metrics"]["test/accuracy", 12] == known["result"]["test/accuracy"]


# --- MLflow -----------------------------------------------------------------------------------------------------------


def test_a_study_is_one_parent_with_a_run_per_cell_and_the_report_as_artifacts(workplace: Path) -> None:
    name = study(FOUR)
    assert call("study", "run", name, "budget.epochs=1", "--quiet") == 0
    runs = mlflow_runs()
    (parent,) = [run for run in runs if run["name"] == "table"]
    cells = [run for run in runs if run is not parent]
    assert len(cells) == 4
    assert {run["tags"]["mlflow.parentRunId"] for run in cells} == {parent["id"]}
    assert {(run["tags"]["study_row"], run["tags"]["seed"]) for run in cells} == {
        (row, seed) for row in ("dfa", "backprop") for seed in "01"
    }
    stored = {path.name: path for path in Path("mlruns").rglob(f"{parent['id']}/artifacts/*")}
    assert len([name for name in stored if name.endswith((".html", ".md", ".csv"))]) == 3
    assert parent["metrics"] == {}  # a number is a metric of the cells alone, by one name and in one unit
    scores = [outcome["result"]["test/accuracy"] for outcome in outcomes() if outcome["row"] == "dfa"]
    table = json.loads(stored["table.json"].read_text())
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert [(row["row"], row["seeds"]) for row in rows] == [("dfa", 2), ("backprop", 2)]
    assert rows[0]["test/accuracy"] == pytest.approx(sum(scores) / 2, rel=1e-5)
    assert {run["status"] for run in runs} == {"FINISHED"}


def test_the_best_cell_by_validation_is_the_model_of_a_study(workplace: Path) -> None:
    name = study(FOUR)
    assert call("study", "run", name, "budget.epochs=1", "--quiet", "tracking.register=best") == 0
    best = max(outcomes(), key=lambda outcome: outcome["history"][-1]["val/accuracy"])
    with sqlite3.connect("mlflow.db") as store:
        ((source,),) = store.execute("select source_run_id from logged_models")
        (version,) = store.execute("select run_id from model_versions where name = 'best'")
    cells = {run["id"]: run for run in mlflow_runs()}
    assert cells[source]["tags"]["study_cell"] == best["cell"]
    assert version == (source,)
    (parent,) = [run for run in cells.values() if run["name"] == "table"]
    assert (parent["tags"]["best_run"], parent["tags"]["best_row"]) == (source, best["row"])
    assert {run["status"] for run in cells.values()} == {"FINISHED"}
    assert call("study", "run", name, "budget.epochs=1", "--quiet", "tracking.register=best") == 0  # nothing is left to do
    with sqlite3.connect("mlflow.db") as store:
        assert store.execute("select count(*) from logged_models").fetchone() == (1,)


def test_a_store_that_is_away_costs_a_warning_and_adopts_the_cells_later(
    workplace: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    name = study(FOUR)
    away = "tracking.uri=http://127.0.0.1:9"
    assert call("study", "run", name, "budget.epochs=1", "--quiet", away, "tracking.flush_timeout=1", "--seeds", "1") == 0
    assert "the study itself could not be logged to MLflow" in caplog.text
    assert {outcome["status"] for outcome in outcomes()} == {"finished"}


def test_a_pool_shares_gpus_among_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are, each process sees one of them, in turn. (No GPU is needed to look at the environment.)"""
    seen = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self) -> None:
            return None

    monkeypatch.setattr(subprocess, "Popen", Process)
    pool = Pool(3, ["2", "5"])
    for _ in range(3):
        hand = pool._new()
        hand.connection.close()
    assert seen == ["2", "5", "2"]


def test_the_visible_gpus_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from bpfree.study.executors import visible_gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert visible_gpus() == ["3", "GPU-abc"]
    monkeypatch.delitem(os.environ, "CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


# --- again, at once ---------------------------------------------------------------------------------------------------


def test_a_finished_study_gives_the_same_answer_until_its_file_changes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(FOUR)

    def run() -> str:
        assert call("study", "run", name, "budget.epochs=1", "tracking.enabled=false", "--quiet") == 0
        return capsys.readouterr().out

    first, known = run(), outcomes()
    assert run() == first
    assert outcomes() == known  # records say when they were written, so that nothing was computed
    Path(name).write_text(FOUR.replace("seeds: 2", "seeds: 1"))
    assert run() != first


def test_workers_that_would_fight_for_processors_are_told_of(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from bpfree.config import parse_words
    from bpfree.study import cells, command
    from bpfree.study.file import read_study
    from bpfree.study.worklist import Worklist

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})

    def said(threads: int, jobs: int) -> str:
        caplog.clear()
        plan = cells.plan(read_study(Path(study(FOUR))), parse_words([f"threads={threads}"]))
        executor = command.executor_for(Worklist(plan), command.Options(jobs=jobs))
        assert executor.slots == jobs
        executor.close()
        return caplog.text

    assert said(1, 4) == said(2, 2) == said(8, 1) == ""
    assert "3 cells at a time with 2 threads each oversubscribe the 4 processors" in said(2, 3)


def test_what_runs_is_said_from_time_to_time(
    site: Path, forked: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bpfree.study import progress

    monkeypatch.setattr(progress, "SILENCE", 0.0)
    name = study(f"title: Slow\n{BARE}seeds: 2\nrules: [slow]\n")
    assert call("study", "run", name, "budget.epochs=1", "tracking.enabled=false", "--jobs", "2") == 0
    said = capsys.readouterr().err
    assert "running: slow seed 0, slow seed 1" in said or "running: slow seed 0 (epoch" in said
    assert re.search(r"running: .*slow seed [01] \(epoch [01]( of 1)?\)", said), said
