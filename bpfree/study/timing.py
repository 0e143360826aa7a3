"""Whose seconds can be compared: a run that waited for others, or for the disk, took longer than its work."""

from __future__ import annotations

from bpfree.study.state import Outcome

__all__ = ["SHARE", "comparable", "processor_share"]

SHARE = 0.9
"""Of its threads' time that a run must have had on the processor."""


def processor_share(outcome: Outcome) -> float | None:
    """Processor seconds over threads times wall seconds, of the training of a cell on a CPU; ``None`` where they were not measured.

    Of a cell without a result (it ran out of time, say): up to its last epoch.
    """
    last = outcome.history[-1] if outcome.history else {}
    wall = outcome.result.get("train/seconds", last.get("seconds"))
    processor = outcome.result.get("train/processor_seconds", last.get("processor_seconds"))
    try:
        threads = int(outcome.tags.get("threads", ""))
    except ValueError:
        return None
    if outcome.tags.get("device", "cpu") != "cpu" or not wall or processor is None or threads < 1:
        return None
    return processor / (threads * wall)


def comparable(outcome: Outcome) -> bool:
    """Whether the seconds of a cell can be compared with those of others.

    On a CPU where the processor worked for it for more than nine tenths of the time of its threads, whatever else ran beside it. On a GPU,
    and where processor seconds were not measured, where it was the only cell on its machine.
    """
    share = processor_share(outcome)
    return outcome.parallel <= 1 if share is None else share > SHARE
