"""A time-conditioned block that sees the input through any model: one block for all times, as continuous time and flow matching need it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bpfree.errors import UsageError
from bpfree.network.builders import NetworkBuilder
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.blocks import check_sizes
from bpfree_noprop.embeddings import target_size
from bpfree_noprop.stems import Maker, StemNetwork, ViewConfig
from bpfree_noprop.timed import TimedConfig, assemble, plain

__all__ = ["NETWORKS", "TimedStemConfig"]


@dataclass
class TimedStemConfig(ViewConfig, TimedConfig):
    """A block that gets the time, and sees the input through any model."""


def build(spec: TaskSpec, config: TimedStemConfig | None = None) -> StemNetwork:
    """Build a network of one block named ``block``, whose stem is frozen only if that is asked for.

    Raises:
        UsageError: a stem that cannot be made, or does not fit the task; several of them.
    """
    config = config or TimedStemConfig()
    d, width = target_size(spec) if config.state_dim is None else config.state_dim, config.width
    check_sizes(spec, config.label, d, images=False, instead="noprop-timed-mlp")
    if isinstance(config.stem, (list, tuple)):
        raise UsageError("there is one block, so one stem", where="network.stem", fix="name one")
    make = Maker(config.stem, spec, config, frozen=bool(config.frozen))

    def path(*before: nn.Module) -> nn.Sequential:
        stem = make()
        return nn.Sequential(*before, stem, nn.BatchNorm1d(stem.size), *plain(stem.size, width))

    label = path(nn.Unflatten(1, spec.input_shape)) if config.label == "input" else nn.Sequential(*plain(d, width))
    block = assemble(path(), label, [width] * (config.depth + 1), width, target_size(spec), d)
    return StemNetwork({"block": block}, spec, missing="" if config.found else config.weights)


NETWORKS = {
    "noprop-timed": NetworkBuilder(build, TimedStemConfig, "a block that gets the time, and sees the input through any model (NoProp)"),
}
