"""The plugin: rules that evaluate a network and take no derivative of it."""

from __future__ import annotations

from pathlib import Path

from bpfree import DataSource, Rule, hookimpl
from bpfree_gradient_free.evolution import Evolution
from bpfree_gradient_free.low_floor import PARITY, TWO_SPIRALS
from bpfree_gradient_free.particles import Particles
from bpfree_gradient_free.spsa import SPSA

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {"particles": Particles, "spsa": SPSA, "evolution": Evolution}


@hookimpl
def bpfree_tasks() -> dict[str, DataSource]:
    return {"two-spirals": TWO_SPIRALS, "parity": PARITY}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}
