"""The scripts in .ci/, as modules for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load(name: str) -> ModuleType:
    """``.ci/NAME.py``, executed again."""
    spec = importlib.util.spec_from_file_location(f"bpfree_ci_{name}", Path(__file__).parents[1] / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
