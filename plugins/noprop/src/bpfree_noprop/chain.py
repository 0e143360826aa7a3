"""What the rules of discrete time have in common: T blocks t1 to tT, each of which takes the state one step on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import always
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import NoPropConfig, NoPropRule
from bpfree_noprop.blocks import DenoisingBlock

__all__ = ["ChainConfig", "ChainRule"]


@dataclass
class ChainConfig(NoPropConfig):
    """Options of rules with T blocks."""

    T: int = option(10, "number of blocks, which is the number of denoising steps", ge=1)
    inference: Literal["deterministic", "sampled"] = option(
        "deterministic", "the chain's mean path from z_0 = 0, or (the paper) with its noise"
    )


class ChainRule(NoPropRule):
    """A rule whose network is T blocks :class:`DenoisingBlock`, named t1 to tT."""

    config: Any
    optimizer_of = always(OptimizerConfig("adamw", lr=1e-3, weight_decay=1e-3))

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        if config is None and isinstance(network, Network):  # in Python the number of blocks need not be said twice
            config = self.Config(T=len(network.blocks))
        super().__init__(network, spec, config)

    def check_network(self, network: Network, d: int) -> None:
        super().check_network(network, d)
        T = self.config.T
        if network.names != [f"t{t}" for t in range(1, T + 1)]:
            raise UsageError(
                f"the rule has T={T} blocks, the network {len(network.blocks)}",
                where=f"blocks: {', '.join(network.names)}",
                fix=f"set network.blocks={T}, or rule.T",
            )

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        return super().network_options(spec, config) | {"blocks": config.T}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        small = super().specimen(kind, depth, width)
        return small and {"rule.T": depth, "network.blocks": depth, **small}

    def denoisers(self) -> Iterator[tuple[int, DenoisingBlock]]:
        """Yield ``(t, block)`` for t = 1..T."""
        for t, block in enumerate(self.network.blocks.values(), start=1):
            yield t, cast(DenoisingBlock, block)
