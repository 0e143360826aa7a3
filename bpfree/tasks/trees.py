"""Inputs as trees: a tensor, or dictionaries, lists and tuples of tensors with one common first axis, the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["cat", "check_tree", "leaves", "length", "select", "tree_map"]

tree_map: Callable[..., Any] = _pytree.tree_map


def leaves(tree: Any) -> list[Any]:
    """List the tensors of a tree."""
    return [tree] if isinstance(tree, Tensor) else list(_pytree.tree_leaves(tree))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """List the tensors of a tree with their places: ``["nodes"]``, empty for a single tensor."""
    if isinstance(tree, Tensor):
        return [("", tree)]
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


def length(tree: Any) -> int:
    """Count the examples of a tree."""
    found = leaves(tree)
    return int(found[0].shape[0]) if found and found[0].dim() else 0


def select(tree: Any, indices: Tensor) -> Any:
    """Take the examples at ``indices`` (M,), which lie on the device of the tensors."""
    return tree.index_select(0, indices) if isinstance(tree, Tensor) else tree_map(lambda leaf: leaf.index_select(0, indices), tree)


def cat(trees: Iterable[Any]) -> Any:
    """Join trees of the same structure along the examples."""
    parts = list(trees)
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tree_map(lambda *each: torch.cat(each), *parts)


def move(tree: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Put a tree on a device."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=non_blocking), tree)


def bytes_of(tree: Any) -> int:
    """Count the bytes of a tree with four for each number."""
    return sum(4 * leaf.numel() for leaf in leaves(tree))


def check_tree(tree: Any) -> str:
    """Say what is wrong with a tree of inputs; the empty string if nothing is."""
    found = leaves(tree)
    if not found:
        return "the inputs hold no tensor"
    wrong = next((leaf for leaf in found if not isinstance(leaf, Tensor)), None)
    if wrong is not None:
        return f"the inputs hold {type(wrong).__name__} where a tensor must be"
    if any(not leaf.dim() for leaf in found):
        return "an input tensor has no axis of examples"
    sizes = sorted({int(leaf.shape[0]) for leaf in found})
    return f"the input tensors hold {' and '.join(map(str, sizes))} examples: they differ" if len(sizes) > 1 else ""
