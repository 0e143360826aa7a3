"""How soon the command line answers: processor seconds of whole processes, and what they import.

In an empty folder with a cache of its own, after each command was called once, as the median of 5. ``study status`` is of the study
``quickstart`` after a short run of one of its rows, which is called again, too: a finished study is planned and reported. The dry run is
of the study as written, and times a few steps of each row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import measure

BEFORE = "study run quickstart budget.samples=64 --rows backprop --seeds 1 -q"
TARGETS = {
    "--help": 0.4,
    "rules": 0.5,
    "plugins list": 0.5,
    "study list": 0.5,
    "study status quickstart budget.samples=64": 1.5,
    "study run quickstart --dry-run": 3.0,
    BEFORE: 3.2,
    "train rule=dfa task=digits budget.epochs=5 tracking.enabled=false -q": 5.0,
}
"""Processor seconds."""
QUICK = ("--help", "rules", "plugins list")
COMPLETION = {"_BPFREE_COMPLETE": "bash_complete", "COMP_WORDS": "bpfree rules d", "COMP_CWORD": "2"}
HEAVY = ("torch", "torchvision", "mlflow", "sklearn", "scipy", "matplotlib", "torch._dynamo", "triton")
INSPECT = f"""
import json, sys
from bpfree.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("\\n" + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def process(code: str, words: Sequence[str], environment: Mapping[str, str]) -> tuple[float, list[str]]:
    """Return the processor seconds of a fresh process, and the imports that its last line reports."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    after = os.times()
    imported: list[str] = json.loads(done.stdout.splitlines()[-1])
    return after.children_user + after.children_system - before.children_user - before.children_system, imported


def measured(words: str, target: float, count: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Measure a command ``count`` times, after a first call that fills the caches."""
    calls = [process(INSPECT, words.split(), environment) for _ in range(count + 1)]
    seconds = [each for each, _ in calls[1:]]
    median = statistics.median(seconds)
    return {
        "first_processor_seconds": calls[0][0],
        "processor_seconds": seconds,
        "median_processor_seconds": median,
        "target_processor_seconds": target,
        "reached": median <= target,
        "imports": calls[-1][1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("startup", __doc__, pairs=5)
    options = benchmark.start(arguments)
    home = os.getcwd()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            cache = {"XDG_CACHE_HOME": f"{folder}/cache"}  # not the working folder: its part "bpfree" would be taken for the package
            if not options.quick:
                process(INSPECT, BEFORE.split(), cache)
            for words, target in TARGETS.items():
                if words in QUICK or not options.quick:
                    results[words] = measured(words, target, options.pairs, cache)
            results["completion"] = measured("", 0.5, options.pairs, {**cache, **COMPLETION})
        finally:
            os.chdir(home)
    for words, found in results.items():
        median, first, target = (found[f"{each}_processor_seconds"] for each in ("median", "first", "target"))
        print(f"{words}: {median:.2f} s (first {first:.2f}, target {target}); imports {', '.join(found['imports']) or 'nothing heavy'}")
    torch = [process("import torch; print('[]')", (), {})[0] for _ in range(options.pairs)]
    print(f"import torch alone: {statistics.median(torch):.2f} s")
    benchmark.finish({**results, "import torch": {"processor_seconds": torch, "median_processor_seconds": statistics.median(torch)}})


if __name__ == "__main__":
    main()
