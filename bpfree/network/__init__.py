"""Networks of blocks: traces, builders, the splitting of foreign modules, and the tools with which rules execute blocks."""

from bpfree.network.builders import MLPConfig, VGGConfig, mlp, vgg
from bpfree.network.calls import Call, recorded_calls
from bpfree.network.gradients import add_gradient, add_gradients
from bpfree.network.network import Network, evaluating
from bpfree.network.replaced_backward import (
    Replaced,
    broadcast_backward,
    broadcast_shapes,
    feedback_layers,
    feedback_weights,
    replaced_backward,
)
from bpfree.network.statistics import kept_buffers
from bpfree.network.trace import Trace, Traces

__all__ = [
    "Call",
    "MLPConfig",
    "Network",
    "Replaced",
    "Trace",
    "Traces",
    "VGGConfig",
    "add_gradient",
    "add_gradients",
    "broadcast_backward",
    "broadcast_shapes",
    "evaluating",
    "feedback_layers",
    "feedback_weights",
    "kept_buffers",
    "mlp",
    "recorded_calls",
    "replaced_backward",
    "vgg",
]
