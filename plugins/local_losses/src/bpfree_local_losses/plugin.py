"""The plugin: rules in which every layer learns from a loss of its own, their networks and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree import Rule, hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree_local_losses.channel_competition import ChannelCompetition
from bpfree_local_losses.channel_network import CHANNEL_GROUPS
from bpfree_local_losses.forward_forward import ForwardForward
from bpfree_local_losses.label_inputs import LABEL_MLP
from bpfree_local_losses.local_errors import LocalErrors
from bpfree_local_losses.mono_forward import MonoForward
from bpfree_local_losses.networks import LOCAL_VGG
from bpfree_local_losses.sigprop import Sigprop

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {
        "local-errors": LocalErrors,
        "sigprop": Sigprop,
        "forward-forward": ForwardForward,
        "mono-forward": MonoForward,
        "channel-competition": ChannelCompetition,
    }


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"channel-groups": CHANNEL_GROUPS, "label-mlp": LABEL_MLP, "local-vgg": LOCAL_VGG}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    return {
        "quickstart/sigprop": {"rule": "sigprop", "network.norm": "layer"},
    }
