"""Where noise on activities goes: before each nonlinearity, at a linear map's output or behind the normalisation that follows it.

A *site* is such a place. It is found by executing the module once and watching who consumes what, so that it works for any
module made of linear layers, convolutions, normalisations and ReLUs, in modules or as functions, with residual sums. Noise may be
masked (zero on inactive units) only where a ReLU is the sole consumer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bpfree.network.closed_form import is_linear, is_norm
from bpfree.network.network import evaluating

__all__ = ["Site", "Sites", "Source", "find_sites"]

RELU_FUNCTIONS = {"relu", "relu_"}
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "iadd"}


@dataclass(frozen=True)
class Source:
    """A linear map, by its path in the module, and the normalisation that alone consumes its output."""

    layer: str
    norm: str | None = None


@dataclass(frozen=True)
class Site:
    """A place for noise.

    Attributes:
        sources: linear maps whose output (normalised, or summed) the noise is added to.
        module: path of the module that it is added behind, or in front of.
        before: in front of the module (a ReLU that takes a sum), in its call number ``call``.
        masked: whether a ReLU is the sole consumer, so that noise may be left out on inactive units.
        shape: of the noise, without the batch axis.
    """

    sources: tuple[Source, ...]
    module: str
    shape: torch.Size
    before: bool = False
    call: int = 0
    masked: bool = False


@dataclass(frozen=True)
class Sites:
    """What noise on activities reaches in a module.

    Attributes:
        sites: in order of execution.
        final: path of the linear map that makes the module's output, if there is one: it needs no noise, because its output's
            cotangent is known.
        others: names of the parameters that belong to no linear map of a site.
    """

    sites: tuple[Site, ...]
    final: str | None
    others: tuple[str, ...]


@dataclass
class _Tensor:
    """A tensor that linear maps made: alone, through a normalisation, or summed."""

    sources: tuple[Source, ...]
    shape: torch.Size
    order: int
    made_by: str
    parents: tuple[_Tensor, ...] = ()
    summed: bool = False
    uses: int = 0
    relu: tuple[str, int] | None = None

    def unshared(self) -> bool:
        return all(parent.uses == 1 and parent.unshared() for parent in self.parents)


@dataclass
class _Watch(TorchFunctionMode):
    """Records the linear maps' outputs and their consumers during one execution."""

    known: dict[int, _Tensor] = field(default_factory=dict)
    made: list[_Tensor] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)  # so that no id is used twice
    calls: Counter[str] = field(default_factory=Counter)
    inside: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        consumed = [self.known[id(t)] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.known]
        result = func(*args, **kwargs)
        if consumed and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._function(getattr(func, "__name__", ""), consumed, result)
        return result

    def _function(self, name: str, consumed: list[_Tensor], result: Any) -> None:
        for tensor in consumed:
            tensor.uses += 1
        self.known.pop(id(result), None)  # in place: what was there is gone
        if name in RELU_FUNCTIONS:
            consumed[0].relu = consumed[0].relu or ("", 0)
        elif name in SUMS and all(tensor.shape == result.shape[1:] for tensor in consumed):
            sources = tuple(source for tensor in consumed for source in tensor.sources)
            self.new(result, sources, "", parents=tuple(consumed), summed=True)

    def new(self, value: Tensor, sources: tuple[Source, ...], made_by: str, **rest: Any) -> None:
        tensor = _Tensor(sources, value.shape[1:], len(self.made), made_by, **rest)
        self.known[id(value)] = tensor
        self.made.append(tensor)
        self.alive.append(value)

    def enter(self, path: str, module: nn.Module, args: Any) -> None:
        self.inside += 1
        tensor = self.known.get(id(args[0])) if args else None
        if tensor is not None:
            tensor.uses += 1
            if isinstance(module, nn.ReLU):
                tensor.relu = (path, self.calls[path])

    def leave(self, path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.inside -= 1
        self.calls[path] += 1
        tensor = self.known.get(id(args[0])) if args else None
        self.known.pop(id(output), None)
        if is_linear(module):
            self.new(output, (Source(path),), path)
        elif is_norm(module) and tensor is not None and not tensor.summed and tensor.sources[0].norm is None:
            self.new(output, (Source(tensor.sources[0].layer, path),), path, parents=(tensor,))


def find_sites(module: nn.Module, x: Tensor, *, final: bool = True) -> Sites:
    """The places for noise on activities in a module.

    Args:
        module: one block, or several in sequence.
        x: (N, ...) an input; the module is executed once on it, in eval mode.
        final: whether a linear map that makes the module's output is set apart, as ``Sites.final``, instead of being a site.
    """
    watch = _Watch()
    with torch.no_grad(), evaluating(module), _watched(module, watch), watch:
        output = module(x)
    end = watch.known.get(id(output))
    last = None
    if end is not None:
        end.uses += 1
        if final and end.uses == 1 and not end.parents and watch.calls[end.made_by] == 1:
            last = end.made_by
    sites = tuple(site for site in _resolve(watch) if last is None or site.sources != (Source(last),))
    reached = {source.layer for site in sites for source in site.sources} | ({last} if last is not None else set())
    owned = {f"{path}.{name}".removeprefix(".") for path in reached for name, _ in module.get_submodule(path).named_parameters()}
    return Sites(sites, last, tuple(name for name, _ in module.named_parameters() if name not in owned))


@contextmanager
def _watched(module: nn.Module, watch: _Watch) -> Iterator[None]:
    """Tells the watch of each call of the modules that it knows."""
    handles = []
    for path, part in module.named_modules():
        if is_linear(part) or is_norm(part) or isinstance(part, nn.ReLU):
            handles.append(part.register_forward_pre_hook(lambda m, args, path=path: watch.enter(path, m, args)))
            handles.append(part.register_forward_hook(lambda m, args, out, path=path: watch.leave(path, m, args, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resolve(watch: _Watch) -> Iterator[Site]:
    """A site for each linear map that is executed once, as late before the nonlinearity as its consumers allow."""
    once = {path for path, count in watch.calls.items() if count == 1}
    chosen: list[tuple[int, Site]] = []
    covered: set[str] = set()
    # sums first, then normalised outputs, then plain ones: the latest place wins
    for rank in (lambda t: t.summed, lambda t: t.sources[0].norm is not None, lambda t: True):
        for tensor in filter(rank, watch.made):
            sources = tuple(source for source in tensor.sources if source.layer in once and source.layer not in covered)
            site = _site(tensor, sources) if sources and tensor.unshared() and watch.calls[tensor.made_by] <= 1 else None
            if site is not None:
                covered |= {source.layer for source in sources}
                chosen.append((tensor.order, site))
    for _, site in sorted(chosen, key=lambda pair: pair[0]):
        yield site


def _site(tensor: _Tensor, sources: tuple[Source, ...]) -> Site | None:
    masked = tensor.relu is not None and tensor.uses == 1
    if not tensor.summed:
        return Site(sources, tensor.made_by, tensor.shape, masked=masked)
    if masked and tensor.relu and tensor.relu[0]:  # a sum has no module of its own: the ReLU behind it takes the noise
        return Site(sources, tensor.relu[0], tensor.shape, before=True, call=tensor.relu[1], masked=True)
    return None
