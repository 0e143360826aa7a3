"""Device, threads and numerical settings of a run, and the tags that describe them."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from bpfree import devices
from bpfree.errors import UsageError
from bpfree.rule import Rule
from bpfree.version import __version__

__all__ = [
    "autocast",
    "check_device_name",
    "describe",
    "device_of",
    "flushing_denormals",
    "free_memory",
    "load",
    "numerics",
    "resolve_device",
]

logger = logging.getLogger("bpfree")


def resolve_device(name: str, *, process: int = 0) -> torch.device:
    """Return the device that a name stands for: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    With ``auto`` it is the first of cuda, mps and cpu that is here. Several processes on a machine take its GPUs in turn, by the number of
    the ``process``, unless one is named.

    Raises:
        UsageError: no such kind of device, or none of it here.
    """
    if name == "auto":
        name = devices.best()
    check_device_name(name)
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    available = devices.count(kind)
    if int(index or 0) >= available:
        found = f"{available} {kind.upper()} device{'s' if available > 1 else ''} found" if available else f"no {kind.upper()} device found"
        raise UsageError(f"device={name}: {found}", where="device", fix="device=auto or device=cpu")
    return torch.device(kind, int(index or process % available))


def device_of(rule: Rule, name: str, *, process: int = 0, processes: int = 1, warn: bool = False) -> torch.device:
    """Return the device of this name for a rule; where ``auto`` takes an MPS device that the rule excludes, the CPU.

    Args:
        rule: that will be trained there.
        name: as :func:`resolve_device` takes it.
        process, processes: number of this process on the machine, and how many train together.
        warn: log why it is the CPU.

    Raises:
        UsageError: an MPS device is named, and the rule has numbers in float64, or several processes train it.
    """
    device = resolve_device(name, process=process)
    if devices.has_doubles(device):
        return device
    reason = "several processes cannot train together on MPS devices" if processes > 1 else ""
    reason = reason or (f"{type(rule).__name__} {devices.NO_DOUBLES}" if devices.keeps_doubles(rule) else "")
    if reason and name != "auto":
        raise UsageError(reason, where=f"device={name}", fix="device=cpu")
    if reason and warn:
        logger.warning("%s: it is trained on the CPU", reason)
    return torch.device("cpu") if reason else device


def check_device_name(name: str) -> None:
    """Refuse a name that is no kind of device, wherever that device would be.

    Raises:
        UsageError: it is none of ``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``.
    """
    kind, _, index = name.partition(":")
    if name != "auto" and (kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit())):
        raise UsageError(f"unknown device {name!r}", where="device", fix="give auto, cpu, cuda, cuda:N or mps")


def free_memory(name: str) -> dict[str, int]:
    """Return the bytes that are free on a device of this name, and on the machine, where networks are made.

    Raises:
        UsageError: no such device.
    """
    device, here = resolve_device(name), {"the machine's memory": int(psutil.virtual_memory().available)}
    return here if device.type != "cuda" else {f"the memory of {device}": torch.cuda.mem_get_info(device)[0], **here}


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Treat numbers below 1.2e-38 as zero inside, where the processor can; in this thread, and in those that it starts.

    Weight decay makes such numbers of the weights of units that never fire, and a processor takes many times as long for a product with
    one: predictions of NoProp-CT on MNIST after twelve epochs took 17 times as long, training steps 1.6 times.
    """
    before = _flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes() -> bool:
    return float(torch.tensor(2e-38) * 0.25) == 0


@contextmanager
def numerics(*, threads: int | None, deterministic: bool) -> Iterator[None]:
    """Set number of threads, deterministic algorithms and no denormals inside; restore the caller's settings afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        with flushing_denormals():
            yield
    finally:
        torch.set_num_threads(before[0])
        if torch.are_deterministic_algorithms_enabled() != before[1]:  # the call itself imports torch's compiler
            torch.use_deterministic_algorithms(before[1])
        torch.backends.cudnn.benchmark = before[2]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return autocast to bfloat16 for ``bf16``, and no autocast for ``fp32``.

    Without torch's cache of cast weights: inside one context it would hand out the weights of the first step for ever.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def describe(device: torch.device) -> dict[str, str]:
    """Return tags: versions, device, threads, numerical settings."""
    cuda = device.type == "cuda"
    return {
        "bpfree": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": str(torch.get_num_threads()),
        "cuda": str(torch.version.cuda) if cuda else "",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "",
        "tf32_matmul": str(torch.backends.cuda.matmul.allow_tf32) if cuda else "",
        "tf32_cudnn": str(torch.backends.cudnn.allow_tf32) if cuda else "",
        "cudnn_benchmark": str(torch.backends.cudnn.benchmark) if cuda else "",
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "flush_denormal": str(_flushes()),
    }


def load() -> float | None:
    """Return the machine's load of the last minute for each of its processors; ``None`` where it is not available."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
