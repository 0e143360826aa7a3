"""Disks that are full for a while or for good, and folders that cannot be written.

A full disk is a limit of the kernel on the size of files (RLIMIT_FSIZE): each write beyond it fails, of the log, of
checkpoints, of the SQLite store. A line of the log may be half written. Read-only folders are met by a
process without privileges. The run whose data come from worker processes is left out: the limit counts what these share in memory as
files, which a full disk does not touch.
"""

from __future__ import annotations

import hashlib
import random
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from faults.kit import Command, Outcome, Plan, program, wait_for
from faults.messages import faults_of
from faults.runs import NAME, RULES, Undisturbed, continue_run, differences, words_of
from faults.stores import Pausing, empty_database

__all__ = ["full_for_a_while", "full_for_good", "read_only"]

PAUSE = 0.4


def _paused(words: Sequence[str], name: str) -> None:
    """Continue a run that sleeps after each epoch; errors are shown as the command line shows them."""
    import sys

    from bpfree import BpfreeError

    try:
        continue_run(words, name, [Pausing(PAUSE)])
    except BpfreeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _limit(pid: int, size: int = resource.RLIM_INFINITY) -> None:
    """Limit the size of every file of a process from now on."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _size(log: Path, draws: random.Random) -> int:
    """Draw a largest file size: no file of the run can be written, or only a part of the next line of the log.

    The kernel counts locks in shared memory, of 32 bytes, as files; a full disk leaves these alone.
    """
    return draws.choice((64, (log.stat().st_size if log.exists() else 0) + draws.randint(1, 200)))


def _site(plan: Plan, number: int) -> tuple[Path, str, list[str], Path]:
    rules = [name for name in RULES if "workers" not in name]
    folder, rule = plan.place(f"run {number}"), rules[number % len(rules)]
    shutil.copy(empty_database(), folder / "mlflow.db")
    return folder, rule, words_of(rule, folder, number), folder / "runs" / NAME / "events.jsonl"


def _filled(plan: Plan, *, forever: bool) -> Outcome:
    outcome, undisturbed = Outcome(), Undisturbed(plan)
    for number in range(plan.count):
        folder, rule, words, log = _site(plan, number)
        like, _ = undisturbed.of(rule)
        draws = plan.draws(number)
        command = Command(_paused, words, NAME, folder=folder)
        epoch, seconds = draws.randint(0, 3), draws.uniform(0.2, 2)
        wait_for(lambda log=log, epoch=epoch, command=command: not command.alive or _epochs(log) >= epoch)
        time.sleep(draws.uniform(0, PAUSE))
        size = _size(log, draws)
        if command.alive:
            _limit(command.pid, size)
            if not forever:
                time.sleep(seconds)
                if command.alive:
                    _limit(command.pid)
        code = command.wait()
        problems = faults_of(command.text, code, refused=False)
        outcome.count(f"exit code {code}")
        if code:
            last = Command(_paused, words, NAME, folder=folder)
            problems += [f"the last attempt ends with exit code {code}: {last.text[-400:]}"] if (code := last.wait()) else []
        problems += _sent(folder) + differences(folder, like)
        outcome.judge(problems, number=number, rule=rule, epoch=epoch, seconds=seconds, size=size, seed=plan.seed, said=command.text[-300:])
    return outcome


def _epochs(log: Path) -> int:
    return log.read_text().count('{"event": "epoch"') if log.exists() else -1


def _sent(folder: Path) -> list[str]:
    from faults.stores import send_rest

    return send_rest(folder)


def full_for_a_while(plan: Plan) -> Outcome:
    """Fill the disk for 0.2 to 2 s: the run ends as usual, or with a message, and is resumed."""
    return _filled(plan, forever=False)


def full_for_good(plan: Plan) -> Outcome:
    """Fill the disk until the run has ended, with a message; then resume it with room on the disk."""
    return _filled(plan, forever=True)


# --- folders that cannot be written ---------------------------------------------------------------------------------------


def read_only(plan: Plan) -> Outcome:
    """Make a folder read-only, in three ways in turn."""
    outcome = Outcome()
    ways, undisturbed = (_at_the_start, _resumed, _on_the_way), Undisturbed(plan)
    for number in range(plan.count):
        folder, rule, words, log = _site(plan, number)
        way = ways[number % 3]
        problems = way(plan, number, folder, words, log)
        if way is _on_the_way:
            problems += differences(folder, undisturbed.of(rule)[0])
        outcome.judge(problems, number=number, way=way.__name__.strip("_"), rule=rule, seed=plan.seed)
    return outcome


def _give(folder: Path, mode: int) -> None:
    """Give a folder and its contents these permissions; files never become executable."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _variables(folder: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "cache"), "HOME": str(folder)}


def _at_the_start(plan: Plan, number: int, folder: Path, words: list[str], log: Path) -> list[str]:
    (folder / "runs").mkdir()
    _give(folder, 0o755)
    (folder / "runs").chmod(0o555)
    command = Command(program, "train", "--quiet", *words, folder=folder, powerless=True, variables=_variables(folder))
    code = command.wait()
    problems = faults_of(command.text, code, refused=True)
    return problems + [f"{path.name} is left behind" for path in (folder / "runs").iterdir()]


def _resumed(plan: Plan, number: int, folder: Path, words: list[str], log: Path) -> list[str]:
    _give(folder, 0o755)
    first = Command(_paused, words, NAME, folder=folder, powerless=True, variables=_variables(folder))
    problems = [f"exit code {code}: {first.text[-300:]}"] if (code := first.wait()) else []
    _give(folder / "runs", 0o555)
    before = _hashes(folder / "runs")
    longer = ("train", "--quiet", "--resume", str(folder / "runs" / NAME), "budget.epochs=4")
    command = Command(program, *longer, folder=folder, powerless=True, variables=_variables(folder))
    code = command.wait()
    problems += faults_of(command.text, code, refused=True)
    problems += ["files have changed"] if _hashes(folder / "runs") != before else []
    _give(folder / "runs", 0o755)
    again = Command(program, *longer, folder=folder, powerless=True, variables=_variables(folder))
    return problems + ([f"once it can be written: exit code {code}: {again.text[-300:]}"] if (code := again.wait()) else [])


def _on_the_way(plan: Plan, number: int, folder: Path, words: list[str], log: Path) -> list[str]:
    _give(folder, 0o755)
    command = Command(_paused, words, NAME, folder=folder, powerless=True, variables=_variables(folder))
    epoch = plan.draws(number).randint(0, 2)
    wait_for(lambda: not command.alive or _epochs(log) >= epoch)
    if (folder / "runs" / NAME).is_dir():
        for path in (folder / "runs" / NAME, *(folder / "runs" / NAME).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
    code = command.wait()
    problems = faults_of(command.text, code, refused=False)
    _give(folder / "runs", 0o755)
    if code:
        last = Command(_paused, words, NAME, folder=folder, powerless=True, variables=_variables(folder))
        problems += [f"the last attempt ends with exit code {code}: {last.text[-300:]}"] if (code := last.wait()) else []
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return problems + _sent(folder)
