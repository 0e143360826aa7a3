"""NoProp for bpfree: each block independently learns to denoise a noised label. :func:`noprop_network` puts any module into its blocks."""

from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from bpfree_noprop.stems import noprop_network

__all__ = ["NoPropDT", "NoPropDTConfig", "noprop_network"]
