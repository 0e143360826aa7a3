"""Inject faults that occur in practice into bpfree, many times, and count what was lost. `make torture` writes docs/reliability.md.

Each kind of fault is repeated n times, at moments drawn from a seed, and its outcome is compared with the one that must follow:
an undisturbed run bit for bit, the run's own log point by point, the files as they were. What did not survive is listed with what repeats
it. `--quick` does a few of each, `--faults` some kinds alone, `--share 0.1` a tenth of each count.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from faults import disks, fuzz, page, runs, stores, studies
from faults.kit import Outcome, Plan

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its name on the command line and in the table, and how often it is done.

    Attributes:
        few: how often with ``--quick``.
        least: what the issue asks for; ``full`` by default.
    """

    name: str
    title: str
    inject: Callable[[Plan], Outcome]
    full: int
    few: int


KINDS = (
    Kind("kill-run", "SIGKILL of a run, six rules", runs.killed_runs, 100, 2),
    Kind("kill-study", "SIGKILL of a study: parent, a worker, all", studies.killed_studies, 30, 1),
    Kind("two-studies", "two processes on one study, one killed", studies.two_on_one, 5, 1),
    Kind("server-restarted", "`mlflow server` killed, and started again", stores.server_restarted, 10, 1),
    Kind("server-stopped", "`mlflow server` killed for good; sent elsewhere", stores.server_stopped, 5, 1),
    Kind("server-slow", "server slow by 3 s a request", stores.troubled("slow"), 5, 1),
    Kind("server-500", "server that answers 500", stores.troubled("error"), 10, 1),
    Kind("server-reset", "connections reset before the request arrives", stores.troubled("reset"), 10, 1),
    Kind("server-lost", "connections reset in place of the answer", stores.troubled("lost"), 10, 1),
    Kind("sqlite-locked", "SQLite locked for 1 to 6 s", stores.locked, 10, 1),
    Kind("sqlite-four", "four processes on one SQLite store", stores.four_on_one, 20, 4),
    Kind("cost", "training beside a store in trouble: at most 5 % more", stores.training_cost, 5, 1),
    Kind("disk-full", "disk full for a while", disks.full_for_a_while, 20, 1),
    Kind("disk-full-for-good", "disk full for good; resumed elsewhere in time", disks.full_for_good, 20, 1),
    Kind("read-only", "read-only folder: of the start, of a resumed run, on the way", disks.read_only, 15, 3),
    Kind("fuzz", "fuzzed inputs", fuzz.fuzzed, 500, 36),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Inject, report, save; returns 1 if anything was lost."""
    benchmark = measure.Benchmark("torture", __doc__)
    benchmark.parser.add_argument("--faults", nargs="*", choices=[kind.name for kind in KINDS], help="inject only these kinds")
    benchmark.parser.add_argument("--seed", type=int, default=0, help="seed of all times and inputs")
    benchmark.parser.add_argument("--share", type=float, default=1.0, help="fraction of each count")
    benchmark.parser.add_argument("--count", type=int, help="faults of each kind")
    benchmark.parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder that keeps the files of lost faults")
    options = benchmark.start(arguments)
    folder, lines = Path(tempfile.mkdtemp(prefix="bpfree-torture-")), list[dict[str, Any]]()
    folder.chmod(0o755)
    try:
        for kind in KINDS:
            if not options.faults or kind.name in options.faults:
                full = kind.few if options.quick else math.ceil(kind.full * options.share)
                line = one(kind, Plan(options.count or full, options.seed, folder / kind.name, options.quick))
                lines.append(json.loads(without_paths(json.dumps(line | {"command": benchmark.command()}, default=str), folder)))
                if options.output and lines[-1]["failures"]:
                    shutil.copytree(folder / kind.name, options.output / kind.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                shutil.rmtree(folder / kind.name, ignore_errors=True)
    finally:
        stores.stop_servers()
        shutil.rmtree(folder, ignore_errors=True)
    results = merged(benchmark, lines, options)
    print(page.table(results["faults"]))
    benchmark.finish(results)
    if options.save == measure.RESULTS and not options.quick:
        page.write(DOCS, results)
    return int(any(line["failures"] for line in lines))


def one(kind: Kind, plan: Plan) -> dict[str, Any]:
    """Inject one kind of fault; returns a line of the table."""
    plan.folder.mkdir(parents=True)
    plan.folder.chmod(0o755)
    began = time.monotonic()
    outcome = kind.inject(plan)
    line = {"name": kind.name, "fault": kind.title, "asked": kind.full, "injected": outcome.injected, "lost": outcome.failed}
    line |= {"failures": outcome.failures, "facts": outcome.facts, "seed": plan.seed, "seconds": round(time.monotonic() - began, 1)}
    print(f"{kind.name}: {outcome.injected} injected, {outcome.failed} lost, {line['seconds']} s", file=sys.stderr, flush=True)
    for failure in outcome.failures:
        print(f"  {json.dumps(failure, default=str)}", file=sys.stderr, flush=True)
    return line


def without_paths(text: str, folder: Path) -> str:
    """Remove the paths of this machine from a text."""
    for place, name in (
        (folder, "FOLDER"),
        (DOCS.parent.parent, "CHECKOUT"),
        (Path(sys.prefix), "PREFIX"),
        (Path(sys.base_prefix), "PYTHON"),
    ):
        text = text.replace(str(place), name)
    return text


def merged(benchmark: measure.Benchmark, lines: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    """Merge the lines with saved ones of kinds that an earlier call injected."""
    known: dict[str, dict[str, Any]] = {}
    if options.save is not None and options.faults:
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = (options.save / f"torture-{benchmark.device.type}.json").read_text(encoding="utf-8")
            known = {line["name"]: line for line in json.loads(text)["results"]["faults"]}
    known |= {line["name"]: line for line in lines}
    return {"faults": [known[kind.name] for kind in KINDS if kind.name in known]}


if __name__ == "__main__":
    sys.exit(main())
