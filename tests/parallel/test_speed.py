"""The benchmark of block-parallel training, as it is run by hand. Oracle: its own figures, which must agree with each other."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_noprop_parallel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(FOLDER)
    importlib.import_module("noprop_parallel").main(["--quick", "--save", str(tmp_path)])
    for name in ("noprop_parallel", "measure"):
        del sys.modules[name]
    torch.set_num_threads(threads)
    text = (tmp_path / "noprop_parallel-cpu.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    cases = json.loads(text)["results"]
    assert list(cases) == ["cnn", "resnet"]
    for results in cases.values():
        (only,) = results["rounds"]
        assert only["two"] / only["one"] == results["two_over_one"] > 0
        assert only["two"] / only["copies"] == results["two_over_copies"] > 0
        assert results["same_bits"]
        assert results["reached"] == (results["two_over_one"] >= 1.8 or results["two_over_copies"] >= 0.95)
