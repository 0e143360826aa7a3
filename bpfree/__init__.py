"""Training neural networks without end-to-end back-propagation, and comparing the ways to do it fairly.

Names are imported on first use, so that ``import bpfree`` (and ``bpfree --help``) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpfree.version import __version__

if TYPE_CHECKING:
    from bpfree.config import load_task
    from bpfree.errors import BpfreeError, UsageError
    from bpfree.hooks import API_VERSION, hookimpl
    from bpfree.network.builders import mlp, vgg
    from bpfree.network.network import Network
    from bpfree.network.split import plan, split
    from bpfree.network.trace import Trace, Traces
    from bpfree.options import OptimizerConfig, ScheduleConfig, option
    from bpfree.plugins import installed_plugins
    from bpfree.rule import Broadcast, Card, Rule, Streamed, Traits
    from bpfree.saved import Saved, load
    from bpfree.step import Batch, Budget, Phase, Step
    from bpfree.tasks.task import Split, Task, TaskSpec
    from bpfree.training.config import BudgetConfig, TrainConfig
    from bpfree.training.run import Run
    from bpfree.training.trainer import Trainer
    from bpfree.training.updater import new_step

_HOME = {
    "API_VERSION": "hooks",
    "Batch": "step",
    "BudgetConfig": "training.config",
    "BpfreeError": "errors",
    "Broadcast": "rule",
    "Budget": "step",
    "Card": "rule",
    "Network": "network.network",
    "OptimizerConfig": "options",
    "Phase": "step",
    "Rule": "rule",
    "Run": "training.run",
    "Saved": "saved",
    "ScheduleConfig": "options",
    "Split": "tasks.task",
    "Step": "step",
    "Streamed": "rule",
    "Task": "tasks.task",
    "TaskSpec": "tasks.task",
    "TrainConfig": "training.config",
    "Trace": "network.trace",
    "Traces": "network.trace",
    "Trainer": "training.trainer",
    "Traits": "rule",
    "UsageError": "errors",
    "hookimpl": "hooks",
    "load": "saved",
    "load_task": "config",
    "mlp": "network.builders",
    "option": "options",
    "new_step": "training.updater",
    "plan": "network.split",
    "installed_plugins": "plugins",
    "split": "network.split",
    "vgg": "network.builders",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bpfree' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bpfree.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
