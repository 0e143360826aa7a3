"""Seconds of the tutorial: docs/tutorial.md is followed to the letter in an empty folder, and each of its steps is timed.

From an installation that is finished, on data that the tutorial makes. With ``--quick`` it stops after the first comparison.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from sitemaker.blocks import Block, pieces  # noqa: E402 - after its folder is known
from sitemaker.reader import Reader  # noqa: E402

PAGE = ROOT / "docs" / "tutorial.md"
COMPARES = "bpfree compare"
"""What the first command of the reader's own comparison begins with."""


def variables(threads: int) -> dict[str, str]:
    """Return the environment of a shell in which the interpreter of this process is active."""
    left_out = ("BPFREE_DATA", "MLFLOW_TRACKING_URI")
    found = {key: value for key, value in os.environ.items() if key not in left_out}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**found, "PATH": path, "OMP_NUM_THREADS": str(threads)}


def follow(reader: Reader, *, first: bool = False) -> list[dict[str, Any]]:
    """Do what the page says, up to the first comparison or to its end; returns what each command took."""
    step, taken = "", list[dict[str, Any]]()
    for piece in pieces(PAGE.read_text(encoding="utf-8")):
        if not isinstance(piece, Block):
            step = next(iter(re.findall(r"^## (.+)$", piece, re.MULTILINE)), step)
            continue
        known = set(reader.taken)
        reader.follow(piece)
        for command, seconds in reader.taken.items():
            if command not in known:
                rounded = {"seconds": round(seconds.wall, 1), "processor_seconds": round(seconds.processor, 1)}
                taken.append({"step": step, "command": command, **rounded})
                print(f"{seconds.wall:7.1f} s  {seconds.processor:7.1f} s of processors  {command}", flush=True)
        if first and COMPARES in piece.text:
            break
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("tutorial", __doc__)
    options = benchmark.start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        commands = follow(Reader(Path(folder), variables(options.threads)), first=options.quick)
    end = next(place for place, line in enumerate(commands) if line["command"].startswith(COMPARES)) + 1
    first = {key: round(sum(line[key] for line in commands[:end]), 1) for key in ("seconds", "processor_seconds")}
    print(f"to the first comparison on own data: {first['seconds']} s, {first['processor_seconds']} s of processors")
    benchmark.finish({"commands": commands, "to_first_comparison": first})


if __name__ == "__main__":
    main()
