"""What the plugin registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree.hooks import hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree.rule import Rule
from bpfree_forward_gradient.mixer import LOCAL_MIXER
from bpfree_forward_gradient.rules import ForwardGradient, LocalBackprop, LocalForwardGradient

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {"forward-gradient": ForwardGradient, "local-forward-gradient": LocalForwardGradient, "local-backprop": LocalBackprop}


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"local-mixer": LOCAL_MIXER}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    return {
        "quickstart/local-forward-gradient": {"rule": "local-forward-gradient"},
        "floor/local-mixer": {"rule": "frozen", "network.name": "local-mixer"},
    }
