"""Lint or types of what `bpfree plugins new` writes, with the settings of this project, and lint with those of the written package too.

python .ci/new_plugins.py lint|types
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bpfree.template import Kind, write_plugin

ROOT = Path(__file__).resolve().parent.parent
NAMES: dict[str, Kind] = {
    "my-rule": "rule",
    "x": "rule",
    "a-rather-long-name-for-a-rule-of-learnin": "rule",
    "my-task": "task",
    "my-network": "network",
    "my-metric": "metric",
}
SETTINGS = str(ROOT / "pyproject.toml")


def lint(folders: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and commands: ruff runs in each plugin's folder, since it looks for a package's own modules from there."""
    checks = (["check"], ["format", "--check"], ["check", "--config", SETTINGS], ["format", "--check", "--config", SETTINGS])
    for folder in folders:
        yield from ((folder, ["ruff", *words, "--no-cache", "--quiet", "."]) for words in checks)


def types(folders: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yield one command for all plugins, so that the core's types are computed once."""
    places = [str(folder / part) for folder in folders for part in ("src", "tests")]
    options = ("--config-file", SETTINGS, "--cache-dir", str(ROOT / ".mypy_cache" / "new"), "--follow-imports", "silent")
    yield folders[0], ["mypy", *options, *places]


def main(what: str) -> int:
    """Write the plugins and check them; returns the exit code of the first command that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in NAMES]
        for (name, kind), folder in zip(NAMES.items(), folders, strict=True):
            write_plugin(name, folder, kind=kind)
        environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), *(str(folder / "src") for folder in folders)])}
        for folder, words in {"lint": lint, "types": types}[what](folders):
            if code := subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, check=False).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
