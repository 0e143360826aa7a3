"""SIGKILL of single runs at random moments, over rules whose state differs.

A run is killed once to four times, resumed each time as a study resumes it, and must end as the same run undisturbed: the weights bit
for bit, the scores, the learning curves, the files; in the store one run, each point once, none missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from faults.kit import UNTIMED, Command, Outcome, Plan, leftovers, points_lost, stored_runs
from faults.stores import empty_database

__all__ = [
    "NAME",
    "RULES",
    "Undisturbed",
    "comparable",
    "continue_run",
    "curves",
    "differences",
    "files_of",
    "killed_runs",
    "weights_of",
    "words_of",
]

NAME = "the-run"
COMMON = (
    *(
        "task=digits",
        "device=cpu",
        "threads=1",
        "budget.epochs=3",
        "log_interval=0.05",
        "pictures.every=2",
        "pictures.count=4",
        "pictures.curves=false",
    ),
    *("select=best-val", "tracking.interval=0.05", "tracking.timeout=60", "tracking.flush_timeout=60"),
)
RULES: dict[str, tuple[str, ...]] = {
    "noprop-dt with dropout": ("rule=noprop-dt", "rule.T=1", "network=noprop-paper", "network.dropout=0.2", "task.validation=0.8"),
    "softhebb in its phases": ("rule=softhebb", "network.widths=[16]", "rule.feature_epochs=1"),
    "ipc": ("rule=ipc", "network.width=16"),
    "forward-gradient": ("rule=forward-gradient", "network.width=32", "network.dropout=0.1"),
    "epc": ("rule=epc", "network.width=16", "optimizer=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9"),
    "dfa, augmented by loader workers": ("rule=dfa", "network.width=16", "task.augment=[flip,crop]", "data.workers=2", "data.resident=no"),
}


def continue_run(words: Sequence[str], name: str, observers: Sequence[Any] = ()) -> None:
    """Resume a run from its checkpoint, or start it (again), as a study does with a cell."""
    from bpfree import runner
    from bpfree.config import parse_words, resolve
    from bpfree.record.folder import RunFolder

    recipe = resolve(parse_words(words))
    folder = Path(recipe.settings.output) / name
    if RunFolder(folder).last.is_file():
        runner.resume(str(folder), quiet=True, observers=observers)
    else:
        runner.run(recipe, quiet=True, run_id=name, observers=observers)


def weights_of(folder: Path) -> dict[str, Any]:
    """Return all tensors of a run's checkpoints."""
    from bpfree.training.checkpoint import read_checkpoint

    found = {}
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        found.update({f"{path.name} {name}": tensor for name, tensor in read_checkpoint(path)["weights"].items()})
    return found


def comparable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that a repetition must reproduce bit for bit."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in UNTIMED)}


def curves(run: Mapping[str, Any]) -> dict[tuple[str, int], list[float]]:
    """Return the points of a run in the store that do not depend on the clock."""
    found: dict[tuple[str, int], list[float]] = run["values"]
    return {at: values for at, values in found.items() if comparable({at[0]: 0}) and not at[0].startswith(("step/", "system/"))}


def files_of(folder: Path) -> set[str]:
    """List the files and folders in a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def words_of(rule: str, folder: Path, number: int) -> list[str]:
    """Return the settings of a run of this rule in a folder; every third run samples the use of the system."""
    system = ("tracking.system_interval=0.05",) if number % 3 == 0 else ("tracking.system=false",)
    return [*RULES[rule], *COMMON, *system, f"output={folder / 'runs'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"]


class Undisturbed:
    """Each rule's run that nothing happened to, made when it is needed.

    Args:
        plan: of the faults.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.of = cache(self._run)

    def _run(self, rule: str) -> tuple[Path, float]:
        """Run a rule; returns its folder, and how many seconds the run took."""
        folder = self._plan.place(f"undisturbed {rule}")
        shutil.copy(empty_database(), folder / "mlflow.db")
        command = Command(continue_run, words_of(rule, folder, 1), NAME, folder=folder)
        if command.wait():
            raise RuntimeError(f"the undisturbed run of {rule} fails:\n{command.text}")
        return folder, command.took


def killed_runs(plan: Plan) -> Outcome:
    """Kill runs until enough kills have hit one, each of the rules in turn."""
    outcome, undisturbed, number = Outcome(), Undisturbed(plan), 0
    while outcome.injected < plan.count:
        rule = list(RULES)[number % len(RULES)]
        wanted = plan.draws(number).randint(1, 4)
        _chain(plan, outcome, undisturbed, rule, number, min(wanted, plan.count - outcome.injected))
        number += 1
    outcome.facts |= {"runs": number, "rules": min(number, len(RULES))}
    return outcome


def _chain(plan: Plan, outcome: Outcome, undisturbed: Undisturbed, rule: str, number: int, kills: int) -> None:
    """Start one run, kill it several times, and then let it finish."""
    like, seconds = undisturbed.of(rule)
    draws, folder = plan.draws(number, "moments"), plan.place(f"run {number}")
    shutil.copy(empty_database(), folder / "mlflow.db")
    words, moments, problems = words_of(rule, folder, number), list[float](), list[str]()
    for _ in range(kills):
        command = Command(continue_run, words, NAME, folder=folder)
        moment = draws.uniform(0.05, 0.95 * seconds)
        command.process.join(moment)
        if not command.alive:  # it was faster
            problems += [f"exit code {command.wait()}: {command.text[-300:]}"] if command.wait() else []
            continue
        children = command.children()
        command.kill()
        problems += leftovers(children)
        moments.append(round(moment, 3))
        outcome.count(f"kills {_where(folder / 'runs' / NAME)}")
    last = Command(continue_run, words, NAME, folder=folder)
    if code := last.wait():
        problems.append(f"the last attempt ends with exit code {code}: {last.text[-400:]}")
    else:
        problems += differences(folder, like)
    outcome.judge(problems, len(moments), rule=rule, run=number, moments=moments, seed=plan.seed)
    if not problems:
        shutil.rmtree(folder)


def _where(folder: Path) -> str:
    """Say how far a run has come, according to its files."""
    try:
        text = (folder / "events.jsonl").read_text()
    except OSError:
        return "before the log begins"
    if '{"event": "end"' in text:
        return "while it is sent to the store"
    return "after a checkpoint" if (folder / "checkpoints" / "last.pt").is_file() else "before a checkpoint"


def differences(folder: Path, like: Path) -> list[str]:
    """List the differences from the undisturbed run."""
    import torch

    from bpfree.record.folder import read_run
    from bpfree.tracking.sending import is_sent

    own, other = folder / "runs" / NAME, like / "runs" / NAME
    mine, theirs = weights_of(own), weights_of(other)
    wrong = [f"weights {name} differ" for name in theirs if name not in mine or not torch.equal(mine[name], theirs[name])]
    run, straight = read_run(own), read_run(other)
    wrong += [f"it is {run.status}"] if run.status != "finished" else []
    wrong += ["results differ"] if comparable(run.result) != comparable(straight.result) else []
    wrong += ["learning curves differ"] if list(map(comparable, run.history)) != list(map(comparable, straight.history)) else []
    wrong += [f"{name} is {'left behind' if name in files_of(own) else 'missing'}" for name in files_of(own) ^ files_of(other)]
    # first, because a child that ends at once leaves SQLite's log to whoever opens the database next, unless a process still has it
    stored, (wanted,) = stored_runs(folder / "mlflow.db"), stored_runs(like / "mlflow.db")
    wrong += [f"{path.name} is left behind" for path in folder.iterdir() if path.name not in files_of(like)]
    if len(stored) != 1:
        return [*wrong, f"the store has {len(stored)} runs"]
    wrong += [f"the run in the store is {stored[0]['status']}"] if stored[0]["status"] != "FINISHED" else []
    wrong += ["points in the store differ from the undisturbed run's"] if curves(stored[0]) != curves(wanted) else []
    wrong += points_lost(stored[0], own, whole=False)
    return wrong + ([] if is_sent(own) else ["not all of the log is sent"])
