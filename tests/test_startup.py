"""What is imported, and when: the command line must answer before torch could."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import sys
from bpfree.cli.main import main
for words in {calls!r}:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, end.code
print("loaded:", *sorted({{"torch", "torchvision", "mlflow", "matplotlib", "rich", "sklearn", "torch._dynamo"}} & set(sys.modules)))
"""
LISTINGS = [["rules"], ["networks"], ["tasks"], ["plugins", "list"], ["study", "list"]]


def loaded(*calls: list[str]) -> set[str]:
    """What is imported by calls in one process."""
    result = subprocess.run([sys.executable, "-c", PROBE.format(calls=calls)], capture_output=True, text=True, check=True)
    return set(result.stdout.strip().splitlines()[-1].split()[1:])


def test_help_imports_nothing_heavy() -> None:
    assert loaded(["--help"], ["--version"], ["train", "--help"]) == set()


def test_listings_import_torch_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is of the rule itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loaded(*LISTINGS, ["rules", "noprop-dt"]) == {"torch"}
    assert loaded(*LISTINGS) == set()


def test_a_dry_run_does_without_torchs_compiler(workplace: Path) -> None:
    """It times steps of each row, with optimisers."""
    assert loaded(["study", "run", "quickstart", "--dry-run"]) == {"torch"}


def test_a_run_without_tracking_draws_its_curves_without_a_library(tmp_path: Path) -> None:
    words = ["train", "rule=dfa", "task=digits", "budget.epochs=1", "tracking.enabled=false", f"output={tmp_path}", "-q"]
    assert loaded(words) & {"matplotlib", "mlflow", "torchvision"} == set()
    assert [path.name for path in tmp_path.glob("*/plots/*")] == ["curves.svg"]


def test_importing_the_package_does_not_load_torch() -> None:
    subprocess.run([sys.executable, "-c", "import bpfree, sys; assert 'torch' not in sys.modules"], check=True)


def test_every_public_name_is_there() -> None:
    import bpfree

    for name in bpfree.__all__:
        assert getattr(bpfree, name) is not None
