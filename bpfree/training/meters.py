"""Measurements of a run itself: step metrics without host synchronisation, time, memory."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bpfree import devices
from bpfree.rule import Metrics
from bpfree.step import Batch, Step

__all__ = ["Clock", "Spent", "StepMemory", "StepMetrics"]


class StepMetrics:
    """Means of step metrics over an epoch, weighted by examples; tensors stay on the device until ``flush``."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Mapping[str, Tensor]]] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, Tensor], examples: int) -> None:
        """Note the metrics of a step (scalars on the device)."""
        self._pending.append((examples, metrics))

    def flush(self) -> dict[str, float]:
        """Read the pending metrics, with one transfer each, and return their means."""
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
                devices.doubled(torch.stack([torch.as_tensor(value) for value in values])).tolist(), weights[name], strict=True
            ):
                total, weight = total + value * examples, weight + examples
                sums[0], sums[1] = sums[0] + value * examples, sums[1] + examples
            means[name] = total / weight
        return means

    def epoch(self, merge: Callable[[Mapping[str, list[float]]], Mapping[str, list[float]]]) -> dict[str, float]:
        """Return the epoch's means, of the sums that ``merge`` makes of those of several processes, and start the next epoch."""
        self.flush()
        means = {name: total / weight for name, (total, weight) in merge(self._sums).items() if weight}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums of an epoch in progress."""
        self.flush()
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sums = {name: list(pair) for name, pair in saved.items()}


@dataclass(frozen=True)
class Spent:
    """Seconds of wall-clock time, and of the processor (all threads of this process)."""

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: Spent) -> Spent:
        return self + other.times(-1)

    def times(self, factor: float) -> Spent:
        """Multiply both times by a number."""
        return Spent(factor * self.wall, factor * self.processor)


def _now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


@dataclass
class _Kind:
    """Steps of one kind: the timed ones, and the measured ones with the time that these took themselves."""

    timed: Spent = field(default_factory=Spent)
    steps: int = 0
    own: Spent = field(default_factory=Spent)
    measured: int = 0

    @property
    def charge(self) -> Spent:
        """Time to charge for the measured steps: the mean of a timed step for each; their own time if none was timed."""
        return self.timed.times(self.measured / self.steps) if self.steps else self.own


class Clock:
    """Seconds of training: runs between ``start`` and ``stop``, and waits for the device at both.

    A step that is measured on the side (:meth:`measuring`) is slow because of that. It is charged, when a pass ends (:meth:`settle`), at
    the mean of the steps of its kind that were timed, or at its own time as long as none was. A charge may become smaller when steps have
    been timed; what was reported (:meth:`report`) does not decrease then, but stays until the clock has caught up.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since: Spent | None = None
        self._timed = self._charged = self._reported = Spent()
        self._kinds: dict[str, _Kind] = {}
        self._kind = ""
        self._knows_processor = True

    def _wait(self) -> None:
        devices.synchronize(self._device)

    def start(self) -> None:
        """Start or continue counting."""
        self._wait()
        self._since = _now()

    def stop(self) -> None:
        """Stop counting, after waiting for the device."""
        self._wait()
        if self._since is not None:
            self._note(_now() - self._since)
        self._since = None

    def _note(self, spent: Spent) -> None:
        self._timed += spent
        if self._kind:
            self._kinds[self._kind].timed += spent

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the body from the time, except for a step (:meth:`measuring`)."""
        running = self._since is not None
        if running:
            self.stop()
        yield
        if running:
            self.start()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the body, unless it fails."""
        self.start()
        try:
            yield
        except BaseException:
            self._since = None
            raise
        self.stop()

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self, kind: str) -> None:
        """Begin a step of this kind; steps of one kind cost the same, and the clock keeps running between them."""
        if kind != self._kind:
            self._lap(kind)
        self._kinds[kind].steps += 1

    def _lap(self, kind: str) -> None:
        running = self._since is not None
        if running:
            self.stop()
        self._kind = kind
        if kind:
            self._kinds.setdefault(kind, _Kind())
        if running:
            self.start()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the step inside if the clock is stopped; the step is charged later."""
        if self._since is not None:
            yield
            return
        self._wait()
        since = _now()
        yield
        self._wait()
        kind = self._kinds.setdefault(self._kind, _Kind())
        kind.steps, kind.measured, kind.own = kind.steps - 1, kind.measured + 1, kind.own + (_now() - since)

    def settle(self) -> None:
        """Charge the steps that were measured; no further step follows for now."""
        self._lap("")
        self._charged = sum((kind.charge for kind in self._kinds.values()), Spent())

    def mark(self) -> tuple[Spent, _Kind]:
        """Mark the beginning of a step, for :meth:`forget`; the clock runs."""
        assert self._since is not None
        return self._timed + (_now() - self._since), replace(self._kinds.get(self._kind, _Kind()))

    def forget(self, mark: tuple[Spent, _Kind]) -> float:
        """Take back the step since a mark, timed or measured, and return its seconds; the clock keeps running."""
        self.stop()
        timed, before = mark
        taken, kind = self._timed - timed, self._kinds.setdefault(self._kind, _Kind())
        self._note(taken.times(-1))
        own = kind.own - before.own
        measured = kind.measured > before.measured
        kind.own, kind.measured = before.own, before.measured
        kind.steps -= bool(self._kind) and not measured
        self.start()
        return taken.wall + own.wall

    def deduct(self, seconds: float) -> None:
        """Deduct seconds that were spent outside steps."""
        self._timed -= Spent(seconds, seconds if self._timed.processor >= seconds else 0.0)

    # --- accounts ---------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far (without waiting for the device)."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since.wall
        return max(self._reported.wall, self._timed.wall + self._charged.wall + running)

    @property
    def processor_seconds(self) -> float | None:
        """Processor seconds so far; ``None`` if a part of the run was not measured."""
        running = 0.0 if self._since is None else time.process_time() - self._since.processor
        return max(self._reported.processor, self._timed.processor + self._charged.processor + running) if self._knows_processor else None

    def report(self) -> float:
        """Return ``seconds``, for budgets and results; later values are never smaller."""
        seconds = self.seconds
        if seconds > self._reported.wall:
            self._reported = Spent(seconds, self._reported.processor)
        return seconds

    def report_processor(self) -> float | None:
        """Return ``processor_seconds``, for results; later values are never smaller."""
        seconds = self.processor_seconds
        if seconds is not None:
            self._reported = Spent(self._reported.wall, seconds)
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the times as plain values, while the clock is stopped."""
        spent = {"timed": self._timed, "charged": self._charged, "told": self._reported}
        kinds = {name: [*astuple(kind.timed), kind.steps, *astuple(kind.own), kind.measured] for name, kind in self._kinds.items()}
        return {**{name: list(astuple(value)) for name, value in spent.items()}, "kinds": kinds, "processor": self._knows_processor}

    def load_state_dict(self, saved: Mapping[str, Any] | None, seconds: float) -> None:
        """Restore what :meth:`state_dict` returned; ``None`` for an older checkpoint, of which only ``seconds`` are known."""
        if saved is None:
            self._timed, self._knows_processor = Spent(seconds), False
            return
        self._timed, self._charged, self._reported = Spent(*saved["timed"]), Spent(*saved["charged"]), Spent(*saved["told"])
        self._kinds = {name: _Kind(Spent(*v[:2]), v[2], Spent(*v[3:5]), v[5]) for name, v in saved["kinds"].items()}
        self._knows_processor = saved["processor"]


class StepMemory:
    """Peak of the tensor memory that training takes, in MiB: what a step allocates, above what is held between steps.

    Activations, gradients and temporaries are seen by watching an early step of each phase: the first, and the third in its place, when
    lazy set-up is over; so is what ``prepare`` and ``end_phase`` take. Parameters, buffers and optimiser state are counted. The data set is
    not in it. The same on a CPU (torch's allocation events, so that the size of the process does not blur it) and on CUDA (the
    allocator's peak).

    Args:
        device: where it is allocated.
        kept: bytes that are held between steps. What a first step adds to them (an optimiser's state) is not the step's.
    """

    def __init__(self, device: torch.device, kept: Callable[[], int] = lambda: 0) -> None:
        self._device, self._kept = device, kept
        self._seen: dict[str, int] = {}
        self._watched: dict[str, int] = {}

    @property
    def step_bytes(self) -> int:
        """Bytes of the step that takes most; 0 before one was watched."""
        return max(self._watched.values(), default=0)

    def wants(self, batch: Batch, step: Step) -> bool:
        """Tell whether to watch this step of its phase: the first, which may be its last, and the third.

        Never while another profiler runs, since torch allows one at a time.
        """
        phase = step.phase.name
        count = self._seen[phase] = self._seen.get(phase, 0) + 1
        return count in (1, 3) and not torch.autograd.profiler._is_profiler_enabled

    def around(self, take: Callable[[Batch, Step], Metrics], clock: Clock, batch: Batch, step: Step) -> Metrics:
        """Take a step and watch its memory."""
        with clock.stopped(), self.watch(step.phase.name):
            return take(batch, step)

    def beside_steps(self, name: str) -> AbstractContextManager[None]:
        """Watch a call of the rule outside of steps, unless another profiler runs; the largest call of a name stays."""
        return nullcontext() if torch.autograd.profiler._is_profiler_enabled else self._largest(f"({name})")

    @contextmanager
    def _largest(self, name: str) -> Iterator[None]:
        before = self._watched.get(name, 0)
        with self.watch(name):
            yield
        self._watched[name] = max(before, self._watched[name])

    @contextmanager
    def watch(self, phase: str = "") -> Iterator[None]:
        """Watch the step inside.

        Args:
            phase: a later step of the same phase takes the place of an earlier one; without a name the largest stays.
        """
        lying = self._kept()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            peak = torch.cuda.max_memory_allocated(self._device) - before
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's messages are of no interest here
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
                yield
            events = watched.profiler.kineto_results.events()
            changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
            peak = max(itertools.accumulate(size for _, size in sorted(changes)), default=0)
        self._watched[phase] = max(peak - (self._kept() - lying), 0 if phase else self._watched.get(phase, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return the watched step of each phase, and how many of its steps were seen: a resumed run watches none twice."""
        return {"step_bytes": self.step_bytes, "watched": dict(self._watched), "seen": dict(self._seen)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; without steps by phase (of several processes, or an older checkpoint), the largest."""
        self._watched = dict(saved.get("watched") or ({"": saved["step_bytes"]} if saved["step_bytes"] else {}))
        self._seen = dict(saved["seen"])

    def total(self) -> float | None:
        """Return MiB: the largest step seen, and the bytes that are kept between steps; ``None`` if no step was watched."""
        return (self.step_bytes + self._kept()) / 2**20 if self._watched else None
