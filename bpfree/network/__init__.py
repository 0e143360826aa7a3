"""Networks of blocks: their traces, their builders, and the splitting of foreign modules."""

from bpfree.network.builders import MLPConfig, VGGConfig, mlp, vgg
from bpfree.network.network import Network, evaluating
from bpfree.network.trace import Trace, Traces

__all__ = ["MLPConfig", "Network", "Trace", "Traces", "VGGConfig", "evaluating", "mlp", "vgg"]
