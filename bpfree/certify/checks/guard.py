"""A check leaves the process as it found it, whatever the rule does."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bpfree.certify.measurements import Measurements

__all__ = ["guarded", "kept_process"]

Run = Callable[[Measurements], str | None]


@contextmanager
def kept_process() -> Iterator[None]:
    """Restore the global generators and torch's settings at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    grad, dtype, anomaly = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_anomaly_enabled()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def guarded(run: Run) -> Run:
    """Run the check inside :func:`kept_process`."""

    @functools.wraps(run)
    def kept(m: Measurements) -> str | None:
        with kept_process():
            return run(m)

    return kept
