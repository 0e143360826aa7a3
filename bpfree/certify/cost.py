"""What a step needs: memory against depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.certify.probe import Probe, Sampling
from bpfree.certify.subject import Specimen, Subject
from bpfree.rule import Rule
from bpfree.step import Batch, Step
from bpfree.training.meters import StepMemory

__all__ = ["MemoryCurve", "measure_memory"]

DEPTHS = (2, 4, 8, 16)
MANY = 512
PHASES = 8
WATCHED = 2
"""Index of the step that is measured; lazy set-up is over by then."""
GROWING = 0.5
"""Slope in activations per block from which memory counts as growing."""


@dataclass(frozen=True)
class MemoryCurve:
    """Memory of a step at several depths.

    Attributes:
        depths: hidden blocks.
        saved: bytes held for backward at the worst moment; empty if it could not be seen (functional transforms).
        peak: bytes that a step allocates at the worst moment.
        activation: bytes of one block's output.
    """

    depths: list[int]
    saved: list[int]
    peak: list[int]
    activation: int

    def slope(self, values: list[int]) -> float | None:
        """Return the activations per block: the slope of a line fitted to the values."""
        if len(values) < 2:
            return None
        return float(np.polyfit(self.depths, values, 1)[0]) / self.activation

    @property
    def growth(self) -> str:
        """``flat`` or ``growing``, by the peak; ``unmeasured`` where the depth cannot be chosen."""
        slope = self.slope(self.peak)
        return "unmeasured" if slope is None else "growing" if slope >= GROWING else "flat"

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain values."""
        slopes = {name: None if value is None else round(value, 2) for name, value in self._slopes()}
        sizes = {"depths": self.depths, "saved_bytes": self.saved, "peak_bytes": self.peak, "activation_bytes": self.activation}
        return {**sizes, "activations_per_block": slopes, "growth": self.growth}

    def _slopes(self) -> Iterator[tuple[str, float | None]]:
        yield "saved", self.slope(self.saved)
        yield "peak", self.slope(self.peak)


def measure_memory(subject: Subject, specimen: Specimen) -> MemoryCurve:
    """Watch a step at several depths, in single precision, with enough examples that weights are small beside activations."""
    depths: list[int] = []
    saved: list[int] = []
    peak: list[int] = []
    found = [_memory(subject, replace(specimen, depth=depth)) for depth in DEPTHS]
    if len({blocks for blocks, _, _ in found}) == len(found):  # otherwise something else determines the number of blocks
        depths = list(DEPTHS)
        peak = [most for _, _, most in found]
        saved = [held for _, held, _ in found if held is not None]
    size = specimen.width * (specimen.image**2 if specimen.kind == "convolutional" else 1)
    return MemoryCurve(depths, saved if len(saved) == len(depths) else [], peak, 4 * MANY * size)


def _memory(subject: Subject, specimen: Specimen) -> tuple[int, int | None, int]:
    """Return the number of blocks, and the bytes saved for backward and peak bytes of the step that needs most."""
    meter = StepMemory(torch.device("cpu"))
    probe = Probe(subject, specimen, Sampling(samples=MANY, steps=WATCHED + 1, phases=PHASES), dtype=torch.float32)
    held: list[int | None] = []
    blocks = 0

    @contextmanager
    def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
        nonlocal blocks
        blocks = len(rule.network.blocks)
        turn = step.index % (WATCHED + 1)
        if turn == WATCHED:
            with meter.watch():
                yield
        elif turn == WATCHED - 1:
            with saved_for_backward() as size:
                yield
            held.append(size.peak if size.works else None)
        else:
            yield

    probe.run(watch=watch)
    return blocks, None if None in held else max((size for size in held if size is not None), default=0), meter.step_bytes


class _Size:
    """Bytes that are alive, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.works = True

    def change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class _Held:
    """A tensor that backward will need."""

    def __init__(self, tensor: Tensor, size: _Size) -> None:
        self.tensor, self._size = tensor.detach(), size  # a node's own output would hold the node
        self._bytes = tensor.numel() * tensor.element_size()
        size.change(self._bytes)

    def __del__(self) -> None:
        self._size.change(-self._bytes)


@contextmanager
def saved_for_backward() -> Iterator[_Size]:
    """Count the bytes that autograd holds for backward, at the peak inside; ``works`` is false where torch does not allow it."""
    size = _Size()

    def pack(tensor: Tensor) -> _Held:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            size.works = False
        return _Held(tensor, size)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            yield size
    except RuntimeError:  # functional transforms refuse such hooks, second derivatives miss their graph
        size.works = False
