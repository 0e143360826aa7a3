"""All blocks of a step at once: one batched product per layer in place of T small ones, for blocks of dense layers.

Features come first: activations are (T, F, N), so that a linear layer is one ``baddbmm``, and batch norm one call on
(1, T F, N), with no copy between them. Parameters stay with their blocks: a step stacks copies, and hands their gradients and
running statistics back. It keeps the activations of all blocks until its one backward pass, where the loop keeps one block's.

Gradients equal the loop's to the order of sums: 1e-9 in double precision, 1e-5 of a gradient's norm in single.

``vmap`` over the blocks does the same for any layer, and is not used: on a CPU, dense blocks of 64 units (T = 10, batches of 64) take
0.42 of the loop's time so and 0.67 by ``vmap``, where ``noprop-cnn`` takes 2.1 and ``noprop-paper`` 1.7. Nor are grouped convolutions:
image paths of these two take 1.3 to 1.6 of the loop's time by them (``benchmarks/noprop_step.py``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.network import add_gradient
from bpfree_noprop.blocks import DenoisingBlock

__all__ = ["Execution", "Stack", "obstacle"]

logger = logging.getLogger("bpfree")

PATHS = ("stem", "label", "fuse", "out")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Layers = Sequence[Any]
"""The layers of all blocks at one place: T modules of one type."""


WIDEST = 128
"""Units of a layer up to which ``auto`` stacks: a step of 64 units takes half of the loop's time, of 256 as long, of 512 longer."""


class Execution:
    """Whether a step computes the blocks as one or in a loop.

    Args:
        wanted: ``loop``, ``stacked``, or ``auto``: stacked where that was measured to pay, which was measured on a CPU.
        blocks: all of the rule's.
    """

    def __init__(self, wanted: str, blocks: Sequence[DenoisingBlock]) -> None:
        self.wanted = wanted
        self.obstacle = obstacle(blocks)
        self._stack = None if self.obstacle else Stack(blocks)
        self._told = False

    def stack(self, filled: int) -> Stack | None:
        """Return the stack if this step, which fills ``filled`` blocks, is to use it; warn once if it is wanted but cannot."""
        if self.wanted == "loop":
            return None
        reason = self.against() or self._against_now(filled)
        if reason and self.wanted == "stacked" and not self._told:
            logger.warning("rule.execution=stacked: %s, so they are computed one after the other", reason)
            self._told = True
        return None if reason else self._stack

    def against(self) -> str:
        """Say why these blocks are computed in a loop; empty if they are not."""
        if self._stack is None or self.wanted == "loop":
            return self.obstacle or "asked for"
        if self.wanted == "auto" and self._stack.device.type != "cpu":
            return "stacking is not measured on this device"
        if self.wanted == "auto" and self._stack.widest > WIDEST:
            return f"layers have more than {WIDEST} units"
        return ""

    def _against_now(self, filled: int) -> str:
        assert self._stack is not None
        if filled < len(self._stack.blocks):
            return "not all blocks are filled at once"
        if self.wanted == "auto" and any(block._compiled_call_impl is not None for block in self._stack.blocks):
            return "blocks are compiled"
        return self._stack.hindrance()

    def __str__(self) -> str:
        reason = self.against()
        return f"blocks one after the other ({reason})" if reason else "all blocks as one, by batched products, unless processes share them"


class Stack:
    """Blocks without an :func:`obstacle`, computed as one.

    Args:
        blocks: T of them, whose layers are not replaced later.

    Attributes:
        widest: units of the widest layer.
    """

    def __init__(self, blocks: Sequence[DenoisingBlock]) -> None:
        self.blocks = list(blocks)
        self._paths = {name: list(zip(*(layers_of(getattr(block, name)) for block in blocks), strict=True)) for name in PATHS}
        layers = [layers for path in self._paths.values() for layers in path]
        self.widest = max(linear[0].out_features for linear in layers if type(linear[0]) is nn.Linear)
        self._norms = [norms for norms in layers if type(norms[0]) is nn.BatchNorm1d]
        self._hooks = [getattr(module, kind) for module in (*blocks, *itertools.chain(*layers)) for kind in HOOKS]
        self._copies: list[tuple[list[nn.Parameter], Tensor]] = []

    @property
    def device(self) -> torch.device:
        """Device of the blocks."""
        return self.blocks[0].out.weight.device

    def hindrance(self) -> str:
        """Say why a step cannot use the stack now, such as hooks, which would not be called; empty if it can."""
        if any(self._hooks) or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters()):
            return "blocks have hooks"
        if any(len({norm.training for norm in norms}) > 1 for norms in self._norms):
            return "some blocks are in eval mode"
        return ""

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Return logits (T, N, m) of inputs (N, ...), which all blocks receive, and states (T, N, d); updates running statistics."""
        self._copies = []
        features = self._path("stem", x.flatten(1).T)
        label = self._path("label", states.transpose(1, 2))
        return self._path("out", self._path("fuse", torch.cat([features, label], dim=1))).transpose(1, 2)

    def backward(self, loss: Tensor) -> None:
        """Add a scalar's gradients to ``.grad`` of the blocks' parameters, and of everything else that it depends on."""
        loss.backward()  # type: ignore[no-untyped-call]
        for members, copy in self._copies:
            if copy.grad is not None:
                for parameter, gradient in zip(members, copy.grad.unbind(0), strict=True):
                    add_gradient(parameter, gradient)
        self._copies = []

    def _parameters(self) -> Iterator[nn.Parameter]:
        for path in self._paths.values():
            for layers in path:
                for layer in layers:
                    yield from layer._parameters.values()

    def _path(self, name: str, h: Tensor) -> Tensor:
        """Apply a child of every block: returns (T, F, N), from that shape or from (F, N) for all blocks."""
        for layers in self._paths[name]:
            h = LAYERS[type(layers[0])](self, layers, h)
        return h  # type: ignore[no-any-return]

    def _linear(self, layers: Layers, h: Tensor) -> Tensor:
        weight, bias = self._copied(layers, "weight"), self._copied(layers, "bias")
        if h.dim() == 2:  # one product for all
            return torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), h).unflatten(0, bias.shape)  # type: ignore[no-any-return]
        return torch.baddbmm(bias.unsqueeze(2), weight, h)

    def _batch_norm(self, layers: Layers, h: Tensor) -> Tensor:
        first = layers[0]
        means, variances = ([layer._buffers[name] for layer in layers] for name in ("running_mean", "running_var"))
        mean, variance = torch.stack(means), torch.stack(variances)
        flat = [x.flatten() for x in (mean, variance, self._copied(layers, "weight"), self._copied(layers, "bias"))]
        out = F.batch_norm(h.reshape(1, -1, h.shape[2]), flat[0], flat[1], flat[2], flat[3], first.training, first.momentum, first.eps)
        if first.training:
            torch._foreach_copy_(means + variances, [*mean.unbind(0), *variance.unbind(0)])
            torch._foreach_add_([layer._buffers["num_batches_tracked"] for layer in layers], 1)
        return out.view(h.shape)

    def _relu(self, layers: Layers, h: Tensor) -> Tensor:
        return h.relu()

    def _same(self, layers: Layers, h: Tensor) -> Tensor:
        """Return features unchanged, since they lie flat from the start."""
        return h

    def _copied(self, layers: Layers, name: str) -> Tensor:
        members = [layer._parameters[name] for layer in layers]
        with torch.no_grad():
            copy = torch.stack(members)
        if any(member.requires_grad for member in members):
            self._copies.append((members, copy.requires_grad_()))
        return copy


LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: Stack._linear,
    nn.BatchNorm1d: Stack._batch_norm,
    nn.ReLU: Stack._relu,
    nn.Flatten: Stack._same,
    nn.Unflatten: Stack._same,
}


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """List the layers of nested sequences, in order."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from layers_of(child)
    else:
        yield module


def obstacle(blocks: Sequence[DenoisingBlock]) -> str:
    """Say why these blocks cannot be computed as one; empty if they can."""
    if len(blocks) < 2:
        return "there is one block"
    if any(len(block.singles()) > 1 for block in blocks):
        return "blocks are pairs"
    for name in PATHS:
        for layers in itertools.zip_longest(*(layers_of(getattr(block, name)) for block in blocks)):
            reason = _obstacle_in(layers)
            if reason:
                return reason
    return ""


def _obstacle_in(layers: Layers) -> str:
    first = layers[0]
    if len({repr(layer) for layer in layers}) > 1:  # types and sizes
        return "the blocks differ"
    if type(first) not in LAYERS:
        return f"{type(first).__name__} has no batched form"
    if isinstance(first, nn.Linear) and first.bias is None:
        return "a linear layer has no bias"
    if isinstance(first, nn.BatchNorm1d) and not (first.affine and first.track_running_stats and first.momentum is not None):
        return "a batch norm has no weights, running statistics or momentum"
    return ""
