"""The table of measured properties in the docs is that of the certificates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bpfree.certify.table import write_docs
from bpfree.registry import certificates

ROOT = Path(__file__).parents[2]


def test_the_table_and_its_heat_maps_are_up_to_date(tmp_path: Path) -> None:
    """Oracle: the same files, written again from the certificates."""
    known = certificates(ROOT / "registry")
    if not known:
        pytest.skip("no rule has a certificate yet: make certify")
    page = shutil.copy(ROOT / "docs" / "certificates.md", tmp_path)
    shutil.copytree(ROOT / "docs" / "images" / "certificates", tmp_path / "images" / "certificates")
    changed = write_docs(Path(page), known)
    assert not changed, f"not up to date: {', '.join(path.name for path in changed)}; renew with make certify"
    pictures = {path.stem for path in (ROOT / "docs" / "images" / "certificates").glob("*.svg")}
    assert pictures == set(known)
