"""How a step behaves: what it leaves behind, whether it waits for the device, and whether it teaches anything."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpfree.certify.checks.places import is_inside, place_now, place_of
from bpfree.certify.findings import Check, CheckFailed
from bpfree.certify.loop import Loop
from bpfree.certify.measurements import Measurements
from bpfree.certify.subject import Specimen, batches
from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.step import Batch

__all__ = ["CHECKS"]

STEPS, WINDOW = 200, 5
WINDOWS = (50, 100)
"""First steps of the windows: what is left of both at the last step was piled up, and not made once."""
PHASES_WATCHED = 3
WARM = 2
"""Steps of a phase that may set things up."""


def _batches(m: Measurements, count: int) -> list[Batch]:
    return batches(Specimen(m.kind).spec, 16, count, dtype=torch.float32)


# --- state ----------------------------------------------------------------------------------------------------------------


def _flags(rule: Rule) -> dict[str, bool]:
    modes = {f"train mode of {name or 'the rule'}": part.training for name, part in rule.named_modules()}
    return modes | {f"requires_grad of {name}": p.requires_grad for name, p in rule.named_parameters()}


def _is_restored(rule: Rule, before: Mapping[str, bool], method: str) -> None:
    after = _flags(rule)
    moved = [name for name, value in before.items() if after.get(name, value) != value]
    if moved:
        raise CheckFailed(
            f"{method} does not put back {', '.join(moved[:3])}{' and more' if len(moved) > 3 else ''}",
            where=place_of(getattr(type(rule), method)),
            fix="restore it in a finally clause, or use bpfree.network's evaluating(module)",
        )


def state_restored(m: Measurements) -> str | None:
    """Modes, ``requires_grad`` and ``.grad`` around each step, and around a prediction."""
    rule, given = m.build(), _batches(m, 3)
    loop = Loop(rule)
    for batch in loop.turns(given, each=3):
        before = _flags(rule)
        loop.learn(batch)
        _is_restored(rule, before, "learn")
        left = [name for name, p in rule.named_parameters() if p.grad is not None]
        if left:
            raise CheckFailed(
                f"learn leaves a .grad on {', '.join(left[:3])}{' and more' if len(left) > 3 else ''}",
                where=place_of(type(rule).learn),
                fix="name the parameter in groups(), so that step.apply() drops it, or give it no .grad",
            )
    with evaluating(rule), torch.no_grad():
        before = _flags(rule)
        rule.predict(given[0].inputs, torch.Generator().manual_seed(0))
        _is_restored(rule, before, "predict")
    return None


# --- updates --------------------------------------------------------------------------------------------------------------


def updates_something(m: Measurements) -> str | None:
    """Groups whose parameters differ after a few steps of each phase from what they were before."""
    rule, given = m.build(), _batches(m, 8)
    loop = Loop(rule)
    before: dict[int, Tensor] = {}
    for batch in loop.turns(given, each=8):
        for parameter in rule.parameters():
            before.setdefault(id(parameter), parameter.detach().clone())
        loop.learn(batch)
    groups = rule.groups()
    moved = [name for name, members in groups.items() if any(not torch.equal(before.get(id(p), p), p) for p in members)]
    if not moved:
        raise CheckFailed(
            f"after {loop.step.index} steps no parameter has moved",
            where=place_of(type(rule).learn),
            fix="fill .grad of the parameters in groups() and call step.apply(), or update them in place and say so in traits.update",
        )
    still = [name for name in groups if name not in moved]
    return f"never updated: {', '.join(still)}" if still else None


# --- the device's time ----------------------------------------------------------------------------------------------------

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
TO_HOST = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "numpy"}
CALLED = {"_local_scalar_dense": "a number read from a tensor (item, float, bool, if)"}


class _Synchronisations(TorchDispatchMode):
    """Notes operations whose result a GPU would have to wait for."""

    def __init__(self, rule: type[Rule], found: list[tuple[str, str]]) -> None:
        super().__init__()
        self._rule, self._found = rule, found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put", "index_put_") and _is_mask(args[1])
        if (name in SYNCHRONISING or picks) and not is_inside("torch.optim"):
            self._found.append((CALLED.get(name, "indexing by a mask" if picks else name), place_now(self._rule)))
        return func(*args, **(kwargs or {}))


class _ToHost(TorchFunctionMode):
    """Notes what no operation shows on a CPU, where tensors are on the host already."""

    def __init__(self, rule: type[Rule], found: list[tuple[str, str]]) -> None:
        super().__init__()
        self._rule, self._found = rule, found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in TO_HOST and not is_inside("torch.optim"):
            self._found.append((TO_HOST[func], place_now(self._rule)))
        return func(*args, **(kwargs or {}))


def _is_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def no_host_sync(m: Measurements) -> str | None:
    """Operations in ``learn``, from each phase's third step on, that would make the host wait for a GPU; the optimiser's do not count."""
    rule = m.build()
    loop, found = Loop(rule), []  # type: tuple[Loop, list[tuple[str, str]]]
    begun: dict[str, int] = {}
    for batch in loop.turns(_batches(m, 4), each=WARM + 2):
        begun[loop.step.phase.name] = begun.get(loop.step.phase.name, 0) + 1
        if begun[loop.step.phase.name] <= WARM:
            loop.learn(batch)
            continue
        with _ToHost(type(rule), found), _Synchronisations(type(rule), found):
            rule.learn(batch, loop.step)
    if found:
        places = list(dict.fromkeys(found))
        raise CheckFailed(
            f"a step makes the host wait for the device: {places[0][0]}{f', and {len(places) - 1} more' if len(places) > 1 else ''}",
            where="; ".join(place for _, place in places[:4]),
            fix="keep it a tensor (torch.where, masks as factors), read it once per epoch, or compute it in __init__",
        )
    return None


# --- memory ---------------------------------------------------------------------------------------------------------------


class _Births(TorchDispatchMode):
    """Weak references to storages that operations make, with their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        """Bytes of those that are still there, by their address."""
        return {address: size for address, (reference, size) in self.made.items() if not reference.expired()}


def _storages(things: Any) -> Iterator[torch.UntypedStorage]:
    for thing in tree_leaves(things):
        if isinstance(thing, Tensor) and thing.layout is torch.strided:
            yield thing.untyped_storage()


def memory_constant(m: Measurements) -> str | None:
    """Storages made in two windows of steps that are still alive at step 200."""
    rule = m.build()
    loop = Loop(rule)
    given = _batches(m, 4)
    turn, phase, windows = 0, loop.step.phase, {}  # type: int, Any, dict[int, _Births]
    phases = 0
    for batch in loop.turns(given, each=STEPS):
        if loop.step.phase is not phase:
            turn, phase, windows, phases = 0, loop.step.phase, {first: _Births() for first in WINDOWS}, phases + 1
            if phases > PHASES_WATCHED:
                break
        window = next((births for first, births in windows.items() if first <= turn < first + WINDOW), None)
        if window is None:
            loop.learn(batch)
        else:
            with window:
                rule.learn(batch, loop.step)
        turn += 1
        if turn == STEPS:
            _judge(rule, [births.alive() for births in windows.values()], phase.name)
    return None


def _judge(rule: Rule, alive: list[dict[int, int]], phase: str) -> None:
    if not all(alive):
        return
    left = {address for survivors in alive for address in survivors}
    holders = list(dict.fromkeys(path for path, tensor in _held(rule) if tensor.untyped_storage()._cdata in left))
    raise CheckFailed(
        f"memory grows in phase {phase!r}: of steps {WINDOWS[-1]} to {WINDOWS[-1] + WINDOW - 1}, "
        f"{sum(alive[-1].values()) / WINDOW:.0f} bytes per step are still alive at step {STEPS}",
        where=f"held by {', '.join(holders)}" if holders else place_of(type(rule).learn),
        fix="keep detached sums instead of lists, and no tensor with its graph beyond the step",
    )


def _held(rule: Rule) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes of the rule, its submodules and its classes, by attribute."""
    for path, part in rule.named_modules():
        for name, value in vars(part).items():
            yield from _inside(f"{path or 'self'}.{name}", value)
    for base in type(rule).__mro__:
        if issubclass(base, Rule) and base is not Rule:
            for name, value in vars(base).items():
                yield from _inside(f"{base.__qualname__}.{name}", value)


def _inside(path: str, value: Any, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module) or not depth:
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _inside(path, item, depth - 1)
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _inside(path, item, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _inside(path, vars(value), depth - 1)


CHECKS = [
    Check("state-restored", "learn and predict restore modes and requires_grad, and leave no .grad", state_restored, waivable=False),
    Check("updates-something", "what learns is updated", updates_something),
    Check("no-host-sync", "a step does not make the host wait for the device", no_host_sync),
    Check("memory-constant", f"memory does not grow over {STEPS} steps", memory_constant),
]
