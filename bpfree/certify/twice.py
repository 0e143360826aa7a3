"""Executing blocks twice: values from the parameters that they should have, and all else from dirty ones.

A *unit* is an outermost module of a block that has parameters of its own, such as a linear map. Where a unit is watched, its parameters are
dirty. Each execution is done with them, which makes the graph, the tangents, and whatever a rule reads; then once more with the clean
parameters of a reference run, which gives the value, bit for bit. Generators and buffers are put back between the two. So a rule that
only ever executes a block cannot tell it from one whose parameters are clean, and a rule that reads them, or sends a cotangent or a tangent
through them, gets other numbers.

The clean parameters of an execution are those of the same execution of the reference run: of the same unit, in the same step, in the same
place among its executions there. They include what a rule did to them, in place or as substitutes (``torch.func.functional_call``).

The second execution is that of a private copy of the unit, made before the rule was given its network; no hooks, modes or profilers of the
rule see it. If a rule changes how a unit is executed, or hands it tensors of a class of its own, the copy may compute something else, and
that is noted.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from bpfree.network.network import Network
from bpfree.network.replaced_backward import is_replaced

__all__ = ["EQUAL", "Doubles", "Record", "dirty", "distance", "units_of", "weights_apart"]

Values = dict[str, Tensor]
EQUAL, IS_REPLACED = torch.equal, is_replaced
"""As they were before any rule could replace them."""
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
Place = tuple[int, str]
"""A step and a unit. Steps count from 0; whatever happens before the first is -1, and what happens after a step belongs to it."""


@dataclass
class Record:
    """The executions of a reference run.

    Attributes:
        values: parameters of each execution, by place and in order; ``None`` where they could not be read.
        inputs: a digest of the inputs of the first execution in each step.
    """

    values: dict[Place, list[Values | None]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[Place, str] = field(default_factory=dict)

    def at(self, place: Place, number: int) -> Values | None:
        """Return the parameters of an execution; those of the last one before it where the reference had fewer."""
        known = self.values.get(place)
        while not known and place[0] >= -1:
            place = (place[0] - 1, place[1])
            known, number = self.values.get(place), -1
        return known[min(number, len(known) - 1)] if known else None


def units_of(network: Network) -> dict[str, dict[str, nn.Module]]:
    """Return for each block its outermost modules that have parameters of their own, by the names of the modules in the network."""
    return {name: dict(_units(f"blocks.{name}", block)) for name, block in network.blocks.items()}


def _units(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module
        return
    for own, child in module.named_children():
        yield from _units(f"{name}.{own}", child)


def dirty(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Make a dirty parameter: permuted, with drawn signs and a tenth of noise, so that zeros and constants become others too."""
    order = torch.randperm(clean.numel(), generator=generator)
    signs = torch.randint(0, 2, (clean.numel(),), generator=generator) * 2 - 1
    noise = torch.randn(clean.numel(), generator=generator) * 0.1 * max(float(clean.square().mean().sqrt()), 0.01)
    mixed = clean.flatten()[order.to(clean.device)] * signs.to(clean) + noise.to(clean)
    return mixed.reshape(clean.shape).contiguous()


class Doubles:
    """Watches executions of a network's units, and doubles some of them.

    Args:
        network: of the rule.
        record: of the reference run; ``None``: this is the reference run, which is recorded.
        doubled: names of the blocks whose units are executed twice.
        altered: names of blocks whose executions on other inputs than the first of their step are given other weights.
        strict: whether the first is one of these too unless it is an output of the block below (in chains).
        generator: of the other weights.
        rounding: change each value of a doubled execution by its rounding: a placebo.

    Attributes:
        record: the given one, or the one that is made.
        step: in which executions happen.
        transport: largest relative difference between cotangents through clean and dirty parameters, by block; it shows that
            transport through them would be seen.
        sides: number of executions on other inputs than the first of their step, by block.
        changed: what a rule changed about how units are executed, by block.
    """

    def __init__(
        self,
        network: Network,
        record: Record | None = None,
        *,
        doubled: tuple[str, ...] = (),
        altered: tuple[str, ...] = (),
        strict: bool = False,
        generator: torch.Generator | None = None,
        rounding: bool = False,
    ) -> None:
        self._rounding = rounding
        self.record, self._recording = record or Record(), record is None
        self._doubled, self._altered = set(doubled), set(altered)
        self._generator = generator or torch.Generator()
        found = [(block, name, unit) for block, units in units_of(network).items() for name, unit in units.items()]
        self._units = {id(unit): (block, name) for block, name, unit in found}
        self._kept = [unit for _, _, unit in found]  # or another module could get the identity of one that is gone
        self._copies = {name: (type(unit), copy.deepcopy(unit).requires_grad_(False)) for _, name, unit in found}
        self._counts: dict[Place, int] = defaultdict(int)
        self._pending: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._within = False
        self._others: dict[str, Values] = {}
        self._strict, self._outputs = strict and network.chain, defaultdict[str, set[str]](set)
        names = list(network.blocks)
        self._blocks = {id(block): name for name, block in network.blocks.items()}
        self._below = dict(zip(names[1:], names, strict=False))
        self._entries = {next(iter(units)) for units in units_of(network).values() if units}
        self.step = -1
        self._prepare_others()
        self.transport: dict[str, float] = {}
        self.sides: dict[str, int] = defaultdict(int)
        self.changed: dict[str, str] = {}

    def begin_step(self) -> None:
        """Go on to the next step."""
        self.step += 1
        self._outputs.clear()
        self._prepare_others()

    def _prepare_others(self) -> None:
        """Draw the step's other weights, outside of whatever a rule executes blocks in."""
        for block, name in self._units.values():
            known = self.record.at((self.step, name), 0) if block in self._altered else None
            if known is not None:
                self._others[name] = {own: dirty(value, self._generator) for own, value in known.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch through torch's hooks for all modules: copies of a unit are other modules, and are executed as they are."""
        before = nn.modules.module.register_module_forward_pre_hook(self._before)
        after = nn.modules.module.register_module_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._within or id(module) not in self._units:
            return
        block, _ = self._units[id(module)]
        if self._recording or block not in self._doubled:
            return
        own = dict(module.named_buffers())
        self._pending[id(module)] = torch.get_rng_state(), own
        _swap(module, {key: buffer.clone() for key, buffer in own.items()}, buffers=True)

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if self._within:
            return None
        result = self._doubled_output(module, arguments, keywords, output) if id(module) in self._units else None
        if self._strict and id(module) in self._blocks:
            self._outputs[self._blocks[id(module)]].add(_digest(output if result is None else result, shapes=False))
        return result

    def _doubled_output(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        block, name = self._units[id(module)]
        place = (self.step, name)
        number = self._counts[place]
        self._counts[place] += 1
        if self._recording:
            self._note(place, module, arguments, keywords)
            return None
        if block not in self._doubled:
            return None
        random, buffers = self._pending.pop(id(module))
        _swap(module, buffers, buffers=True)
        clean = self.record.at(place, number)
        if clean is None:
            return None
        drawn = torch.get_rng_state()
        torch.set_rng_state(random)
        if block in self._altered and not self._is_ordinary(block, place, arguments, keywords):
            self.sides[block] += 1
            clean = self._others.get(name, clean)
        self._look_for_changes(block, name, module, (arguments, keywords))
        value = self._execute(name, module, clean, arguments, keywords)
        torch.set_rng_state(drawn)
        if self._rounding:
            value = tree_map(self._rounded, value)
        if block not in self.transport:
            self._compare_transport(block, name, module, clean, (arguments, keywords))
        return tree_map(_value_of, output, value)

    # --- the reference ----------------------------------------------------------------------------------------------

    def _note(self, place: Place, module: nn.Module, arguments: Any, keywords: Any) -> None:
        last = self._last(place)
        now = {name: _plain(p) for name, p in module.named_parameters(remove_duplicate=False)}
        if any(value is None for value in now.values()):
            self.record.values[place].append(None)
        elif last is not None and all(EQUAL(value, last[name]) for name, value in now.items() if value is not None):
            self.record.values[place].append(last)
        else:
            self.record.values[place].append({name: value.clone() for name, value in now.items() if value is not None})
        self.record.inputs.setdefault(place, _digest((arguments, keywords)))

    def _last(self, place: Place) -> Values | None:
        known = self.record.values.get(place)
        if not known:
            known = self.record.values.get((place[0] - 1, place[1]))
        return known[-1] if known else None

    # --- the second execution ---------------------------------------------------------------------------------------

    def _execute(self, name: str, module: nn.Module, clean: Values, arguments: Any, keywords: Any) -> Any:
        """Execute the unit's copy with clean parameters, and with the unit's own buffers, which it may update, and modes."""
        _, private = self._copies[name]
        for own, theirs in zip(private.modules(), module.modules(), strict=True):
            own.training, own._buffers = theirs.training, theirs._buffers
        _swap(private, clean)
        self._within = True
        try:
            with torch.no_grad(), _unobserved():
                return private.forward(*arguments, **keywords)
        finally:
            self._within = False

    def _look_for_changes(self, block: str, name: str, module: nn.Module, given: Any) -> None:
        kind, private = self._copies[name]
        own = "forward" in module.__dict__ and not IS_REPLACED(module)
        if type(module) is not kind or own or len([*module.modules()]) != len([*private.modules()]):
            self.changed[block] = f"the rule changed how {name} is executed"
        if any(isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) for x in tree_leaves(given)):
            self.changed[block] = f"the rule executes {name} on tensors of a class of its own"

    def _is_ordinary(self, block: str, place: Place, arguments: Any, keywords: Any) -> bool:
        """Tell whether these are the first inputs of the step, and outputs of the block below if that is asked for."""
        if self.step < 0 or self.record.inputs.get(place) != _digest((arguments, keywords)):
            return False
        if not self._strict or place[1] not in self._entries or block not in self._below:
            return True
        return _digest((arguments, keywords), shapes=False) in self._outputs[self._below[block]]

    def _rounded(self, value: Any) -> Any:
        if not _is_real(value):
            return value
        signs = torch.randint(-1, 2, value.shape, generator=self._generator).to(value)
        return value * (1 + torch.finfo(value.dtype).eps * signs)

    def _compare_transport(self, block: str, name: str, module: nn.Module, clean: Values, given: Any) -> None:
        """Compare the cotangents of the unit's inputs through clean and dirty parameters, in the unit's copy."""
        live = {own: _plain(p) for own, p in module.named_parameters(remove_duplicate=False)}
        leaves = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        if any(value is None for value in live.values()) or any(_plain(x) is None for x in leaves):
            return  # inside a transform
        _, private = self._copies[name]
        random, found = torch.get_rng_state(), []
        self._within = True
        try:
            for values in (clean, live):
                _swap(private, {own: value for own, value in values.items() if value is not None})
                for own, theirs in zip(private.modules(), module.modules(), strict=True):
                    own._buffers = {key: None if buffer is None else buffer.clone() for key, buffer in theirs._buffers.items()}
                torch.set_rng_state(random)
                with _unobserved():
                    found.append(_cotangents(private, given))
        finally:
            self._within = False
            torch.set_rng_state(random)
        pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
        change = max((distance(a, b) for a, b in pairs), default=0.0)
        self.transport[block] = max(change, self.transport.get(block, 0.0))


def _cotangents(module: nn.Module, given: Any) -> list[Tensor | None]:
    """Send a drawn cotangent through a module, and return those of its inputs."""
    with torch.enable_grad():
        arguments, keywords = tree_map(lambda x: x.detach().clone().requires_grad_() if _is_real(x) else x, given)
        inputs = [x for x in tree_leaves((arguments, keywords)) if _is_real(x)]
        outputs = [y for y in tree_leaves(module.forward(*arguments, **keywords)) if _is_real(y) and y.requires_grad]
        if not inputs or not outputs:
            return []
        sent = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) for y in outputs]
        return list(torch.autograd.grad(outputs, inputs, sent, allow_unused=True))


@contextmanager
def _unobserved() -> Iterator[None]:
    """Execute without the hooks, modes, tensor classes and profilers that a rule may have set up."""
    traced, profiled = sys.gettrace(), sys.getprofile()
    with ExitStack() as stack:
        for name in GLOBAL_HOOKS:
            stack.enter_context(mock.patch.object(nn.modules.module, name, OrderedDict()))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(profiled)
            if sys.gettrace() is not traced:
                sys.settrace(traced)


def weights_apart(clean: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of a linear map's weights: of the cotangents that they would carry."""
    return max((distance(clean[name], p.detach()) for name, p in live.items() if p.dim() > 1), default=0.0)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference over the larger norm."""
    size = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / size if size else 0.0


def _swap(module: nn.Module, values: Mapping[str, Tensor], *, buffers: bool = False) -> None:
    """Put tensors in the places of a module's parameters or buffers, by name, without writing into any."""
    for name, value in values.items():
        path, _, own = name.rpartition(".")
        part = module.get_submodule(path) if path else module
        (part._buffers if buffers else part._parameters)[own] = value  # type: ignore[assignment]


def _plain(tensor: Tensor) -> Tensor | None:
    """Return a tensor's value without graph and tangent; ``None`` inside a transform of ``torch.func`` that hides it."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    if getattr(forward_ad, "_current_level", -1) >= 0:
        tensor = forward_ad.unpack_dual(tensor).primal
    return tensor.detach()


def _digest(tree: Any, *, shapes: bool = True) -> str:
    """Hash the values of a tree's tensors, by default with their shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(tree):
        plain = _plain(leaf) if isinstance(leaf, Tensor) else None
        if shapes:
            digest.update(f"{type(leaf).__name__}".encode() if plain is None else f"{plain.shape} {plain.dtype}".encode())
        if plain is not None:
            digest.update(plain.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Value(torch.autograd.Function):
    """Has the value of its second argument, and the derivatives of its first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(graph: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, other: Any) -> Tensor:
        return tangent.clone()


def _value_of(graph: Any, value: Any) -> Any:
    if not _is_real(graph):
        return value
    result: Callable[..., Any] = _Value.apply
    return result(graph, value)
