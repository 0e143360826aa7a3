"""A run as its observers see it: what it is, where it lies, how it stands."""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Run", "new_run_id"]

Status = Literal["created", "running", "finished", "diverged", "interrupted", "failed"]


@dataclass
class Run:
    """One rule, one network, one task, one seed, one budget.

    Attributes:
        id: unique, and the name of the run's folder.
        name: for people: rule, task, seed.
        folder: holds ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``checkpoints/`` and, where the rule has them,
            ``plan.txt`` and ``pictures/``; ``None``: nothing is written.
        config: the resolved configuration, flat: ``{"rule.name": "dfa", "seed": 0, ...}`` of plain values.
        tags: rule, plugin and its version, task, data fingerprint, seed, device, versions, numerical settings.
        total_epochs: passes over the training split that the budget amounts to, where that is known beforehand.
        resumed: whether the run goes on after an interruption, from a checkpoint.
        reopened: whether the run begins under an identity that it was given: an earlier attempt, which was killed before its first
            checkpoint, may have left traces of it in its folder and in the tracking store.
        status: ``finished``, ``diverged`` (non-finite loss or weights), ``interrupted`` (resumable), ``failed``.
        reason: why it did not finish.
        epoch: passes over the training split completed.
        history: metrics of each completed pass, in order; each has ``epoch``, ``samples`` and ``seconds``.
        result: metrics of the end: ``test/accuracy``, ``train/seconds`` and so on.
        artifacts: files that observers made or that belong to the run, by name.
        tracking: what a tracker needs to find the run again, such as its identifier in the store; kept in checkpoints.
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


def new_run_id(name: str) -> str:
    """A sortable, unique name: time, what it is, and six random hex digits."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}-{name}-{secrets.token_hex(3)}"
