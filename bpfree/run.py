"""A run as its observers see it: its identity, its files, and its status."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from bpfree.metric import ACCURACY, LOSS, Metric, metric_of, metrics_from, scores_in

__all__ = ["PAUSED", "ReadOnly", "Run", "RunView", "as_file", "new_run_id"]

PAUSED = "paused after epoch"
"""Begin of the reason of a run that was interrupted because it was to pause at a rung."""

Status = Literal["created", "running", "finished", "diverged", "interrupted", "failed"]


@dataclass
class Run:
    """One rule, one network, one task, one seed, one budget.

    Observers are handed a :class:`RunView` of it, which is read-only but for ``artifacts`` and ``tracking``.

    Attributes:
        id: unique, and the name of the run's folder.
        name: for people: rule, task, seed.
        folder: holds ``events.jsonl``, ``config.yaml``, ``checkpoints/`` and, where the rule has them, ``plan.txt`` and ``pictures/``;
            ``None``: nothing is written.
        config: the resolved configuration, flat: ``{"rule.name": "dfa", "seed": 0, ...}`` of plain values.
        tags: rule, plugin and its version, task, data fingerprint, seed, device, versions, numerical settings.
        total_epochs: passes over the training split that the budget amounts to, where that is known beforehand.
        resumed: whether the run was resumed from a checkpoint after an interruption.
        reopened: whether the run begins under an identity that it was given: an earlier attempt, which was killed before its first
            checkpoint, may have left traces of it in its folder and in the tracking store.
        status: ``finished``, ``diverged`` (non-finite loss or weights), ``interrupted`` (resumable), ``failed``.
        reason: why it did not finish.
        epoch: passes over the training split completed.
        history: metrics of each completed pass, in order; each has ``epoch``, ``samples`` and ``seconds``.
        result: metrics of the end: ``test/accuracy``, ``train/seconds`` and so on.
        artifacts: files in the folder that observers made or that belong to the run, by name.
        tracking: where trackers have the run, such as its identifier in MLflow.
        metrics: what its predictions are scored by: direction and unit by name, first the one to choose by
            (:func:`bpfree.metric.metrics_from`).
        parameters: keys of the configuration that say what the run is, the others having their defaults; ``None``: not known.
        data: facts of the task: its spec, the type of its inputs, its number of examples (:func:`bpfree.tasks.facts.facts_of`).
    """

    id: str
    name: str
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    total_epochs: int | None = None
    resumed: bool = False
    reopened: bool = False
    status: Status = "created"
    reason: str = ""
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    result: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)
    tracking: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        epochs = f"epoch {self.epoch}" + (f" of {self.total_epochs}" if self.total_epochs else "")
        scores = [f"test {metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in self.scores("test")]
        reason = f" ({self.reason})" if self.reason else ""
        return f"Run({', '.join([f'{self.name}: {self.status}{reason}', epochs, *scores, *([str(self.folder)] if self.folder else [])])})"

    @property
    def measures(self) -> dict[str, Metric]:
        """Metrics by name, the primary one first; of a run that does not record them, those that it has numbers of."""
        found = metrics_from(self.metrics)
        if found:
            return found
        keys = {key.rsplit("/", 1)[-1] for key in (*self.result, *(self.history[-1] if self.history else ()))}
        return {metric.name: metric for metric in (ACCURACY, LOSS) if metric.name in keys} or {ACCURACY.name: ACCURACY}

    @property
    def primary(self) -> Metric:
        """Metric by which the run is judged."""
        return next(iter(self.measures.values()))

    def scores(self, split: str) -> list[tuple[Metric, float]]:
        """Return the measured metrics of a split for display, the primary one first.

        Of ``test`` it is the result, of ``train`` and ``val`` the last epoch's. The loss is among them where it is the primary metric, or
        nothing else was measured.
        """
        values = self.result if split == "test" else self.history[-1] if self.history else {}
        return scores_in(values, split, self.measures.values())

    def metric(self, key: str) -> Metric:
        """Find the metric of a key of the result or the history."""
        return metric_of(key, self.measures)


class ReadOnly(dict[str, Any]):
    """A read-only copy of a mapping, which is a dictionary to its readers (``json.dumps``, ``isinstance``)."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("observers get a read-only mapping: change a copy, dict(...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class RunView(Run):
    """A read-only view of a run for observers, which shows its current state.

    Its mappings are copies; only ``artifacts`` and ``tracking`` are the run's own, to which observers add what they made.

    Args:
        run: the trainer's.
    """

    def __init__(self, run: Run) -> None:
        object.__setattr__(self, "_run", run)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"observers see a run read-only, so they cannot set its {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"observers see a run read-only, so they cannot delete its {name}")


def _seen(name: str) -> Callable[[RunView], Any]:
    def see(view: RunView) -> Any:
        value = getattr(view.__dict__["_run"], name)
        if name == "history":
            return [ReadOnly(metrics) for metrics in value]
        if name in ("config", "tags", "result", "metrics", "data"):
            return ReadOnly(copy.deepcopy(value))
        return value

    return see


for _field in dataclasses.fields(Run):
    setattr(RunView, _field.name, property(_seen(_field.name)))


def new_run_id(name: str) -> str:
    """Make a sortable, unique name of time, subject, and six random hex digits."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}-{as_file(name)}-{secrets.token_hex(3)}"


def as_file(name: str) -> str:
    """Return a name as part of a file name, with hyphens for characters that not every file system takes."""
    return re.sub(r"[^\w.+-]", "-", name)
