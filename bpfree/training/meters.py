"""What a run measures of itself: step metrics without host synchronisation, time, memory."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Clock", "StepMemory", "StepMetrics"]


class StepMetrics:
    """Means of step metrics over an epoch, weighted by examples; tensors stay on the device until ``flush``."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Mapping[str, Tensor]]] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, Tensor], examples: int) -> None:
        """Note the metrics of a step (scalars on the device)."""
        self._pending.append((examples, metrics))

    def flush(self) -> dict[str, float]:
        """Read what is pending: one transfer per metric. Returns the means over what was pending."""
        columns: dict[str, list[Tensor]] = {}
        weights: dict[str, list[int]] = {}
        for examples, metrics in self._pending:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
                weights.setdefault(name, []).append(examples)
        self._pending.clear()
        means = {}
        for name, values in columns.items():
            total = weight = 0.0
            sums = self._sums.setdefault(name, [0.0, 0.0])
            # One by one, in order: the sum does not depend on when the metrics were read.
            for value, examples in zip(
                torch.stack([torch.as_tensor(value) for value in values]).double().tolist(), weights[name], strict=True
            ):
                total, weight = total + value * examples, weight + examples
                sums[0], sums[1] = sums[0] + value * examples, sums[1] + examples
            means[name] = total / weight
        return means

    def epoch(self, merge: Callable[[Mapping[str, list[float]]], Mapping[str, list[float]]]) -> dict[str, float]:
        """Means over the epoch, of the sums that ``merge`` makes of those of several processes; starts the next one."""
        self.flush()
        means = {name: total / weight for name, (total, weight) in merge(self._sums).items() if weight}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """The sums of an epoch in progress."""
        self.flush()
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._sums = {name: list(pair) for name, pair in saved.items()}


class Clock:
    """Seconds of training: runs between ``start`` and ``stop``, and waits for the device at both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since: float | None = None
        self._total = 0.0

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def start(self) -> None:
        """Go on counting."""
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting, once the device has done its work."""
        self._wait()
        self._total = self.seconds
        self._since = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside does not count."""
        self.stop()
        yield
        self.start()

    @property
    def seconds(self) -> float:
        """Counted so far (without waiting for the device)."""
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._total = value


class StepMemory:
    """Peak of the tensor memory that training takes, in MiB: what a step allocates, above what lies between steps.

    Activations, gradients and temporaries are seen by watching a single early step of each phase; parameters, buffers and
    optimiser state are counted. The data set is not in it. The same on a CPU (torch's allocation events, so that the size
    of the process does not blur it) and on CUDA (the allocator's peak).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[str, int] = {}
        self.step_bytes = 0

    def wants(self, phase: str) -> bool:
        """Whether this step of the phase is to be watched: its third, when lazy set-up is over.

        Never while somebody else profiles, since torch has one profiler at a time.
        """
        count = self._seen[phase] = self._seen.get(phase, 0) + 1
        return count == 3 and not torch.autograd.profiler._is_profiler_enabled

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the step inside."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            self._note(torch.cuda.max_memory_allocated(self._device) - before)
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's messages are of no interest here
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            yield
        changes = [(event.start_ns(), event.nbytes()) for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
        self._note(max(itertools.accumulate(size for _, size in sorted(changes)), default=0))

    def _note(self, size: int) -> None:
        self.step_bytes = max(self.step_bytes, size)

    def state_dict(self) -> dict[str, Any]:
        """The largest step so far, and how many steps of each phase were seen: a run that goes on watches none twice."""
        return {"step_bytes": self.step_bytes, "seen": dict(self._seen)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.step_bytes, self._seen = saved["step_bytes"], dict(saved["seen"])

    def total(self, kept: Iterable[Tensor]) -> float:
        """MiB: the largest step seen, and the tensors that are kept between steps; 0 before a step was seen."""
        return (self.step_bytes + sum(t.numel() * t.element_size() for t in kept)) / 2**20 if self.step_bytes else 0.0
