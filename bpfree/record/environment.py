"""Describe the environment of a run: versions, hardware, plugins, the command and the commit that it ran from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from bpfree.redaction import redact_word
from bpfree.version import __version__

__all__ = ["environment", "source"]

PACKAGES = ("torch", "torchvision", "numpy", "mlflow", "mlflow-skinny", "pluggy", "omegaconf", "psutil", "nvidia-ml-py")
GIT_SECONDS = 2.0
"""Time limit of asking for the commit."""


def environment() -> dict[str, Any]:
    """Describe versions of Python, packages and plugins; system, processors, memory and GPUs; the command line and the commit."""
    return {
        **source(),
        "bpfree": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "memory_megabytes": _memory(),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "plugins": _plugins(),
    }


def source() -> dict[str, Any]:
    """Return the command line, and the commit of the working folder."""
    return {"command": _command(), "git": _git()}


def _command() -> str:
    """Return the command line, its addresses without secrets; the program by its name, without its folder."""
    program, *words = sys.argv or [""]
    return shlex.join(redact_word(word) for word in (Path(program).name, *words)) if program else ""


def _git() -> dict[str, Any]:
    """Return the commit of the working folder, and whether files that git knows differ from it; empty outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        options: dict[str, Any] = {"timeout": GIT_SECONDS, "env": os.environ | {"GIT_OPTIONAL_LOCKS": "0"}}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)
        if done.returncode == 0 and (found := done.stdout.strip()):
            return {"commit": found.removesuffix("-dirty"), "dirty": found.endswith("-dirty")}
    return {}


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
