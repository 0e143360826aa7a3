"""Which local losses the noise in a block of the local mixer reaches. Oracle: the paper's architecture, layer by layer."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from bpfree_forward_gradient.mixer import LocalMixerConfig, local_mixer

from bpfree import TaskSpec
from bpfree.network.reach import Reach, probe
from bpfree.network.sites import Source, find_sites


@pytest.mark.parametrize("norm", ["both", "after"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_reach_in_the_blocks_of_the_mixer(norm: Literal["both", "after"], groups: int, device: torch.device) -> None:
    """Noise is put behind the normalisation that follows a map. Behind token mixing the dense map of the channels is yet to come; behind
    that, only layers that keep to their own group."""
    torch.manual_seed(0)
    config = LocalMixerConfig(blocks=2, patches=2, channels=16, groups=groups, norm=norm)
    network = local_mixer(TaskSpec("toy", (3, 8, 8), 5), config).to(device)
    shape = network.input_shape
    own_group = Reach(examples=True, tokens=True, groups=groups > 1)
    token, channel, group = ("layers.token", Reach(True, True, False)), ("layers.channel", own_group), ("layers.group", own_group)
    expected = {"b1": [channel, group], "b2": [token, channel, group]}
    for name, block in network.blocks.items():
        if name != network.readout:
            sites = find_sites(block, torch.zeros(2, *shape, device=device), final=False).sites
            found = probe(block, sites, shape, groups)
            assert [(site.sources[0].layer, reach) for site, reach in zip(sites, found, strict=True)] == expected[name]
            assert all(site.sources == (Source(layer, f"{layer}_after"),) for site, (layer, _) in zip(sites, expected[name], strict=True))
            assert [site.before for site in sites] == [False] * (len(sites) - 1) + [name == "b2"]
            assert all(site.masked for site in sites)
        shape = network.shapes[name]
