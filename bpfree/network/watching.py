"""The operations of a module from watching it run, for modules that ``torch.fx`` cannot trace.

A forward pass is executed on made-up examples. What the outermost forward does between its submodules is recorded as it happens, so that
shapes are numbers, optional arguments have their defaults, and assertions are simply executed. A submodule is kept whole, with whatever
is in it, unless a cut lies inside it. Only one path is recorded, so it is watched in several passes: two numbers of examples (which tell
what depends on that number), values of both signs, and both modes. A module that takes different paths is refused.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bpfree.errors import UsageError
from bpfree.network.cuts import Traced, first_line, in_mode
from bpfree.network.recordings import Operation, Recording, Ref, created, mapped, merged, needed, to_graph
from bpfree.network.statistics import kept_buffers

__all__ = ["main_output", "watch"]

logger = logging.getLogger("bpfree.network")

READS = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
"""Functions that turn a tensor's values into Python values, on which control flow may depend."""
SCORES = ("logits", "scores", "output", "out")
"""Names of the scores among several outputs."""
BATCHES = (2, 3)
"""Numbers of examples in the passes that are watched."""


class OperationRecorder(TorchFunctionMode):
    """Records what a module does outside of the submodules that are kept whole.

    Args:
        module: that will be executed.
        x: its input.
        ancestors: paths of submodules with a cut inside, which are not kept whole.
    """

    def __init__(self, module: nn.Module, x: Tensor, ancestors: set[str]) -> None:
        super().__init__()
        self.recording = Recording(examples=len(x))
        self._module, self._ancestors, self._examples = module, ancestors, len(x)
        self._refs: dict[int, Ref] = {}
        self._alive: list[Any] = []  # so that no other object gets the identity of one that was recorded
        self._attributes = {id(t): name for name, t in [*_own_tensors(module), *module.named_buffers(), *module.named_parameters()]}
        self._depth, self._scopes = 0, [""]
        self._note(x, "placeholder", "x", (), {}, "")

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Record the calls of submodules inside."""
        with ExitStack() as stack:
            for path, part in self._module.named_modules():
                if not path:
                    continue
                before, after = self._scope(path) if path in self._ancestors else self._whole(path)
                stack.callback(part.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _whole(self, path: str) -> tuple[Any, Any]:
        taken: list[Any] = []

        def before(part: nn.Module, args: Any, kwargs: Any) -> None:
            if self._depth == 0:
                taken.append((self._referred(args), self._referred(kwargs)))
            self._depth += 1

        def after(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._depth -= 1
            if self._depth == 0:
                given, named = taken.pop()
                self._note(output, "call_module", path, given, named, path)
                self.recording.calls.setdefault(path, []).append((given, named, self._value(output)))

        return before, after

    def _scope(self, path: str) -> tuple[Any, Any]:
        taken: list[Any] = []

        def before(part: nn.Module, args: Any, kwargs: Any) -> None:
            taken.append((self._referred(args), self._referred(kwargs)))
            self._scopes.append(path)

        def after(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._scopes.pop()
            self.recording.calls.setdefault(path, []).append((*taken.pop(), self._value(output)))

        return before, after

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return function(*args, **kwargs)
        name = str(getattr(function, "__name__", ""))
        if name in READS:
            self.recording.reads.append(name)
        if name == "__set__":
            raise UsageError("it sets an attribute of a tensor", where=self._scopes[-1] or type(self._module).__name__)
        if name == "__setitem__":  # its value is the tensor as it was called before
            self._append(Operation("call_method", name, self._referred(args), {}, self._scopes[-1], in_place=True))
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in _leaves(result)):
            kind, target, given = _spelling(function, name, args)
            in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and result is args[0]) or "out" in kwargs
            referred, named = self._referred(given), self._referred(kwargs)
            self._note(result, kind, target, referred, named, self._scopes[-1], in_place=in_place)
        return result

    def _note(self, value: Any, kind: str, target: Any, args: Any, kwargs: Any, owner: str, *, in_place: bool = False) -> None:
        """Record an operation, and where each tensor of its value is found."""
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self._examples
        ref = self._append(Operation(kind, target, args, kwargs, owner, batched, in_place))
        self._alive.append(value)
        if isinstance(value, Tensor):
            self._refs[id(value)] = ref
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                self._note_part(entry, ref, key, owner)
        elif isinstance(value, (tuple, list)):
            for index, entry in enumerate(value):
                self._note_part(entry, ref, index, owner)

    def _note_part(self, value: Any, whole: Ref, key: Any, owner: str) -> None:
        if any(isinstance(leaf, Tensor) for leaf in _leaves(value)):
            self._note(value, "call_function", operator.getitem, (whole, key), {}, owner)

    def _append(self, operation: Operation) -> Ref:
        self.recording.operations.append(operation)
        return Ref(len(self.recording.operations) - 1)

    def _referred(self, arguments: Any) -> Any:
        return mapped(arguments, lambda leaf: self._ref(leaf) if isinstance(leaf, Tensor) else leaf)

    def _ref(self, tensor: Tensor) -> Ref:
        if id(tensor) in self._refs:
            return self._refs[id(tensor)]
        path = self._attributes.get(id(tensor))
        if path is None:
            raise UsageError(
                "it uses a tensor that is neither computed from its input nor an attribute of the module", where=self._scopes[-1]
            )
        return self._append(Operation("get_attr", path, (), {}, path.rpartition(".")[0]))

    def _value(self, output: Any) -> Ref | None:
        return self._refs.get(id(output)) if isinstance(output, Tensor) else None

    def finish(self, output: Tensor) -> Recording:
        """Return the recording without what the output does not need."""
        self.recording.result = self._ref(output)
        return needed(self.recording)


def watch(module: nn.Module, input_shape: Sequence[int], at: Sequence[str]) -> Traced:
    """Record the operations of a module by executing it; a submodule without a cut counts as one operation.

    Args:
        module: is called with one tensor; optional arguments are allowed; it may return a mapping or tuple with identifiable scores.
        input_shape: of one example, without the batch axis.
        at: the submodules that begin a block.

    Raises:
        UsageError: it fails on such an input, takes different paths for different inputs, or its scores cannot be identified.
    """
    ancestors = {".".join(name.split(".")[:depth]) for name in at for depth in range(1, name.count(".") + 1)}
    name = type(module).__name__
    examples = [_made_up(module, count, input_shape) for count in BATCHES]
    first, second = (_record(module, x, ancestors) for x in examples)
    others = [_record(module, -examples[0].abs(), ancestors), _record(module, examples[0].abs(), ancestors)] if first.reads else []
    common = merged(first, second)
    if common is None or any(merged(first, other) is None for other in others):
        raise _refusal(name, "it takes different paths for different inputs, and watching sees one")
    trained = _record(module, examples[0], ancestors, training=True)
    if merged(first, trained) is None:
        raise _refusal(name, "its forward depends on self.training, as functional dropout or batch norm does, and a cut would freeze that")
    if first.reads:
        logger.warning("%s reads values in its forward (%s): the blocks do not contain what depends on them", name, first.reads[0])
    graph, tracer = to_graph(common, first)
    return Traced(module, graph, tracer, input_shape)


def main_output(output: Any) -> Tensor:
    """Return the scores in a module's output: the tensor, the entry of a usual name, or the only one.

    Raises:
        UsageError: several tensors, none of which has a usual name.
    """
    if isinstance(output, Tensor):
        return output
    fields = output if isinstance(output, Mapping) else _fields(output)
    for name in SCORES:
        if isinstance(fields.get(name), Tensor):
            return fields[name]  # type: ignore[no-any-return]
    tensors = [leaf for leaf in _leaves(list(fields.values())) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        names = ", ".join(map(str, fields)) or type(output).__name__
        raise UsageError(f"it returns {len(tensors)} tensors, and none is named {', '.join(SCORES[:-1])} or {SCORES[-1]}", where=names)
    return tensors[0]


# --- one pass ---------------------------------------------------------------------------------------------------------


def _record(module: nn.Module, x: Tensor, ancestors: set[str], *, training: bool = False) -> Recording:
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), in_mode(module, training), kept_buffers(module), torch.random.fork_rng(devices=devices):
            recorder = OperationRecorder(module, x, ancestors)
            with recorder.hooked(), recorder:
                output = module(x)
            return recorder.finish(main_output(output))
    except UsageError as error:
        raise _refusal(type(module).__name__, error.what, error.where) from error
    except Exception as error:  # user code may raise any exception
        raise UsageError(
            f"{type(module).__name__} cannot take an input of shape {tuple(x.shape[1:])}",
            where=f"{type(error).__name__}: {first_line(error)}",
            fix="give the shape of one example, without the batch axis",
        ) from error


def _refusal(name: str, why: str, where: str = "") -> UsageError:
    fix = "give it a method bpfree_blocks() that returns its blocks in order, by name, or make a Network of blocks"
    return UsageError(f"{name} cannot be split by watching it: {why}", where=where or f"{name}.forward", fix=fix)


def _made_up(module: nn.Module, count: int, input_shape: Sequence[int]) -> Tensor:
    some = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *input_shape, generator=generator).to(some.device, some.dtype)


def _spelling(function: Any, name: str, args: Any) -> tuple[str, Any, Any]:
    """Return an operation in the terms of ``torch.fx``: the kind, the target, and the arguments."""
    if name == "__get__":
        return "call_function", getattr, (args[0], function.__self__.__name__)
    if function is getattr(Tensor, name, None):
        return "call_method", name, args
    if function is getattr(torch, name, None) and not any(isinstance(leaf, Tensor) for leaf in _leaves(args)):
        return "call_function", created, (name, *args)
    return "call_function", function, args


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _fields(output: Any) -> Mapping[Any, Any]:
    if hasattr(output, "_asdict"):  # a named tuple
        return dict(output._asdict())
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return vars(output) if hasattr(output, "__dict__") else {}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are plain attributes of submodules."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}".lstrip("."), value
