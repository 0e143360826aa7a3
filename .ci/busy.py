"""Repeat a command beside busy processes, until it fails or has succeeded as often as it should.

python .ci/busy.py [--processes 8] [--times 10] COMMAND ...
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

SPIN = "while True: pass"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that compute without end, as long as the context lasts."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the busy processes end too
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in spinning:
            process.kill()
            process.wait()


def main(words: list[str]) -> int:
    """Return the exit code of the last repetition."""
    parser = argparse.ArgumentParser(description="Repeats a command beside busy processes.")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    with busy(options.processes):
        for time in range(1, options.times + 1):
            print(f"{time} of {options.times}, beside {options.processes} busy processes", flush=True)
            if code := subprocess.run(options.command, check=False).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
