"""What the plugin registers."""

from __future__ import annotations

import bpfree
from bpfree.network.builders import NetworkBuilder
from bpfree_noprop.blocks import NETWORKS
from bpfree_noprop.dt import NoPropDT

bpfree_api = 1


@bpfree.hookimpl
def bpfree_rules() -> dict[str, type[bpfree.Rule]]:
    return {"noprop-dt": NoPropDT}


@bpfree.hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return dict(NETWORKS)
