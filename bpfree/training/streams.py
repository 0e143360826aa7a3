"""A stream's state: the scores of each stage after each stage, and the examples of earlier stages that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bpfree.metric import Metric
from bpfree.step import Stage
from bpfree.tasks.splits import Split
from bpfree.tasks.stages import chosen
from bpfree.tasks.task import Task
from bpfree.tasks.trees import leaves

__all__ = ["StreamState", "stream_scores"]

MIB = 2**20
Rows = list[list[float]]


class StreamState:
    """Scores that a run on a stream has reached, and the examples that it keeps.

    Args:
        task: with its stages; none: it is no stream, and all of this stays empty.
        seed: of the choice of examples.

    Attributes:
        stage: that is learned now; ``None``: none has begun, or the task is no stream.
        scores: by split (``val``, ``test``): row i has the primary metric of the stages 0 to i after stage i.
        kept: positions in the training split, by stage and class.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._seed = task, seed
        self.stage: Stage | None = None
        self.scores: dict[str, Rows] = {}
        self.kept: list[list[Tensor]] = []

    @property
    def seen(self) -> tuple[Stage, ...]:
        """The stages up to the present one."""
        return () if self.stage is None else self._task.stages[: self.stage.index + 1]

    @property
    def ended(self) -> bool:
        """Tell whether the present stage has been scored, or none has begun."""
        return self.stage is None or any(len(rows) > self.stage.index for rows in self.scores.values())

    def positions(self) -> Tensor | None:
        """Return the positions (M,) of the examples that the present stage trains on, kept ones included; ``None`` for all examples."""
        if self.stage is None or self.stage.train is None:
            return None
        return torch.cat([self.stage.train, *self._memory()]).sort().values

    def _memory(self) -> list[Tensor]:
        memory = self._task.memory
        if memory is None or self.stage is None:
            return []
        count = memory.each(self._groups(self._task.stages[: self.stage.index]))
        return [positions[:count] for stage in self.kept[: self.stage.index] for positions in stage]

    def _groups(self, stages: Sequence[Stage]) -> int:
        """Count the classes of some stages; a stage without classes of its own counts as a group."""
        return max(1, sum(len(stage.classes) or 1 for stage in stages))

    def keep(self, features: Callable[[Tensor], Tensor]) -> None:
        """Choose the examples to keep of the present stage, if another one follows.

        Args:
            features: gives the features (M, F) of the training examples at (M,).
        """
        memory, stage = self._task.memory, self.stage
        last = stage is None or stage.index == len(self._task.stages) - 1  # after which nothing is trained on again
        if memory is None or stage is None or stage.train is None or last or len(self.kept) > stage.index:
            return
        targets = self._task.train.targets
        labels = torch.zeros(len(stage.train), dtype=torch.long) if targets is None else targets[stage.train]
        found = features(stage.train) if memory.choose == "herding" else None
        picked = chosen(memory, labels, found, self._groups(self.seen), self._seed, stage.index)
        self.kept.append([stage.train[each] for each in picked])

    def add(self, split: str, scores: Sequence[float]) -> None:
        """Note the scores of the stages seen so far."""
        self.scores.setdefault(split, []).append(list(scores))

    def results(self, metric: Metric) -> dict[str, float]:
        """Summarise the scores, and report what is kept."""
        found: dict[str, float] = {}
        for split, rows in self.scores.items():
            sizes = [len(_of(stage, split)) for stage in self._task.stages]
            found |= {f"{split}/{name}": value for name, value in stream_scores(rows, sizes, metric).items()}
        if self._task.memory is not None:
            count = sum(len(part) for part in self._memory())
            found["train/memory_examples"] = float(count)
            if isinstance(self._task.train, Split):
                bytes_each = sum(leaf.nbytes for leaf in leaves(self._task.train.inputs)) / max(1, len(self._task.train))
                found["train/memory_examples_mb"] = count * bytes_each / MIB
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"scores": self.scores, "kept": self.kept}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Restore a checkpoint's state; older checkpoints have none."""
        if saved:
            self.scores = {name: [list(row) for row in rows] for name, rows in saved["scores"].items()}
            self.kept = [list(stage) for stage in saved["kept"]]


def _of(stage: Stage, split: str) -> Tensor:
    found = stage.test if split == "test" else stage.validation
    return torch.empty(0, dtype=torch.long) if found is None else found


def stream_scores(rows: Rows, sizes: Sequence[int], metric: Metric) -> dict[str, float]:
    """Summarise a matrix of scores.

    Args:
        rows: row i has the scores of the stages 0 to i after stage i.
        sizes: examples of each stage.
        metric: the task's primary one.

    Returns:
        ``average_incremental``, the mean over i of the score on all stages up to i (Rebuffi et al. 2017); ``last``, that of the final
        row; ``forgetting``, the mean over all stages but the last of their best score less their final one (Chaudhry et al. 2018), above
        0 where something is forgotten; and the matrix, as ``after_3/on_1/accuracy``.
    """
    whole = [_mean(row, sizes) for row in rows]
    if not whole:
        return {}
    name = metric.name
    found = {f"average_incremental/{name}": sum(whole) / len(whole), f"last/{name}": whole[-1]}
    final = rows[-1]
    drops = [
        metric.sign * (metric.best(row[stage] for row in rows[stage:-1]) - final[stage])
        for stage in range(len(final) - 1)
        if rows[stage:-1]
    ]
    if drops:
        found[f"forgetting/{name}"] = sum(drops) / len(drops)
    return found | {f"after_{i + 1}/on_{j + 1}/{name}": value for i, row in enumerate(rows) for j, value in enumerate(row)}


def _mean(row: Sequence[float], sizes: Sequence[int]) -> float:
    count = sum(sizes[: len(row)])
    return sum(value * size for value, size in zip(row, sizes, strict=False)) / count if count else math.nan
