"""What kinds of devices do differently: CUDA, MPS (Apple's GPUs, which have no float64), the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import seeds
from bpfree.errors import UsageError

__all__ = [
    "NO_DOUBLES",
    "best",
    "count",
    "doubled",
    "explained",
    "global_state",
    "has_doubles",
    "keeps_doubles",
    "preserved_global_state",
    "seed_global",
    "set_global_state",
    "summed",
    "synchronize",
    "with_doubles",
]

NO_DOUBLES = "computes in float64, which MPS devices do not have"
"""Why a rule is refused."""


def count(kind: str) -> int:
    """Count the devices of a kind: ``cuda``, ``mps`` or ``cpu``."""
    if kind == "cuda":
        return torch.cuda.device_count()
    return int(kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available()))


def best() -> str:
    """Return the kind that ``device=auto`` takes: the first that is here of ``cuda``, ``mps`` and ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "mps" if count("mps") else "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- float64 ------------------------------------------------------------------------------------------------------------


def has_doubles(device: torch.device) -> bool:
    """Tell whether a device computes in float64."""
    return device.type != "mps"


def with_doubles(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of one without float64."""
    return device if has_doubles(device) else torch.device("cpu")


def doubled(values: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has no such numbers."""
    return values.to(with_doubles(values.device)).double()


def summed(values: Tensor) -> Tensor:
    """Sum all values in float64, on the CPU where the device has no such numbers."""
    return values.to(with_doubles(values.device)).sum(dtype=torch.float64)


def keeps_doubles(module: nn.Module) -> bool:
    """Tell whether a module has parameters or buffers in float64."""
    return any(value.dtype == torch.float64 for value in (*module.parameters(), *module.buffers()))


@contextmanager
def explained(device: torch.device, name: str) -> Iterator[None]:
    """Say in one message that what runs inside needs float64, which the device does not have.

    Args:
        device: where it runs.
        name: of what runs.

    Raises:
        UsageError: torch has refused to make numbers in float64 there.
    """
    try:
        yield
    except (TypeError, RuntimeError) as error:
        if has_doubles(device) or "float64" not in str(error):
            raise
        raise UsageError(f"{name} {NO_DOUBLES}", where=f"device {device}", fix="device=cpu") from error


# --- generators ---------------------------------------------------------------------------------------------------------


def global_state(device: torch.device) -> dict[str, Any]:
    """Return the state of torch's global generators that a run on ``device`` may use."""
    return seeds.global_state(device) | ({"mps": torch.mps.get_rng_state()} if device.type == "mps" else {})


def set_global_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`global_state` returned; a run that moves to another kind of device keeps what fits."""
    seeds.set_global_state(state, device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserved_global_state(device: torch.device) -> Iterator[None]:
    """Restore the caller's state of torch's global generators at the end."""
    before = global_state(device)
    try:
        yield
    finally:
        set_global_state(before, device)


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of the device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
