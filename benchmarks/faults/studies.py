"""SIGKILL of studies: of the parent, of a worker, of all; and two processes on one study.

A study is killed once to four times and run again with the same command each time. In the end its cells have the scores, curves and
weights of an undisturbed study, bit for bit; the store has one run for each cell and one for the study, all finished, each point once.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from faults.kit import Command, Outcome, Plan, leftovers, program, stored_runs, wait_for
from faults.runs import comparable, files_of, weights_of
from faults.stores import empty_database

__all__ = ["killed_studies", "two_on_one"]

STUDY = """
title: Killed
settings: {task: digits, device: cpu, network.width: 16}
floor: false
probe: false
seeds: 2
rules: [dfa, {rule: noprop-dt, settings: {rule.T: 2}}]
"""
WORDS = ("study", "run", "table.yaml", "budget.epochs=12", "log_interval=0.2", "tracking.system=false", "tracking.flush_timeout=60")
TARGETS = ("parent", "worker", "all")


def _site(plan: Plan, name: str) -> Path:
    folder = plan.place(name)
    (folder / "table.yaml").write_text(STUDY)
    shutil.copy(empty_database(), folder / "mlflow.db")
    return folder


@cache
def _undisturbed(folder: Path) -> tuple[Path, float]:
    plan = Plan(1, 0, folder)
    site = _site(plan, "undisturbed")
    command = Command(program, *WORDS, "--jobs", "2", folder=site)
    if command.wait():
        raise RuntimeError(f"the undisturbed study fails:\n{command.text}")
    return site, command.took


def killed_studies(plan: Plan) -> Outcome:
    """Kill studies until enough kills have hit one."""
    outcome, number = Outcome(), 0
    like, seconds = _undisturbed(plan.folder)
    while outcome.injected < plan.count:
        draws, site = plan.draws(number), _site(plan, f"study {number}")
        kills, problems = list[str](), list[str]()
        for _ in range(min(draws.randint(1, 4), plan.count - outcome.injected)):
            target = draws.choice(TARGETS)
            command = Command(program, *WORDS, "--jobs", "2", folder=site)
            moment = draws.uniform(0.5, 0.9 * seconds)
            command.process.join(moment)
            if not command.alive:
                problems += _failed(command)
                continue
            kills.append(f"{target} after {moment:.2f} s")
            problems += _kill(command, target, draws)
            outcome.count(f"kills of {target}")
        problems += _ends_like(site, like)
        outcome.judge(problems, len(kills), study=number, kills=kills, seed=plan.seed)
        if not problems:
            shutil.rmtree(site)
        number += 1
    outcome.facts["studies"] = number
    return outcome


def _kill(command: Command, target: str, draws: Any) -> list[str]:
    """Kill the parent, one of its workers, or both; returns what is wrong afterwards."""
    children = command.children()
    if target == "worker":
        if children:
            draws.choice(children).kill()
            return _failed(command)
        target = "parent"
    for child in children if target == "all" else ():
        child.kill()
    command.kill()
    return leftovers(children)


def _failed(command: Command) -> list[str]:
    return [f"the study ends with exit code {code}: {command.text[-400:]}"] if (code := command.wait()) else []


def two_on_one(plan: Plan) -> Outcome:
    """Run one study in two processes at a time, and kill one of them."""
    outcome = Outcome()
    like, seconds = _undisturbed(plan.folder)
    for number in range(plan.count):
        draws, site = plan.draws(number), _site(plan, f"study {number}")
        commands = [Command(program, *WORDS, "--jobs", "1", folder=site) for _ in range(2)]
        moment = draws.uniform(0.5, 0.9 * seconds)
        commands[0].process.join(moment)
        outcome.count("killed in time", float(commands[0].alive))
        children = commands[0].children()
        commands[0].kill()
        problems = leftovers(children)
        wait_for(lambda commands=commands: not commands[1].alive, 120)
        code = commands[1].wait(1)
        problems += [f"the other one ends with exit code {code}: {commands[1].text[-300:]}"] if code not in (0, 1) else []
        problems += _ends_like(site, like)
        outcome.judge(problems, number=number, moment=moment, seed=plan.seed)
    return outcome


def _ends_like(site: Path, like: Path) -> list[str]:
    """Run the study to its end; returns what differs from the undisturbed study."""
    last = Command(program, *WORDS, "--jobs", "1", "--quiet", folder=site)
    if code := last.wait():
        return [f"the last attempt ends with exit code {code}: {last.text[-400:]}"]
    return differences(site, like)


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the result of each cell in a folder of runs."""
    from bpfree.study.store import CellStore

    found = {}
    for path in folder.rglob("cells/*.json"):
        known = CellStore(path.parents[3], path.parents[1].name).read(path.stem)
        assert known is not None
        history = [comparable(metrics) for metrics in known.history]
        found[path.stem] = {"status": known.status, "result": comparable(known.result), "history": history, "run": known.run}
    return found


def differences(site: Path, like: Path) -> list[str]:
    """List the differences from the undisturbed study."""
    import torch

    ours, theirs = outcomes(site / "runs"), outcomes(like / "runs")
    wrong = ["other cells"] if ours.keys() != theirs.keys() else []
    for cell in ours.keys() & theirs.keys():
        mine, yours = dict(ours[cell]), dict(theirs[cell])
        one, other = (weights_of(root / "runs" / known.pop("run")) for root, known in ((site, mine), (like, yours)))
        wrong += [f"cell {cell}: {key} differs" for key in mine if mine[key] != yours[key]]
        wrong += [f"cell {cell}: weights {name}" for name in other if name not in one or not torch.equal(one[name], other[name])]
    extra = {Path(name).name for name in files_of(site)} - {Path(name).name for name in files_of(like)}
    known = {known["run"] for known in ours.values()}
    wrong += [f"{name} is left behind" for name in sorted(extra) if name not in known and not _dated(name)]
    return wrong + _stored(site, ours)


def _dated(name: str) -> bool:
    """Tell whether a name contains a date or a hash: a report's, or a run's or a model's (``m-HASH``) in the store."""
    return name.startswith("report") or len(name.removeprefix("m-")) == 32


def _stored(site: Path, ours: dict[str, dict[str, Any]]) -> list[str]:
    """Say what is wrong with the runs in the store."""
    runs = stored_runs(site / "mlflow.db")
    cells = {run["tags"]["study_cell"]: run for run in runs if "study_cell" in run["tags"]}
    parents = [run for run in runs if "study_cell" not in run["tags"]]
    wrong = [f"{len(parents)} runs of the study in the store"] if len(parents) != 1 else []
    wrong += [f"{len(runs) - len(parents)} runs of {len(ours)} cells"] if len(runs) - len(parents) != len(ours) else []
    wrong += ["runs of other cells in the store"] if cells.keys() != ours.keys() else []
    wrong += [f"a run in the store is {run['status']}" for run in runs if run["status"] != "FINISHED"]
    for cell, run in cells.items():
        wrong += [f"{key} at {step} of {cell} has {len(found)} values" for (key, step), found in run["values"].items() if len(found) != 1]
        curve = {step: found[0] for (key, step), found in run["values"].items() if key == "val/accuracy"}
        known = {int(metrics["epoch"]): metrics["val/accuracy"] for metrics in ours.get(cell, {}).get("history", [])}
        wrong += [f"the curve of {cell} in the store is another"] if curve != known else []
    return wrong
