"""What is imported, and when: the command line must answer before torch could."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
from bpfree.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted({{"torch", "torchvision", "mlflow", "matplotlib", "rich", "sklearn"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["train", "--help"], set()),
        (["rules"], {"torch"}),
        (["rules", "noprop-dt"], {"torch"}),
    ],
)
def test_commands_import_only_what_they_need(arguments: list[str], allowed: set[str]) -> None:
    result = subprocess.run([sys.executable, "-c", PROBE.format(arguments=arguments)], capture_output=True, text=True, check=True)
    assert set(result.stdout.strip().splitlines()[-1].split()[1:]) <= allowed


def test_importing_the_package_does_not_load_torch() -> None:
    subprocess.run([sys.executable, "-c", "import bpfree, sys; assert 'torch' not in sys.modules"], check=True)


def test_every_public_name_is_there() -> None:
    import bpfree

    for name in bpfree.__all__:
        assert getattr(bpfree, name) is not None
