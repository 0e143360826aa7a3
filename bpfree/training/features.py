"""Phases on features: the readout's inputs, computed once per split and kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.step import Batch
from bpfree.tasks.loading import Loader, Resident
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training import environment

__all__ = ["FeatureLoader", "feature_loader", "feature_split"]

SHARE_OF_FREE = 0.5


@torch.no_grad()
def feature_split(
    rule: Rule, batches: Loader, *, precision: str = "fp32", folder: Path | None = None, look: Callable[[float], None] | None = None
) -> Split:
    """Compute ``rule.features`` of all examples, in eval mode: inputs (N, ...) in the network's dtype, on the CPU.

    Args:
        rule: on its device, in whatever mode; it gets that mode back.
        batches: of the split, in its original order.
        precision: of the computation.
        folder: where features that take more than half of the free memory are kept, in a temporary file.
        look: called after each batch with the share that is done; what it raises ends the computation.
    """
    inputs = torch.empty(0)
    targets: list[Tensor] = []
    done, count = 0, len(batches.split)
    with evaluating(rule), environment.autocast(batches.device, precision):
        for batch in batches:
            features = rule.features(batch.inputs)
            if not done:
                inputs = _allocate((count, *features.shape[1:]), folder, rule.network.dtype)
            inputs[done : done + len(batch)] = features
            done += len(batch)
            if batch.targets is not None:
                targets.append(batch.targets.cpu())
            if look is not None:
                look(done / count)
    return Split(inputs, torch.cat(targets) if targets else None)


def _allocate(shape: tuple[int, ...], folder: Path | None, dtype: torch.dtype) -> Tensor:
    """Allocate a tensor in memory, or in a mapped file, which is removed from its folder at once."""
    count = torch.Size(shape).numel()
    if dtype.itemsize * count <= SHARE_OF_FREE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="features-") as file:
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def feature_loader(
    split: Split, spec: TaskSpec, *, batch_size: int, device: torch.device, seed: int | None = None, balanced: bool = False
) -> Loader:
    """Make batches of a split of features, in the order of the raw split's batches."""
    # on a CPU they are in place, in memory or in a file mapped into it; a GPU takes them if it has room
    shared = Resident(split.inputs, split.targets, normalised=True) if device.type == "cpu" else None
    described = TaskSpec(spec.name, tuple(split.inputs.shape[1:]), spec.outputs, scale=1.0)  # of features, which are taken as they are
    return Loader(
        split, described, batch_size=batch_size, device=device, seed=seed, balanced=balanced, share=shared, dtype=split.inputs.dtype
    )


class FeatureLoader:
    """Batches of a loader with the rule's features as inputs, computed again for each batch.

    Args:
        rule: on its device.
        loader: of raw examples.
    """

    def __init__(self, rule: Rule, loader: Loader) -> None:
        self._rule, self._loader = rule, loader

    def __len__(self) -> int:
        return len(self._loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one pass, as ``Loader.batches`` does."""
        for batch in self._loader.batches(epoch, start):
            with evaluating(self._rule), torch.no_grad():
                features = self._rule.features(batch.inputs)
            yield Batch(features, batch.targets, indices=batch.indices)
