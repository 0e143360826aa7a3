"""Randomness: one seed, and independent streams derived from it by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["KeyedGenerators", "derive", "derive_in", "preserved_global_state", "seeded"]


def derive(*parts: object) -> int:
    """Derive a 63-bit seed that is a pure function of its parts, such as ``(seed, "order", epoch)``."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def derive_in(stream: str | None, seed: int, *parts: object) -> int:
    """Derive the seed of what a run's ``stream`` separates; without a stream it is ``derive(seed, *parts)``.

    Initialisation and all noise are kept apart so, the order of the data is not: runs of several streams share it.
    """
    return derive(seed, *parts, stream) if stream else derive(seed, *parts)


class KeyedGenerators:
    """Generators keyed by (seed, name, step index, part); one generator object per name, seeded again at each call.

    Args:
        seed: of the run.
        device: on which the generators draw.
        place: the current step's index and part.
        stream: of the run.
    """

    def __init__(self, seed: int, device: torch.device, place: Callable[[], tuple[int, int]], *, stream: str | None = None) -> None:
        self._seed, self._device, self._place, self._stream = seed, device, place, stream
        self._generators: dict[str, tuple[torch.Generator, int]] = {}

    def __call__(self, name: str) -> torch.Generator:
        known = self._generators.get(name)
        if known is None:
            known = self._generators[name] = (torch.Generator(self._device), derive_in(self._stream, self._seed, "keyed", name))
        generator, base = known
        index, part = self._place()
        # Odd multipliers spread consecutive indices; the sum is taken modulo 2**63.
        return generator.manual_seed((base + index * 0x9E3779B97F4A7C15 + part * 0xD1B54A32D192ED03) & 0x7FFF_FFFF_FFFF_FFFF)


@contextmanager
def preserved_global_state(device: torch.device) -> Iterator[None]:
    """Restore the caller's state of torch's global generators at the end."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda, enabled=True):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's global CPU generator to ``seed`` inside, and restore it afterwards (for initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def global_state(device: torch.device) -> dict[str, Any]:
    """Return the state of torch's global generators that a run on ``device`` may use."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_global_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`global_state` returned; a run that moves to another kind of device keeps what fits."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
