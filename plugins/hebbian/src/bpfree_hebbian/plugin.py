"""The plugin: Hebbian rules and their networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree import hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree.rule import Rule
from bpfree_hebbian.classes import CLASSES, HebbianNorm
from bpfree_hebbian.krotov import KrotovHopfield
from bpfree_hebbian.networks import CNN, MLP
from bpfree_hebbian.oja import Oja, Sanger
from bpfree_hebbian.softhebb import SoftHebb

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {
        "softhebb": SoftHebb,
        "oja": Oja,
        "sanger": Sanger,
        "krotov-hopfield": KrotovHopfield,
        "hebbian-norm": HebbianNorm,
    }


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"hebbian-mlp": MLP, "hebbian-cnn": CNN, "hebbian-classes": CLASSES}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    twin = {"rule": "softhebb", "twin": True}
    return {
        "quickstart/softhebb": {"rule": "softhebb"},
        "floor/hebbian-mlp 16": {**twin, "network.name": "hebbian-mlp"},
        "floor/hebbian-mlp 2000": {**twin, "network.name": "hebbian-mlp", "network.widths": [2000]},
        "floor/hebbian-cnn": {**twin, "network.name": "hebbian-cnn"},
        "floor/hebbian-classes": {"rule": "hebbian-norm", "twin": True},
    }
