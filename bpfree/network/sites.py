"""Places for noise on activities: before each nonlinearity, at a linear map's output or behind the normalisation that follows it.

A *site* is such a place. It is found by executing the module once and observing what consumes each tensor, so that it works for any
module made of linear layers, convolutions, normalisations and ReLUs, in modules or as functions, with residual sums. Noise may be
masked (zero on inactive units) only where a ReLU is the sole consumer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bpfree.network.closed_form import is_batch_norm, is_linear, is_norm

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
    """Places in a module that noise on activities can reach.

    Attributes:
        sites: in order of execution.
        final: path of the linear map that makes the module's output, if there is one: it needs no noise, because its output's
            cotangent is known.
        others: names of the parameters that belong to no linear map of a site, nor to ``final``: of normalisations, of embeddings, and
            of linear maps that are called several times, share their parameters, or do not act on the batch.
    """

    sites: tuple[Site, ...]
    final: str | None
    others: tuple[str, ...]


@dataclass
class _Tensor:
    """A tensor computed by linear maps: by one alone, through a normalisation, or as a sum."""

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
class _SiteWatch(TorchFunctionMode):
    """Records the linear maps' outputs and their consumers during one execution.

    Attributes:
        examples: N; a tensor with another first axis has no place for noise of each example's own.
        owners: modules that hold a parameter, by its id.
        known: what is known of a tensor, by its id, as long as nothing overwrites it.
        made: all such tensors, in order.
        alive: the tensors themselves, so that no id is used twice.
        calls: of each module.
        odd: linear maps and normalisations whose parameters are read outside the module, or that get no plain tensor.
        inside: depth of watched modules in execution; what happens in them is theirs.
    """

    examples: int
    owners: dict[int, set[str]]
    known: dict[int, _Tensor] = field(default_factory=dict)
    made: list[_Tensor] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    odd: set[str] = field(default_factory=set)
    inside: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        consumed = [self.known[id(t)] for t in tensors if id(t) in self.known]
        result = func(*args, **kwargs)
        target = args[0] if result is None and args else result  # without a result it writes, as x[0] = y does
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(target)):
            return result
        for tensor in tensors:
            self.odd |= self.owners.get(id(tensor), set())
        if consumed:
            self._function(getattr(func, "__name__", ""), consumed, target, kwargs)
        return result

    def _function(self, name: str, consumed: list[_Tensor], result: Any, kwargs: Any) -> None:
        for tensor in consumed:
            tensor.uses += 1
        self.known.pop(id(result), None)  # in place: the former value is gone
        if name in RELU_FUNCTIONS:
            consumed[0].relu = consumed[0].relu or ("", 0)
        elif name in SUMS and kwargs.get("alpha", 1) == 1 and all(tensor.shape == result.shape[1:] for tensor in consumed):
            sources = tuple(source for tensor in consumed for source in tensor.sources)
            self.new(result, sources, "", parents=tuple(consumed), summed=True)

    def new(self, value: Tensor, sources: tuple[Source, ...], made_by: str, **rest: Any) -> None:
        if value.dim() < 2 or len(value) != self.examples:
            return
        tensor = _Tensor(sources, value.shape[1:], len(self.made), made_by, **rest)
        self.known[id(value)] = tensor
        self.made.append(tensor)
        self.alive.append(value)

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside += 1
        for tensor in self._known((args, kwargs)):
            tensor.uses += 1
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            self.odd.add(path)
        elif type(module) is nn.ReLU and id(args[0]) in self.known:
            self.known[id(args[0])].relu = (path, self.calls[path])

    def leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self.inside -= 1
        self.calls[path] += 1
        if self.inside:
            return
        tensor = self.known.get(id(args[0])) if args else None
        self.known.pop(id(output), None)
        if path in self.odd or not isinstance(output, Tensor):
            return
        if is_linear(module):
            self.new(output, (Source(path),), path)
        elif is_norm(module) and tensor is not None and not tensor.summed and tensor.sources[0].norm is None:
            self.new(output, (Source(tensor.sources[0].layer, path),), path, parents=(tensor,))

    def _known(self, values: Any) -> list[_Tensor]:
        return [self.known[id(leaf)] for leaf in tree_leaves(values) if id(leaf) in self.known]

    def end(self, output: Any) -> _Tensor | None:
        """Record the module's return value, which its caller consumes."""
        for tensor in self._known(output):
            tensor.uses += 1
        return self.known.get(id(output))

    def alone(self, path: str) -> bool:
        """Tell whether the module was called once, as such, on the batch, and nothing else reads its parameters."""
        return self.calls[path] == 1 and path not in self.odd


def find_sites(module: nn.Module, x: Tensor, *, final: bool = True) -> Sites:
    """Find the places for noise on activities in a module.

    Args:
        module: one block, or several in sequence; it is executed once, as in training but for normalisations by running statistics:
            where dropout or a random depth is, evaluation would see nothing.
        x: (N, ...) an input; two examples do, if no other axis that is moved to the front is as long.
        final: whether a linear map that makes the module's output is set apart, as ``Sites.final``, instead of being a site.
    """
    watch = _SiteWatch(len(x), _owners(module))
    with torch.no_grad(), _rehearsing(module, x), _watched(module, watch), watch:
        output = module(x)
    end, last = watch.end(output), None
    if final and end is not None and end.uses == 1 and not end.parents and watch.alone(end.made_by):
        last = end.made_by
    sites = tuple(site for site in _resolve(watch) if last is None or site.sources != (Source(last),))
    reached = {source.layer for site in sites for source in site.sources} | ({last} if last is not None else set())
    owned = {f"{path}.{name}".removeprefix(".") for path in reached for name, _ in module.get_submodule(path).named_parameters()}
    return Sites(sites, last, tuple(name for name, _ in module.named_parameters() if name not in owned))


def _owners(module: nn.Module) -> dict[int, set[str]]:
    """Return the linear maps and normalisations that hold a parameter, by the parameter's id."""
    owners: dict[int, set[str]] = {}
    for path, part in module.named_modules():
        if is_linear(part) or is_norm(part):
            for parameter in part.parameters():
                owners.setdefault(id(parameter), set()).add(path)
    return owners


def _shared(module: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules hold."""
    counts = Counter(id(parameter) for part in module.modules() for parameter in part._parameters.values() if parameter is not None)
    return {key for key, count in counts.items() if count > 1}


@contextmanager
def _rehearsing(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Use train mode inside, batch norms with running statistics excepted; restore random state, buffers and modes."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        try:
            for part, _ in modes:
                part.training = not is_batch_norm(part)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _watched(module: nn.Module, watch: _SiteWatch) -> Iterator[None]:
    """Report each call of a known module inside to the watch."""
    shared = _shared(module)
    watch.odd |= {path for key, paths in watch.owners.items() if key in shared for path in paths}
    handles = []
    for path, part in module.named_modules():
        if is_linear(part) or is_norm(part) or type(part) is nn.ReLU:
            handles.append(part.register_forward_pre_hook(partial(watch.enter, path), with_kwargs=True))
            handles.append(part.register_forward_hook(partial(watch.leave, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resolve(watch: _SiteWatch) -> Iterator[Site]:
    """Yield a site for each linear map that is executed once, as late before the nonlinearity as its consumers allow."""
    chosen: list[tuple[int, Site]] = []
    covered: set[str] = set()
    # sums first, then normalised outputs, then plain ones: the latest place wins
    for rank in (lambda t: t.summed, lambda t: t.sources[0].norm is not None, lambda t: True):
        for tensor in filter(rank, watch.made):
            usable = (s for s in tensor.sources if watch.alone(s.layer) and (s.norm is None or watch.alone(s.norm)))
            sources = tuple(source for source in usable if source.layer not in covered)
            site = _site(tensor, sources) if sources and tensor.unshared() else None
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
