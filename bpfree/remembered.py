"""Networks that remember their builder, and so can be built again for a checkpoint of a run that was made in Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bpfree.network import builders
from bpfree.network.builders import MLPConfig, VGGConfig
from bpfree.network.network import Network
from bpfree.tasks.task import TaskSpec

__all__ = ["builder_of", "mlp", "remember", "vgg"]

KEY = "_bpfree_builder"


def remember(network: Network, name: str, config: Any) -> Network:
    """Note in each block of a network by which name, and with which options, it was built."""
    for key, block in network.blocks.items():
        vars(block)[KEY] = (name, config, key, str(block))  # in the blocks, because a rule without a readout makes a network of the others
    return network


def builder_of(network: Network) -> tuple[str, Any] | None:
    """Return the name and the options that build the network; ``None`` if they are not known, or a block was changed since."""
    found = [(vars(block).get(KEY), key, str(block)) for key, block in network.blocks.items()]
    known = [memory[:2] for memory, key, text in found if memory is not None and memory[2:] == (key, text)]
    same = len(known) == len(found) and all(each == known[0] for each in known)
    return known[0] if same else None


def _remembering(name: str, build: Callable[..., Network], options: type) -> Callable[..., Network]:
    @functools.wraps(build)
    def built(spec: TaskSpec, config: Any = None) -> Network:
        config = options() if config is None else config
        return remember(build(spec, config), name, config)

    return built


mlp: Callable[..., Network] = _remembering("mlp", builders.mlp, MLPConfig)
vgg: Callable[..., Network] = _remembering("vgg", builders.vgg, VGGConfig)
