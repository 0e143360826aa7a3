"""How a step behaves: what it leaves behind, whether it waits for the device, and whether it changes any weights."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpfree.certify.checks.check import Check
from bpfree.certify.checks.guard import guarded
from bpfree.certify.checks.places import is_inside, place_now, place_of
from bpfree.certify.findings import CheckFailed
from bpfree.certify.loop import Loop, numbered
from bpfree.certify.measurements import Measurements
from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.step import Batch

__all__ = ["CHECKS"]

STEPS, WINDOW = 200, 5
WINDOWS = (50, 100)
"""First steps of the windows: storages of both that are alive at the last step have accumulated."""
CONTAINERS = (dict, list, tuple, set, deque)
WARM = 2
"""First steps of a phase, which may set up state."""


def _batches(m: Measurements, count: int) -> list[Batch]:
    return m.batches(16, count)


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
            where=place_of(type(rule), method),
            fix="restore it in a finally clause, or use bpfree.network's evaluating(module)",
        )


def state_restored(m: Measurements) -> str | None:
    """Check modes, ``requires_grad`` and ``.grad`` around each step, and around a prediction."""
    rule, given = m.build(), _batches(m, 3)
    loop = Loop(rule)
    for batch in loop.turns(given, each=3):
        before = _flags(rule)
        loop.take(batch)
        _is_restored(rule, before, "learn")
        left = [name for name, p in rule.named_parameters() if p.grad is not None]
        if left:
            raise CheckFailed(
                f"learn leaves a .grad on {', '.join(left[:3])}{' and more' if len(left) > 3 else ''}",
                where=place_of(type(rule), "learn"),
                fix="name the parameter in groups(), so that step.apply() drops it, or give it no .grad",
            )
    with evaluating(rule), torch.no_grad():
        before = _flags(rule)
        rule.predict(given[0].inputs, torch.Generator().manual_seed(0))
        _is_restored(rule, before, "predict")
    return None


# --- updates --------------------------------------------------------------------------------------------------------------


def updates_something(m: Measurements) -> str | None:
    """Check that some parameters change in a few steps of each phase, and name the groups in which none does."""
    rule, given = m.build(), _batches(m, 8)
    loop = Loop(rule)
    before: dict[int, Tensor] = {}
    for batch in loop.turns(given, each=8):
        for parameter in rule.parameters():
            before.setdefault(id(parameter), parameter.detach().clone())
        loop.take(batch)
    groups = rule.groups()
    moved = [name for name, members in groups.items() if any(not torch.equal(before.get(id(p), p), p) for p in members)]
    if not moved:
        raise CheckFailed(
            f"after {loop.step.index} steps no parameter has moved",
            where=place_of(type(rule), "learn"),
            fix="fill .grad of the parameters in groups() and call step.apply(), or update them in place and say so in traits.update",
        )
    still = [name for name in groups if name not in moved]
    return f"never updated: {', '.join(still)}" if still else None


# --- the device's time ----------------------------------------------------------------------------------------------------

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
TO_HOST = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "numpy"}
HARMLESS = {F.one_hot}
"""Functions that read values on a CPU only, if the number of classes is given."""
CALLED = {"_local_scalar_dense": "a number read from a tensor (item, float, bool, if)"}


class _Synchronisations(TorchDispatchMode):
    """Notes operations whose result a GPU would have to wait for."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put", "index_put_") and _is_mask(args[1])
        if name in SYNCHRONISING or picks:
            self._note("indexing by a mask" if picks else CALLED.get(name, name))
        return func(*args, **(kwargs or {}))


class _ToHost(TorchFunctionMode):
    """Notes transfers to the host that no operation shows on a CPU, where tensors are on the host already.

    Attributes:
        harmless: whether a function is being called that would not wait on a GPU.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note
        self.harmless = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in TO_HOST:
            self._note(TO_HOST[func])
        self.harmless = func in HARMLESS and len(args) + len(kwargs or {}) > 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.harmless = False


class _StepWatch:
    """Operations that make the host wait, each with its line.

    Attributes:
        found: what and where, each pair once.
    """

    def __init__(self, rule: type[Rule]) -> None:
        self.found: dict[tuple[str, str], None] = {}
        self._rule = rule
        self._functions = _ToHost(self._note)

    def _note(self, what: str) -> None:
        if not self._functions.harmless and not is_inside("torch.optim"):
            self.found[what, place_now(self._rule)] = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self._functions, _Synchronisations(self._note):
            yield


def _is_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def no_host_sync(m: Measurements) -> str | None:
    """Check that ``learn`` makes the host wait for no GPU from each phase's third step on; the optimiser's operations do not count."""
    rule = m.build()
    loop, watch = Loop(rule), _StepWatch(type(rule))
    for turn, batch in numbered(loop, _batches(m, 4), each=WARM + 2):
        with watch.watching() if turn >= WARM else nullcontext():
            rule.learn(batch, loop.step)
    if watch.found:
        what = list(dict.fromkeys(what for what, _ in watch.found))
        raise CheckFailed(
            f"a step makes the host wait for the device: {', '.join(what)}",
            where="; ".join([place for _, place in watch.found][:4]),
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
        """Return the bytes of the storages that are still alive, by address."""
        return {address: size for address, (reference, size) in self.made.items() if not reference.expired()}


def _storages(things: Any) -> Iterator[torch.UntypedStorage]:
    for thing in tree_leaves(things):
        if isinstance(thing, Tensor) and thing.layout is torch.strided:
            yield thing.untyped_storage()


def memory_constant(m: Measurements) -> str | None:
    """Check the storages of two windows of steps that are alive at step 200, and containers that grow between windows."""
    rule = m.build()
    loop = Loop(rule)
    windows: dict[int, _Births] = {}
    sizes: dict[int, Counter[str]] = {}
    for turn, batch in numbered(loop, _batches(m, 4), each=STEPS):
        windows = windows if turn else {first: _Births() for first in WINDOWS}
        with next((births for first, births in windows.items() if first <= turn < first + WINDOW), nullcontext()):
            rule.learn(batch, loop.step)
        if turn in (*WINDOWS, STEPS - 1):
            sizes[turn] = _sizes(rule)
        if turn == STEPS - 1:
            gc.collect()  # so that unreachable cycles do not count
            _no_survivors(rule, [births.alive() for births in windows.values()], loop.step.phase.name)
            _no_piles([sizes[at] for at in sorted(sizes)], loop.step.phase.name)
    return None


def _no_survivors(rule: Rule, alive: list[dict[int, int]], phase: str) -> None:
    if not all(alive):
        return
    left = {address for survivors in alive for address in survivors}
    holders = list(dict.fromkeys(path for path, tensor in _held(rule) if tensor.untyped_storage()._cdata in left))
    raise CheckFailed(
        f"memory grows in phase {phase!r}: of steps {WINDOWS[-1]} to {WINDOWS[-1] + WINDOW - 1}, "
        f"{sum(alive[-1].values()) / WINDOW:.0f} bytes per step are still alive at step {STEPS}",
        where=f"held by {', '.join(holders)}" if holders else place_of(type(rule), "learn"),
        fix="keep detached sums instead of lists, and no tensor with its graph beyond the step",
    )


def _no_piles(sizes: list[Counter[str]], phase: str) -> None:
    """Find containers that grow by half an item per step, from the first count to the second and from the second to the third."""
    spans = [WINDOWS[1] - WINDOWS[0], STEPS - 1 - WINDOWS[1]]
    for path in sizes[-1]:
        grown = [sizes[1][path] - sizes[0][path], sizes[2][path] - sizes[1][path]]
        if all(items >= span / 2 for items, span in zip(grown, spans, strict=True)):
            seen = f"{sizes[-1][path]} items after {STEPS} steps, and {sizes[0][path]} after {WINDOWS[0]}"
            raise CheckFailed(
                f"memory grows in phase {phase!r}: {path} has {seen}",
                where=path,
                fix="keep sums or the last few values: a run has millions of steps",
            )


def _sizes(rule: Rule) -> Counter[str]:
    """Count the items in the containers that attributes of the rule, its submodules and its classes hold, by attribute."""
    return Counter({path: _items(value) for path, value in _attributes(rule) if isinstance(value, CONTAINERS)})


def _items(value: Any, depth: int = 3) -> int:
    if not isinstance(value, CONTAINERS) or not depth:
        return 0
    inside = value.values() if isinstance(value, dict) else value
    return len(value) + sum(_items(item, depth - 1) for item in inside)


def _attributes(rule: Rule) -> Iterator[tuple[str, Any]]:
    for path, part in rule.named_modules():
        yield from ((f"{path or 'self'}.{name}", value) for name, value in vars(part).items())
    for base in type(rule).__mro__:
        if issubclass(base, Rule) and base is not Rule:
            yield from ((f"{base.__qualname__}.{name}", value) for name, value in vars(base).items())


def _held(rule: Rule) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors that the attributes hold, by attribute."""
    for path, value in _attributes(rule):
        yield from _inside(path, value)


def _inside(path: str, value: Any, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module) or not depth:
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _inside(path, item, depth - 1)
    elif isinstance(value, CONTAINERS):
        for item in value:
            yield from _inside(path, item, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _inside(path, vars(value), depth - 1)


CHECKS = [
    Check("state-restored", "modes and requires_grad are restored, and no .grad is left", guarded(state_restored), waivable=False),
    Check("updates-something", "what learns is updated", guarded(updates_something)),
    Check("no-host-sync", "a step does not make the host wait for the device", guarded(no_host_sync)),
    Check("memory-constant", f"memory does not grow over {STEPS} steps", guarded(memory_constant)),
]
