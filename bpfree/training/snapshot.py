"""State that executing a rule may change, saved and restored around measurements that must not change the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import devices

__all__ = ["Snapshot"]


class Snapshot:
    """The state of modules, optimisers and torch's global generators, which can be restored any number of times.

    Attributes of modules and optimisers are followed through modules, tensors (with ``.grad``), generators, dictionaries,
    lists, deques, sets and tuples. What lies inside other objects is not seen.

    Args:
        roots: modules, optimisers and generators.
        device: whose global generator is kept beside the CPU's.
    """

    def __init__(self, *roots: nn.Module | torch.optim.Optimizer | torch.Generator, device: torch.device) -> None:
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}  # holds its objects, so that no id is given away again
        self._storages: set[tuple[torch.device, int]] = set()
        for root in roots:
            self._remember(root)
        self._undo.append(partial(devices.set_global_state, devices.global_state(device), device))

    def restore(self) -> None:
        """Restore the saved state."""
        for undo in self._undo:
            undo()

    def _remember(self, thing: Any) -> None:
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self._remember_tensor(thing)
        elif isinstance(thing, torch.Generator):
            self._undo.append(partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, (nn.Module, torch.optim.Optimizer)):
            self._remember(vars(thing))
        elif isinstance(thing, dict):
            self._undo.append(partial(_restore_mapping, thing, dict(thing)))
            self._remember_all(thing.values())
        elif isinstance(thing, (list, deque, set)):
            self._undo.append(partial(_restore_collection, thing, list(thing)))
            self._remember_all(thing)
        elif isinstance(thing, tuple):
            self._remember_all(thing)

    def _remember_all(self, things: Any) -> None:
        for thing in list(things):
            self._remember(thing)

    def _remember_tensor(self, tensor: Tensor) -> None:
        if tensor.is_leaf and tensor.requires_grad:
            self._undo.append(partial(setattr, tensor, "grad", tensor.grad))
            if tensor.grad is not None:
                self._remember(tensor.grad)
        if tensor.layout is not torch.strided or tensor.is_meta:
            return
        # The storage and not the tensor, because views may overlap, and because what is as it was needs no new version.
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr())
        if place not in self._storages:
            self._storages.add(place)
            self._undo.append(partial(storage.copy_, storage.clone()))


def _restore_mapping(mapping: dict[Any, Any], saved: dict[Any, Any]) -> None:
    if [*map(id, mapping)] != [*map(id, saved)]:  # identities, because keys may be parameters; the order of parameters counts
        mapping.clear()
    for key, value in saved.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value


def _restore_collection(collection: Any, saved: list[Any]) -> None:
    if [*map(id, collection)] == [*map(id, saved)]:
        return
    collection.clear()
    if isinstance(collection, set):
        collection.update(saved)
    else:
        collection.extend(saved)
