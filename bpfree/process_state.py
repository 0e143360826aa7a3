"""Settings of the whole process that foreign code may change: torch's, the working folder, signal handlers."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bpfree import interrupts

__all__ = ["unchanged"]


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)  # naming the CPU would cost time at each call


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # the folder has been removed
        return os.curdir


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's grad mode": (
        lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        lambda before: torch.set_grad_enabled(before[0]),  # the inference mode ends with a context
    ),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda before: torch.use_deterministic_algorithms(before[0], warn_only=before[1]),
    ),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's settings of cuDNN": (
        lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, None, torch.backends.cudnn.deterministic),
        lambda before: torch.backends.cudnn.set_flags(*before),
    ),
    "torch's seed": (torch.initial_seed, lambda before: None),  # with the generator's state
    "the working folder": (_folder, os.chdir),
}


@contextmanager
def unchanged() -> Iterator[list[str]]:
    """Restore the process's settings after the body, and list those that it changed.

    Torch's global generator may draw inside: its state comes back without a word. Answers to signals come back too, in the main thread.

    Yields:
        What was changed, once the block has ended; empty until then.
    """
    before, random, answers = {name: get() for name, (get, _) in SETTINGS.items()}, torch.get_rng_state(), _answers()
    changed: list[str] = []
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(before["torch's grad mode"][0])
            try:
                yield changed
            finally:
                found = [name for name, (get, _) in SETTINGS.items() if get() != before[name]]
                found += ["the signal handlers"] if _answers() != answers else []
    finally:
        for name in found:
            if name in SETTINGS:
                SETTINGS[name][1](before[name])
        torch.set_rng_state(random)
        _answer(answers)
        changed += found


def _answers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in interrupts.NUMBERS}


def _answer(answers: dict[int, Any]) -> None:
    for number, answer in answers.items():
        if answer is not None and signal.getsignal(number) != answer:
            with contextlib.suppress(ValueError):  # in another thread than the main one, which cannot have changed it either
                signal.signal(number, answer)
