"""Fuzzed inputs: files that another person or program may have written, damaged or planted.

Each input must be refused with a message, or (where it may be valid still) taken without harm: no traceback, no file lost or changed, and
nothing in it executed, for which the planted code would make the file CANARY. Plugins are executed by design; they must not affect
unrelated rules.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from faults.fuzz_files import CANARY, FAMILIES, Case
from faults.fuzz_plugins import TRAIN, plugins
from faults.kit import Command, Outcome, Plan, program
from faults.messages import faults_of

__all__ = ["fuzzed"]

GROWING = ("events.jsonl", "mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db.lock", "sent-mlflow.json")
"""Files that a command may add to: the log, and what it says of the store."""
ALL = {**FAMILIES, "plugin": plugins}


def fuzzed(plan: Plan) -> Outcome:
    """Try one family after the other, until there are enough inputs; inputs that turn out to be valid are extra."""
    outcome, material = Outcome(), _material(plan)
    for number in range(plan.count):
        family = list(ALL)[number % len(ALL)]
        folder = plan.place(f"{family} {number}")
        case = ALL[family](material, folder, plan.draws(number), number // len(ALL))
        problems, code = _tried(case, folder)
        outcome.count(f"{family}: {'refused' if code else 'taken'}")
        outcome.judge(problems, family=family, number=number, seed=plan.seed, how=case.how, words=list(case.words))
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _tried(case: Case, folder: Path) -> tuple[list[str], int]:
    """Run a command on the input; returns what is wrong afterwards, and its exit code."""
    before = _contents(folder)
    command = Command(program, *case.words, folder=folder, variables={"XDG_CACHE_HOME": str(folder / "cache")} | case.variables)
    code = command.wait(120)
    problems = faults_of(command.text, code, refused=case.refused)
    after = _contents(folder)
    problems += [f"{name} is lost" for name in before if name not in after]
    same = [name for name in before.keys() & after.keys() if Path(name).name not in GROWING]
    if code:  # a run that could be resumed has replaced its files
        problems += [f"{name} has changed" for name in same if before[name] != after[name]]
    problems += ["what was planted has been executed"] if list(folder.rglob(CANARY)) else []
    temporary = [name for name in after if name not in before and Path(name).name.startswith(".") and "cache" not in name]
    problems += [f"{name} is left behind" for name in temporary]
    return problems + (case.check(command.text, code) if case.check else []), code


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _material(plan: Plan) -> Path:
    """Make valid inputs of all kinds, to be spoilt: a finished run, a registry, a study, arrays."""
    import numpy as np

    folder = plan.place("material")
    words = ("rule=dfa", "task=digits", "network.width=8", "network.depth=1", "device=cpu", "threads=1", "budget.epochs=1")
    more = ("pictures.every=0", "tracking.enabled=false", "--quiet")
    command = Command(program, "train", *words, *more, folder=folder)
    if command.wait():
        raise RuntimeError(f"the run to be spoilt fails:\n{command.text}")
    (run,) = (folder / "runs").iterdir()
    run.rename(folder / "run")
    plain = Command(program, "train", "rule=dfa", *TRAIN, folder=plan.place("plain"))
    plain.wait()
    (folder / "plain.txt").write_text(plain.text)
    draws = np.random.default_rng(plan.seed)
    np.savez(folder / "arrays.npz", x=draws.random((80, 6), dtype=np.float32), y=draws.integers(0, 3, 80))
    registry = Path(__file__).resolve().parents[2] / "registry"
    shutil.copytree(registry / "plugins", folder / "registry" / "plugins")
    shutil.copy(registry / "index.json", folder / "registry")
    (folder / "registry" / "certificates").mkdir()
    for name in ("dfa", "linear"):
        shutil.copy(registry / "certificates" / f"{name}.json", folder / "registry" / "certificates")
    (folder / "study.yaml").write_text(
        "title: Small\nsettings: {task: digits, device: cpu, network.width: 8}\nseeds: 2\nrules: [dfa, backprop]\n"
    )
    return folder
