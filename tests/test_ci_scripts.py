"""The scripts beside the tests. Oracles: a command that counts its calls; a package with a known fault."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import ci_scripts
import psutil
import pytest

COUNTS = "import sys, pathlib; p = pathlib.Path('calls'); p.open('a').write('x'); sys.exit(len(p.read_text()) == int(sys.argv[1]))"


@pytest.mark.parametrize(("fails_at", "calls", "code"), [(9, 3, 0), (2, 2, 1)])
def test_a_command_is_repeated_beside_busy_processes(workplace: Path, fails_at: int, calls: int, code: int) -> None:
    """Until it fails; of the busy processes none is left."""
    script, before = ci_scripts.load("busy"), signal.getsignal(signal.SIGTERM)
    assert script.main(["--processes", "1", "--times", "3", sys.executable, "-c", COUNTS, str(fails_at)]) == code
    assert Path("calls").read_text() == "x" * calls
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [child for child in psutil.Process().children() if script.SPIN in child.cmdline()]


@pytest.mark.parametrize("fault", ["", "import os\n"])
def test_the_style_of_a_new_plugin_is_looked_at(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    script = ci_scripts.load("new_plugins")
    write = script.write_plugin

    def written(name: str, folder: Path, **options: Any) -> None:
        write(name, folder, **options)
        path = next(folder.rglob("plugin.py"))
        path.write_text(path.read_text() + fault)

    monkeypatch.setattr(script, "write_plugin", written)
    assert bool(script.main("lint")) == bool(fault)
