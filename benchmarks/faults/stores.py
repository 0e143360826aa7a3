"""A tracking store that dies, comes back, is slow, answers errors, loses answers, or is locked: all of a run arrives, once.

The oracle is the run's own log: after the run, and after ``bpfree track send`` where something was left, each of its points is in the
store exactly once, with its value, and nothing else is; each artifact is there, and one model, with the weights that were tested.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from faults.kit import Command, Outcome, Plan, points_lost, program, stored_runs, wait_for
from faults.servers import Relay, Server

__all__ = ["WORDS", "empty_database", "four_on_one", "locked", "server_restarted", "server_stopped", "tracked", "training_cost", "troubled"]

WORDS = (
    *("rule=dfa", "task=digits", "network.width=16", "network.depth=2", "device=cpu", "threads=1", "log_interval=0.1"),
    *("pictures.every=0", "tracking.interval=0.1", "tracking.system_interval=0.2", "tracking.timeout=10"),
)
PAUSE = 0.3
"""Seconds that a run sleeps after each epoch, so that a fault meets it while it trains."""


@cache
def empty_database() -> Path:
    """Return a SQLite store without runs, made once since that takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="bpfree-torture-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = Command(_make_database, str(folder / "mlflow.db"), folder=folder)
    if command.wait():
        raise RuntimeError(f"no empty store: {command.text}")
    return folder / "mlflow.db"


def _make_database(path: str) -> None:
    from bpfree.tracking.store import Store

    Store(f"sqlite:///{path}", 60).connect()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Pausing:
    """An observer that sleeps after each epoch.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    from bpfree import hookimpl

    @hookimpl
    def epoch_end(self) -> None:
        """Sleep after an epoch."""
        time.sleep(self._seconds)


def tracked(words: Sequence[str], pause: float = 0.0) -> None:
    """Train like ``bpfree train``."""
    from bpfree import runner
    from bpfree.config import parse_words, resolve

    runner.run(resolve(parse_words(words)), quiet=True, observers=[Pausing(pause)] if pause else [])


_server: list[Server] = []


def server(plan: Plan) -> Server:
    """Return the running server, or start one."""
    if not _server or not _server[-1].folder.is_dir():
        folder = plan.place("server")
        shutil.copy(empty_database(), folder / "mlflow.db")
        _server[:] = [Server(folder)]
    if not _server[-1].alive:
        _server[-1].start()
    return _server[-1]


def stop_servers() -> None:
    """Stop the server."""
    while _server:
        _server.pop().kill()


# --- checks -------------------------------------------------------------------------------------------------------------


def delivered(folder: Path, database: Path, artifacts: Path) -> list[str]:
    """Say what is wrong with the only run in a folder of runs, as stored."""
    from bpfree.record.folder import read_run

    (place,) = (folder / "runs").iterdir()
    run = read_run(place)
    stored = [each for each in stored_runs(database) if each["tags"].get("bpfree.run") == run.id]
    if len(stored) != 1:
        return [f"the store has {len(stored)} runs of it"]
    wrong = points_lost(stored[0], place)
    wrong += [f"the run in the store is {stored[0]['status']}"] if stored[0]["status"] != "FINISHED" else []
    there = {path.name for path in artifacts.rglob(f"{stored[0]['id']}/artifacts/**/*") if path.is_file()}
    wanted = {path.name for path in run.artifacts.values() if path.is_file()} | {"config.yaml", "environment.json"}
    wrong += [f"the file {name} is not in the store" for name in wanted - there]
    return wrong + _model_lost(place, stored[0]["id"], database, artifacts)


def _model_lost(place: Path, run_id: str, database: Path, artifacts: Path) -> list[str]:
    """Say what is wrong with a run's model, as stored: there is one, with the weights that were tested."""
    import torch

    from bpfree.training.checkpoint import find_checkpoint, read_checkpoint

    with contextlib.closing(sqlite3.connect(database)) as store:
        models = [name for (name,) in store.execute("select model_id from logged_models where source_run_id = ?", (run_id,))]
    files = [path for name in models for path in artifacts.rglob(f"{name}/**/weights.pt")]
    if (len(models), len(files)) != (1, 1):
        return [f"the run has {len(models)} models in the store, with {len(files)} files of weights"]
    ours, theirs = (read_checkpoint(path)["weights"] for path in (find_checkpoint(place, prefer="selected"), files[0]))
    return [f"{name} differs in the store's model" for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]


def send_rest(folder: Path, *words: str) -> list[str]:
    """Send what a run's store does not have yet; returns what is wrong if that fails."""
    from bpfree.tracking.sending import is_sent

    (place,) = (folder / "runs").iterdir()
    if is_sent(place) and not words:
        return []
    command = Command(program, "track", "send", str(place), "tracking.timeout=30", *words, folder=folder)
    return [f"track send ends with exit code {code}: {command.text[-400:]}"] if (code := command.wait()) else []


def ended(command: Command) -> list[str]:
    """Say what is wrong with a run that a store's trouble must not have ended."""
    return [f"the run ends with exit code {code}: {command.text[-400:]}"] if (code := command.wait()) else []


def _begun(folder: Path, epoch: int) -> Callable[[], bool]:
    """Return a condition: whether the only run in a folder has come to this epoch."""
    return lambda: any(path.read_text().count('{"event": "epoch"') >= epoch for path in folder.glob("runs/*/events.jsonl"))


def _start(folder: Path, uri: str, *words: str, epochs: int = 12, pause: float = PAUSE) -> Command:
    return Command(
        tracked, [*WORDS, f"budget.epochs={epochs}", f"output={folder / 'runs'}", f"tracking.uri={uri}", *words], pause, folder=folder
    )


# --- faults -------------------------------------------------------------------------------------------------------------


def server_restarted(plan: Plan) -> Outcome:
    """Kill the server while a run trains, and start it again."""
    outcome = Outcome()
    for number in range(plan.count):
        folder, draws, there = plan.place(f"run {number}"), plan.draws(number), server(plan)
        command = _start(folder, there.uri, epochs=6 if plan.quick else 40)
        after = draws.randint(1, 4)
        wait_for(_begun(folder, after))
        there.kill()
        time.sleep(draws.uniform(0, 1))
        there.start()
        outcome.count("back before the run's end", float(command.alive))
        problems = ended(command) + send_rest(folder) + delivered(folder, there.database, there.folder)
        outcome.judge(problems, number=number, seed=plan.seed, epoch=after)
    return outcome


def server_stopped(plan: Plan) -> Outcome:
    """Kill the server for good, and send the run to another store later."""
    outcome = Outcome()
    for number in range(plan.count):
        folder, there = plan.place(f"run {number}"), server(plan)
        shutil.copy(empty_database(), folder / "other.db")
        command = _start(folder, there.uri, "tracking.flush_timeout=3", epochs=6)
        after = plan.draws(number).randint(1, 4)
        wait_for(_begun(folder, after))
        there.kill()
        problems = ended(command)
        problems += [] if "bpfree track send" in command.text else ["nothing says how to send it later"]
        problems += send_rest(folder, f"tracking.uri=sqlite:///{folder / 'other.db'}") + delivered(folder, folder / "other.db", folder)
        outcome.judge(problems, number=number, seed=plan.seed, epoch=after)
    return outcome


def troubled(kind: str) -> Callable[[Plan], Outcome]:
    """Return a test with a server that is ``slow``, or fails a share of the requests, up to all of them for a while."""

    def inject(plan: Plan) -> Outcome:
        outcome, there = Outcome(), server(plan)
        for number in range(plan.count):
            folder, draws = plan.place(f"{kind} {number}"), plan.draws(kind, number)
            share = 1.0 if kind == "slow" or number % 3 == 2 else 0.4
            relay = Relay(there.port)
            relay.fault = lambda draws=draws, share=share: kind if draws.random() < share else ""  # type: ignore[misc]
            try:
                problems = ended(_start(folder, relay.uri, "tracking.flush_timeout=4", epochs=6))
                relay.fault = str
                problems += send_rest(folder) + delivered(folder, there.database, there.folder)
            finally:
                relay.close()
            outcome.count("requests hit", relay.hit)
            outcome.judge(problems, kind=kind, number=number, seed=plan.seed, share=share)
        return outcome

    return inject


def locked(plan: Plan) -> Outcome:
    """Lock the SQLite database from another process for some seconds."""
    outcome = Outcome()
    for number in range(plan.count):
        folder, draws = plan.place(f"run {number}"), plan.draws(number)
        database = folder / "mlflow.db"
        shutil.copy(empty_database(), database)
        command = _start(folder, f"sqlite:///{database}", "tracking.flush_timeout=30")
        after, seconds = draws.randint(0, 6), draws.uniform(1, 6)
        wait_for(_begun(folder, after))
        with contextlib.closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            other.execute("ROLLBACK")
        problems = ended(command) + send_rest(folder) + delivered(folder, database, folder)
        outcome.judge(problems, number=number, seed=plan.seed, epoch=after, seconds=seconds)
    return outcome


def four_on_one(plan: Plan) -> Outcome:
    """Track four processes at a time to one SQLite database, which every second time does not exist yet."""
    outcome = Outcome()
    for number in range(-(-plan.count // 4)):
        place = plan.place(f"round {number}")
        if number % 2 == 0:
            shutil.copy(empty_database(), place / "mlflow.db")
        folders = [place / str(process) for process in range(4)]
        for folder in folders:
            folder.mkdir()
        commands = [_start(folder, f"sqlite:///{place / 'mlflow.db'}", epochs=5, pause=0.05) for folder in folders]
        ends = [ended(command) for command in commands]
        for process, (folder, problems) in enumerate(zip(folders, ends, strict=True)):
            outcome.judge(
                problems + send_rest(folder) + delivered(folder, place / "mlflow.db", place), round=number, process=process, seed=plan.seed
            )
        extra = len(stored_runs(place / "mlflow.db")) - 4
        outcome.judge([f"the store has {extra} runs too many"] if extra else [], 0, round=number)
    return outcome


# --- what it costs ------------------------------------------------------------------------------------------------------


def training_cost(plan: Plan) -> Outcome:
    """Compare processor seconds of training with a store in trouble and without tracking: the median of alternating pairs."""
    outcome, there = Outcome(), server(plan)
    for kind in ("slow", "error", "reset", "away"):
        relay, ratios = Relay(there.port), list[float]()
        relay.fault = lambda kind=kind: kind  # type: ignore[misc]
        if kind == "away":
            relay.close()
        try:
            for number in range(plan.count):
                pair = {name: _processor_seconds(plan, f"{kind} {number} {name}", relay.uri, name) for name in _turns(number)}
                ratios.append(pair["troubled"] / pair["untracked"])
        finally:
            relay.close()
        median = statistics.median(ratios)
        slow = median > 1.05 and not plan.quick
        outcome.facts[f"processor ratio, {kind}"] = round(median, 4)
        outcome.facts[f"ratios, {kind}"] = [round(ratio, 4) for ratio in ratios]
        outcome.judge([f"training takes {median:.3f} times as long with a store that is {kind}"] if slow else [], plan.count, kind=kind)
    return outcome


def _turns(number: int) -> tuple[str, str]:
    return ("troubled", "untracked") if number % 2 == 0 else ("untracked", "troubled")


def _processor_seconds(plan: Plan, name: str, uri: str, which: str) -> float:
    folder = plan.place(name)
    words = ["rule=dfa", "task=digits", "network.width=256", "device=cpu", "threads=1", "pictures.every=0", "tracking.flush_timeout=1"]
    words += [f"budget.epochs={2 if plan.quick else 60}", f"output={folder / 'runs'}", f"tracking.uri={uri}", "evaluation.every=5"]
    command = Command(tracked, [*words, f"tracking.enabled={str(which == 'troubled').lower()}"], folder=folder)
    if code := command.wait():
        raise RuntimeError(f"exit code {code}: {command.text}")
    (log,) = folder.glob("runs/*/events.jsonl")
    end: dict[str, Any] = next(event for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == "end")
    return float(end["result"]["train/processor_seconds"])
