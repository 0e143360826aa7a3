"""Noise that is the same for every example, in whatever batches they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bpfree.seeds import derive

__all__ = ["FrozenNoise"]

Handler = Callable[["FrozenNoise", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Tensor]


class FrozenNoise(TorchFunctionMode):
    """Every random draw becomes a function of how many draws came before it and of the position on its last axis alone.

    So all examples, which lie on the axes before, get the same noise, and get it in a batch of any size. A draw with one axis is a
    single number, repeated. Draws have their distribution, but are not independent.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        handler = HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self, func, args, kwargs or {})

    def uniform(self, like: Tensor) -> Tensor:
        """Return uniform numbers in (0, 1) of the shape of ``like``, in double precision."""
        self._count += 1
        generator = torch.Generator().manual_seed(derive("frozen noise", self._count))
        row = torch.rand(like.shape[-1:] if like.dim() > 1 else (1,), generator=generator, dtype=torch.float64)
        return row.clamp(1e-12, 1 - 1e-12).to(like.device).expand(like.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers of the shape of ``like``, in double precision."""
        return torch.special.ndtri(self.uniform(like))  # type: ignore[no-any-return]


def _like(draw: Callable[[FrozenNoise, Tensor], Tensor]) -> Handler:
    """Wrap functions whose arguments give a shape; the original's result gives the shape and dtype."""

    def handle(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        with torch.no_grad():
            return result.copy_(draw(noise, result))

    return handle


def _normal(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute ``torch.normal(mean, std)`` and ``Tensor.normal_(mean, std)`` from the frozen noise."""
    result: Tensor = func(*args, **kwargs)
    rest = args[1:] if func is Tensor.normal_ else args
    mean = kwargs.get("mean", rest[0] if rest else 0.0)
    std = kwargs.get("std", rest[1] if len(rest) > 1 else 1.0)
    return result.copy_(noise.normal(result) * std + mean)


def _uniform(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute ``Tensor.uniform_(from, to)`` from the frozen noise."""
    low = kwargs.get("from", args[1] if len(args) > 1 else 0.0)
    high = kwargs.get("to", args[2] if len(args) > 2 else 1.0)
    result: Tensor = func(*args, **kwargs)
    return result.copy_(low + (high - low) * noise.uniform(result))


def _bernoulli(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute ``bernoulli(p)``, where the input holds the probabilities unless ``p`` is given, and ``bernoulli_(p)``."""
    default = 0.5 if func is Tensor.bernoulli_ else args[0].clone()
    p = kwargs.get("p", args[1] if len(args) > 1 else default)
    result: Tensor = func(*args, **kwargs)
    return result.copy_(noise.uniform(result) < p)


def _exponential(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute ``Tensor.exponential_(lambd)`` from the frozen noise."""
    rate = kwargs.get("lambd", args[1] if len(args) > 1 else 1.0)
    result: Tensor = func(*args, **kwargs)
    return result.copy_(-noise.uniform(result).log() / rate)


def _integers(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute ``torch.randint([low], high, size)`` and ``randint_like(x, [low], high)`` from the frozen noise."""
    bounds = [value for value in args if isinstance(value, int)]
    high = kwargs.get("high", bounds[-1] if bounds else 1)
    low = kwargs.get("low", bounds[0] if len(bounds) > 1 or ("high" in kwargs and bounds) else 0)
    result: Tensor = func(*args, **kwargs)
    return result.copy_((low + (high - low) * noise.uniform(result)).floor())


def _multinomial(noise: FrozenNoise, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Draw from a multinomial: the largest of log probabilities with Gumbel noise; several draws are sequential, with replacement."""
    weights = kwargs.get("input", args[0] if args else None)
    count = int(kwargs.get("num_samples", args[1] if len(args) > 1 else 1))
    again = bool(kwargs.get("replacement", args[2] if len(args) > 2 else False))
    assert isinstance(weights, Tensor)
    logs = weights.double().log()

    def gumbel() -> Tensor:
        return -(-noise.uniform(logs.unsqueeze(0)).squeeze(0).log()).log()

    if again:
        return torch.stack([(logs + gumbel()).argmax(-1) for _ in range(count)], -1)
    return (logs + gumbel()).topk(count, -1).indices


HANDLERS: dict[Any, Handler] = {
    torch.randn: _like(FrozenNoise.normal),
    torch.randn_like: _like(FrozenNoise.normal),
    torch.rand: _like(FrozenNoise.uniform),
    torch.rand_like: _like(FrozenNoise.uniform),
    torch.normal: _normal,
    Tensor.normal_: _normal,
    Tensor.uniform_: _uniform,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli,
    Tensor.exponential_: _exponential,
    torch.randint: _integers,
    torch.randint_like: _integers,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
}
