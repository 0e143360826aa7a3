"""How fast the command line answers, and what it imports.

``bpfree --help``: at most 0.4 s. ``bpfree rules``: at most 1.3 times ``python -c 'import torch'``, importing neither
torchvision nor mlflow. Fresh processes, interleaved, the median of 7; what is imported is read from ``sys.modules``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import measure

HELP_TARGET, RULES_TARGET = 0.4, 1.3
HEAVY = ("torch", "torchvision", "mlflow", "sklearn", "scipy", "matplotlib")
FORBIDDEN = ("torchvision", "mlflow")
COMMAND = "import sys; from bpfree.cli.main import main; main(sys.argv[1:])"
"""What the console script does."""
INSPECT = f"""
import json, sys
from bpfree.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("\\n" + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def process(code: str, *words: str) -> measure.Cost:
    """The cost of a fresh process that runs ``code``."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
    wall, after = time.perf_counter() - began, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return measure.Cost(wall, processor)


def imported(*words: str) -> list[str]:
    """Which of the heavy packages a command imports."""
    done = subprocess.run([sys.executable, "-c", INSPECT, *words], check=True, capture_output=True, text=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("startup", __doc__, pairs=7)
    options = benchmark.start(arguments)
    rules = measure.compared(
        measure.interleaved(lambda: process(COMMAND, "rules"), lambda: process("import torch"), options.pairs), RULES_TARGET
    )
    rules["imports"] = imported("rules")
    rules["reached"] = rules["reached"] and not set(FORBIDDEN) & set(rules["imports"])
    times = [process(COMMAND, "--help").wall for _ in range(options.pairs)]
    answer = {"seconds": times, "median_seconds": statistics.median(times), "target_seconds": HELP_TARGET, "imports": imported("--help")}
    answer["reached"] = answer["median_seconds"] <= HELP_TARGET
    measure.show_ratios({"bpfree rules / import torch": rules})
    print(f"bpfree --help: median {answer['median_seconds']:.3f} s of {len(times)} (target <= {HELP_TARGET} s)")
    print(
        f"imported by rules: {', '.join(rules['imports']) or 'nothing heavy'}; by --help: {', '.join(answer['imports']) or 'nothing heavy'}"
    )
    benchmark.finish({"help": answer, "rules": rules})


if __name__ == "__main__":
    main()
