"""Switches of a phase: which groups learn, and which blocks run in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bpfree.errors import unknown_name
from bpfree.rule import Rule
from bpfree.step import Phase

__all__ = ["learning"]


@contextmanager
def learning(rule: Rule, phase: Phase) -> Iterator[None]:
    """Put the rule in train mode with the phase's groups trainable; restore ``requires_grad`` and modes afterwards.

    Blocks below the first learning one run in eval mode, and without a graph, since nothing below needs a gradient.

    Raises:
        UsageError: the phase names a group that the rule does not have.
    """
    modes = {module: module.training for module in rule.modules()}
    wanted = {p: p.requires_grad for p in rule.parameters()}
    rule.train()
    try:
        if phase.groups is not None:
            _select(rule, phase.groups)
        yield
    finally:
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
        for module, mode in modes.items():
            module.training = mode


def _select(rule: Rule, chosen: tuple[str, ...]) -> None:
    groups = rule.groups()
    for name in chosen:
        if name not in groups:
            raise unknown_name("group", name, groups, where="Phase.groups")
    for name, members in groups.items():
        if name not in chosen:
            for parameter in members:
                parameter.requires_grad_(False)
    if rule.network.chain:
        for name, block in rule.network.blocks.items():
            if name in chosen:
                break
            block.eval()
