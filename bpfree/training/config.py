"""The options of training, shared by the trainer as a library and by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpfree.errors import UsageError
from bpfree.options import OptimizerConfig, ScheduleConfig, Sectioned, option
from bpfree.step import Budget
from bpfree.training.alignment import AlignmentConfig
from bpfree.training.updater import ClipConfig

__all__ = ["LIMITS", "AlignmentConfig", "BudgetConfig", "CalibrationConfig", "CheckpointConfig", "EvaluationConfig", "TrainConfig"]

DEFAULT_EPOCHS = 10
LIMITS = ("epochs", "samples", "seconds", "forwards", "operations")
"""Of a budget; one of them is set."""


@dataclass
class BudgetConfig(Sectioned):
    """The length of training, by one of five limits (none: 10 epochs), and when to stop before."""

    epochs: int | None = option(None, "passes over the training split, as the rule counts them (no limit set: 10)", ge=1)
    samples: int | None = option(None, "examples drawn; every pass over an example counts", ge=1)
    seconds: float | None = option(None, "seconds of training, without evaluation", gt=0)
    forwards: int | None = option(
        None, "forward-pass equivalents of one example: operations of the training steps over those of one forward pass", ge=1
    )
    operations: float | None = option(None, "floating-point operations of training, equal for all rules and networks", gt=0)
    patience: int | None = option(
        None, "epochs without a better primary metric on validation that end the run; none: it trains until the limit", ge=1
    )

    def resolve(self, examples: int) -> Budget:
        """Resolve the budget for a training split of n examples.

        Raises:
            UsageError: if more than one limit is set.
        """
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"a budget has one limit, not {len(given)}", where=", ".join(f"budget.{name}" for name in given), fix="set one of them"
            )
        if self.samples is not None:
            return Budget(epochs=-(-self.samples // examples), samples=self.samples)
        if self.seconds is not None:
            return Budget(seconds=self.seconds)
        if self.forwards is not None:
            return Budget(forwards=self.forwards)
        if self.operations is not None:
            return Budget(operations=self.operations)
        return Budget(epochs=self.epochs or DEFAULT_EPOCHS)


@dataclass
class EvaluationConfig(Sectioned):
    """Options of the scoring of predictions, which does not count as training time."""

    every: int = option(1, "epochs between evaluations; the last one is always evaluated", ge=1)
    batch_size: int = option(512, "examples per forward pass", ge=1)
    draws: int | None = option(
        None, "draws of a stochastic rule averaged in the final evaluation (none: as many as the rule declares)", ge=1
    )
    samples: int = option(
        99,
        "draws from the distribution of real targets that a rule predicts, for its CRPS and its intervals in the final evaluation",
        ge=19,
    )
    test: bool = option(True, "evaluate the test split at the end; false for trials of tuning, which must not see it")
    alternatives: bool = option(True, "also score the rule's alternative predictions, such as its single blocks")
    metrics: list[str] = option(factory=list, help="further metrics of predictions, beside the task's own: bpfree metrics")
    protocols: list[str] = option(factory=list, help="at the end also score the features: linear-probe, nearest-centroid, clustering")


@dataclass
class CalibrationConfig(Sectioned):
    """What a rule that calibrates itself after training is given for it, where there is no validation split."""

    folds: int = option(
        0,
        "parts of the training examples, without each of which the rule is trained once more and calibrated on that part; the mean counts "
        "(0: none; costs folds - 1 further trainings on all examples)",
        ge=0,
    )


@dataclass
class CheckpointConfig(Sectioned):
    """Times at which the state is saved (``last.pt``); the weights that are tested are kept beside it."""

    every: int = option(1, "epochs between checkpoints; 0: only at the end and on interruption", ge=0)
    minutes: float = option(5.0, "minutes between checkpoints inside an epoch", gt=0)
    keep: Literal["last", "all"] = option("last", "checkpoints to keep; all: also epoch-NNNN.pt of each, from which certify --run forks")


@dataclass
class TrainConfig(Sectioned):
    """Options of training other than those of the rule, the network and the task."""

    seed: int = option(0, "drives initialisation, order of the data, and noise", ge=0)
    stream: str | None = option(
        None,
        "mixed into the seeds of initialisation and noise, not of the order of the data (in a study: the rule's name)",
    )
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch_size: int = option(64, "examples per update", ge=1)
    accumulate: int = option(1, "micro-batches per update; the update equals the whole batch's", ge=1)
    parallel: Literal["auto", "data", "blocks"] = option(
        "auto",
        "how processes share the work: examples of each batch, or blocks; auto: blocks if they are independent and enough",
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16: autocast")
    compile: Literal["none", "default", "cuda-graphs"] = option(
        "none", "torch.compile of each block, also with CUDA graphs; where that fails blocks stay eager, with a warning"
    )
    device: str = option("auto", "auto (the first that is here of cuda, mps and cpu), cpu, cuda, cuda:N or mps")
    deterministic: bool = option(False, "only deterministic algorithms; matters on CUDA, a CPU repeats itself anyway")
    threads: int | None = option(
        None, "threads of torch on the CPU (none: torch's choice); their number changes results in the last bits", ge=1, le=1024
    )
    select: Literal["last", "best-val"] = option("last", "which weights are tested: the last, or the best on validation")
    twin: bool = option(False, "train the rule's own-prediction twin: everything but its readout recipe stays as initialised")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    log_interval: float = option(1.0, "seconds between readings of the step metrics (which stay on the device until then)", gt=0)
