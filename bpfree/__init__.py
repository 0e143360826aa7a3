"""Training neural networks without end-to-end back-propagation, and comparing the ways to do it fairly.

Names are imported on first use, so that ``import bpfree`` (and ``bpfree --help``) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpfree.version import __version__

if TYPE_CHECKING:  # `as` makes them exports for type checkers
    from bpfree.config import load_task as load_task
    from bpfree.errors import BpfreeError as BpfreeError, UsageError as UsageError
    from bpfree.hooks import API_VERSION as API_VERSION, hookimpl as hookimpl
    from bpfree.network.builders import mlp as mlp, vgg as vgg
    from bpfree.network.network import Network as Network
    from bpfree.network.split import plan as plan, split as split
    from bpfree.network.trace import Trace as Trace, Traces as Traces
    from bpfree.options import OptimizerConfig as OptimizerConfig, ScheduleConfig as ScheduleConfig, option as option
    from bpfree.plugins import installed_plugins as installed_plugins
    from bpfree.rule import Broadcast as Broadcast, Card as Card, Rule as Rule, Streamed as Streamed, Traits as Traits
    from bpfree.saved import Saved as Saved, load as load
    from bpfree.step import Batch as Batch, Budget as Budget, Phase as Phase, Step as Step
    from bpfree.tasks.task import Split as Split, Task as Task, TaskSpec as TaskSpec
    from bpfree.training.alignment import AlignmentConfig as AlignmentConfig
    from bpfree.training.config import BudgetConfig as BudgetConfig, TrainConfig as TrainConfig
    from bpfree.training.run import Run as Run
    from bpfree.training.trainer import Trainer as Trainer
    from bpfree.training.updater import new_step as new_step

_HOME = {
    "API_VERSION": "hooks",
    "AlignmentConfig": "training.alignment",
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
