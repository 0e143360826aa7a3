"""What a step executes: reverse-mode calls and the blocks they cross, forward-mode use, forward passes.

An identity on every block's output and hooks on the parameters, keyed by the engine's graph task, find what goes through modules; a
dispatch mode attributes each operation inside a reverse-mode call to the block whose weights it reads, and counts those that belong to
none. It is observed, not proved: copies of weights inside an otherwise honest call are not seen here. The causal test is
``interventions.downstream_weights``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.certify.passes import Work, disagreement
from bpfree.rule import Rule
from bpfree.step import Batch, Step
from bpfree.training.operations import counted_operations

__all__ = ["ObservedSteps", "ReverseCall", "observed", "place_of_caller"]

PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr"),
    *("linear", "einsum", "convolution", "_convolution", "convolution_backward"),
}
"""Products and convolutions; in-place variants count too: ``addmm_`` as ``addmm``."""
RIGHT = {"mm": 1, "addmm": 2, "bmm": 1, "baddbmm": 2}
OWN = ""
"""Stands for the rule's own parameters (heads and so on), which belong to no block."""
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@dataclass
class ReverseCall:
    """One reverse-mode call.

    Attributes:
        blocks: that it crossed.
        own: whether it reached the rule's own parameters.
        layers: names of the weight matrices that it met, of blocks and of the rule.
        products: matrix products and convolutions inside it.
        where: file and line that made it.
    """

    blocks: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    own: bool = False
    products: int = 0
    where: str = ""


@dataclass
class ObservedSteps:
    """Observations of one or more steps.

    Attributes:
        calls: reverse-mode calls.
        forward_mode: uses of dual numbers.
        products: examples that went forward through each weight matrix, by block and parameter, summed over the steps.
        examples: of all steps.
        steps: observed.
        work: the operations, by what they were.
    """

    calls: list[ReverseCall] = field(default_factory=list)
    forward_mode: int = 0
    products: dict[str, Counter[str]] = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    work: Work = field(default_factory=Work)

    @property
    def span(self) -> int:
        """Blocks that the widest reverse-mode call crossed."""
        return max((len(call.blocks) for call in self.calls), default=0)

    @property
    def layers(self) -> int:
        """Weight matrices that the call met which met most: more than one inside a block is credit through layers."""
        return max((len(call.layers) for call in self.calls), default=0)

    @property
    def widest(self) -> ReverseCall | None:
        """Reverse-mode call that crossed most blocks."""
        return max(self.calls, key=lambda call: len(call.blocks), default=None)

    @property
    def unattributed(self) -> list[ReverseCall]:
        """Calls with products in them that reached neither a block nor the rule's own parameters."""
        return [call for call in self.calls if call.products and not call.blocks and not call.own]

    def passes(self, block: str) -> float:
        """Return the forward passes per example through a block's most used weights."""
        return max(self.products.get(block, Counter()).values(), default=0) / self.examples if self.examples else 0.0

    def disagreement(self, most: float) -> str:
        """Say why the operations disagree with the number of passes; empty if they agree."""
        rows = {name: count for counts in self.products.values() for name, count in counts.items()}
        one_pass = sum(operations * self.examples / rows[name] for name, operations in self.work.forward.items())
        return disagreement(self.work, one_pass, most, forward_mode=self.forward_mode > 0)

    def merge(self, other: ObservedSteps) -> None:
        """Add the observations of another step."""
        self.calls += other.calls
        self.forward_mode += other.forward_mode
        self.examples += other.examples
        self.steps += other.steps
        self.work.merge(other.work)
        for name, counts in other.products.items():
            self.products.setdefault(name, Counter()).update(counts)


@contextmanager
def observed(rule: Rule, batch: Batch, step: Step) -> Iterator[ObservedSteps]:
    """Observe one ``learn``; the result is complete at the end."""
    result = ObservedSteps(examples=len(batch), steps=1)
    watch = _ReverseWatch(rule, result)
    names = {id(block): name for name, block in rule.network.blocks.items()}
    with ExitStack() as stack:
        stack.enter_context(_hooked_outputs(names, watch))
        stack.enter_context(_hooked_parameters(rule, watch))
        stack.enter_context(mock.patch.object(forward_ad, "make_dual", watch.counting(forward_ad.make_dual)))
        if hasattr(torch.autograd, "_engine_run_backward"):
            engine = torch.autograd._engine_run_backward
            stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", watch.nested(engine)))
        count = stack.enter_context(counted_operations())
        stack.enter_context(watch)
        yield result
    result.work.total = count()
    watch.finish()


class _ReverseWatch(TorchDispatchMode):
    """Attributes every operation to a block and a reverse-mode call."""

    def __init__(self, rule: Rule, result: ObservedSteps) -> None:
        super().__init__()
        self._result = result
        self._owners: dict[int, tuple[str, str, Tensor]] = {}
        blocks = {id(p): name for name, block in rule.network.blocks.items() for p in block.parameters()}
        for name, p in rule.named_parameters():
            self._owners[p.untyped_storage().data_ptr()] = (blocks.get(id(p), OWN), name, p)
        self._shapes = {(p.shape[0], p[0].numel()) for _, _, p in self._owners.values() if p.dim() > 1}
        self._calls: dict[int, ReverseCall] = {}
        self._parents: dict[int, int] = {}
        self._pending: int | None = None
        self._intervals: dict[int, list[int]] = {}
        self._clock = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # where composite operations arrive whole
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        task = current_task()
        if task is not None:
            call = self.call(task)
            call.products += name in PRODUCTS
        if name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        with counted_operations() as count:
            result = func(*args, **(kwargs or {}))
        self._note(name, args, result, count(), task)
        return result

    def _note(self, name: str, args: Any, result: Any, operations: int, task: int | None) -> None:
        """Record a product: whose weights stand in it, and whether as in a forward pass."""
        owners = {place: owner for place, tensor in enumerate(args) if (owner := self._owner(tensor)) and owner[2].dim() > 1}
        passing = False
        for place, owner in owners.items():
            if task is not None:
                self.reached(owner[0])
                self.call(task).layers.add(owner[1])
            elif len(owners) == 1:  # a product of weights with weights is no pass
                passing = self._forward(name, place, args, owner)
                if passing:
                    self._result.work.forward[owner[1]] += operations
        if not owners:
            self._result.work.add_foreign(name, args, result, self._shapes, operations, reverse=task is not None)
        elif not passing:
            self._result.work.explained += operations

    def _owner(self, tensor: Any) -> tuple[str, str, Tensor] | None:
        if not isinstance(tensor, Tensor):
            return None
        try:
            return self._owners.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # without storage
            return None

    def _forward(self, name: str, place: int, args: Any, owner: tuple[str, str, Tensor]) -> bool:
        """Record the examples of a product, if the weights stand in it as in a forward pass."""
        block, parameter, weight = owner
        rows = 0
        if name in ("convolution", "_convolution"):
            rows = args[0].shape[0] if place == 1 else 0
        elif name in RIGHT:
            given, straight = args[place], weight.detach().flatten(1).stride()
            if place == RIGHT[name] and tuple(given.stride()[-2:]) == (straight[1], straight[0]):
                rows = args[place - 1].shape[:-1].numel()
            elif place == RIGHT[name] - 1 and tuple(given.stride()[-2:]) == straight:
                rows = args[place + 1].shape[-1] * args[place + 1].shape[:-2].numel()
        if rows:
            self._result.products.setdefault(block, Counter())[parameter] += rows
        return rows > 0

    # --- reverse-mode calls -----------------------------------------------------------------------------------------

    def call(self, task: int) -> ReverseCall:
        """Return the call that a graph task belongs to."""
        self._clock += 1
        if task not in self._calls:
            self._calls[task] = ReverseCall(where=place_of_caller())
            self._intervals[task] = [self._clock, self._clock]
            if self._pending is not None and self._pending != task:
                self._parents[task] = self._pending
            self._pending = None
        self._intervals[task][1] = self._clock
        return self._calls[task]

    def reached(self, block: str, layer: str = "") -> None:
        """Record that the current graph task has reached a block, and perhaps a weight matrix."""
        task = current_task()
        if task is not None:
            call = self.call(task)
            call.layers |= {layer} - {""}
            call.own |= block == OWN
            if block != OWN:
                call.blocks.add(block)

    def nested(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the engine's entry, so that a call inside another call (checkpointing) is part of the outer one."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._pending = current_task()
            return engine(*args, **kwargs)

        return run

    def counting(self, make_dual: Callable[..., Any]) -> Callable[..., Any]:
        """Count uses of forward mode."""

        def make(*args: Any, **kwargs: Any) -> Any:
            self._result.forward_mode += 1
            return make_dual(*args, **kwargs)

        return make

    def finish(self) -> None:
        """Fold calls into those that contain them."""
        for inner, outer in [(a, b) for a in self._calls for b in self._calls if a != b]:
            (first, last), (begin, end) = self._intervals[inner], self._intervals[outer]
            if begin < first and last < end:
                self._parents.setdefault(inner, outer)
        for task, call in self._calls.items():
            top = task
            while top in self._parents and self._parents[top] in self._calls:
                top = self._parents[top]
            if top != task:
                whole = self._calls[top]
                whole.blocks |= call.blocks
                whole.layers |= call.layers
                whole.own |= call.own
                whole.products += call.products
        self._result.calls = [call for task, call in self._calls.items() if task not in self._parents]


def current_task() -> int | None:
    """Return the engine's graph task, inside a reverse-mode call."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


class _Identity(torch.autograd.Function):
    """Passes its input on, and reports when a cotangent passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, passed: Callable[[], None]) -> Tensor:
        return x.clone()  # no view, which a function that marks its input dirty could not take

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.passed = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, passed: Any) -> Tensor:
        return tangent.view_as(tangent)


@contextmanager
def _hooked_outputs(names: dict[int, str], watch: _ReverseWatch) -> Iterator[None]:
    """Watch outputs through torch's hook for all modules, because rules may treat modules with hooks of their own differently."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        name = names.get(id(module))
        if name is None:
            return None

        def wrap(x: Any) -> Any:
            return _Identity.apply(x, lambda: watch.reached(name)) if isinstance(x, Tensor) and x.requires_grad else x

        return torch.utils._pytree.tree_map(wrap, output)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked_parameters(rule: Rule, watch: _ReverseWatch) -> Iterator[None]:
    blocks = {id(p): name for name, block in rule.network.blocks.items() for p in block.parameters()}

    def hook(name: str, block: str, matrix: bool) -> Callable[[Tensor], None]:
        return lambda gradient: watch.reached(block, name if matrix else "")

    named = [(name, p) for name, p in rule.named_parameters() if p.requires_grad]
    handles = [p.register_hook(hook(name, blocks.get(id(p), OWN), p.dim() > 1)) for name, p in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def place_of_caller() -> str:
    """Return file and line of the innermost frame outside torch and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if TORCH not in path.parents and HERE not in path.parents and path.name not in ("mock.py", "contextlib.py"):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
