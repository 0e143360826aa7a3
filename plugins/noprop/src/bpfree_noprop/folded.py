"""The whole chain as one module for deployment: no Python state, batch norms folded away, the input's part of each block apart.

Batch norm at prediction is a linear map of each channel, so that a linear layer or convolution in front of it can do it as well. The first
joined layer of a block, ``W [features, label]``, is the sum of two products, of which one does not depend on the state: it belongs to what
is computed of the input once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bpfree_noprop.blocks import DenoisingBlock, PairedBlock
from bpfree_noprop.stacked import layers_of
from bpfree_noprop.stems import shared_stem

__all__ = ["FoldedBlock", "FoldedChain", "folded"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (nn.Dropout, nn.Identity)
"""Layers that do nothing at prediction."""


def folded(module: nn.Module) -> nn.Module:
    """Copy a module for prediction: in sequences, batch norms become part of the layers before them. It keeps the function in eval mode."""
    copied = copy.deepcopy(module).requires_grad_(False).eval()
    if type(copied) is nn.Sequential:
        return nn.Sequential(*joined(map(folded, layers_of(copied))))
    for name, child in copied.named_children():
        setattr(copied, name, folded(child))
    return copied


def joined(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield layers that follow on each other, with batch norms joined to linear layers and convolutions, and without what does nothing."""
    before: nn.Module | None = None
    for layer in layers:
        if isinstance(layer, NOTHING):
            continue
        fused = None if before is None else fuse(before, layer)
        if before is not None and fused is None:
            yield before
        before = layer if fused is None else fused
    if before is not None:
        yield before


def fuse(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """Return one layer for two, if the second is a batch norm with statistics of its own, and the first can take it in."""
    if not isinstance(norm, NORMS) or norm.running_mean is None:
        return None
    if isinstance(layer, CONVOLUTIONS) and type(layer) in CONVOLUTIONS:
        return fuse_conv_bn_eval(layer, norm)
    return fuse_linear_bn_eval(layer, norm) if type(layer) is nn.Linear else None


class FoldedBlock(nn.Module):
    """A block in two parts: ``features`` of the input up to what the first joined layer adds up, and ``judge`` of a state.

    Args:
        block: which is copied.
    """

    def __init__(self, block: DenoisingBlock) -> None:
        super().__init__()
        self.state_dim = block.state_dim
        self.label = folded(block.label)
        first, *rest = folded(nn.Sequential(block.fuse, block.out)).children()
        assert isinstance(first, nn.Linear)
        with torch.no_grad():
            width = self.label(first.weight.new_zeros(1, block.state_dim)).shape[1]
        split = first.in_features - width
        self.features = nn.Sequential(*joined([folded(block.stem)]), part(first, slice(0, split), first.bias))
        self.state, self.rest = part(first, slice(split, None), None), nn.Sequential(*rest)

    def judge(self, features: Tensor, z: Tensor) -> Tensor:
        """Return outputs (N, m) of a state (N, d) and of the features (N, H) of the input."""
        return self.rest(features + self.state(self.label(z)))  # type: ignore[no-any-return]


def part(layer: nn.Linear, inputs: slice, bias: Tensor | None) -> nn.Linear:
    """Return the layer on some of its inputs."""
    weight = layer.weight[:, inputs]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(False)


def fold_block(block: nn.Module) -> nn.Module:
    """Fold a block, or both of a pair."""
    if isinstance(block, PairedBlock):
        return PairedBlock([cast(DenoisingBlock, FoldedBlock(member)) for member in block.singles()])
    return FoldedBlock(cast(DenoisingBlock, block))


class FoldedChain(nn.Module):
    """What a rule predicts along the mean path, with its weights of now: normalised inputs (N, ...) to what its ``predict`` returns.

    Args:
        rule: which is copied.
    """

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = copy.deepcopy(rule).requires_grad_(False).eval()
        for name, block in rule.network.blocks.items():
            self.rule.network.blocks[name] = fold_block(block)
        if shared_stem(rule.network) is not None:
            self.rule.network.stem = folded(rule.network.stem)

    def forward(self, inputs: Any) -> Tensor:
        """Return log-probabilities of classes, logits of labels, or values of the target's shape."""
        return self.rule.predict(inputs, None)  # type: ignore[no-any-return]
