"""Training neural networks without end-to-end back-propagation, and comparing the ways to do it fairly.

Names are imported on first use, so that ``import bpfree`` (and ``bpfree --help``) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpfree.version import __version__

if TYPE_CHECKING:  # `as` makes them exports for type checkers
    from bpfree.addons import Activations as Activations
    from bpfree.addons import AddonKind as AddonKind
    from bpfree.config import load_task as load_task
    from bpfree.errors import BpfreeError as BpfreeError
    from bpfree.errors import UsageError as UsageError
    from bpfree.hooks import API_VERSION as API_VERSION
    from bpfree.hooks import hookimpl as hookimpl
    from bpfree.kinds import Maker as Maker
    from bpfree.library import Trained as Trained
    from bpfree.library import train as train
    from bpfree.metric import Metric as Metric
    from bpfree.named_networks import build_network as build_network
    from bpfree.network.network import Network as Network
    from bpfree.network.split import plan as plan
    from bpfree.network.split import split as split
    from bpfree.network.trace import Trace as Trace
    from bpfree.network.trace import Traces as Traces
    from bpfree.options import OptimizerConfig as OptimizerConfig
    from bpfree.options import ScheduleConfig as ScheduleConfig
    from bpfree.options import option as option
    from bpfree.plugins import installed_plugins as installed_plugins
    from bpfree.program import Program as Program
    from bpfree.program import ProgramContext as ProgramContext
    from bpfree.pure import Gradients as Gradients
    from bpfree.pure import Pure as Pure
    from bpfree.recipe import RunConfig as RunConfig
    from bpfree.recorded import Trainer as Trainer
    from bpfree.remembered import mlp as mlp
    from bpfree.remembered import vgg as vgg
    from bpfree.rule import Broadcast as Broadcast
    from bpfree.rule import Card as Card
    from bpfree.rule import Rule as Rule
    from bpfree.rule import Streamed as Streamed
    from bpfree.rule import Traits as Traits
    from bpfree.rule import always as always
    from bpfree.run import Run as Run
    from bpfree.saved import Saved as Saved
    from bpfree.saved import load as load
    from bpfree.solved import RidgeSums as RidgeSums
    from bpfree.solved import Solved as Solved
    from bpfree.step import Batch as Batch
    from bpfree.step import Budget as Budget
    from bpfree.step import Phase as Phase
    from bpfree.step import Stage as Stage
    from bpfree.step import Step as Step
    from bpfree.study.executor import Executor as Executor
    from bpfree.study.model import Row as Row
    from bpfree.study.model import Study as Study
    from bpfree.study.python import compare as compare
    from bpfree.study.python import run_study as run_study
    from bpfree.tasks.class_streams import class_stream as class_stream
    from bpfree.tasks.metrics import mean_metric as mean_metric
    from bpfree.tasks.metrics import whole_metric as whole_metric
    from bpfree.tasks.spec import InputPart as InputPart
    from bpfree.tasks.splits import DatasetSplit as DatasetSplit
    from bpfree.tasks.splits import ItemSplit as ItemSplit
    from bpfree.tasks.splits import StreamedSplit as StreamedSplit
    from bpfree.tasks.stages import Memory as Memory
    from bpfree.tasks.task import DataSource as DataSource
    from bpfree.tasks.task import Examples as Examples
    from bpfree.tasks.task import Split as Split
    from bpfree.tasks.task import Task as Task
    from bpfree.tasks.task import TaskSpec as TaskSpec
    from bpfree.tracking.config import PicturesConfig as PicturesConfig
    from bpfree.tracking.config import TrackingConfig as TrackingConfig
    from bpfree.tracking.tracker import Tracker as Tracker
    from bpfree.training.alignment import AlignmentConfig as AlignmentConfig
    from bpfree.training.config import BudgetConfig as BudgetConfig
    from bpfree.training.config import TrainConfig as TrainConfig
    from bpfree.training.stepper import Stepper as Stepper
    from bpfree.training.stepper import new_step as new_step

_HOME = {
    "API_VERSION": "hooks",
    "Activations": "addons",
    "AddonKind": "addons",
    "AlignmentConfig": "training.alignment",
    "Batch": "step",
    "BudgetConfig": "training.config",
    "BpfreeError": "errors",
    "Broadcast": "rule",
    "Budget": "step",
    "Card": "rule",
    "Executor": "study.executor",
    "DataSource": "tasks.task",
    "Examples": "tasks.task",
    "DatasetSplit": "tasks.splits",
    "InputPart": "tasks.spec",
    "ItemSplit": "tasks.splits",
    "Maker": "kinds",
    "Metric": "metric",
    "Memory": "tasks.stages",
    "RidgeSums": "solved",
    "Solved": "solved",
    "Stage": "step",
    "StreamedSplit": "tasks.splits",
    "class_stream": "tasks.class_streams",
    "mean_metric": "tasks.metrics",
    "whole_metric": "tasks.metrics",
    "Gradients": "pure",
    "Network": "network.network",
    "Pure": "pure",
    "OptimizerConfig": "options",
    "Phase": "step",
    "Program": "program",
    "ProgramContext": "program",
    "Rule": "rule",
    "Row": "study.model",
    "RunConfig": "recipe",
    "PicturesConfig": "tracking.config",
    "TrackingConfig": "tracking.config",
    "Run": "run",
    "Saved": "saved",
    "ScheduleConfig": "options",
    "Split": "tasks.task",
    "Step": "step",
    "Stepper": "training.stepper",
    "Streamed": "rule",
    "Study": "study.model",
    "Task": "tasks.task",
    "TaskSpec": "tasks.task",
    "TrainConfig": "training.config",
    "Trace": "network.trace",
    "Traces": "network.trace",
    "Tracker": "tracking.tracker",
    "Trained": "library",
    "train": "library",
    "Trainer": "recorded",
    "Traits": "rule",
    "UsageError": "errors",
    "always": "rule",
    "build_network": "named_networks",
    "compare": "study.python",
    "hookimpl": "hooks",
    "load": "saved",
    "load_task": "config",
    "mlp": "remembered",
    "option": "options",
    "new_step": "training.stepper",
    "plan": "network.split",
    "installed_plugins": "plugins",
    "run_study": "study.python",
    "split": "network.split",
    "vgg": "remembered",
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
