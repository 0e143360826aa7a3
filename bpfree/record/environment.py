"""Describe the environment of a run: versions, hardware and plugins."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from bpfree.version import __version__

__all__ = ["environment"]

PACKAGES = ("torch", "torchvision", "numpy", "mlflow", "mlflow-skinny", "pluggy", "omegaconf", "psutil", "nvidia-ml-py")


def environment() -> dict[str, Any]:
    """Describe versions of Python, packages and plugins; system, processors, memory and GPUs."""
    return {
        "bpfree": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "memory_megabytes": _memory(),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "plugins": _plugins(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total // 10**6)


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # a run has already imported torch; other callers should not wait for the import
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _plugins() -> dict[str, Any]:
    """Return distribution and version of every installed plugin, by entry point."""
    found = {}
    for entry in importlib.metadata.entry_points(group="bpfree"):
        found[entry.name] = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
    return found
