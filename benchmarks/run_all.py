"""Run the benchmarks one after the other: ``make bench``. Options are passed on; ``--full`` adds the accuracies on digits.

The speeds are ratios within one run, so other load on the machine widens their range; still, run them on a quiet one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    "trainer_overhead",
    "streamed",
    "noprop_step",
    "noprop_inference",
    "noprop_memory",
    "feedback_step",
    "forward_gradient_step",
    "forward_gradient_memory",
    "gradient_free_memory",
    "hebbian_step",
    "local_losses_step",
    "predictive_coding_step",
    "startup",
)


def commands(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """List the command lines, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also accuracy.py digits (minutes)")
    for name, help in (("quick", "smoke runs"), ("save", "write result files")):
        parser.add_argument(f"--{name}", action="store_true", help=help)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    passed = [f"--{name}" for name in ("quick", "save") if getattr(options, name)] + ["--device", options.device]
    jobs = [[name] for name in SCRIPTS] + ([["accuracy", "digits"]] if options.full else [])
    return [[sys.executable, str(HERE / f"{name}.py"), *words, *passed] for name, *words in jobs]


def main(arguments: Sequence[str] | None = None) -> None:
    failed = []
    for command in commands(arguments):
        name = Path(command[1]).stem
        print(f"\n== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
