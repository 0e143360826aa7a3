"""Folders, homes and locales that are not what one has at home."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import sqlalchemy

from bpfree import BpfreeError
from bpfree.cli import listing
from bpfree.cli.main import main
from bpfree.config import resolve
from bpfree.tracking.config import TrackingConfig, sqlite_file


@pytest.mark.makes_database
@pytest.mark.parametrize("name", ["plain", "a?b", "x%20y", "100%", "w%3Fz", "p#q", "two words", "ü", "a&b=c;d", "%?#ü"])
def test_the_store_lies_beside_the_output_folder_whatever_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file that SQLAlchemy, which MLflow uses, makes at this address."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    uri = TrackingConfig().resolve_uri(tmp_path / name / "runs")
    sqlalchemy.create_engine(uri).connect().close()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.db")] == [f"{name}/mlflow.db"]
    assert sqlite_file(uri) == tmp_path / name / "mlflow.db"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "http://host/a?b", "postgresql://u@h/d", "sqlite:///?x=1"])
def test_addresses_without_a_file(uri: str) -> None:
    assert sqlite_file(uri) is None


def test_options_of_a_database_are_not_its_name() -> None:
    assert sqlite_file("sqlite:////tmp/a.db?timeout=3") == Path("/tmp/a.db")


def test_signs_that_a_terminal_lacks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bytes that arrive."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    monkeypatch.setattr(listing, "certificate_of", lambda name, registry: "größer als α")
    with pytest.raises(SystemExit) as end:
        main(["rules", "dfa"])
    sys.stdout.flush()
    assert not end.value.code
    assert b"gr\xf6\xdfer als \\u03b1" in written.getvalue()


def test_a_home_is_needed_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", lambda self: homeless() if str(self).startswith("~") else self)
    monkeypatch.delenv("BPFREE_DATA", raising=False)
    resolve({"rule": "dfa", "task": "digits"}).build_task()
    for asked in ({"task": "mnist"}, {"task": "mnist", "data.root": "~/data"}, {"task": {"name": "npz", "path": "~/x.npz"}}):
        with pytest.raises(BpfreeError, match="no home"):
            resolve({"rule": "dfa", **asked}).build_task()
